"""The wavelet half of `wavepath bench ops`: every cell checked against the exact transform, timed in rotation, and judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wavepath.benchmarks.timing import Timed, ratios, take_turns
from wavepath.benchmarks.wavelet_peers import FLOOR, OURS, PEERS, MissingPeer, Peer, Task

WAVELETS = ("haar", "db2", "db4", "sym4", "bior2.2", "coif1")
SHAPES = ("32x224x224x3", "8x1024x1024x3")
MODE = "symmetric"
# Relative to the largest value; float32 transforms of one level differ from float64 by 1e-6.
TOLERANCE = 1e-4
TIE = 1.05


@dataclass(frozen=True)
class Bound:
    """A speed that wavepath must reach in one wavelet and direction: `peer` takes at least `times` as long (or, for the copy, at most 1/`times`)."""

    wavelet: str
    direction: str
    peer: str
    times: float
    at_most: bool = False

    def judge(self, shape: str, ratio: float) -> dict[str, object]:
        """`ratio` is the peer's time over wavepath's."""
        reached = 1 / ratio if self.at_most else ratio
        name = {"forward": "forward", "inverse": "inverse", "gradient": "forward+gradient"}[self.direction]
        if self.at_most:
            text = f"{self.wavelet} {name} within {self.times:g} times a {self.peer}"
        elif self.times == 1:
            text = f"{self.wavelet} {name} ahead of {self.peer}"
        else:
            text = f"{self.wavelet} {name} at least {self.times:g} times as fast as {self.peer}"
        met = reached <= self.times if self.at_most else reached >= self.times
        return {"bound": text, "shape": shape, "reached": reached, "met": bool(met)}


BOUNDS = (
    Bound("haar", "forward", "jaxwt", 8.0),
    Bound("haar", "forward", FLOOR, 3.5, at_most=True),
    Bound("db4", "gradient", "jaxwt", 6.0),
    Bound("db4", "gradient", "pytorch_wavelets", 1.0),
)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`32x224x224x3` -> (32, 224, 224, 3). Raises ConfigError for anything else."""
    from wavepath.errors import ConfigError

    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts) or min(int(parts[1]), int(parts[2])) < 2:
        raise ConfigError(f"--shapes {text}: a shape is images x height x width x channels, for example 32x224x224x3")
    return tuple(int(part) for part in parts)  # type: ignore[return-value]


def analysis_matrices(size: int, wavelet: str, mode: str = MODE) -> tuple[np.ndarray, np.ndarray]:
    """The transform of one axis as two float64 matrices [size', size] (low, high), column by column from PyWavelets."""
    import pywt

    low, high = pywt.dwt(np.eye(size), wavelet, mode, axis=0)
    return low, high


def make_task(wavelet: str, shape: tuple[int, int, int, int], mode: str = MODE, seed: int = 0) -> Task:
    """Random data of one cell, the same for every contender."""
    import pywt

    rng = np.random.default_rng(seed)
    image = rng.random(shape, dtype=np.float32)
    ll, details = pywt.dwt2(image, wavelet, mode, axes=(1, 2))
    cotangents = tuple(rng.standard_normal(ll.shape, dtype=np.float32) for _ in range(4))
    return Task(wavelet, mode, image, (ll, *details), cotangents)


def exact(task: Task, direction: str, keep: tuple[int, ...]) -> list[np.ndarray]:
    """What every contender must return for the images `keep`: bands, image, or bands and gradient, in float64 and by matrix products."""
    rows, columns = (analysis_matrices(size, task.wavelet, task.mode) for size in task.image.shape[1:3])
    # (ll, lh, hl, hh): lh is high along the rows' axis (PyWavelets' cH).
    pairs = [(rows[0], columns[0]), (rows[1], columns[0]), (rows[0], columns[1]), (rows[1], columns[1])]
    image = task.image[list(keep)].astype(np.float64)
    if direction == "inverse":
        return [image]
    bands = [np.einsum("ih,nhwc,jw->nijc", a, image, b, optimize=True) for a, b in pairs]
    if direction == "forward":
        return bands
    cotangents = [array[list(keep)].astype(np.float64) for array in task.cotangents]
    return [*bands, sum(np.einsum("ih,nijc,jw->nhwc", a, c, b, optimize=True) for (a, b), c in zip(pairs, cotangents, strict=True))]


def trimmed(results: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[np.ndarray]:
    """An inverse cannot tell an odd size from the next even one: what it returns beyond the image by one row or column is cut off."""
    return [
        array[:, : like.shape[1], : like.shape[2]] if all(0 <= a - b <= 1 for a, b in zip(array.shape[1:3], like.shape[1:3], strict=True)) else array
        for array, like in zip(results, expected, strict=False)
    ]


def difference(results: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The greatest difference over all arrays, relative to each array's greatest value; infinite where shapes or counts differ."""
    if len(results) != len(expected) or any(a.shape != b.shape for a, b in zip(results, expected, strict=True)):
        return float("inf")
    worst = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in zip(results, expected, strict=True))
    return worst if np.isfinite(worst) else float("inf")


def _inside(image: np.ndarray) -> np.ndarray:
    """Without what the border can reach."""
    rows, columns = image.shape[1] // 4, image.shape[2] // 4
    return image[:, rows:-rows, columns:-columns]


def measure_cell(
    task: Task, direction: str, runs: int, peers: Sequence[Peer], missing: dict[str, str] | None = None, advance: Callable[[], None] = lambda: None
) -> dict[str, object]:
    """One cell: builds, checks and times every contender.

    Returns:
        `contenders`: name to status (`right`, `WRONG`, `missing`, `none` where the library has no such direction), difference, milliseconds
        of every round, their median, and `ratio` (their time over wavepath's: median, least, greatest); `fastest`: the verdict.
        A library that gives another result is timed too, and never called the fastest.
    """
    keep = (len(task.image) - 1,)
    expected = exact(task, direction, keep)
    calls, contenders = {}, {}
    missing = {} if missing is None else missing
    for peer in peers:
        try:
            built = peer.build(task, direction)
        except MissingPeer as error:
            missing[peer.name] = str(error)
            contenders[peer.name] = {"status": "missing"}
            continue
        if built is None:
            contenders[peer.name] = {"status": "none"}
            continue
        call, unpack = built
        contenders[peer.name] = {"status": "right"}
        if peer.name != FLOOR:
            results = peer.results(unpack(call()), keep)
            worst = difference(trimmed(results, expected) if direction == "inverse" else results, expected)
            contenders[peer.name] = {"status": "right" if worst <= TOLERANCE else "WRONG", "difference": worst}
            if worst > TOLERANCE and direction != "forward":
                contenders[peer.name]["inside"] = difference([_inside(results[-1])], [_inside(expected[-1])])
        calls[peer.name] = call
    advance()
    timed = {one.name: one for one in take_turns(calls, runs, advance)}
    for name, one in timed.items():
        contenders[name].update(milliseconds=[1e3 * value for value in one.seconds], median_ms=1e3 * one.median)
        if OURS in timed:
            contenders[name]["ratio"] = list(ratios(one, timed[OURS]))
    return {
        "wavelet": task.wavelet, "shape": "x".join(map(str, task.image.shape)), "direction": direction, "mode": task.mode,
        "contenders": contenders, "fastest": verdict(contenders, timed),
    }  # fmt: skip


def verdict(contenders: dict[str, dict], timed: dict[str, Timed]) -> str:
    """`yes`, `tie` (within 5 %) or `no`, with the peer that comes closest; only peers with the right result count."""
    if OURS not in timed:
        return "-"
    if contenders[OURS]["status"] != "right":
        return "no: wavepath is WRONG"
    rivals = {name: contenders[name]["ratio"][0] for name in timed if name not in (OURS, FLOOR) and contenders[name]["status"] == "right"}
    if not rivals:
        return "-"
    nearest = min(rivals, key=rivals.get)
    if rivals[nearest] >= 1:
        return "yes"
    return ("tie" if rivals[nearest] * TIE >= 1 else "no") + f": {nearest} {rivals[nearest]:.2f}"


def judge(cells: Sequence[dict]) -> list[dict[str, object]]:
    """The bounds over all cells; a bound whose cell was not measured is not judged."""
    found = []
    for bound in BOUNDS:
        for cell in cells:
            entry = cell["contenders"].get(bound.peer, {})
            if (cell["wavelet"], cell["direction"]) == (bound.wavelet, bound.direction) and "ratio" in entry:
                one = bound.judge(cell["shape"], entry["ratio"][0])
                one["met"] = one["met"] and cell["contenders"][OURS]["status"] == "right"  # a wrong result is no result, however fast
                found.append(one)
    return found


def measure(
    wavelets: Sequence[str], shapes: Sequence[str], directions: Sequence[str], runs: int, peers: Sequence[str], missing: dict[str, str]
) -> dict[str, object]:
    """All cells, as JSON values. `missing` receives the libraries that are not installed, with the command that brings each."""
    from wavepath.console import progress

    chosen = [PEERS[name] for name in peers]
    cells = []
    sizes = [parse_shape(shape) for shape in shapes]
    with progress("wavelets", len(wavelets) * len(sizes) * len(directions) * (runs + 1), "rounds") as bar:
        for size in sizes:
            for wavelet in wavelets:
                task = make_task(wavelet, size)
                for direction in directions:
                    name = f"{wavelet} {'x'.join(map(str, size))} {direction}"
                    cells.append(measure_cell(task, direction, runs, chosen, missing, lambda name=name: bar.advance(1, name)))
    return {"cells": cells, "bounds": judge(cells)}


def rows(report: dict, peers: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table: wavepath's milliseconds, then each contender's time over wavepath's."""
    header = ["shape", "wavelet", "direction", "wavepath ms", *[name for name in peers if name != OURS], "fastest?"]
    lines = []
    for cell in report["cells"]:
        contenders = cell["contenders"]
        ours = contenders.get(OURS, {})
        line = [cell["shape"], cell["wavelet"], cell["direction"], f"{ours['median_ms']:.2f}" if "median_ms" in ours else "-"]
        for name in header[4:-1]:
            entry = contenders[name]
            if "median_ms" not in entry:
                line.append({"missing": "missing", "none": "-"}[entry["status"]])
                continue
            text = f"{entry['ratio'][0]:.2f}" if "ratio" in entry else f"{entry['median_ms']:.2f} ms"
            where = "at the border" if entry.get("inside", 1) <= TOLERANCE else f"by {entry.get('difference', 0):.0e}"
            line.append(text if entry["status"] == "right" else f"{text} WRONG {where}")
        lines.append([*line, cell["fastest"]])
    return header, lines


def bound_lines(report: dict) -> list[str]:
    """One plain line for each bound and shape, and one for the whole table."""
    lines = []
    for one in report["bounds"]:
        lines.append(f"{'met   ' if one['met'] else 'MISSED'}  {one['shape']}: {one['bound']}: {one['reached']:.2f}")
    verdicts = [cell["fastest"] for cell in report["cells"] if cell["fastest"] != "-"]
    if verdicts:
        ties = sum(text.startswith("tie") for text in verdicts)
        fastest = sum(text == "yes" for text in verdicts)
        met = "met   " if fastest + ties == len(verdicts) else "MISSED"
        lines.append(f"{met}  fastest in every cell (ties within 5 %): {fastest} and {ties} ties of {len(verdicts)}")
    return lines
