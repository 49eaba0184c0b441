"""Torch's `.pt` and `.pth` files without torch: read without running anything that is in them, and written, with the same bytes each time.

A file is a zip archive with a pickle that says which views of which storages the tensors are, and the storages as they lie in memory; before
torch 1.6 it was five pickles and the storages one after the other. The pickles are read by `torch_pickle`, which runs nothing.

Everything that a file says about sizes is held against the bytes that are there: archives must not be compressed (torch's never are), views must
lie inside of their storages, and tensors are returned as views, so that reading takes no more memory than the file.
"""

import io
import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from wavepath.console import progress
from wavepath.errors import DatasetError
from wavepath.files import atomic_path
from wavepath.interop.torch_pickle import NAMES, REMEDY, Name, Parsed, Refused, Tensor, interpret, shown

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_DEEPEST = 64  # dictionaries and lists inside of each other
_SMALL = 1 << 24  # values that a tensor may show where fewer are stored (an expanded bias)
_ALIGNED = 64  # bytes, of storages in the archive, as torch lays them
_FOLDER = "archive"
_STORAGES = {name.dtype: text.removeprefix("torch.") for text, name in NAMES.items() if name.storage and name.dtype is not None}


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote: nested dictionaries, lists, tuples, numbers and texts, with tensors as numpy arrays (bfloat16 by `ml_dtypes`).

    A tensor that was saved alone is returned as an array. Tensors that share a storage share it here too; all are read-only. An
    `argparse.Namespace` is a dictionary of its fields; numbers of numpy's are stepped over and stand as `Opaque`.

    Raises:
        DatasetError: no such file, another format, a damaged one, or one whose pickle does or names anything that tensors do not need: none of it
            is run, and the message says what it was.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; give a .pt or .pth file that `torch.save` wrote")
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                return _read_zip(file, path)
            if start.startswith(b"\x80") and start[2:13] == b"\x8a\x0a" + _LEGACY_MAGIC[:9]:
                return _read_legacy(file, path)
    except Refused as error:
        raise DatasetError(f"{path} {error}; nothing of it was run: {REMEDY}") from None
    except DatasetError:
        raise
    except Exception as error:  # a damaged pickle or archive goes wrong in whatever way its bytes say
        reason = shown((str(error).splitlines() or [""])[0])
        raise DatasetError(f"{path} is damaged ({type(error).__name__}: {reason}); copy it again") from None
    raise DatasetError(f"{path} is not a file of torch's (neither a zip archive nor the older format); {REMEDY}")


# Archives ---------------------------------------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO, path: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = _entries(archive, path)
        if any(name.startswith("code/") or name == "constants.pkl" for name in entries):
            raise Refused("is a TorchScript program, not a file of tensors")
        if "data.pkl" not in entries:
            raise Refused("is a zip archive without data.pkl, which `torch.save` writes")
        order = archive.read(entries["byteorder"]).strip() if "byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise ValueError("unknown byte order")
        parsed = interpret(io.BytesIO(archive.read(entries["data.pkl"])))
        kept: dict[str, bytes] = {}
        with progress(f"reading {path.name}", sum(storage.nbytes for storage in parsed.storages.values()) >> 20, "MiB") as bar:
            for key, storage in parsed.storages.items():
                entry = entries.get(f"data/{key}")
                if entry is None or entry.file_size != storage.nbytes:
                    raise ValueError(f"storage {shown(key)} is not there or has another size than its tensors need")
                kept[key] = archive.read(entry)  # which checks its sum
                bar.advance(len(kept[key]) / 2**20)
    return _resolved(parsed, kept, swap=order == b"big")


def _entries(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by their names below its one folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for entry in archive.infolist():
        folder, slash, name = entry.filename.partition("/")
        parts = entry.filename.split("/")
        if not slash or not name or not folder or ".." in parts or "\\" in entry.filename or name in found:
            raise Refused(f"has an entry {shown(entry.filename)}, which `torch.save` does not write")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refused("is a compressed archive, which `torch.save` does not write")
        folders.add(folder)
        found[name] = entry
    if len(folders) != 1:
        raise Refused("is a zip archive of several folders, which `torch.save` does not write")
    if sum(entry.file_size for entry in found.values()) > path.stat().st_size:
        raise Refused("is a zip archive whose entries overlap")
    return found


def _read_legacy(file: BinaryIO, path: Path) -> Any:
    """The format before torch 1.6: magic, version, machine, object, keys of its storages; then of each its count and its numbers."""
    size = path.stat().st_size
    _, version, machine = (interpret(file, {}).value for _ in range(3))
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("is of a version or a machine that is not known here")
    parsed = interpret(file)
    keys = interpret(file, {}).value
    # Only texts are hashed: hashing a tuple visits all that is below it, which a few bytes can make endless.
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(parsed.storages):
        raise ValueError("the storages are not those of the tensors")
    kept: dict[str, bytes] = {}
    with progress(f"reading {path.name}", size >> 20, "MiB") as bar:
        for key in keys:
            storage = parsed.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count != storage.count or storage.nbytes > size - file.tell():
                raise ValueError(f"storage {shown(key)} is not whole")
            kept[key] = file.read(storage.nbytes)
            bar.advance(len(kept[key]) / 2**20)
    return _resolved(parsed, kept, swap=False)


# Values -----------------------------------------------------------------------------------------------------------------------------------


def _resolved(parsed: Parsed, kept: Mapping[str, bytes], swap: bool) -> Any:
    """The value with arrays for tensors; what is shared stays shared, and a value inside of itself is an error."""
    done: dict[int, Any] = {}
    open_: set[int] = set()
    numbers: dict[tuple[str, np.dtype], np.ndarray] = {}

    def resolve(value: Any, depth: int) -> Any:
        if not isinstance(value, dict | list | tuple | set | Tensor):
            return value.text if isinstance(value, Name) else value
        if id(value) in done:
            return done[id(value)]
        if id(value) in open_:
            raise Refused("has a value that contains itself")
        if depth > _DEEPEST:
            raise Refused(f"has values more than {_DEEPEST} levels deep")
        open_.add(id(value))
        if isinstance(value, Tensor):
            place = value.storage.key, value.dtype
            if place not in numbers:  # once for each storage, however many tensors show it
                numbers[place] = _numbers(kept[place[0]], value.dtype, swap)
            result = _array(value, numbers[place])
        elif isinstance(value, dict):
            result = {key: resolve(item, depth + 1) for key, item in value.items()}
        elif isinstance(value, set):
            result = value
        else:
            result = type(value)(resolve(item, depth + 1) for item in value)
        open_.remove(id(value))
        done[id(value)] = result
        return result

    return resolve(parsed.value, 0)


def _array(tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    """A read-only view of a storage's numbers.

    Raises:
        ValueError: it reaches beyond them. Refused: it shows many times what is stored.
    """
    dtype, shape = tensor.dtype, tensor.shape
    values = math.prod(shape)
    stored = len(numbers)
    if values > max(stored, _SMALL):
        raise Refused(f"has a tensor of {values} values where {stored} are stored")
    if values == 0:
        return np.zeros(shape, dtype)
    last = tensor.offset + sum((side - 1) * stride for side, stride in zip(shape, tensor.strides, strict=True))
    if last >= stored:
        raise ValueError(f"a tensor reaches to value {last} of a storage of {stored}")
    numbers = numbers[tensor.offset :]
    steps = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)


def _numbers(kept: bytes, dtype: np.dtype, swap: bool) -> np.ndarray:
    """A storage's bytes as numbers of one type: a view, but of truth values, any byte of which may be there, and of the other byte order."""
    flat = np.frombuffer(kept, np.uint8)[: len(kept) // dtype.itemsize * dtype.itemsize]
    if swap and dtype.itemsize > 1:
        part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        flat = flat.view(f"u{part}").byteswap().view(np.uint8)
    return flat != 0 if dtype.kind == "b" else flat.view(dtype)


# Writing ----------------------------------------------------------------------------------------------------------------------------------


def write_tensor(path: Path, array: Shaped[np.ndarray, "..."]) -> None:
    """Writes one tensor, as CLAM keeps the features of a slide (float32 [n, d]): `torch.load(path)` gives it, with `weights_only=True` too.

    Raises:
        ValueError: a type of numbers that torch has no storage for.
    """
    write_torch(path, np.asarray(array))


def write_torch(path: Path, value: Any) -> None:
    """Writes dictionaries, lists, tuples, texts and numbers with arrays as tensors; whole or not at all, equal values as equal bytes.

    Raises:
        ValueError: a value of another type, or a type of numbers that torch has no storage for.
    """
    storages: list[np.ndarray] = []
    pickle = b"\x80\x02" + _pickled(value, storages) + b"."
    entries: list[tuple[str, Any]] = [("data.pkl", pickle), ("byteorder", b"little")]
    entries += [(f"data/{key}", _little(array)) for key, array in enumerate(storages)] + [("version", b"3\n")]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            entry = zipfile.ZipInfo(f"{_FOLDER}/{name}", (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr, entry.file_size = 3, 0o600 << 16, len(data)
            # As torch does it, an extra field of padding puts the numbers where they can be mapped into memory.
            head = archive.fp.tell() + zipfile.sizeFileHeader + len(entry.filename) + 4  # type: ignore[union-attr]
            padding = -head % _ALIGNED
            entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            with archive.open(entry, "w") as target:
                target.write(data)


def _little(array: np.ndarray) -> memoryview:
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    return memoryview(array.reshape(-1).view(np.uint8))


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """One value as opcodes of protocol 2, which every version of torch reads; arrays are put into `storages`."""
    if isinstance(value, np.ndarray):
        return _pickled_tensor(value, storages)
    if isinstance(value, bool | None):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        return (lambda data: b"\x8a" + bytes([len(data)]) + data)(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return (lambda data: b"X" + struct.pack("<I", len(data)) + data)(value.encode())
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_pickled(part, storages) for item in value.items() for part in item) + b"u"
    if isinstance(value, list | tuple):
        parts = b"".join(_pickled(item, storages) for item in value)
        return b"](" + parts + b"e" if isinstance(value, list) else b"(" + parts + b"t"
    raise ValueError(f"a value of type {type(value).__name__} has no place in a file of tensors")


def _pickled_tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    kind = _STORAGES.get(array.dtype.newbyteorder("=") if array.dtype.kind != "V" else array.dtype)
    if kind is None:
        raise ValueError(f"torch has no storage for numbers of type {array.dtype}")
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    plain = [_pickled(each, []) for each in ("storage", str(len(storages)), "cpu", array.size, 0, array.shape, tuple(strides))]
    storages.append(array)
    place = b"(" + plain[0] + f"ctorch\n{kind}\n".encode() + b"".join(plain[1:4]) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"  # no gradient, no hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"".join(plain[4:]) + hooks + b"tR"
