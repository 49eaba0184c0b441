"""Durations of a run in steps, epochs, examples or percent, resolved to steps.

`config.train` gives the run's length as exactly one of `steps`, `epochs` or `examples`. `config.optim.warmup`, `config.optim.halve_every`,
`config.optim.hold`, `config.train.patience_after` and `config.loss.second.start` are texts: `"500"` steps, `"5%"` of the run, `"40ep"` epochs or
`"100000ex"` examples. The resolved config carries whole steps only, so that whoever reads it later (a schedule, a tool, a person) needs no dataset to
understand it.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from wavepath.errors import ConfigError

_SUFFIXES = (("steps", "steps"), ("ep", "epochs"), ("ex", "examples"), ("%", "percent"))


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}={text!r} is no duration; give steps (500), percent of the run (5%), epochs (40ep) or examples (100000ex)")
    return value


def to_steps(value: float, unit: str, *, batch_size: int, n_examples: int, total: int | None = None, name: str = "duration") -> int:
    """Converts a duration to whole steps; a part of a step counts as one.

    Args:
        value: how many of `unit`.
        unit: steps, epochs, examples or percent.
        batch_size: examples in a step.
        n_examples: examples in an epoch.
        total: steps of the whole run, for percent.
        name: the config field, for messages.

    Raises:
        ConfigError: percent of a run whose length is not known, or epochs of an empty source.
    """
    if unit == "percent":
        if total is None:
            raise ConfigError(f"{name} cannot be a percentage: it is what percentages are taken of")
        exact = value / 100 * total
    elif unit == "epochs":
        if n_examples < 1:
            raise ConfigError(f"{name} is given in epochs, but the data source is empty; prepare tiles first or give config.train.steps")
        exact = value * n_examples / batch_size
    elif unit == "examples":
        exact = value / batch_size
    else:
        exact = value
    # 0.1 * 30 is 3.0000000000000004, which is no fourth step.
    return math.ceil(exact - 1e-9 * max(1.0, exact))


def parse(text: str | int | float, *, batch_size: int, n_examples: int, total: int, name: str) -> int:
    """Reads one duration text such as `"5%"`, `"40ep"`, `"100000ex"`, `"500"` as steps.

    Raises:
        ConfigError: the text is no duration, or more than 100 %.
    """
    text = str(text).strip().replace(" ", "")
    for suffix, unit in _SUFFIXES:
        if text.endswith(suffix):
            value = _number(text.removesuffix(suffix), name)
            if unit == "percent" and value > 100:
                raise ConfigError(f"{name}={text} is more than the whole run; give at most 100%")
            return to_steps(value, unit, batch_size=batch_size, n_examples=n_examples, total=total, name=name)
    return to_steps(_number(text, name), "steps", batch_size=batch_size, n_examples=n_examples, total=total, name=name)


def resolve(config: ConfigDict, n_examples: int) -> ConfigDict:
    """A locked copy of `config` whose durations are whole steps.

    `train.steps`, `optim.warmup`, `optim.halve_every`, `optim.hold`, `train.patience_after` and `loss.second.start` (where given) become integers;
    `train.epochs`, `train.examples` and `train.eval_epochs` (now `train.eval_every`) become zero, so that resolving twice changes nothing. The
    arguments are left as they are.

    Args:
        config: a training config.
        n_examples: examples in one epoch of the source.

    Raises:
        ConfigError: not exactly one of steps, epochs and examples given, an impossible interval, or a warm-up longer than the run.
    """
    config = config.copy_and_resolve_references()
    train = config.train
    batch_size = int(config.batch_size)
    if batch_size < 1:
        raise ConfigError(f"config.batch_size={batch_size} must be at least 1")
    given = {unit: train[unit] for unit in ("steps", "epochs", "examples") if train[unit]}
    if len(given) != 1:
        listed = ", ".join(f"config.train.{unit}={value}" for unit, value in given.items()) or "none is"
        raise ConfigError(f"give the run's length as exactly one of config.train.steps, epochs and examples ({listed} given); set the others to 0")
    (unit, value), = given.items()
    name = f"config.train.{unit}"
    total = to_steps(_number(str(value), name), unit, batch_size=batch_size, n_examples=n_examples, name=name)
    if train.eval_epochs:
        name = "config.train.eval_epochs"
        every = to_steps(_number(str(train.eval_epochs), name), "epochs", batch_size=batch_size, n_examples=n_examples, name=name)
        _set(config, "train.eval_every", max(every, 1))
        _set(config, "train.eval_epochs", 0.0)
    for interval, least in (("log_every", 1), ("save_every", 0), ("panels_every", 0), ("eval_every", 0), ("keep", 1), ("patience", 0)):
        if train[interval] < least:
            raise ConfigError(f"config.train.{interval}={train[interval]} must be at least {least}")
    warmup = parse(config.optim.warmup, batch_size=batch_size, n_examples=n_examples, total=total, name="config.optim.warmup")
    if warmup > total:
        raise ConfigError(
            f"config.optim.warmup={config.optim.warmup} is {warmup} steps, more than the run's {total}; shorten it, for example to 5%"
        )
    _set(config, "optim.warmup", warmup)
    name = "config.optim.halve_every"
    every = parse(config.optim.halve_every, batch_size=batch_size, n_examples=n_examples, total=total, name=name)
    if every < 1:
        raise ConfigError(f"{name}={config.optim.halve_every} must be at least one step; config.optim.schedule=constant halves nothing")
    _set(config, "optim.halve_every", every)
    # One that lies behind the end is no mistake: a run cut short by --config.train.steps keeps the rate of the part that it has.
    hold = parse(config.optim.hold, batch_size=batch_size, n_examples=n_examples, total=total, name="config.optim.hold")
    _set(config, "optim.hold", hold)
    name = "config.train.patience_after"
    _set(config, "train.patience_after", parse(train.patience_after, batch_size=batch_size, n_examples=n_examples, total=total, name=name))
    if str(config.loss.second.start).strip():
        name = "config.loss.second.start"
        start = parse(config.loss.second.start, batch_size=batch_size, n_examples=n_examples, total=total, name=name)
        if start > total:
            raise ConfigError(f"{name}={config.loss.second.start} is step {start}, after the run's {total}; begin earlier, for example at 50%")
        _set(config, "loss.second.start", start)
    _set(config, "train.steps", total)
    _set(config, "train.epochs", 0.0)
    _set(config, "train.examples", 0)
    return config.lock()


def _set(config: ConfigDict, name: str, value: Any) -> None:
    *groups, field = name.split(".")
    node = config
    for group in groups:
        node = node[group]
    # A warm-up comes as a text and leaves as a number.
    with node.ignore_type():
        node[field] = value


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after `step` steps; never where `every` is 0."""
    return every > 0 and step > 0 and step % every == 0


def window(text: str, name: str = "config.profile") -> tuple[int, int] | None:
    """`"10:20"` -> (10, 20), a half-open range of steps; `""` -> None.

    Raises:
        ConfigError: anything else.
    """
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"{name}={text!r} is no window of steps; write it as in 10:20 (steps 10 to 19)")
    return int(first), int(last)
