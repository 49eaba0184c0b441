"""Two JSON files of one kind of `wavepath bench`: old value, new value and ratio of every number that both hold.

Reports differ in form from kind to kind, so they are read by a rule: every number has a path of names. In a list of objects the texts of an object,
and its sizes (crop, batch, shape ...), are its name; a list of numbers counts as its median. What names the machine, versions or settings is no
measurement, and neither are the texts and sizes of the whole report: those are compared for equality. Where they differ, a ratio may say more about
the machine or the case than about the code.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wavepath.console import table
from wavepath.errors import ConfigError
from wavepath.files import read_json

CONTEXT = ("command", "machine", "versions", "threads", "allocator", "chip", "runs")
# Whole numbers that say which case was measured, and are no result.
SIZES = frozenset({
    "batch", "batch_size", "crop", "levels", "shape", "width", "height", "side", "patch", "threads", "devices", "examples", "steps", "level", "scale",
    "image_shape", "memory_shape", "runs", "rounds", "tiles", "slides", "prefetch", "data_threads",
})  # fmt: skip
_UNSAID = ("load_at_start",)  # of the machine: of the moment, not of the machine
_LONGEST = 80  # characters of a text that names something
_CLOSE = 0.02  # ratios within this of 1 count as equal


def read(path: Path, kind: str) -> dict[str, Any]:
    """A report that `wavepath bench KIND --json` wrote.

    Raises:
        ConfigError: no such file, not a report, or one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--compare: no file {path}; write one with --json first")
    try:
        report = read_json(path)
    except ValueError:
        report = None
    if not isinstance(report, dict) or "machine" not in report:
        raise ConfigError(f"--compare: {path} is not a report of `wavepath bench`")
    if report.get("kind") != kind:
        other = f"of `wavepath bench {report['kind']}`" if report.get("kind") else "that does not say of what, as older versions wrote them"
        raise ConfigError(f"--compare: {path} is a report {other}; give one that `wavepath bench {kind} --json` wrote")
    return report


def _name(item: Mapping[str, Any]) -> str:
    named = next((key for key in ("name", "id") if isinstance(item.get(key), str)), None)
    parts = [] if named is None else [item[named]]
    for key, value in item.items():
        if (named is None and isinstance(value, str) and len(value) <= _LONGEST):
            parts.append(str(value))
        elif _is_size(key, value):
            parts.append(f"{key} {'x'.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(parts)


def _is_size(key: str, value: Any) -> bool:
    """Whether it says which case was measured. (`steps` may be how many, or what was found of each.)"""
    return key in SIZES and (_is_number(value) or (isinstance(value, list) and all(_is_number(one) for one in value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers(report: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(what was measured, name of the number) to value, in order."""
    return dict(_numbers({key: value for key, value in report.items() if key not in CONTEXT}, ""))


def _numbers(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[tuple[str, str], float]]:
    for key, inner in value.items():
        if _is_size(key, inner) or (key.endswith("milliseconds") and key.replace("milliseconds", "median_ms") in value):
            continue  # the rounds behind a median that is there too
        if _is_number(inner):
            yield (prefix, key), float(inner)
        elif isinstance(inner, Mapping):
            yield from _numbers(inner, f"{prefix} {key}".strip())
        elif isinstance(inner, list) and inner and all(_is_number(one) for one in inner):
            yield (prefix, key), float(statistics.median(inner))
        elif isinstance(inner, list):
            seen: dict[str, int] = {}
            for item in inner:
                if not isinstance(item, Mapping):
                    continue
                name = _name(item)
                seen[name] = seen.get(name, 0) + 1
                # Namesakes are told apart by their turn.
                place = f"{prefix} {name}{f' ({seen[name]})' if seen[name] > 1 else ''}".strip()
                yield from _numbers(item, place)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How the two were measured differently, in words."""
    found = []
    told = {key: (old.get(key), new.get(key)) for key in CONTEXT}
    for key in dict.fromkeys([*old, *new]):
        if key not in told and key != "kind":
            told[key] = _case(key, old.get(key)), _case(key, new.get(key))
    for key, (before, now) in told.items():
        if isinstance(before, Mapping) or isinstance(now, Mapping):
            before, now = (one if isinstance(one, Mapping) else {} for one in (before, now))
            for name in dict.fromkeys([*before, *now]):
                if name not in _UNSAID and before.get(name) != now.get(name):
                    found.append(f"{name if key != 'machine' else f'machine {name}'}: {before.get(name, 'not there')} then,"
                                 f" {now.get(name, 'not there')} now")
        elif before != now:
            found.append(f"{key}: {'not said' if before is None else before} then, {'not said' if now is None else now} now")
    return found


def _case(key: str, value: Any) -> Any:
    """What a part of a report says of the case that was measured, or None: a text, a size, or those of a group."""
    if isinstance(value, Mapping):
        return {name: said for name, inner in value.items() if (said := _case(name, inner)) is not None and not isinstance(said, Mapping)}
    return value if isinstance(value, str | bool) or _is_size(key, value) else None


def text(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> str:
    """The comparison as a user reads it.

    Args:
        old: an earlier report. new: that of now. name: of the old file.
    """
    then, now = numbers(old), numbers(new)
    wanted = new.get("compare")  # a kind may say which of its numbers are worth a line
    both = [key for key in now if key in then and (wanted is None or key[1] in wanted)]
    changed = [key for key in both if then[key] != now[key]]
    rows = []
    for place, key in changed:
        before, after = then[place, key], now[place, key]
        verdict = "was 0" if not before else "same" if abs(after / before - 1) <= _CLOSE else f"{after / before:.3g}"
        rows.append([place or "whole", key.replace("_", " "), f"{before:.4g}", f"{after:.4g}", verdict])
    parts = [f"against {name}: ratio is new / old, `same` within {100 * _CLOSE:.0f} %"]
    parts += [f"warning: {line}" for line in differences(old, new)]
    if rows:
        parts.append(table(["measured", "number", "old", "new", "ratio"], rows))
    if len(changed) < len(both):
        parts.append(f"{len(both) - len(changed)} numbers are exactly as they were")
    for title, here, there in (("only now", now, then), ("only then", then, now)):
        places = list(dict.fromkeys(place or key for place, key in here if (place, key) not in there))
        if places:
            parts.append(f"{title}: {', '.join(places[:8])}{f' and {len(places) - 8} more' if len(places) > 8 else ''}")
    return "\n".join(parts if both else [*parts, "the two have no number in common"])
