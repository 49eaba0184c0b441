"""Weights of others as a run folder: what `wavepath embed`, `config.init_from`, `wavepath export` and the probes take, without a training run.

An encoder alone becomes a run of task `encoder`, an autoencoder with its decoder one of task `mae`. The folder has a checkpoint of step 0, and
`import.json`, which says where the arrays came from and what was left out of them. It is written whole or not at all.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath import __version__
from wavepath import config as configs
from wavepath.console import progress
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, WavepathError
from wavepath.files import writable_folder, write_json
from wavepath.interop import hf_vitmae, mae_names
from wavepath.interop.vit_reader import check_activation, vit_to_params
from wavepath.interop.weight_files import WeightFiles, preprocessing, read_weight_files, sha256
from wavepath.models.vit import VARIANTS
from wavepath.tasks import encoder as encoders
from wavepath.tasks import mae
from wavepath.tasks.base import State, build, merge_params
from wavepath.training import durations, parallel
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder

ORIGIN = "import.json"
STEP = 0


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        config: of the run that was written.
        parameters: their number.
        left_out: names of arrays that were not used.
        notes: what was assumed or chosen.
        flags: what a training run needs beside `--config.init_from` to have the same encoder.
    """

    config: ConfigDict
    parameters: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    flags: tuple[str, ...]


def import_weights(
    source: Path,
    out: Path,
    *,
    encoder_only: bool = False,
    heads: int = 0,
    decoder_heads: int = 0,
    image_size: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    mpp: float = 0.0,
    key: str = "",
    prefix: str | None = None,
) -> Imported:
    """Reads weights and writes a run folder.

    Args:
        source: a file, an index of files, or a folder of timm or transformers.
        out: the run folder; must not exist, or be empty.
        encoder_only: leave an autoencoder's decoder out.
        heads, decoder_heads: 0: as config.json says, else as published encoders of the width have.
        image_size: side in px that images are resized to; 0: as config.json says, else that of the position table.
        mean, std: of RGB in [0, 1]; empty: as config.json says, else ImageNet's.
        mpp: um per pixel that the encoder was trained at, which `embed --slides` reads tiles at; 0: the default of `wavepath prepare`.
        key, prefix: where in a torch checkpoint the model is, and what the names of the encoder begin with; found where not given.

    Raises:
        DatasetError: files that cannot be read, or arrays that are no encoder of ours.
        ConfigError: numbers that do not fit the encoder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WavepathError(f"{out} exists and is not empty; give a new folder with --out")
    with progress(f"import {Path(source).name}", 4, "stages") as bar:
        weights = read_weight_files(source, key)
        bar.advance(1, "arrays read")
        found = None if encoder_only or prefix is not None else _autoencoder(weights, heads, decoder_heads)
        task, network, model, others, left_out, notes = found or _encoder(weights, heads, prefix)
        notes = [*weights.notes, *notes]
        config = _config(task, model, others, _preprocessed(weights, model, image_size, mean, std, notes), mpp)
        state = _state(config, network)
        bar.advance(1, "checked")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        origin = {
            "source": str(source), "files": [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in weights.files],
            "left_out": list(left_out), "notes": notes, "parameters": parameters, "wavepath_version": __version__,
        }  # fmt: skip
        bar.advance(1, "checksums")
        _write(out, config, state, origin)
        bar.advance(1, "run written")
    return Imported(config, parameters, tuple(left_out), tuple(notes), tuple(_flags(config)))


def _config(task: str, model: Mapping[str, Any], loss: Mapping[str, Any], images: Mapping[str, Any], mpp: float) -> ConfigDict:
    """The resolved config of the run."""
    config = train_defaults()
    config.task = task
    config.train.steps = 1  # nothing is trained: the durations of the config must resolve
    config.batch_size, config.model.dtype = 64, "float32"
    for name, value in loss.items():
        config.loss[name] = value
    _set_model(config.model, {**model, **images})
    config.prepare.tiles.size = config.model.image_size
    if mpp:
        config.prepare.tiles.mpp = float(mpp)
    return durations.resolve(config, 1)


Found = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], Sequence[str], list[str]]


def _autoencoder(weights: WeightFiles, heads: int, decoder_heads: int) -> Found | None:
    """Task, network, fields of `config.model`, of `config.loss`, names left out and notes of an autoencoder with decoder; None where it is none."""
    tensors, settings = weights.tensors, {}
    if hf_vitmae.is_vitmae(tensors):
        tensors, settings = hf_vitmae.to_mae(tensors), hf_vitmae.read_config(weights.config)
    elif not mae_names.is_mae(tensors):
        return None
    check_activation(weights.config, gated=False)
    given = weights.config if settings else {}  # a number of heads that no config.json names is not known
    found = mae_names.mae_to_params(
        tensors, heads or (settings.get("heads", 0) if "num_attention_heads" in given else 0),
        decoder_heads or (settings.get("decoder_heads", 0) if "decoder_num_attention_heads" in given else 0),
    )
    model = {**found.model, **settings.get("model", {})}
    loss = {"norm_pix": settings["norm_pix"]} if settings else {}
    if "norm_pix_loss" in weights.arguments:
        loss = {"norm_pix": bool(weights.arguments["norm_pix_loss"])}
    notes = [f"{guess} assumed" for guess in found.guessed]
    if not loss:
        notes.append("the file does not say whether its loss normalised patches (norm_pix_loss): taken for so")
    return "mae", {mae.NETWORK: found.params}, model, loss, found.left, notes


def _encoder(weights: WeightFiles, heads: int, prefix: str | None) -> Found:
    found = vit_to_params(weights.tensors, heads=heads, config=weights.config, prefix=prefix)
    model = {**found.fields, "image_size": found.grid * found.fields["patch"]}
    return "encoder", {encoders.NETWORK: {encoders.ENCODER: found.params}}, model, {}, found.left_out, list(found.notes)


def _set_model(settings: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Sets the fields of `config.model`; an encoder of a named size gets that name."""
    for name, value in fields.items():
        settings[name] = value
    sizes = {size: name for name, size in VARIANTS.items()}
    size = (settings.width, settings.depth, settings.heads)
    settings.variant = sizes.get(size, encoders.CUSTOM)
    if settings.variant != encoders.CUSTOM:
        settings.width = settings.depth = settings.heads = 0


def _preprocessed(
    weights: WeightFiles, model: Mapping[str, Any], image_size: int, mean: Sequence[float], std: Sequence[float], notes: list[str]
) -> dict[str, Any]:
    """`image_size`, `mean` and `std` by the user, else by the files, else the defaults, which is noted."""
    said = preprocessing(weights.config, weights.preprocessor)
    found = {name: tuple(float(value) for value in values) for name, values in (("mean", mean), ("std", std)) if values}
    for name in ("mean", "std"):
        if name not in found and name in said:
            found[name] = said[name]
        if name in found and (len(found[name]) != 3 or not np.isfinite(found[name]).all() or (name == "std" and min(found[name]) <= 0)):
            raise ConfigError(f"--{name} takes three numbers for red, green and blue in [0, 1], not {found[name]}")
    if len(found) < 2:
        notes.append("mean and deviation of ImageNet assumed, since no file says them; --mean and --std give others")
    side, patch = image_size or said.get("image_size") or model["image_size"], model["patch"]
    if side % patch:
        if image_size:
            raise ConfigError(f"--image-size {image_size} is not a multiple of the encoder's patch of {patch} px; give one that is")
        notes.append(f"images of {model['image_size']} px, since the files' {side} px are no multiple of the patch of {patch} px")
        side = model["image_size"]
    grid = model.get("position_grid")
    if grid and side != grid * patch:
        notes.append(f"the position table of {grid} x {grid} patches is resized to {side // patch} x {side // patch} (bicubic, antialiased)")
    return {**found, "image_size": int(side)}


def _state(config: ConfigDict, network: dict[str, Any]) -> State:
    """The State of a run of `config` with these parameters, held against the shapes that its task has."""
    task = build(config)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    params = {name: merge_params(abstract.params[name], tree, name) for name, tree in network.items()}
    if config.task == "mae":
        return task.fresh(params[mae.NETWORK])
    return State(step=jax.numpy.zeros((), jax.numpy.int32), params=params, opt={})


def _flags(config: ConfigDict) -> list[str]:
    """What differs from the defaults in `config.model`, as flags."""
    changed = configs.diff(train_defaults(), config)
    return [
        f"--config.{name}={_shown(now)}" for name, (_, now) in sorted(changed.items()) if name.startswith("model.") and name != "model.dtype"
    ]


def _shown(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple | list) else str(value)


def _write(out: Path, config: ConfigDict, state: State, origin: Mapping[str, Any]) -> None:
    """The run folder, under a temporary name until it is whole."""
    writable_folder(out.parent)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        run = RunFolder(writable_folder(temporary))
        run.write_configs(config, config, {"examples": 0, "image_shape": [], "places": []})
        write_json(temporary / ORIGIN, dict(origin))
        devices = parallel.Parallel("jit", jax.local_devices()[:1])
        checkpoints = Checkpointer(temporary)
        checkpoints.save(STEP, devices.place(state), {"version": {"wavepath": __version__, "jax": jax.__version__}})
        checkpoints.close()
        run.write_status("done", STEP, STEP, 0.0, 0.0)
        if out.is_dir():
            out.rmdir()
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
