"""Weak scaling on paper: one step at a fixed batch on each device, compiled for slices of more and more devices.

What a device computes should stay, what it exchanges should grow to a limit; the table shows both from the compiled programs, with the step time that
the roofline makes of them. Efficiency is the throughput of a device beside that of one in the smallest slice: of the best time, where communication
hides behind computation, and of the worst, where none does.

Not in the model, and so above what a pod reaches: the latency of each exchange (`exchanges` says how many there are), stragglers, and input.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavepath.errors import ConfigError
from wavepath.planning import hlo
from wavepath.planning.compile import versions
from wavepath.planning.plan import Compiler, Plan, changed, plan
from wavepath.planning.roofline import DEFAULTS, Assumptions, volume
from wavepath.planning.topology import DIMENSIONS, find

DEVICES = (4, 16, 64, 256)
PER_DEVICE = 64
BACKENDS = {"jit": {"parallel.backend": "jit", "parallel.fsdp": 1}, "fsdp": {"parallel.backend": "jit", "parallel.fsdp": 0},
            "pmap": {"parallel.backend": "pmap", "parallel.fsdp": 1}, "shard_map": {"parallel.backend": "shard_map", "parallel.fsdp": 1}}  # fmt: skip
HEADER = (
    "backend", "devices", "topology", "GFLOP", "traffic GB", "exchanges", "all-reduce MB", "all-gather MB", "reduce-scatter MB", "other MB",
    "sent MB", "compute ms", "memory ms", "links ms", "step ms", "images/s", "efficiency",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One slice. All but `images_per_second` is of one device and one step.

    Attributes:
        backend: a name of `BACKENDS`.
        devices, topology: of the slice.
        fits: whether the step fits the devices' memory.
        peak: bytes that it takes.
        flops: compiled operations.
        traffic: bytes from and to the device's memory.
        exchanges: executions of collectives.
        collectives: bytes by kind, as `hlo.Collective` counts them.
        sent: bytes that the device sends.
        seconds: `compute`, `memory`, `communication`, and of the step `best` and `worst`.
        images_per_second: of all devices, best and worst.
        efficiency: beside the first row, best and worst.
    """

    backend: str
    devices: int
    topology: str
    fits: bool | None
    peak: int | None
    flops: float
    traffic: float
    exchanges: int
    collectives: dict[str, float]
    sent: float
    seconds: dict[str, float]
    images_per_second: tuple[float, float]
    efficiency: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def shape(family: str, devices: int) -> tuple[int, ...]:
    """The most even slice of a power of two of TPU chips: `("v5e", 64)` -> `(8, 8)`, `("v5p", 64)` -> `(4, 4, 4)`.

    Raises:
        ConfigError: a family that is no TPU, or a number that is no power of two from 4 on.
    """
    if family not in DIMENSIONS:
        raise ConfigError(f"--weak-scaling {family!r} is no TPU; choose one of {', '.join(DIMENSIONS)}")
    if devices < 4 or devices & (devices - 1):
        raise ConfigError(f"weak scaling over {devices} chips: give powers of two from 4 on, such as {', '.join(map(str, DEVICES))}")
    axes = DIMENSIONS[family]
    twos = devices.bit_length() - 1
    # Written as the documentation of Cloud TPU does, 2x4 and 2x2x4; a host fills the first two axes, as in 2x2x1.
    sizes = [2 ** (twos // axes + (place < twos % axes)) for place in range(axes)]
    return tuple(sizes if min(sizes) < 2 else sorted(sizes))


def parse(text: str) -> tuple[str, int]:
    """`"v5e"` -> `("v5e", 64)`, `"v5e:32"` -> `("v5e", 32)`: chip and batch of each device.

    Raises:
        ConfigError: anything else.
    """
    family, _, batch = text.strip().lower().partition(":")
    if family not in DIMENSIONS or (batch and not (batch.isdigit() and int(batch))):
        raise ConfigError(f"--weak-scaling {text!r} is no TPU with its batch; give {', '.join(DIMENSIONS)}, with the batch as in v5e:{PER_DEVICE}")
    return family, int(batch) if batch else PER_DEVICE


def table(
    config: ConfigDict, chip: str, devices: Sequence[int] = DEVICES, backend: str = "jit", *, per_device: int = PER_DEVICE,
    assumptions: Assumptions = DEFAULTS, cache: Path | None = None, compiler: Compiler | None = None, say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows for slices of growing size, the first of which the others are held against.

    Args:
        config: a training config; its batch size and its placement are replaced.
        chip: a TPU of `chips.CHIPS`.
        devices: powers of two.
        backend: a name of `BACKENDS`; `fsdp` divides the state over all devices.
        per_device: examples of a step on each device.
        assumptions: of the estimate.
        cache: folder in which compiled steps are kept.
        compiler: `compile_step`, for tests.
        say: is told which compile begins.

    Raises:
        ConfigError: an unknown chip or backend, or a step that fits no slice.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    names = [f"{chip}:{'x'.join(map(str, shape(chip, count)))}" for count in devices]
    placed, rows = changed(config, BACKENDS[backend]), []
    for count, name in zip(devices, names, strict=True):
        made = plan(
            placed, find(name), name=f"{config.task}, {backend}", batch=per_device * count, advice=False, assumptions=assumptions, cache=cache,
            compiler=compiler, say=say,
        )
        if made.estimate is None or made.compiled.program is None:
            raise ConfigError(
                f"{per_device} examples on each device of {name} do not fit ({made.compiled.message[:120]}); give a smaller batch, as in"
                f" --weak-scaling {chip}:{per_device // 2 or 1}, or --config.model.remat=full"
            )
        rows.append(_row(made, backend, rows[0] if rows else None))
    return rows


def _row(made: Plan, backend: str, first: Row | None) -> Row:
    program, times = made.compiled.program, made.estimate
    rate = tuple(images / made.devices for images in times.images_per_second)
    base = tuple(images / first.devices for images in first.images_per_second) if first else rate
    memory = made.compiled.memory
    return Row(
        backend=backend, devices=made.devices, topology=made.topology, fits=made.fits, peak=memory.peak if memory else None, flops=program.flops,
        traffic=program.traffic, exchanges=sum(one.times for one in program.collectives),
        collectives={kind: row["bytes"] for kind, row in hlo.summary(program).items()},
        sent=sum(one.times * volume(one) for one in program.collectives),
        seconds={"compute": times.compute, "memory": times.memory, "communication": times.communication, "best": times.best, "worst": times.worst},
        images_per_second=times.images_per_second, efficiency=tuple(now / before for now, before in zip(rate, base, strict=True)),
    )


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows as texts, in the order of `HEADER`."""
    found = []
    for row in rows:
        kinds = row.collectives
        named = [kinds.get(kind, 0.0) for kind in ("all-reduce", "all-gather", "reduce-scatter")]
        numbers = [
            f"{row.flops / 1e9:.0f}", f"{row.traffic / 1e9:.1f}", str(row.exchanges),
            *(f"{size / 1e6:.1f}" for size in (*named, sum(kinds.values()) - sum(named), row.sent)),
            *(f"{1e3 * row.seconds[name]:.1f}" for name in ("compute", "memory", "communication")),
        ]
        best, worst = (1e3 * row.seconds[name] for name in ("best", "worst"))
        found.append((
            row.backend, str(row.devices), row.topology, *numbers, f"{best:.1f} to {worst:.1f}",
            f"{row.images_per_second[1]:.0f} to {row.images_per_second[0]:.0f}", " to ".join(f"{share:.3f}" for share in sorted(row.efficiency)),
        ))  # fmt: skip
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table, with the versions of the compilers."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "|".join("---:" if place else "---" for place in range(len(HEADER))) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells(rows)]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"Compiled with {made}.", ""])


def picture(rows: Sequence[Row], path: Path) -> None:
    """A PNG of efficiency over devices: for each backend the range between its best and its worst time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.4))
    for backend in dict.fromkeys(row.backend for row in rows):
        own = [row for row in rows if row.backend == backend]
        sizes = [row.devices for row in own]
        low, high = ([pick(row.efficiency) for row in own] for pick in (min, max))
        (line,) = axes.plot(sizes, high, marker="o", label=f"{backend}: communication hidden")
        axes.plot(sizes, low, marker="o", linestyle=":", color=line.get_color(), label=f"{backend}: not hidden")
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row.devices for row in rows}), [str(size) for size in sorted({row.devices for row in rows})])
    axes.set(xlabel="devices", ylabel="modelled efficiency", ylim=(0, 1.1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
