"""The text of a compiled program (optimised HLO), as computations, instructions and shapes.

Text is read since it is what JAX gives in public for every backend (`compiled.as_text()`); the protocol buffers behind it are private to jaxlib, and
`compiled.cost_analysis()` counts the body of a loop once, however often it runs, and knows no collective. What the grammar here does not know it
passes over: attributes stay text, and a line that is no instruction is skipped.

Syntax: XLA's HLO parser and printer (`hlo/parser`, `hlo_instruction.cc`); the forms of replica groups: `ir/replica_group.cc` and `mesh_and_axis.cc`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEAD = re.compile(r"^(ENTRY )?%?([^\s(=]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*?)\s([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_LAYOUT_TILE, _LAYOUT_SPACE = re.compile(r":T\(([\d,]+)\)"), re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
_CALLEES = ("calls", "to_apply", "body", "condition", "branch_computations", "true_computation", "false_computation", "called_computations")
_CALLED = re.compile(rf"\b({'|'.join(_CALLEES)})=(\{{[^}}]*\}}|[^\s,]+)")
_QUOTED = re.compile(r'"[^"]*"')
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Shape:
    """An array: its type and, where the text says so, how it lies in memory.

    Attributes:
        dtype: as XLA writes it (`bf16`, `pred`, `s4`).
        dims: sizes.
        order: dimensions from the fastest varying; empty: not said.
        tile: the tile that the fastest dimensions are padded to (TPU); empty: none.
        space: memory space; 0 is the device's main memory, 1 on a TPU its vector memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Of the numbers themselves."""
        return self.count * bits(self.dtype) / 8

    @property
    def stored(self) -> float:
        """Bytes in memory, with what the tile adds: 32 columns of a tile of 128 take four times their size."""
        if not self.order or not self.dims or len(self.tile) > len(self.order):
            return self.bytes
        sizes = list(self.dims)
        for dimension, tile in zip(self.order, reversed(self.tile), strict=False):
            sizes[dimension] = -(-sizes[dimension] // tile) * tile
        return math.prod(sizes) * bits(self.dtype) / 8


def bits(dtype: str) -> int:
    """Of one number: `f8e4m3fn` has 8, `pred` is stored in 8, `token` in none."""
    found = _BITS.match(dtype)
    return int(found[1]) if found else 8 if dtype == "pred" else 0


def shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type: one, or those of a tuple, nested ones in order."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(_COMMENT.sub("", text)):
        sizes = tuple(int(size.strip().lstrip("<=")) for size in dims.split(",") if size.strip())
        order, _, rest = layout.partition(":")
        tile, space = _LAYOUT_TILE.search(":" + rest), _LAYOUT_SPACE.search(rest)
        found.append(Shape(
            dtype, sizes, tuple(int(i) for i in order.split(",") if i.strip().isdigit()), tuple(int(i) for i in tile[1].split(",")) if tile else (),
            int(space[1]) if space else 0,
        ))  # fmt: skip
    return tuple(found)


@dataclass
class Instruction:
    """One line of a computation. `shapes` are of its result; `rest` is what follows the operands; `literal` stands in the brackets of a constant."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    literal: str = ""
    root: bool = False
    called: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def attribute(self, name: str) -> str:
        """The text of an attribute without brackets or spaces in it (`channel_id=3`, `dim_labels=bf_io->bf`, `direction=LT`), or nothing."""
        found = re.search(rf"\b{name}=([^\s,]+)", self.rest)
        return found[1] if found else ""


@dataclass
class Computation:
    """Instructions in the order of the text, by name."""

    name: str
    entry: bool = False
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """Its result."""
        return next((one for one in self if one.root), None) or list(self)[-1]

    def users(self, name: str) -> list[Instruction]:
        return [one for one in self if name in one.operands]

    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        return sorted((one for one in self if one.opcode == "parameter"), key=lambda one: int(one.literal or 0))


@dataclass
class Module:
    """A program: computations, those that are called before those that call them, and how many devices run it."""

    computations: dict[str, Computation]
    devices: int

    @property
    def entry(self) -> Computation:
        return next((one for one in self.computations.values() if one.entry), None) or list(self.computations.values())[-1]

    def callee(self, one: Instruction, kind: str = "calls") -> Computation | None:
        """The computation that an instruction names; None where it names none, or one that the text does not hold."""
        return self.computations.get(one.called.get(kind, ("",))[0])


def parse(text: str) -> Module:
    """Reads the text of one module.

    Raises:
        ValueError: it has no computation.
    """
    computations: dict[str, Computation] = {}
    current, devices = None, 1
    for line in text.splitlines():
        if line.startswith("HloModule"):
            for name in ("num_partitions", "replica_count"):
                found = re.search(rf"\b{name}=(\d+)", line)
                devices *= int(found[1]) if found else 1
        elif line.startswith("}"):
            current = None
        elif current is None:
            if head := _HEAD.match(line):
                current = computations[head[2]] = Computation(head[2], bool(head[1]))
        elif found := _LINE.match(line):
            instruction = _instruction(line, found)
            current.instructions[instruction.name] = instruction
    if not any(one.instructions for one in computations.values()):
        raise ValueError("the text is not an HLO module: no computation was found in it")
    return Module(computations, devices)


def _instruction(line: str, found: re.Match) -> Instruction:
    end = _closing(line, found.end() - 1)
    inside, rest = line[found.end() : end], line[end + 1 :]
    opcode = found[4]
    operands = () if opcode in ("constant", "parameter", "iota") else tuple(_operands(inside))
    # What stands in quotes (names of the source) must not be taken for attributes.
    named = _CALLED.findall(_QUOTED.sub("", rest)) if _CALLED.search(rest) else ()
    called = {kind: tuple(name.strip().lstrip("%") for name in names.strip("{}").split(",")) for kind, names in named}
    return Instruction(found[2], opcode, shapes(found[3]), operands, rest, inside.strip(), bool(found[1]), called)


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(line)):
        if line[place] == "(":
            depth += 1
        elif line[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    return len(line)


def _operands(text: str) -> Iterator[str]:
    """Names of the operands, which may stand behind their types."""
    text = _COMMENT.sub("", text)
    if "%" in text:
        yield from re.findall(r"%([^\s,()]+)", text)
    else:
        for item in re.sub(r"[\[{(][^\[\](){}]*[\]})]", "", text).split(","):
            if item.strip():
                yield item.split()[-1]


# Groups of devices ---------------------------------------------------------------------------------------------------------------------------


def groups(instruction: Instruction, devices: int) -> tuple[int, int]:
    """(devices in a group, groups) of a collective; without groups in the text all devices are one."""
    rest = instruction.rest
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return _rings([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", found[1])])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2]), int(found[1])
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest):
        members = [group.split(",") for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return max(map(len, members), default=1), len(members)
    if found := re.search(r"replica_groups=@?mesh\S*?\[([^\]]*)\](?:,[^{]*)? ?\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        total, group = math.prod(sizes.values()), 1
        # An axis may be named in part: 'x':(2)4 are four of its devices, two apart.
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2]):
            group *= int(part) if part else sizes.get(name, 1)
        return group, max(1, total // group)
    return devices, 1


def _rings(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    """Of sends from device to device: the largest set that is connected, and how many sets there are."""
    ring: dict[int, int] = {}

    def first(device: int) -> int:
        while ring.setdefault(device, device) != device:
            device = ring[device]
        return device

    for source, target in pairs:
        ring[first(source)] = first(target)
    members = [first(device) for device in list(ring)]
    return max((members.count(one) for one in set(members)), default=1), max(1, len(set(members)))


# Loops ---------------------------------------------------------------------------------------------------------------------------------------


_REACH = {"LT": 0, "GT": 0, "NE": 0, "LE": 1, "GE": -1}
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop runs: as the compiler noted it (CPU, GPU), or a counter compared with a constant (TPU); None: the text does not say."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(found[1])
    condition, body = (module.callee(loop, kind) for kind in ("condition", "body"))
    start = computation.instructions.get(loop.operands[0]) if loop.operands else None
    if condition is None or body is None or start is None:
        return None
    # The comparison may stand in a fusion, whose parameters are what the condition gives it.
    test, inner, given = condition.root, condition, {}
    if test.opcode == "fusion" and (inner := module.callee(test)):
        given = dict(zip((one.name for one in inner.parameters()), test.operands, strict=False))
        test = inner.root
    direction = test.attribute("direction")
    if test.opcode != "compare" or len(test.operands) != 2:
        return None
    names = [given.get(name, name) for name in test.operands]
    values = [_constant(condition if name in condition.instructions else inner, name) for name in names]
    if values[0] is not None:
        names, values, direction = names[::-1], values[::-1], _MIRRORED.get(direction, direction)
    counter, limit = _place(condition, names[0]), values[1]
    if limit is None:  # it is a part of the state too, which stays
        limit = _initial(module, computation, start, _place(condition, names[1]))
    first, step = _initial(module, computation, start, counter), _step(module, body, counter)
    if first is None or limit is None or not step or direction not in _REACH:
        return None
    return max(0, -(-(limit - first + _REACH[direction]) // step))


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction is, through copies."""
    one = computation.instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start") and one.operands:
        one = computation.instructions.get(one.operands[0])
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.literal):
        return None
    return int(one.literal)


def _place(computation: Computation, name: str) -> int | None:
    """Which part of a loop's state an instruction reads."""
    one = computation.instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "convert") and one.operands:
        one = computation.instructions.get(one.operands[0])
    return int(one.attribute("index")) if one is not None and one.opcode == "get-tuple-element" and one.attribute("index") else None


def _initial(module: Module, computation: Computation, start: Instruction, place: int | None) -> int | None:
    """The integer that a part of a loop's state is at the start."""
    if start.opcode != "tuple" or place is None or place >= len(start.operands):
        return None
    name = start.operands[place]
    value = _constant(computation, name)
    # The state may come out of a loop before this one, which left the number as it was.
    before = computation.instructions.get(name)
    if value is None and before is not None and (kept := _place(computation, name)) is not None:
        loop = computation.instructions.get(before.operands[0])
        if loop is not None and loop.opcode == "while" and (body := module.callee(loop, "body")) and (root := body.root).opcode == "tuple":
            first = computation.instructions.get(loop.operands[0])
            if first is not None and kept < len(root.operands) and _place(body, root.operands[kept]) == kept:
                return _initial(module, computation, first, kept)
    return value


def _step(module: Module, body: Computation, place: int | None) -> int | None:
    """What a run of the body adds to a part of its state."""
    if body.root.opcode != "tuple" or place is None or place >= len(body.root.operands):
        return None
    where, one = body, body.instructions.get(body.root.operands[place])
    while one is not None and one.opcode in ("copy", "bitcast", "fusion"):
        if one.opcode == "fusion":
            where = module.callee(one)
            one = where.root if where else None
        else:
            one = where.instructions.get(one.operands[0])
    if where is None or one is None or one.opcode not in ("add", "subtract"):
        return None
    step = next((value for value in (_constant(where, name) for name in one.operands) if value is not None), None)
    return -step if step is not None and one.opcode == "subtract" else step
