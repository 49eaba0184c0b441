"""Files of weights as others publish them, read to arrays by name without running anything that is in them.

A file (`.safetensors`, `.npz`, torch's `.pth .pt .bin .ckpt`), several files with an index, or a folder as timm and transformers write it, whose
`config.json` and `preprocessor_config.json` say what the arrays do not: heads, the size of images, their mean and deviation.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors reads bfloat16 only where numpy has been told of it)
import numpy as np

from wavepath.console import progress
from wavepath.errors import DatasetError
from wavepath.files import read_json
from wavepath.interop import torch_file

SUFFIXES = (".safetensors", ".npz", *torch_file.SUFFIXES)
# In a folder the first of these that is there is the model; what else lies about is then not looked at.
NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
# What checkpoints call the model, in the order of preference: of a teacher and its student the teacher is published.
WRAPPERS = ("teacher", "model_ema", "state_dict_ema", "ema", "state_dict", "model_state_dict", "model", "module", "net", "network", "encoder")
_LISTED = 5
# A compressed .npz larger than this, and by more than that, is no file of weights, whose bits are nearly random.
_MOST_UNPACKED, _MOST_PACKED = 1 << 30, 50
_DEEPEST = 4


@dataclass(frozen=True)
class WeightFiles:
    """Arrays by name, and what their origin says.

    Attributes:
        tensors: as they are in the files.
        files: which were read.
        config: `config.json` of timm or transformers beside them; empty where there is none.
        preprocessor: `preprocessor_config.json`, likewise.
        arguments: what a torch checkpoint says that the model was trained with (`args`, plain values alone).
        notes: what was chosen among several.
    """

    tensors: dict[str, np.ndarray]
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weight_files(path: Path, key: str = "") -> WeightFiles:
    """Reads a file, the files that an index names, or a folder.

    Args:
        path: as described above.
        key: where in a torch checkpoint the model is, as in `teacher.backbone`; empty: found by its name.

    Raises:
        DatasetError: nothing there, several candidates, another format, a damaged file, or code in it (none of which is run).
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path} does not exist; give a file of weights ({', '.join(SUFFIXES)}) or a folder of timm or transformers")
    model = _in_folder(path) if path.is_dir() else path
    notes: list[str] = []
    parts = _indexed(model) if model.name.endswith(".index.json") else [model]
    tensors: dict[str, np.ndarray] = {}
    arguments: dict[str, Any] = {}
    with progress("files read", len(parts), "files") as bar:
        for part in parts:
            if part.suffix in torch_file.SUFFIXES:
                value = torch_file.read_torch(part)
                found = _tensors_of(value, part, key, notes)
                if isinstance(value, Mapping) and isinstance(value.get("args"), Mapping):
                    arguments |= {str(name): plain for name, plain in value["args"].items() if isinstance(plain, bool | int | float | str)}
            else:
                found = read_arrays(part)
            if both := tensors.keys() & found.keys():
                raise DatasetError(f"{part} has {min(both)} once more, which another file of {model} holds; copy them again")
            tensors |= found
            bar.advance(1, part.name)
    if not tensors:
        raise DatasetError(f"{model} holds no array; give a file of weights")
    config, preprocessor = (_json(model.parent / name) for name in ("config.json", "preprocessor_config.json"))
    return WeightFiles(tensors, tuple(parts), config, preprocessor, arguments, tuple(notes))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .safetensors or .npz file.

    Raises:
        DatasetError: another format, an array of Python objects (which could run code), or a damaged file.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise DatasetError(
            f"{path} is neither .safetensors nor .npz; other formats can run code when they are read, so save the arrays as one of these"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        with np.load(path, allow_pickle=False) as archive:
            unpacked = sum(entry.file_size for entry in archive.zip.infolist())
            if unpacked > max(_MOST_UNPACKED, _MOST_PACKED * path.stat().st_size):
                raise ValueError(f"{unpacked >> 20} MiB packed as no weights can be")
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # three libraries' own types for a damaged file
        reason = (str(error).splitlines() or ["damaged"])[0][:120]
        if "allow_pickle" in reason:
            raise DatasetError(f"{path} holds Python objects, which can run code and were not read; save plain arrays of numbers") from None
        raise DatasetError(f"{path} cannot be read ({type(error).__name__}: {reason}); copy it again") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def preprocessing(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """`mean`, `std` (of RGB in [0, 1]) and `image_size` that timm's or transformers' files give; what they do not say is left out.

    timm: `pretrained_cfg` of config.json, or config.json itself. transformers: `image_mean`, `image_std`, and the size of the crop, or else the one
    that is resized to.
    """
    timm = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), Mapping) else config
    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        values = preprocessor.get(f"image_{name}", timm.get(name))
        if isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(value, int | float) for value in values):
            found[name] = tuple(float(value) for value in values)
    crop = preprocessor.get("crop_size") if preprocessor.get("do_center_crop", True) else None
    arguments = config.get("model_args") if isinstance(config.get("model_args"), Mapping) else {}
    for value in (crop, preprocessor.get("size"), timm.get("input_size"), arguments.get("img_size"), config.get("image_size")):
        if side := _side(value):
            found["image_size"] = side
            break
    return found


def number_in(config: Mapping[str, Any], name: str, default: float) -> Any:
    """A number of a config.json, whole where `default` is, and not negative; `default` where it is not there.

    Raises:
        DatasetError: something else is there.
    """
    value = config.get(name)
    if value is None:
        return default
    kinds = int if isinstance(default, int) else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:
        raise DatasetError(f"config.json gives {name}={str(value)[:40]!r}, which is no such number; correct it, or move the weights elsewhere")
    return value


def _side(value: Any) -> int:
    """Side in px of 224, [3, 224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}; 0 for anything else."""
    if isinstance(value, Mapping):
        value = value.get("height", value.get("shortest_edge"))
    if isinstance(value, list | tuple) and value:
        value = value[-1]
    return value if isinstance(value, int) and value > 0 else 0


def _in_folder(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found[:_LISTED])
        raise DatasetError(f"{folder} holds {'several files of weights: ' + listed if found else 'no file of weights'}; give the file itself")
    return found[0]


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it."""
    names = read_json(index)
    names = names.get("weight_map") if isinstance(names, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
        raise DatasetError(f"{index} does not map arrays to files beside it; copy it again")
    parts = [index.parent / name for name in sorted(set(names.values()))]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise DatasetError(f"{index} names files that are not there ({', '.join(missing[:_LISTED])}); copy the whole folder")
    return parts


def _tensors_of(value: Any, path: Path, key: str, notes: list[str]) -> dict[str, np.ndarray]:
    """The dictionary of arrays inside of a torch checkpoint."""
    if isinstance(value, np.ndarray):
        raise DatasetError(f"{path} is a single array, not a model; `wavepath evaluate` and `wavepath train` read such features")
    for part in key.split(".") if key else ():
        if not isinstance(value, Mapping) or part not in value:
            raise DatasetError(f"--key {key} is not in {path}; it has {_keys(value)}")
        value = value[part]
    where = [key] if key else []
    for _ in range(_DEEPEST):
        if not isinstance(value, Mapping):
            break
        arrays = {str(name): array for name, array in value.items() if isinstance(array, np.ndarray)}
        inner = [name for name in WRAPPERS if isinstance(value.get(name), Mapping)]
        if len(arrays) > 1 or not inner:
            if where:
                notes.append(f"read {'.'.join(where)} of {path.name}")
            return arrays
        if len(inner) > 1:
            notes.append(f"{path.name} has {', '.join(inner)}: {inner[0]} is taken; --key names another")
        where.append(inner[0])
        value = value[inner[0]]
    raise DatasetError(f"{path} holds no dictionary of arrays; say where it is with --key (there are {_keys(value)})")


def _keys(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "no names"
    names = [str(name) for name in value]
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of timm or transformers; anything else of its name (a run folder has a config.json too) says nothing about weights."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DatasetError(f"{path} is not valid JSON; copy it again, or move the weights to a folder of their own") from None
    known = ("model_type", "architecture", "architectures", "pretrained_cfg", "image_mean", "image_processor_type", "feature_extractor_type")
    return found if isinstance(found, dict) and any(name in found for name in known) else {}
