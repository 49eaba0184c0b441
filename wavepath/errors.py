"""Errors that a user can act on, and the exit codes of the command line.

Every message is one line that says what is wrong and how to put it right; the command line prints it without a traceback.
An error that is not a `WavepathError` is a defect of ours and keeps its traceback.
"""

EXIT_OK = 0  # all whole
EXIT_NOTHING = 1  # nothing done
EXIT_PARTIAL = 3  # done, with slides or tiles reported as failed
EXIT_PREEMPTED = 85  # stopped by a signal after saving; launchers restart on this code


class WavepathError(Exception):
    """Something outside the program is not as it must be; the message names the fix."""

    exit_code = EXIT_NOTHING


class ConfigError(WavepathError):
    """A config file, argument or flag that does not exist or has the wrong type."""


class SlideError(WavepathError):
    """A slide that cannot be read: corrupt, truncated, empty, of unknown format, or too large to read untiled."""


class MissingMppError(SlideError):
    """A slide without a trustworthy physical pixel size (micrometres per pixel)."""


class DatasetError(WavepathError):
    """A prepared dataset, feature file or label table that is missing, damaged or inconsistent."""


class CheckpointError(WavepathError):
    """No whole checkpoint in a run folder, or one that does not fit the model."""


class LockedError(WavepathError):
    """Another process works in the same folder."""


class TrainingDiverged(WavepathError):
    """A loss that is not finite; the message names the step, the last good checkpoint is kept."""
