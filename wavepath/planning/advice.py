"""What to change where a step does not fit: recomputation, a divided state, micro-batches, or the largest batch. Each answer has been compiled.

A compile can take minutes, so there are few, and each is chosen by what the refusals before it said that they would have needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from wavepath.errors import ConfigError
from wavepath.planning.compile import Compiled, CompilerError

MOST = 5  # compiles
_DOTS_SAVES = 2.5  # where more than this many times the memory is needed, keeping the products is not tried
_HEAVY_STATE = 0.2  # of a device's memory, from which dividing the state is worth a compile
_MARGIN = 0.93  # of the limit, aimed at where sizes are extrapolated
_GOOD = 0.8  # of the limit; a batch that uses less is tried larger
_ROWS = 8  # examples on a device come in multiples of this where there are as many: the tiles of a TPU's memory


@dataclass(frozen=True)
class Trial:
    """One compile: `changes` by field of the config, and what came of it. `failed`: what the compiler says where it gave no answer."""

    changes: Mapping[str, str]
    fits: bool
    used: int | None
    failed: str = ""


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        changes: fields of the config and their values with which the step fits; None where nothing was found.
        alternative: changes that keep the batch where `changes` lower it; None: not found.
        trials: all compiles, in order.
    """

    changes: Mapping[str, str] | None
    alternative: Mapping[str, str] | None = None
    trials: tuple[Trial, ...] = field(default_factory=tuple)


def flags(changes: Mapping[str, str]) -> str:
    """As they are given on the command line of `wavepath train` and `wavepath plan`."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def savings(config: ConfigDict, ratio: float) -> list[dict[str, str]]:
    """The policies of recomputation that a config does not use yet, the cheaper in time first.

    Args:
        config: of any task.
        ratio: memory needed over memory there is.
    """
    if config.task in ("mae", "finetune"):
        order = ["none", "dots", "full"]
        left = order[order.index(config.model.remat) + 1 :] if config.model.remat in order else []
        return [{"model.remat": policy} for policy in left if policy != "dots" or ratio <= _DOTS_SAVES]
    if config.task in ("stain", "stain_encoders") and not config.stain.remat:
        return [{"stain.remat": "True"}]
    if config.task == "superres" and config.superres.network == "cwt-net" and not config.superres.remat:
        return [{"superres.remat": "True"}]
    return []


class _Search:
    """Compiles, and remembers what was tried."""

    def __init__(self, try_it: Callable[[Mapping[str, str]], Compiled], most: int):
        self._try, self.left, self.trials = try_it, most, []

    def __call__(self, changes: Mapping[str, str]) -> Trial | None:
        """None for settings that do not go together; nothing was compiled then."""
        try:
            result = self._try(changes)
            trial = Trial(dict(changes), result.fits is not False, result.used)
        except ConfigError:
            return None
        except CompilerError as error:
            trial = Trial(dict(changes), False, None, str(error))
        self.left -= 1
        self.trials.append(trial)
        return trial


def advise(
    config: ConfigDict, refused: Compiled, try_it: Callable[[Mapping[str, str]], Compiled], *, devices: int, state: int, most: int = MOST
) -> Advice:
    """Looks for changes with which a step fits.

    The order: recomputation; where the state is a large part, the state divided over all devices, by itself and with the recomputation; then, with
    the most saving of these, the largest batch, and micro-batches that keep the batch as it is.

    Args:
        config: whose step was refused.
        refused: that compile.
        try_it: compiles with some fields changed. A ConfigError from it means that they do not go together, a CompilerError that it is not known.
        devices: how many.
        state: bytes of the state on one device.
        most: compiles at most.
    """
    limit = refused.limit or 0
    search = _Search(try_it, most)
    base: dict[str, str] = {}
    last = Trial({}, False, refused.used)
    for changes in savings(config, refused.used / limit if refused.used and limit else 1.0):
        if search.left == 0:
            break
        trial = search(changes)
        if trial is None or trial.failed:
            continue
        base, last = changes, trial
        if last.fits:
            return Advice(changes, trials=tuple(search.trials))
    parallel, part = config.parallel, state // devices
    if parallel.backend == "jit" and parallel.fsdp == 1 and devices > 1 and limit and state > _HEAVY_STATE * limit:
        divided = {"parallel.fsdp": "0"}
        # By itself it costs no computation; not compiled where what it saves cannot be enough.
        alone = [divided] if base and (not refused.used or refused.used - state + part <= limit) else []
        for changes in [*alone, {**base, **divided}]:
            trial = search(changes) if search.left else None
            if trial is None or trial.failed:
                continue
            if trial.fits:
                return Advice(changes, trials=tuple(search.trials))
            if changes is not divided or not base:
                base, last, state = changes, trial, part
    found = _largest(search, config, base, last, devices=devices, state=state, limit=limit)
    if found is None:
        return Advice(None, trials=tuple(search.trials))
    return Advice(found, _accumulated(search, config, base, found, devices), tuple(search.trials))


def _largest(
    search: _Search, config: ConfigDict, base: Mapping[str, str], last: Trial, *, devices: int, state: int, limit: int
) -> dict[str, str] | None:
    """The largest batch that was seen to fit: memory grows by a straight line, from the state up."""
    # Whatever has to divide the batch; `mask_groups` is of masked autoencoders.
    unit = math.lcm(devices * int(config.optim.accumulate), (config.task == "mae" and int(config.model.mask_groups)) or 1)
    points = [(0, state)] + ([(int(config.batch_size), last.used)] if last.used else [])
    smallest_refused, best = int(config.batch_size), 0
    while search.left:
        batch = _next(points, limit, unit, best, smallest_refused)
        if batch is None:
            break
        trial = search({**base, "batch_size": str(batch)})
        if trial is None:
            break
        if trial.fits:
            best = batch
        else:
            smallest_refused = batch
        if trial.used:
            points = sorted({**dict(points), batch: trial.used}.items())
        if trial.fits and (not trial.used or trial.used >= _GOOD * limit):
            break
    return {**base, "batch_size": str(best)} if best else None


def _next(points: Sequence[tuple[int, int]], limit: int, unit: int, above: int, below: int) -> int | None:
    """A batch between `above`, which fits, and `below`, which does not; None where there is none."""
    guess = below // 2
    if len(points) > 1:
        # The two measured sizes nearest to the limit; the state alone counts while there is but one.
        (first, low), (second, high) = sorted(sorted(points, key=lambda point: abs(point[1] - limit))[:2])
        if high > low:
            guess = int(first + (_MARGIN * limit - low) * (second - first) / (high - low))
    step = unit * _ROWS if guess >= unit * _ROWS else unit
    batch = min(max(guess // step * step, unit), (below - 1) // unit * unit)
    return batch if batch > above else None


def _accumulated(search: _Search, config: ConfigDict, base: Mapping[str, str], found: Mapping[str, str], devices: int) -> dict[str, str] | None:
    """The batch as it was, in as few micro-batches as fit; None where that was not tried, is not allowed or does not fit."""
    batch, fitting = int(config.batch_size), int(found["batch_size"])
    before = int(config.optim.accumulate)
    least = math.ceil(batch / fitting) * before
    parts = next((count for count in range(least, batch // devices + 1) if batch % (devices * count) == 0), None)
    if not search.left or parts is None:
        return None
    changes: dict[str, Any] = {**base, "optim.accumulate": str(parts)}
    trial = search(changes)
    return changes if trial and trial.fits else None  # a loss that looks at the whole batch is refused
