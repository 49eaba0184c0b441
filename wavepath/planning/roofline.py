"""How long a step takes at least and about, from what its program computes, reads and sends, and what the chip can do.

A model, not a measurement: each of the three at a stated share of the chip's peak; computing and reading memory overlap, and communication either
overlaps with both (`best`) or with neither (`worst`). What it leaves out: the latency of instructions and of the network, input and output, and
matrices that are narrower than the matrix unit.

Source: S. Williams et al., Roofline, CACM 2009; the volumes of ring collectives as in P. Patarasuk and X. Yuan, JPDC 2009.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wavepath.planning.chips import Chip
from wavepath.planning.hlo import Collective, Program

# Names of XLA for those of the chips' table. int8 and the like are not in it, nor are double precision products.
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# A TPU multiplies float32 in bfloat16 passes: JAX asks for one by default, three for `high`, six for `highest`.
_PASSES = {"high": 3, "highest": 6}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the chip's peaks that a program reaches.

    Attributes:
        compute: of operations a second, in matrix products. Over whole steps published vision transformers report 0.3 (ViT-B) to 0.55 (ViT-22B).
        memory: of bytes a second from and to memory.
        links: of bytes a second between chips.
    """

    compute: float = 0.6
    memory: float = 0.8
    links: float = 0.8


DEFAULTS = Assumptions()


@dataclass(frozen=True)
class Estimate:
    """Times in seconds of one step, on one device.

    Attributes:
        compute: of the operations that the compiled program has (what is computed again, included).
        model: of the model's own operations.
        memory: of the traffic with the device's memory. Intermediate results that stay in caches count, so it is an upper bound.
        communication: of the collectives.
        best, worst: a step with all communication hidden, and with none.
        images_per_second: of all devices, best and worst.
        mfu: model operations over what the chip could do in that time, best and worst.
        bound: compute, memory or communication: what the best time is of.
        collectives: seconds by kind.
    """

    compute: float
    model: float
    memory: float
    communication: float
    best: float
    worst: float
    images_per_second: tuple[float, float]
    mfu: tuple[float, float]
    bound: str
    collectives: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def volume(one: Collective) -> float:
    """Bytes that each device sends in one execution, as the bandwidth-optimal algorithms do.

    With g devices in a group and the bytes that `Collective` counts: an all-reduce twice (g - 1) / g of them, a gathering, a scattering or an
    exchange of all with all (g - 1) / g, a permutation all.
    """
    if one.group < 2:
        return 0.0
    if one.kind == "collective-permute":
        return one.bytes
    share = (one.group - 1) / one.group
    return one.bytes * share * (2 if one.kind == "all-reduce" else 1)


def communication(collectives: Iterable[Collective], bandwidth: float) -> dict[str, float]:
    """Seconds of all executions by kind.

    Args:
        collectives: of a program.
        bandwidth: bytes a second that a device can send while all do; above 0.
    """
    seconds: dict[str, float] = {}
    for one in collectives:
        seconds[one.kind] = seconds.get(one.kind, 0.0) + one.times * volume(one) / bandwidth
    return seconds


def compute_seconds(flops: Mapping[str, float], chip: Chip) -> float:
    """Seconds of matrix products at the chip's peak.

    Args:
        flops: by the operands' type, as `hlo.Program.by_type`. Of types that the table does not have float32 is taken.
        chip: from the table.
    """
    total = 0.0
    for name, count in flops.items():
        dtype, _, precision = name.partition(":")
        passes = _PASSES.get(precision, 1) if chip.kind.startswith("TPU") else 1
        total += passes * count / chip.peak.get(_DTYPES.get(dtype, "float32"), chip.peak["float32"])
    return total


def estimate(
    program: Program, chip: Chip, *, model_flops: float, dtype: str, devices: int, batch: int, bandwidth: float,
    assumptions: Assumptions = DEFAULTS,
) -> Estimate:
    """The times of a step.

    Args:
        program: of one device.
        chip: what the devices are.
        model_flops: of the whole batch, counted from the model's shapes.
        dtype: in which the model computes; MFU is by its peak.
        devices: how many.
        batch: examples of a step.
        bandwidth: bytes a second that a device can send in a collective over all of them.
    """
    peak = chip.peak.get(dtype, chip.peak["float32"])
    ideal = model_flops / devices / peak
    compute = compute_seconds(program.by_type, chip) / assumptions.compute
    memory = program.traffic / (chip.hbm_bandwidth * assumptions.memory)
    sending = communication(program.collectives, bandwidth * assumptions.links) if bandwidth else {}
    talk = sum(sending.values())
    busy = max(compute, memory)
    best, worst = max(busy, talk), busy + talk
    bound = "communication" if talk > busy else "compute" if compute >= memory else "memory"
    return Estimate(
        compute=compute, model=ideal / assumptions.compute, memory=memory, communication=talk, best=best, worst=worst,
        images_per_second=(batch / best, batch / worst), mfu=(ideal / best, ideal / worst), bound=bound, collectives=sending,
    )


def run_time(steps: int, step_seconds: float, devices: int) -> tuple[float, float]:
    """(seconds, chip-hours) of a run; evaluation, saving and compilation are not in it."""
    seconds = steps * step_seconds
    return seconds, devices * seconds / 3600


def listed(assumptions: Assumptions, bandwidth: float | None) -> list[str]:
    """The assumptions in words, a line each."""
    return [
        f"matrix products run at {assumptions.compute:.0%} of the chip's peak, memory at {assumptions.memory:.0%}, links at {assumptions.links:.0%}",
        "computing and memory traffic overlap; communication is hidden behind both (best) or not at all (worst)",
        *([f"each chip sends {bandwidth / 1e9:.4g} GB/s at most in a collective over all, by ring or torus algorithms"] if bandwidth else []),
        "memory traffic is an upper bound: every result counts as written and read again",
        "input keeps up; evaluation, saving, compiling and restarts take no time",
    ]
