"""The run folder of `wavepath train`: what lies in it, and whether a command that is run again means the same run.

    config.json              the resolved config (durations in steps, data folder filled in)
    given.json, source.json  the config as it was asked for, and what the data was: what a resume is compared with
    status.json              status, step, steps, seconds, images_per_second
    metrics.jsonl            one JSON object on a line
    constants.json           what one pass over the source measured, where the task measures anything
    import.json              of `wavepath import`: the files, their SHA-256, what was left out of them and what was assumed
    checkpoints/<step>/      whole checkpoints; checkpoints.json their file sizes; checkpoints_damaged/ those that were passed over
    checkpoints_best/<step>/ with early stopping (config.train.patience) the best State, which best.json names
    panels/step_000100.png   reconstructions
    tensorboard/, profile/   where they are switched on
    train.lock               while a process trains
"""

import json
import zlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import say
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.files import read_json, write_json
from wavepath.training.distributed import is_first

# What may differ when a run is resumed: how long, how often things are written, and on what machine. Everything else changes what is learnt.
HARMLESS = (
    "train.", "parallel.", "writers.", "profile", "data.threads", "data.prefetch", "data.cache_mb", "data.on_corrupt", "model.attention",
    "model.remat", "stain.attention", "stain.attention_chunk", "stain.remat", "superres.attention_chunk", "superres.remat",
)
# Data may have moved. That it is the same data is checked by its identity, not by where it lies.
PATHS = ("data.dir", "data.slides", "data.mpp_csv", "data.exclude_slides", "data.labels", "data.bags", "data.splits")


class RunFolder:
    """Reads and writes the small files of one run."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def status(self) -> dict[str, Any]:
        """The last status written; empty for a new run."""
        path = self.folder / "status.json"
        return read_json(path) if path.is_file() else {}

    def write_status(self, status: str, step: int, steps: int, seconds: float, images_per_second: float, **more: Any) -> None:
        """`status` is running, done, preempted or diverged."""
        values = dict(status=status, step=step, steps=steps, seconds=round(seconds, 3), images_per_second=round(images_per_second, 3), **more)
        self._write("status.json", values)

    def check_given(self, config: ConfigDict) -> list[str]:
        """Refuses to go on with a run under a config that would have made another one.

        Returns:
            The fields that differ and may, as `"train.steps 100 -> 200"`.

        Raises:
            ConfigError: naming every field that differs and may not, with both values.
        """
        path = self.folder / "given.json"
        if not path.is_file():
            return []
        # A field that came with a later version was at its default when the run began.
        before = configs.complete(configs.load_json(path), train_defaults())
        changed = configs.diff(before, config)
        # A field that only one of the two has went with a version of wavepath, or belongs to another kind of config.
        known = configs.flatten(before).keys() & configs.flatten(config).keys()
        wrong = {name: values for name, values in changed.items() if name in known and not name.startswith(HARMLESS) and name not in PATHS}
        if wrong:
            listed = "; ".join(f"config.{name} was {old!r}, now {new!r}" for name, (old, new) in wrong.items())
            raise ConfigError(f"{self.folder} holds a run with another config: {listed}; give the old values to resume, or a new --workdir")
        return [f"{name} {old} -> {new}" for name, (old, new) in changed.items()]

    def keep_phase(self, config: ConfigDict, step: int) -> None:
        """Leaves the beginning of a second phase where it was, if the run is past it: a longer run moves a percentage, and would go back."""
        path = self.folder / "config.json"
        second = config.get("loss", {}).get("second", {})
        if not str(second.get("start", "")).strip() or not path.is_file():
            return
        start = configs.load_json(path).loss.second.start
        if start != second.start and start <= step:
            say(f"the second phase began at step {start} and stays there (config.loss.second.start of the longer run would be {second.start})")
            second.start = start

    def kept_order(self) -> str:
        """The order of the data that the run began with: what is best may depend on the machine (memory), the order may not."""
        return configs.load_json(self.folder / "config.json").data.order

    def check_source(self, identity: dict[str, Any]) -> None:
        """Refuses to go on with other data: the order of the examples is a function of their number, and no path says what lies behind it.

        Raises:
            ConfigError: naming what differs.
        """
        path = self.folder / "source.json"
        if not path.is_file():
            return
        before = read_json(path)
        sizes = ("examples", "image_shape")
        changed = [f"{name} were {before.get(name)}, now {identity[name]}" for name in sizes if before.get(name) != identity[name]]
        pairs = zip(before.get("places", ()), identity["places"], strict=False)
        moved = sum(old != new for old, new in pairs if old is not None and new is not None)
        if not changed and moved:
            changed = [f"{moved} of {len(identity['places'])} examples looked at come from other places"]
        if changed:
            raise ConfigError(
                f"{self.folder} was trained on other data ({'; '.join(changed)}); restore that data to resume, or give a new --workdir"
            )

    def write_configs(self, given: ConfigDict, resolved: ConfigDict, identity: dict[str, Any]) -> None:
        """Records both configs and the data's identity. A resume that changes harmless fields (more steps) records the new ones."""
        if is_first():
            configs.save_json(resolved, self.folder / "config.json")
            configs.save_json(given, self.folder / "given.json")
        self._write("source.json", identity)

    def constants(self) -> dict[str, Any] | None:
        """What an earlier start measured."""
        path = self.folder / "constants.json"
        return read_json(path) if path.is_file() else None

    def write_constants(self, constants: dict[str, Any]) -> None:
        """Keeps what one pass over the source measured, so that a resume need not measure again."""
        self._write("constants.json", constants)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        if is_first():  # of several processes, which have the same to write
            write_json(self.folder / name, value)


def identity_of(source: Any) -> dict[str, Any]:
    """What makes a source the same source: its size, and the whereabouts of examples spread over it, wherever its files lie.

    An example that cannot be read counts for neither yes nor no (`data.on_corrupt` decides about it later).
    """
    count = len(source)
    places = []
    for index in sorted({number * (count - 1) // 63 for number in range(64)}):
        try:
            facts = source.meta(index)
        except DatasetError:
            places.append(None)
            continue
        known = [str(facts[name]) for name in ("slide", "name", "x", "y", "mpp") if name in facts]
        places.append(zlib.crc32(json.dumps(known).encode("utf-8")))
    return {"examples": count, "image_shape": list(source.image_shape), "places": places}
