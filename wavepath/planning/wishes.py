"""What `wavepath plan` was asked for, one by one: every combination of the configs and of the sweeps' values."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from wavepath.config import propose, split_list, split_spec
from wavepath.errors import ConfigError

_OWN = ("topology", "batch", "backend")


@dataclass(frozen=True)
class Wish:
    """One plan to make: the config's spec and overrides, and what replaces its fields; `name` is for tables."""

    spec: str
    overrides: tuple[str, ...]
    topology: str
    backend: str
    batch: int
    name: str


def axis(text: str) -> tuple[str, tuple[str, ...]]:
    """`"batch=256,512"` -> `("batch", ("256", "512"))`; values with commas stand in brackets.

    Raises:
        ConfigError: no name or value, or a name that cannot be swept.
    """
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("--")
    parts = split_list(values) if equals else []
    if not name or not all(parts) or not parts:
        raise ConfigError(f"--sweep takes a name and values, as in --sweep topology=v5e:4x4,v5e:8x8, not {text!r}")
    if name not in _OWN and not name.startswith(("config.", "arg.")):
        hint = propose(name, [*_OWN, "config.FIELD", "arg.NAME"], "choose from")
        raise ConfigError(f"--sweep {name} is unknown; {hint}")
    return name, tuple(parts)


def wishes(
    specs: Sequence[str], overrides: Sequence[str], topology: str, backend: str, batch: int, sweeps: Sequence[str]
) -> list[Wish]:
    """All combinations, the last sweep fastest.

    Raises:
        ConfigError: no topology, one name swept twice, or a batch that is no number.
    """
    axes = [axis(text) for text in sweeps]
    names = [name for name, _ in axes]
    if len(set(names)) < len(names):
        raise ConfigError(f"--sweep has a name twice: {', '.join(names)}")
    if not topology and "topology" not in names:
        raise ConfigError("plan needs a topology, as in --topology v5e:4x4, --topology cpu:8 or --sweep topology=v5e:4x4,v5e:8x8")
    found = []
    for spec, values in itertools.product(specs, itertools.product(*(values for _, values in axes))):
        chosen = dict(zip(names, values, strict=True))
        path, arg = split_spec(spec)
        arg = ",".join([*([arg] if arg else []), *(f"{name.removeprefix('arg.')}={value}" for name, value in chosen.items() if name[:4] == "arg.")])
        fields = [f"{name.removeprefix('config.')}={value}" for name, value in chosen.items() if name[:7] == "config."]
        size = chosen.get("batch", str(batch))
        if not size.isdigit():
            raise ConfigError(f"--sweep batch={size}: a batch is a whole number of examples")
        name = path.rpartition("/")[2].removesuffix(".py") + (f":{arg}" if arg else "")
        found.append(Wish(
            f"{path}:{arg}" if arg else path, (*overrides, *fields), chosen.get("topology", topology), chosen.get("backend", backend), int(size),
            " ".join([name, *fields]),
        ))  # fmt: skip
    return found
