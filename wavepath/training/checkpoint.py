"""Checkpoints of a run: written in the background, verified when read, never half. The only file that knows Orbax.

A checkpoint is `checkpoints/<step>/` with the state and a small JSON beside it. Orbax writes to a temporary name and renames; what it does
not do is notice a flipped byte inside an array, and a file cut short makes it print pages before it raises. So each save records a checksum
of every array, and each committed folder its file sizes (`checkpoints.json`); a checkpoint is whole when both agree.
"""

import contextlib
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import say, warn
from wavepath.defaults import train_defaults
from wavepath.errors import CheckpointError
from wavepath.files import read_json, write_json
from wavepath.tasks.base import State, Task, build
from wavepath.training import distributed
from wavepath.training import parallel as parallels
from wavepath.training.run_folder import RunFolder

FOLDER = "checkpoints"
DAMAGED = "checkpoints_damaged"
BEST = "checkpoints_best"  # with early stopping
BEST_FILE = "best.json"  # which of them it is


def checksums(state: State | dict[str, Any]) -> dict[str, int]:
    """CRC-32 of every array of a state or a tree, by its path; equal on any number of devices."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    # zlib leaves the interpreter lock, so large states are read by several threads.
    with ThreadPoolExecutor(4) as pool:
        arrays = (distributed.whole(leaf) for _, leaf in leaves)  # in this thread: other processes may have to take part, in the same order
        values = pool.map(lambda array: zlib.crc32(np.ascontiguousarray(array).view(np.uint8)), arrays)
        return {jax.tree_util.keystr(path): value for (path, _), value in zip(leaves, values, strict=True)}


def saved_steps(run: Path) -> list[int]:
    """Steps with a committed checkpoint folder in a run, oldest first; needs no Orbax."""
    folder = Path(run) / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def best_step(run: Path) -> int | None:
    """The step of the State that early stopping kept, None where there is none; needs no Orbax."""
    path = Path(run) / BEST_FILE
    step = int(read_json(path)["step"]) if path.is_file() else 0
    return step if step and (Path(run) / BEST / str(step)).is_dir() else None


def _recorded_sizes(run: Path, folder: str) -> dict[str, dict[str, int]]:
    path = run / f"{folder}.json"
    return read_json(path) if path.is_file() else {}


def check_sizes(run: Path, step: int, folder: str = FOLDER) -> None:
    """Holds the files of a checkpoint against the sizes that they had when it was committed; needs no Orbax.

    Raises:
        CheckpointError: a file is missing or was cut short.
    """
    recorded = _recorded_sizes(run, folder).get(str(step))
    if recorded is None:  # killed between commit and record: the checksums decide
        return
    for name, size in recorded.items():
        path = run / folder / str(step) / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {size}")


class Checkpointer:
    """The checkpoints of one run folder.

    Args:
        run: the run folder.
        keep: how many of the newest stay.
        read_only: for tools that read a run that may still be training; nothing is cleaned up, moved or deleted.
        folder: the checkpoints' place in it, `FOLDER` or `BEST`.
    """

    def __init__(self, run: Path, keep: int = 3, read_only: bool = False, folder: str = FOLDER):
        self.run, self.keep, self.read_only, self.name = Path(run).resolve(), keep, read_only, folder
        self.folder = self.run / folder
        self._sizes: dict[str, dict[str, int]] | None = None  # what `checkpoints.json` holds, once read
        self._manager = self._open()

    def _open(self) -> Any:
        # Imported here: Orbax costs seconds, which a tool that only lists steps does not pay.
        import orbax.checkpoint as ocp

        if self.read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, cleanup_tmp_directories=True)
        with _quiet():
            return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Starts saving `state` as `step` and returns when the arrays may be changed; a step that is there already is left.

        Raises:
            CheckpointError: an earlier save failed in the background, or this one could not start.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step in self._manager.all_steps():
            return
        meta = {**meta, "step": step, "checksums": checksums(state)}
        with _orbax_errors(f"saving step {step} to {self.folder}"):
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            if not self._manager.save(step, args=args, force=True):
                raise CheckpointError(f"step {step} was not saved in {self.folder}; delete checkpoints of later steps there")

    def poll(self) -> None:
        """Cheap, for every step: raises what went wrong in the background, and records the sizes of what was committed."""
        with _orbax_errors(f"saving to {self.folder}"):
            self._manager.check_for_errors()
        if not self._manager.is_saving_in_progress():
            self._record()

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        with _orbax_errors(f"saving to {self.folder}"):
            self._manager.wait_until_finished()
        self._record()

    def close(self) -> None:
        """Waits and releases the folder."""
        self.wait()
        self._manager.close()

    def restore(self, abstract: State, step: int | None = None) -> tuple[int, State, dict[str, Any]] | None:
        """The newest whole checkpoint (or that of `step`), placed as `abstract` says; None where no checkpoint was ever saved.

        A damaged one is said and passed over; once an older one has been restored, a writer moves it aside to `checkpoints_damaged/`, so
        that its step can be saved again and nothing is deleted that a repaired disk might bring back.

        Raises:
            CheckpointError: there are checkpoints and none fits; the message has the reason of each.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} has no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        failed: dict[int, str] = {}
        for candidate in steps if step is None else [step]:
            try:
                state, meta = self._read(candidate, abstract)
            except CheckpointError as error:
                failed[candidate] = str(error)
                continue
            for bad, reason in failed.items():
                warn(f"checkpoint {bad} of {self.run} is damaged ({reason}); going back to step {candidate}")
            if failed and not self.read_only:
                self._set_aside(failed)
            return candidate, state, meta
        if failed:
            reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in failed.items())
            raise CheckpointError(f"no checkpoint in {self.folder} can be restored ({reasons}); delete {self.run} to start over")
        return None

    def _read(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        import orbax.checkpoint as ocp

        check_sizes(self.run, step, self.name)
        with _orbax_errors(""), _quiet():
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
            )
        state, meta = restored["state"], restored["meta"]
        wrong = sorted(name for name, value in checksums(state).items() if meta["checksums"].get(name) != value)
        if wrong:
            raise CheckpointError(f"checksum of {wrong[0].lstrip('.')}" + (f" and {len(wrong) - 1} more arrays differs" if wrong[1:] else " differs"))
        return state, meta

    def keep_only(self, steps: Sequence[int]) -> None:
        """Deletes the checkpoints of all other steps."""
        for step in set(self._manager.all_steps()) - set(steps):
            with _orbax_errors(f"deleting step {step} of {self.folder}"):
                self._manager.delete(step)
        self._record()

    def _record(self) -> None:
        if self.read_only or not distributed.is_first():
            return
        steps = {str(step) for step in self._manager.all_steps()}
        recorded = _recorded_sizes(self.run, self.name) if self._sizes is None else self._sizes
        if steps == set(recorded):
            self._sizes = recorded
            return
        self._sizes = {step: recorded.get(step) or _sizes(self.folder / step) for step in sorted(steps, key=int)}
        write_json(self.run / f"{self.name}.json", self._sizes)

    def _set_aside(self, failed: dict[int, str]) -> None:
        self._manager.close()
        with distributed.first_alone("damaged checkpoints") as first:
            for step in failed if first else ():
                target = self.run / DAMAGED / str(step)
                target.parent.mkdir(exist_ok=True)
                number = 1
                while target.exists():
                    number += 1
                    target = target.with_name(f"{step}_{number}")
                (self.folder / str(step)).rename(target)
        self._manager, self._sizes = self._open(), None
        self._record()


def restore_run(
    run: Path,
    step: int | None = None,
    *,
    parallel: parallels.Parallel | None = None,
    task_factory: Callable[[ConfigDict], Task] = build,
) -> tuple[ConfigDict, Task, State]:
    """A trained model for tools: the resolved config of a run, its task, and the state of its newest whole checkpoint.

    Of a run with early stopping it is the best one so far, which is said.

    Args:
        run: a run folder of `wavepath train`, finished or still training.
        step: a particular checkpoint.
        parallel: where the state is placed and the task will run; the first local device by default.
        task_factory: how the config becomes a task.

    Raises:
        CheckpointError: not a run folder, no checkpoint yet, or none that is whole.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{run} is no run folder (no config.json in it); give the --workdir of a `wavepath train`")
    config = configs.complete(configs.load_json(run / "config.json"), train_defaults())
    if not saved_steps(run):
        raise CheckpointError(f"{run} has no checkpoint yet; train longer than config.train.save_every={config.train.save_every} steps")
    task = task_factory(config)
    task.constants = RunFolder(run).constants() or {}
    parallel = parallel or parallels.Parallel("jit", jax.local_devices()[:1])
    best = best_step(run) if config.train.patience else None
    folder = BEST if best and step in (None, best) else FOLDER
    if folder == BEST:
        say(f"{run}: the best step, {best}, of {max(saved_steps(run))} (early stopping)")
        step = best
    checkpointer = Checkpointer(run, read_only=True, folder=folder)
    try:
        found = checkpointer.restore(parallel.abstract_state(task), step)
    finally:
        checkpointer.close()
    if found is None:
        raise CheckpointError(f"{run} has no whole checkpoint; run `wavepath train` with --workdir={run} again")
    return config, task, found[1]


def _sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def _orbax_errors(doing: str) -> Iterator[None]:
    """Orbax, TensorStore and the disk raise many types: one line of ours for each, the cause kept behind it."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{doing}: {error.strerror or error}".removeprefix(": ")) from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(f"{doing}: {type(error).__name__}: {first}".removeprefix(": ")) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports what it was told to do, and asyncio the futures of a read that failed: both would bury our one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
