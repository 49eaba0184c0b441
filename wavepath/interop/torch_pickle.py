"""The pickle inside of a torch file, read without unpickling: an interpreter of a closed list of opcodes that builds inert values only.

A pickle is a program for a machine with a stack, and Python's own machine calls whatever function the program names. This one knows the few
opcodes that `torch.save` writes for dictionaries of tensors, and the few names that it writes with them; each name stands for a value of this
file. Nothing is imported or called by a name that a file gives; every other opcode and name ends the reading.

Source: the formats of Python's `pickletools` and of `torch.save`.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

REMEDY = "load it in an environment that trusts it and save `torch.save(model.state_dict(), ...)` or a .safetensors file"
_MOST_DIMENSIONS = 32
_SHOWN = 80  # characters of a name in an error
_MOST_BYTES = 1 << 24  # of one pickle: that of a ViT-H with its optimiser has less than 1 MB, and one byte can ask for 200 bytes of memory
_LARGEST = 1 << 63  # size, stride or offset: torch's have 64 bits, and products of much longer numbers take hours
_MOST_COPIED = 1 << 24  # values and characters that all calls together may copy: a few bytes can name a large value again and again


class Refused(Exception):
    """Something that a file of tensors does not need: nothing after it is read."""


class Opaque:
    """Stands for a value that is not looked into (a number of numpy's, a path)."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers kept in the file under `key`: `count` of `dtype`, or bytes where `dtype` is None."""

    dtype: np.dtype | None
    key: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage: offset, sizes and strides in elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Name:
    """A name that may stand in a file: what calling it gives (None: it is never called), what making an object of it gives."""

    text: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None
    dtype: np.dtype | None = None  # of a storage class or of torch's own dtypes
    storage: bool = False


@dataclass
class Parsed:
    """What a pickle describes, and the storages that it refers to, by key."""

    value: Any
    storages: dict[str, Storage] = field(default_factory=dict)


def interpret(file: BinaryIO, names: dict[str, Name] | None = None) -> Parsed:
    """Reads one pickle from `file` up to its end mark, leaving the position behind it.

    Returns:
        Dictionaries, lists, tuples, sets, numbers and texts as they are; `Tensor`, `Opaque` and names of dtypes for what torch and numpy add.

    Raises:
        Refused: an opcode, a name or a use of one that is not on the list.
        Exception: a damaged stream, by whatever it does wrong (the caller names the file).
    """
    machine = _Machine(NAMES if names is None else names)
    start = file.tell()
    for opcode, argument, place in pickletools.genops(file):
        if place - start > _MOST_BYTES:
            raise Refused(f"has a pickle of more than {_MOST_BYTES} bytes")
        if opcode.name == "STOP":
            return Parsed(machine.stack.pop(), machine.storages)
        machine.step(opcode.name, argument)
    raise ValueError("no end of the pickle")


class _Machine:
    """Stack, memo and what the opcodes do with them."""

    def __init__(self, names: dict[str, Name]):
        self.names, self.storages = names, {}
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def step(self, name: str, argument: Any) -> None:
        """Does one opcode."""
        if name in _IGNORED:
            return
        if name in _ARGUMENTS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            values = [self.stack.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(values[::-1]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif method := _METHODS.get(name):
            method(self, argument)
        else:
            raise Refused(f"uses the pickle opcode {name}, which dictionaries of tensors do not need")

    # Stack ------------------------------------------------------------------------------------------------------------------------------

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.outer.pop()
        return values

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def pop_mark(self, _: Any) -> None:
        self._to_mark()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # Containers -------------------------------------------------------------------------------------------------------------------------

    def close_tuple(self, _: Any) -> None:
        values = self._to_mark()
        self.stack.append(tuple(values))

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        _is(self.stack[-1], list).append(value)

    def appends(self, _: Any) -> None:
        values = self._to_mark()
        _is(self.stack[-1], list).extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _is(self.stack[-1], dict)[_key(key)] = value

    def set_items(self, _: Any) -> None:
        values = self._to_mark()
        target = _is(self.stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self, _: Any) -> None:
        values = self._to_mark()
        _is(self.stack[-1], set).update(_key(value) for value in values)

    # Names ------------------------------------------------------------------------------------------------------------------------------

    def name(self, argument: str) -> None:
        self._name(argument.replace(" ", ".", 1))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(f"{_is(module, str)}.{_is(name, str)}")

    def _name(self, text: str) -> None:
        if text not in self.names:
            raise Refused(f"names {shown(text)}, which dictionaries of tensors do not need")
        self.stack.append(self.names[text])

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or function.call is None or not isinstance(arguments, tuple):
            raise Refused(f"calls {_described(function)}")
        self._count(arguments)
        self.stack.append(function.call(*arguments))

    def _count(self, values: tuple[Any, ...]) -> None:
        self.copied += sum(len(value) for value in values if isinstance(value, str | list | tuple | dict | set))
        if self.copied > _MOST_COPIED:
            raise Refused("copies values again and again")

    def new(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name) or kind.new is None or arguments != ():
            raise Refused(f"makes an object of {_described(kind)}")
        self.stack.append(kind.new())

    def build(self, _: Any) -> None:
        """The state of an object: fields of a Namespace are kept; what ordered dictionaries and opaque values carry is not needed."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Namespace and type(state) is dict:
            self._count((state,))
            target.update(state)
        elif not isinstance(target, Opaque | OrderedDict):
            raise Refused(f"sets the state of {_described(target)}")

    def persistent(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", Name(storage=True, dtype=dtype), str(key), str(), int(count)) | (
                "storage", Name(storage=True, dtype=dtype), str(key), str(), int(count), None
            ) if count >= 0:  # fmt: skip
                found = self.storages.setdefault(key, Storage(dtype, key, count))
                given = Storage(dtype, key, count)
                if found.nbytes != given.nbytes:
                    raise ValueError(f"storage {shown(key)} has two sizes")
                self.stack.append(given)
            case _:
                raise Refused("refers to something outside of it that is not a storage of numbers")


class Namespace(dict):
    """The fields of an `argparse.Namespace`, as a dictionary."""


class OrderedDict(dict):
    """An ordered dictionary; torch hangs the versions of modules on it, which are not needed."""


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise Refused(f"uses {_described(value)} as a {kind.__name__}")
    return value


def _key(value: Any) -> Any:
    # Hashing a tuple visits all that is below it, which a few bytes can make endless.
    if value is None or isinstance(value, str | bytes | int | float):
        return value
    raise Refused(f"has {_described(value)} as the key of a dictionary")


def _described(value: Any) -> str:
    return shown(value.text) if isinstance(value, Name) else f"a value of type {type(value).__name__}"


def shown(text: str) -> str:
    """A text from a file, fit for one line of an error."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "..."


# What names stand for ---------------------------------------------------------------------------------------------------------------------


def _whole(values: Any) -> tuple[int, ...]:
    short = isinstance(values, tuple | list) and len(values) <= _MOST_DIMENSIONS
    if not short or not all(type(value) is int and 0 <= value < _LARGEST for value in values):
        raise ValueError("sizes or strides that are no list of whole numbers")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """`rest`: whether it asks for gradients, its hooks, and whatever else a tensor carries beside its numbers."""
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise Refused("has a tensor without a storage of its own type")
    return _view(storage, offset, shape, strides, storage.dtype)


def _typed_tensor(storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any, _hooks: Any, kind: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(kind, Name) or kind.dtype is None:
        raise Refused("has a tensor without storage or type")
    return _view(storage, offset, shape, strides, kind.dtype)


def _view(storage: Storage, offset: Any, shape: Any, strides: Any, dtype: np.dtype) -> Tensor:
    (offset,), shape, strides = _whole((offset,)), _whole(shape), _whole(strides)
    if len(shape) != len(strides):
        raise ValueError("a tensor whose sizes and strides differ in number")
    return Tensor(storage, offset, shape, strides, dtype)


def _parameter(tensor: Any, *rest: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused(f"has {_described(tensor)} as a parameter")
    return tensor


def _ordered(*items: Any) -> OrderedDict:
    """Protocol 2 has the items in one list of pairs, where there are any."""
    (pairs,) = items or ([],)
    return OrderedDict((_key(key), value) for key, value in pairs)


def _bytes(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise Refused("encodes a text in another way than bytes are")
    return _is(text, str).encode("latin1")


def _table() -> dict[str, Name]:
    numbers = {
        "Double": ("float64", "double"), "Float": ("float32", "float"), "Half": ("float16", "half"), "BFloat16": ("bfloat16",),
        "Long": ("int64", "long"), "Int": ("int32", "int"), "Short": ("int16", "short"), "Char": ("int8",), "Byte": ("uint8",),
        "Bool": ("bool",), "ComplexFloat": ("complex64", "cfloat"), "ComplexDouble": ("complex128", "cdouble"),
    }  # fmt: skip
    names = []
    for storage, dtypes in numbers.items():
        dtype = np.dtype(ml_dtypes.bfloat16 if dtypes[0] == "bfloat16" else dtypes[0])
        names.append(Name(f"torch.{storage}Storage", dtype=dtype, storage=True))
        names += [Name(f"torch.{each}", dtype=dtype) for each in dtypes]
    for kind in ("uint16", "uint32", "uint64"):
        names.append(Name(f"torch.{kind}", dtype=np.dtype(kind)))
    for kind in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        names.append(Name(f"torch.{kind}", dtype=np.dtype(getattr(ml_dtypes, kind))))
    names.append(Name("torch.storage.UntypedStorage", storage=True))
    tensors = {"_rebuild_tensor": _tensor, "_rebuild_tensor_v2": _tensor, "_rebuild_tensor_v3": _typed_tensor}
    names += [Name(f"torch._utils.{name}", call) for name, call in tensors.items()]
    names += [Name(f"torch._utils._rebuild_parameter{name}", _parameter) for name in ("", "_with_state")]
    names += [
        *(Name(f"{module}.set", lambda values=(): {_key(value) for value in values}) for module in ("builtins", "__builtin__")),
        Name("torch.Size", lambda values=(): _whole(values)),
        Name("torch.device", lambda *where: Opaque("device")),
        Name("collections.OrderedDict", _ordered, OrderedDict),
        Name("collections.Counter", lambda counts=(): OrderedDict(_is(counts, dict)) if counts else OrderedDict()),
        Name("argparse.Namespace", None, Namespace),
        Name("_codecs.encode", _bytes),
    ]
    # Numbers of numpy's stand beside the weights (a best accuracy): they are stepped over.
    opaque = ["numpy.dtype", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"]
    opaque += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
    names += [Name(name, lambda *_, name=name: Opaque(name)) for name in opaque] + [Name("numpy.ndarray")]
    return {name.text: name for name in names}


NAMES = _table()
_IGNORED = {"PROTO", "FRAME"}
_ARGUMENTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "POP": _Machine.pop, "POP_MARK": _Machine.pop_mark, "MEMOIZE": _Machine.memoize, "TUPLE": _Machine.close_tuple,
    "APPEND": _Machine.append, "APPENDS": _Machine.appends, "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items, "GLOBAL": _Machine.name, "STACK_GLOBAL": _Machine.name_on_stack, "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new, "BUILD": _Machine.build, "BINPERSID": _Machine.persistent,
}  # fmt: skip
