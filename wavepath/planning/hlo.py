"""What a compiled program does, from its text: the collectives with their bytes, the operations of its matrix products, its traffic with memory.

Everything is of one device and of one execution of the program: what stands in a loop counts as often as the loop runs. The text is that of
`compiled.as_text()` of a CPU, GPU or TPU; `hlo_text` says why text is read.

Source: XLA's operation semantics and its `HloCostAnalysis`, from which the counts of a convolution and the reading of slices follow.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wavepath.errors import WavepathError
from wavepath.planning import hlo_text
from wavepath.planning.hlo_text import Computation, Instruction, Module, Shape

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LIKE_ONE = re.compile(r"^(all-|collective-|reduce-scatter|ragged-all)")
_PHASE = re.compile(r"-(start|done|update)$")
# These name memory or order, and move nothing; what a `done` waits for its `start` has counted.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id opt-barrier domain add-dependency"
    " get-dimension-size rng-get-and-update-state".split()
)
_FREE_CALLS = (  # of a TPU's compiler; the last two annotate indices
    "AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One instruction that exchanges data between devices.

    Attributes:
        kind: one of `KINDS`.
        bytes: of one execution on one device: of an all-gather the gathered array, of a reduce-scatter its input, else the result; a tuple's sum.
        group: devices that exchange with one another (of a permutation: of its largest ring).
        groups: how many such groups there are.
        times: executions in one run of the program.
        name: of the instruction.
        dtype: of its largest operand, as XLA writes it.
        shapes: of its operands on one device, as `f32[8,16]`.
    """

    kind: str
    bytes: float
    group: int
    groups: int
    times: int
    name: str
    dtype: str
    shapes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """What one device does in one run.

    Attributes:
        collectives: in the order of the text.
        flops: of dot products and convolutions, a multiplication and an addition being two.
        traffic: bytes that instructions (a fusion is one) read from the device's main memory and write to it. Of an array that an instruction slices
            or updates only the part counts; tiles' padding counts. An upper bound: caches are not known, and all branches of a conditional count.
        by_type: `flops` by the operands' type as XLA writes it, with the precision where one is asked for (`f32:highest`: six passes on a TPU).
        unknown: names of loops whose number of runs the text does not say; they count once.
        opaque: targets of custom calls, whose operations are not counted.
    """

    collectives: tuple[Collective, ...]
    flops: float
    traffic: float
    by_type: dict[str, float]
    unknown: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()


def read(text: str) -> Program:
    """Reads the text of an optimised HLO module.

    Raises:
        WavepathError: no HLO, or a collective of a kind that is not known here (it must not be left out).
    """
    try:
        module = hlo_text.parse(text)
    except ValueError as error:
        raise WavepathError(f"{error}; give the text of `compiled.as_text()`") from error
    times, outside, unknown = _executions(module)
    found: dict[object, Collective] = {}
    by_type: dict[str, float] = defaultdict(float)
    traffic, opaque = 0.0, set()
    for computation in module.computations.values():
        count = times[computation.name]
        if not count:
            continue
        for one in computation:
            collective = _collective(module, computation, one, count)
            if collective:
                # A TPU's compiler spreads one all-gather over several fusions, which all show it.
                channel = one.attribute("channel_id")
                shared = channel and not outside[computation.name] and not _PHASE.search(one.opcode)
                found.setdefault((collective.kind, channel) if shared else (computation.name, one.name), collective)
            flops, dtype = _flops(computation, one)
            if flops:
                by_type[dtype] += count * flops
            elif one.opcode == "custom-call" and (target := _target(one)) not in _FREE_CALLS:
                opaque.add(target)
        if outside[computation.name]:
            traffic += outside[computation.name] * sum(_traffic(module, computation, one) for one in computation)
    return Program(tuple(found.values()), sum(by_type.values()), traffic, dict(by_type), tuple(unknown), tuple(sorted(opaque)))


def summary(program: Program | Iterable[Collective]) -> dict[str, dict[str, float]]:
    """By kind the number of instructions (`count`), of their `executions`, and the `bytes` of all these on one device; absent kinds are left out."""
    table: dict[str, dict[str, float]] = {}
    for one in program.collectives if isinstance(program, Program) else program:
        row = table.setdefault(one.kind, {"count": 0, "executions": 0, "bytes": 0.0})
        row["count"] += 1
        row["executions"] += one.times
        row["bytes"] += one.times * one.bytes
    return {kind: table[kind] for kind in KINDS if kind in table}


# Executions ----------------------------------------------------------------------------------------------------------------------------------


def _executions(module: Module) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """How often each computation runs, how often outside any fusion, and the loops of which the text does not say it."""
    times: dict[str, int] = defaultdict(int)
    outside: dict[str, int] = defaultdict(int)
    unknown = []
    times[module.entry.name] = outside[module.entry.name] = 1
    # Who calls stands behind whom it calls.
    for computation in reversed(module.computations.values()):
        if not times[computation.name]:
            continue
        for one in computation:
            if not one.called or one.opcode.endswith(("-done", "-update")):
                continue
            runs, whole = 1, one.opcode in ("while", "call", "conditional")
            if one.opcode == "while":
                found = hlo_text.trips(module, computation, one)
                runs = 1 if found is None else found
                if found is None:
                    unknown.append(one.name)
            elif not whole and one.opcode not in ("fusion", "async-start", "custom-call"):
                continue  # the operator of a reduction, a sort, a scatter
            for kind, names in one.called.items():
                # A condition is tried once more than the body runs.
                more = runs + 1 if kind == "condition" else runs
                for name in names:
                    times[name] += times[computation.name] * more
                    outside[name] += outside[computation.name] * more if whole else 0
    return times, outside, unknown


# Collectives ---------------------------------------------------------------------------------------------------------------------------------


def _collective(module: Module, computation: Computation, one: Instruction, times: int) -> Collective | None:
    phase = _PHASE.search(one.opcode)
    kind = _PHASE.sub("", one.opcode)
    if kind not in KINDS:
        if _LIKE_ONE.match(kind):
            raise WavepathError(
                f"instruction {one.name!r} of the compiled program is a collective of kind {kind!r}, which is not counted here; the kinds known are"
                f" {', '.join(KINDS)}. Add it to wavepath.planning.hlo"
            )
        return None
    if phase and phase[1] != "start":
        return None
    group, groups = hlo_text.groups(one, module.devices)
    # The operands say it alike for all forms: of a `start` the result holds buffers besides.
    arrays = [shape for name in one.operands for shape in _shapes(computation, name)] or list(one.shapes)
    if kind == "collective-permute":
        arrays = arrays[:1]  # a form in place has buffers and offsets behind it
    size = sum(shape.bytes for shape in arrays) * (group if kind == "all-gather" else 1)
    if kind == "all-reduce" and _scatters(computation):
        kind = "reduce-scatter"
    largest = max(arrays, key=lambda shape: shape.bytes)
    texts = tuple(f"{shape.dtype}[{','.join(map(str, shape.dims))}]" for shape in arrays)
    return Collective(kind, size, group, groups, times, one.name, largest.dtype, texts)


def _scatters(computation: Computation) -> bool:
    """Whether this is a TPU's fusion that sums and keeps a slice, which is a reduce-scatter by another name."""
    return computation.name.startswith("all-reduce-scatter") and any(one.opcode in ("dynamic-slice", "slice") for one in computation)


def _shapes(computation: Computation, name: str) -> tuple[Shape, ...]:
    """Of an operand; nothing where the text does not define it."""
    one = computation.instructions.get(name)
    return () if one is None else one.shapes


# Operations ----------------------------------------------------------------------------------------------------------------------------------


def _flops(computation: Computation, one: Instruction) -> tuple[float, str]:
    """Operations of one execution of a matrix product or convolution, and the type of its operands; 0 for everything else."""
    gemm = one.opcode == "custom-call" and "__cublas$" in one.rest
    convolution = one.opcode == "convolution" or (one.opcode == "custom-call" and "__cudnn$conv" in one.rest)
    if not (one.opcode == "dot" or gemm or convolution):
        return 0.0, ""
    sides = [_shapes(computation, name) for name in one.operands[:2]]
    if len(sides) < 2 or not all(sides) or not one.shapes:
        return 0.0, ""
    lhs, rhs, out = sides[0][0], sides[1][0], one.shapes[0]
    precision = re.search(r"operand_precision=\{(\w+)", one.rest)
    dtype = lhs.dtype + (f":{precision[1]}" if precision and precision[1] != "default" else "")
    if convolution:
        target = _target(one)
        if "BackwardInput" in target:
            lhs, out = out, lhs
        elif "BackwardFilter" in target:
            rhs, out = out, rhs
        return 2.0 * _products(one, lhs, rhs, out), dtype
    if gemm:
        found = re.search(r'"dot_dimension_numbers":(\{.*?\})', one.rest)
        dimensions = json.loads(found[1]).get("lhs_contracting_dimensions", ()) if found else ()
        contracted = [int(dimension) for dimension in dimensions]
    else:
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        contracted = [int(dimension) for dimension in found[1].split(",") if dimension] if found else []
    return 2.0 * out.count * float(np.prod([lhs.dims[dimension] for dimension in contracted], dtype=np.float64)), dtype


def _products(one: Instruction, lhs: Shape, rhs: Shape, out: Shape) -> float:
    """Multiplications of a convolution that meet neither padding nor the holes of a dilated input: on a TPU batched products are such ones."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if not labels or len(labels[1]) != len(lhs.dims):
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}
    total = lhs.dims[labels[1].index("b")] * lhs.dims[labels[1].index("f")] * rhs.dims[labels[2].index("o")]
    for place, letter in enumerate(sorted(letter for letter in labels[1] if letter.isdigit())):
        pad = _of(fields, "pad", place, "0_0")
        total *= _meetings(
            lhs.dims[labels[1].index(letter)], rhs.dims[labels[2].index(letter)], out.dims[labels[3].index(letter)],
            int(_of(fields, "stride", place)), int(pad.split("_")[0]), int(_of(fields, "lhs_dilate", place)), int(_of(fields, "rhs_dilate", place)),
        )  # fmt: skip
    shared = int(one.attribute("feature_group_count") or 1) * int(one.attribute("batch_group_count") or 1)
    return total / shared


def _of(fields: dict[str, str], name: str, place: int, default: str = "1") -> str:
    return fields[name].split("x")[place] if name in fields else default


@functools.lru_cache(maxsize=4096)
def _meetings(size: int, window: int, out: int, stride: int, pad: int, dilated: int, spread: int) -> int:
    """Along one dimension the pairs of an output and a place of the window under which an input lies."""
    places = np.arange(out)[:, None] * stride + np.arange(window)[None, :] * spread - pad
    return int(((places >= 0) & (places <= (size - 1) * dilated) & (places % dilated == 0)).sum())


def _target(one: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', one.rest)
    return found[1] if found else ""


# Traffic -------------------------------------------------------------------------------------------------------------------------------------


def _stored(shapes: Iterable[Shape]) -> float:
    """Bytes of arrays that lie in the device's main memory."""
    return sum(shape.stored for shape in shapes if shape.space == 0)


def _part(of: Iterable[Shape], part: Iterable[Shape]) -> float:
    """Bytes of a part of an array in the main memory, wherever the part goes."""
    return sum(shape.stored for shape in part) if any(shape.space == 0 for shape in of) else 0.0


def _traffic(module: Module, computation: Computation, one: Instruction) -> float:
    """Bytes that one execution of an instruction reads from the main memory and writes to it."""
    kind, phase = _PHASE.sub("", one.opcode), _PHASE.search(one.opcode)
    if one.opcode in _FREE or (phase and phase[1] != "start") or (kind == "custom-call" and _target(one) in _FREE_CALLS):
        return 0.0
    given = [_shapes(computation, name) for name in one.operands]
    if kind in KINDS or kind == "async":
        group = hlo_text.groups(one, module.devices)[0]
        share = {"all-gather": float(group), "reduce-scatter": 1 / group}.get(kind, 1.0)
        return sum(_stored(shapes) for shapes in given) * (1 + share)
    if kind == "copy" and phase:
        return _stored(given[0]) + _stored(one.shapes[:1]) if given else 0.0
    if kind == "slice" and phase:
        target = one.shapes[len(given[0]) :][:1]
        return _part(given[0], target) + _stored(target)
    if kind in ("dynamic-slice", "slice", "gather"):
        return _part(given[0], one.shapes) + _stored(one.shapes) + sum(_stored(shapes) for shapes in given[1:])
    if kind == "dynamic-update-slice":
        return _stored(given[1]) + _part(given[0], given[1])
    if kind == "scatter":
        return sum(_stored(shapes) for shapes in given[1:]) + 2 * _part(given[0], given[-1])
    if kind == "fusion" and (inner := module.callee(one)):
        total = sum(_read_of(module, inner, index, shapes) for index, shapes in enumerate(given))
        return total + _written(inner, inner.root, one.shapes)
    return sum(_stored(shapes) for shapes in given) + _stored(one.shapes)


def _read_of(module: Module, inner: Computation, index: int, given: tuple[Shape, ...]) -> float:
    """Bytes that a fusion reads of an operand: all, unless every use of it takes a slice, or writes into it."""
    parameters, whole = inner.parameters(), _stored(given)
    if index >= len(parameters) or not whole:
        return whole
    total, waiting = 0.0, [parameters[index].name]
    while waiting:
        name = waiting.pop()
        for user in inner.users(name):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name and name not in user.operands[1:]:
                total += sum(shape.stored for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name and name not in user.operands[1:]:
                continue
            elif user.opcode == "bitcast" and not user.root:
                waiting.append(user.name)
            elif user.opcode == "fusion" and (nested := module.callee(user)):
                total += sum(_read_of(module, nested, place, given) for place, operand in enumerate(user.operands) if operand == name)
            else:
                return whole
    return min(total, whole)


def _written(inner: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> float:
    """Bytes that a fusion writes of its results: of an array updated in place only the update."""
    if root.opcode == "tuple" and len(root.operands) == len(shapes):
        results = [inner.instructions.get(name) for name in root.operands]
    else:
        results = [root] * len(shapes)
    total = 0.0
    for result, shape in zip(results, shapes, strict=True):
        while result is not None and result.opcode == "bitcast" and result.operands:
            result = inner.instructions.get(result.operands[0])
        if result is not None and result.opcode == "dynamic-update-slice" and shape.space == 0:
            total += sum(part.stored for part in _shapes(inner, result.operands[1]))
        else:
            total += _stored([shape])
    return total
