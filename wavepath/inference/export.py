"""A trained encoder for other programs: a folder that timm or transformers load, plain arrays, or a compiled program that needs JAX alone.

Averaged parameters are exported where the run keeps them, as `wavepath embed` uses them. A folder is written beside its place and renamed, with
a README that says how it is loaded, where it comes from, and the SHA-256 of every file.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from wavepath import __version__
from wavepath.console import progress, say
from wavepath.errors import CheckpointError, ConfigError
from wavepath.files import read_json, write_json, write_text
from wavepath.inference.stablehlo import write_stablehlo
from wavepath.interop.hf_vitmae import write_vitmae
from wavepath.interop.timm_folder import write_timm_folder
from wavepath.interop.weight_files import sha256
from wavepath.tasks.base import task_class
from wavepath.tasks.encoder import ENCODER, arranged, encoder_size
from wavepath.training import checkpoint
from wavepath.training.import_run import ORIGIN

FORMATS = ("timm", "hf-vitmae", "npz", "stablehlo")
README, RECORD = "README.md", "export.json"
ARRAYS = "weights.npz"
_STACKS = ("blocks", "decoder_blocks")


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its format, what of the network is in it, the run's step, the folder's bytes."""

    folder: Path
    format: str
    content: str
    step: int
    nbytes: int


def export(run: Path, out: Path, kind: str, *, step: int | None = None, encoder_only: bool = False) -> Exported:
    """Writes the encoder of a run as a folder for other programs.

    Args:
        run: run folder of `wavepath train` or `wavepath import`; its newest whole checkpoint, or `step`.
        out: folder that does not exist yet, or is empty.
        kind: one of `FORMATS`.
        encoder_only: leaves the decoder of a pretraining run out, in the formats that have one (hf-vitmae, npz).

    Raises:
        ConfigError: an unknown format, a folder with files in it, a run without an encoder, an encoder that the format cannot hold.
        CheckpointError: no whole checkpoint in `run`.
    """
    if kind not in FORMATS:
        raise ConfigError(f"--format {kind!r} is unknown; choose one of {', '.join(FORMATS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; give --out a new folder, or delete it")
    _check_task(run)
    with progress(f"export as {kind}", 3, "stages") as bar:
        config, task, state = checkpoint.restore_run(run, step)
        network, params = _network(state.ema or state.params, run)
        params = jax.tree.map(np.asarray, params)
        bar.advance(1, "checkpoint read")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            parts = _plain({ENCODER: params[ENCODER]} if encoder_only else params)
            content = _WRITERS[kind](task, config, parts, folder)
            bar.advance(1, "weights written")
            about = _about(run, config, network, int(state.step), kind, content)
            _describe(folder, about, config)
            nbytes = sum(path.stat().st_size for path in folder.iterdir())
            if out.exists():
                out.rmdir()
            os.replace(folder, out)
            bar.advance(1)
    say(f"{content} of {run} at step {int(state.step)} is in {out}")
    return Exported(out, kind, content, int(state.step), nbytes)


def _check_task(run: Path) -> None:
    """Refuses a run without an encoder before its checkpoint is read."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{run} is no run folder (no config.json in it); give the folder of a `wavepath train` or `wavepath import`")
    name = read_json(path).get("task", "mae")
    if not task_class(name).embeds:
        raise ConfigError(f"{run} is a run of task {name!r}, which has no encoder to export; give a pretraining, fine-tuning or imported run")


def _network(params: Mapping[str, Any], run: Path) -> tuple[str, Mapping[str, Any]]:
    for name, tree in params.items():
        if ENCODER in tree:
            return name, tree
    raise ConfigError(f"{run} holds no encoder but {', '.join(params)}; give a pretraining, fine-tuning or imported run")


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a tree for each block, however the run kept them."""
    plain = {name: arranged(tree, False) if name in _STACKS else tree for name, tree in params.items()}
    plain[ENCODER] = {name: arranged(tree, False) if name in _STACKS else tree for name, tree in params[ENCODER].items()}
    return plain


# Formats ----------------------------------------------------------------------------------------------------------------------------------


def _timm(task: Any, config: Any, params: dict[str, Any], folder: Path) -> str:
    write_timm_folder(params[ENCODER], _settings(config), folder)
    return ENCODER


def _vitmae(task: Any, config: Any, params: dict[str, Any], folder: Path) -> str:
    decoder = "decoder_pred" in params
    write_vitmae(params if decoder else {ENCODER: params[ENCODER]}, _settings(config), folder)
    return "encoder and decoder" if decoder else ENCODER


def _settings(config: Any) -> dict[str, Any]:
    """`config.model` with the numbers of a named size, and the loss's `norm_pix`."""
    return {**config.model.to_dict(), **encoder_size(config.model)._asdict(), "norm_pix": config.loss.norm_pix}


def _npz(task: Any, config: Any, params: dict[str, Any], folder: Path) -> str:
    flat = traverse_util.flatten_dict(params, sep="/")
    np.savez(folder / ARRAYS, allow_pickle=False, **{name: np.asarray(flat[name]) for name in sorted(flat)})
    return "encoder and decoder" if "decoder_pred" in params else ", ".join(params)


def _stablehlo(task: Any, config: Any, params: dict[str, Any], folder: Path) -> str:
    write_stablehlo(config, task.networks[0], params, folder)
    return ENCODER


_WRITERS: dict[str, Callable[[Any, Any, dict[str, Any], Path], str]] = {
    "timm": _timm, "hf-vitmae": _vitmae, "npz": _npz, "stablehlo": _stablehlo,
}  # fmt: skip

# What is beside the weights ---------------------------------------------------------------------------------------------------------------

_LOAD = {
    "timm": """import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()  # the path of this folder
settings = timm.data.resolve_model_data_config(model)
features = model(timm.data.create_transform(**settings)(image)[None])  # image: a PIL image in RGB""",
    "hf-vitmae": """from transformers import ViTImageProcessor, ViTMAEModel

processor = ViTImageProcessor.from_pretrained(".")  # the path of this folder
model = ViTMAEModel.from_pretrained(".", mask_ratio=0.0).eval()  # features of all patches; with masks leave mask_ratio out
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
features = tokens[:, 0]  # class token; tokens[:, 1:].mean(1): mean of patches, which come in a shuffled order""",
    "npz": """import numpy as np
from flax import traverse_util

with np.load("weights.npz", allow_pickle=False) as file:
    params = traverse_util.unflatten_dict({name: file[name] for name in file.files}, sep="/")
# export.json has config.model, with which wavepath.models.vit.ViT (params["encoder"]) is built""",
    "stablehlo": """from wavepath.inference.stablehlo import load_stablehlo

encoder = load_stablehlo(".")  # the path of this folder
outputs = encoder(images)  # uint8 [b, side, side, 3] -> {"cls": [b, d], "mean": [b, d]}, float32

# or without wavepath, with jax and safetensors alone
import jax
from jax import export
from safetensors.numpy import load_file

exported = export.deserialize(open("encoder.stablehlo", "rb").read())
outputs = jax.jit(exported.call)(load_file("weights.safetensors"), images)""",
}


def _about(run: Path, config: Any, network: str, step: int, kind: str, content: str) -> dict[str, Any]:
    size = encoder_size(config.model)
    origin = Path(run) / ORIGIN
    imported = {"imported_from": read_json(origin)["files"]} if origin.is_file() else {}
    return {
        **imported,
        "format": kind, "content": content, "network": network, "task": config.task, "run": Path(run).resolve().name, "step": step,
        "wavepath_version": __version__, "width": size.width, "depth": size.depth, "heads": size.heads, "model": config.model.to_dict(),
    }  # fmt: skip


def _describe(folder: Path, about: dict[str, Any], config: Any) -> None:
    """Writes `export.json` and `README.md` for the files that are there."""
    model = config.model
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / RECORD, {**about, "sha256": files})
    mean, std = (", ".join(f"{value:g}" for value in model[name]) for name in ("mean", "std"))
    origin = "".join(f"\n* Imported from {file['name']} (SHA-256 {file['sha256']})." for file in about.get("imported_from", ()))
    if about["step"]:
        origin += f"\n* Trained for {about['step']} steps, on tiles at {config.prepare.tiles.mpp:g} um per px unless their folder says otherwise."
    inside = " Both are part of the program, which takes uint8." if about["format"] == "stablehlo" else ""
    text = f"""# Encoder of {about['run']}

Exported by wavepath {__version__} from a run of task `{about['task']}` at step {about['step']}.

* Vision transformer: width {about['width']}, {about['depth']} blocks, {about['heads']} heads, patches of {model.patch} px. In this folder: \
{about['content']}.
* Images: RGB, {model.image_size} x {model.image_size} px, values in [0, 1] less mean ({mean}), over deviation ({std}).{inside}{origin}
* A research model: not for diagnosis. Its licence is that of its training data and of the weights it started from.

## Load it

```python
{_LOAD[about['format']]}
```

## Files (SHA-256)

```
{chr(10).join(f'{digest}  {name}' for name, digest in files.items())}
```
"""
    write_text(folder / README, text)
