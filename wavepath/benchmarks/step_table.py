"""What `wavepath bench step` says of what it measured: the numbers of each contender, their table, and the lines around it.

Rates are images a second, so contenders of different batches compare; every ratio is taken round by round, since the load of a shared machine meets
both halves of each. Heading and command are those of `bench compile` and `bench train` too.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wavepath.benchmarks.timing import spread


@dataclass(frozen=True)
class Measured:
    """One contender: what is known of its step (`Step.facts`), seconds of each round, CPU seconds of a step (median), what its last step said."""

    facts: Mapping[str, Any]
    seconds: Sequence[float]
    cpu: float
    last: Mapping[str, Any]


def rows_of(found: Mapping[str, Measured], base: str, best: Sequence[float], peak: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of the table, as JSON values.

    Args:
        found: the contenders by name. base: the one that the others are held against, in images a second and CPU seconds an image.
        best: FLOP/s that a matrix product reached in each round: on one accelerator, or on all cores together. Empty: no shares of it.
        peak: FLOP/s of one device by dtype, where it is known.
    """
    against = found[base]
    rows = []
    for name, one in found.items():
        facts, median = one.facts, statistics.median(one.seconds)
        batch, devices = facts["batch"], facts["devices"]
        work = facts["flops"] * batch
        row = {
            "name": name, **facts, "milliseconds": [1e3 * value for value in one.seconds], "median_ms": 1e3 * median, "cpu_ms": 1e3 * one.cpu,
            "images_per_second": batch / median, "images_per_second_per_device": batch / median / devices, "flops_per_second": work / median,
        }
        if facts["dtype"] in peak:
            row["mfu"] = row["flops_per_second"] / (peak[facts["dtype"]] * devices)
        if best:
            # Devices of a CPU are parts of one: the product has all their cores.
            places = 1 if facts["device_kind"] == "cpu" else devices
            row["share_of_product"] = statistics.median(work / places / value / rate for value, rate in zip(one.seconds, best, strict=True))
        if name != base:
            rates, others = ([each.facts["batch"] / value for value in each.seconds] for each in (one, against))
            row["rate_over_base"] = list(spread(rates, others))
            row["cpu_over_base"] = (one.cpu / batch) / (against.cpu / against.facts["batch"])
        rows.append(row | dict(one.last))
    return rows


def table_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows)."""
    rows = report["rows"]
    several = len(rows) > 1
    share = "MFU" if any("mfu" in row for row in rows) else "of the product" if "product" in report else None
    header = ["step", "median ms", "least to most", "CPU ms", "images/s", "per device", "GFLOP/s", *([share] if share else [])]
    header += [f"rate over {report['base']}"] * several + ["planned MB", "of it scratch"]
    measured = any("device_peak" in row for row in rows)
    header += ["device peak MB, first step alone"] * measured
    body = []
    for row in rows:
        times = row["milliseconds"]
        cells = [row["name"], _plain(row["median_ms"]), f"{_plain(min(times))} to {_plain(max(times))}", _plain(row["cpu_ms"])]
        cells += [f"{row['images_per_second']:.4g}", f"{row['images_per_second_per_device']:.4g}", f"{row['flops_per_second'] / 1e9:.4g}"]
        if share:
            value = row.get("mfu", row.get("share_of_product"))
            cells.append("" if value is None else f"{100 * value:.1f} %")
        if several:
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*row["rate_over_base"]) if "rate_over_base" in row else "1")
        cells += [f"{row[name] / 1e6:.0f}" if name in row else "" for name in ("planned", "scratch")]
        if measured:
            cells.append(f"{'at most ' * row['device_peak_is_bound']}{row['device_peak'] / 1e6:.0f}" if "device_peak" in row else "")
        body.append(cells)
    return header, body


def _plain(value: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def lines(report: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    first = report["rows"][0]
    listed = ", ".join(map(str, dict.fromkeys(row["batch"] for row in report["rows"])))
    found = [
        f"{first['parameters'] / 1e6:.4g} M parameters, {first['flops'] / 1e9:.4g} GFLOP an image and step, {first['dtype']}, batch {listed}"
        f" on {first['devices']} {first['device_kind']} device{'s' if first['devices'] > 1 else ''}"
    ]
    if "product" in report:
        several = any(row["devices"] > 1 and row["device_kind"] != "cpu" for row in report["rows"])
        each = ", on every device" if several else ""
        listed = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in report["product"]["each"].items())
        found.append(f"GFLOP/s of one large square product on this machine in the same rounds: {listed}; shares are of the faster one{each}")
    others = [f"{row['name']} {row['cpu_over_base']:.2f}" for row in report["rows"] if "cpu_over_base" in row]
    if others:
        found.append(f"CPU time of an image over that of {report['base']}: {', '.join(others)}; threads that wait by spinning use it too")
    for row in report["rows"]:
        found += [f"{row['name']}: {note}" for note in row.get("notes", ())]
        if not math.isfinite(row.get("loss", 0.0)):
            found.append(f"{row['name']}: the loss is {row['loss']}, so its time may not be that of real training")
    rises = [f"{row['name']} {row['resident_rise'] / 1e6:.0f}" for row in report["rows"] if row.get("resident_rise") is not None]
    if rises:
        found.append(f"resident memory of the process rose during a step, in MB: {', '.join(rises)}")
    if any(row.get("device_peak_is_bound") for row in report["rows"]):
        found.append("the device keeps the greatest use so far alone: of a step that came after a greater one no more is known than a bound")
    return found


def heading(report: Mapping[str, Any]) -> list[str]:
    """What the numbers were taken on, and how."""
    where = report["machine"]
    load, named = where["load_at_start"], ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    first = f"{where['cpu'] or 'unknown processor'}, {report['threads']} threads, load {load} at the start, {report['runs']} rounds"
    return [first, f"{report['allocator']}, {named}" if "allocator" in report else named, f"`{report['command']}`"]


def command_of(kind: str, args: argparse.Namespace, flags: Sequence[str] = ()) -> str:
    """The command that was given, as far as it decides on numbers."""
    config = f"--config={args.config}" if isinstance(args.config, str) else f"--config {' '.join(args.config)}"
    parts = ["wavepath bench", kind, config, *(f"--config.{text}" for text in args.config_overrides)]
    parts += [f"--batch {args.batch}"] if args.batch else []
    return " ".join([*parts, *(["--vary", *args.vary] if args.vary else []), *flags])
