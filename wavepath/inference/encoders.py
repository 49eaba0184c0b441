"""What makes features of tiles: the encoder of a run, the same as it was before the first step, or the floor beneath both, the tiles' colours."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from wavepath import __version__
from wavepath import config as configs
from wavepath.console import say
from wavepath.errors import CheckpointError, ConfigError
from wavepath.ops.stain import separate_stains, to_float
from wavepath.tasks import lineage
from wavepath.tasks.base import task_class
from wavepath.training import checkpoint, parallel

COLOUR = "colour-statistics"
COLOURS = ("red", "green", "blue", "haematoxylin", "eosin")


@dataclass(frozen=True)
class Encoder:
    """Features of a batch of tiles.

    Attributes:
        name: as feature files say it.
        origin: what tells its features from those of others: run, step, checksum of the parameters, version.
        train_slides: what it has learnt from (`tasks.lineage`); None: not known.
        encode: a host batch with `image` uint8 [b, h, w, 3] -> `cls`, `mean` f32 [b, d].
    """

    name: str
    origin: dict[str, Any]
    train_slides: list[str] | None
    encode: Callable[[Mapping[str, np.ndarray]], Mapping[str, Array]]


def run_config(run: Path) -> ConfigDict:
    """The config of a run that has features.

    Raises:
        CheckpointError: no run. ConfigError: of a task without features.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{run} is no run folder (no config.json in it); give the --workdir of a `wavepath train`")
    config = configs.load_json(path)
    if not task_class(config.task).embeds:
        raise ConfigError(f"{run} is a run of task {config.task!r}, which has no features; give a pretraining or fine-tuning run")
    return config


def run_encoder(run: Path, step: int | None, batch_size: int, devices: int = 0, untrained: bool = False) -> Encoder:
    """The encoder of a run.

    Args:
        run: its folder; the newest whole checkpoint is used, or `step`.
        batch_size: tiles at once. devices: see `embed`.
        untrained: the parameters as the run's seed drew them, ahead of the first step and of any that it was started from.

    Raises:
        ConfigError: a batch that does not divide over the devices, or a step of an untrained encoder. CheckpointError: no whole checkpoint.
    """
    config = run_config(run)
    # The run may have been trained on a machine with more devices than this one.
    used = parallel.for_tools(config.parallel, devices)
    if batch_size % len(used.devices):
        raise ConfigError(f"--batch-size {batch_size} does not divide over {len(used.devices)} devices; choose a multiple, or --devices 1")
    if untrained and step is not None:
        raise ConfigError("--step is a checkpoint of the training, and --untrained is from before it; leave one of them out")
    config, task, state = checkpoint.restore_run(run, step, parallel=used)
    if untrained:
        state = used.init(task, config.seed)
    slides = [] if untrained else lineage.seen(task.constants)
    say(f"encoder: {run} {'as initialised' if untrained else f'at step {int(state.step)}'}, {used}")
    origin = {
        "run": str(Path(run).resolve()), "step": int(state.step), "parameters": digest(state.ema or state.params), "wavepath_version": __version__,
    }
    predict = used.predict(task, ("cls", "mean"))
    name = f"wavepath-{config.task}-{config.model.variant}{config.model.patch}" + "-untrained" * untrained
    return Encoder(name, origin, slides, lambda batch: predict(state, used.put(batch)))


def colour_encoder() -> Encoder:
    """Colour statistics as features (both of them), which nothing was learnt for: what an encoder has to beat."""
    statistics = jax.jit(colour_statistics)

    def encode(batch: Mapping[str, np.ndarray]) -> Mapping[str, Array]:
        found = statistics(batch["image"])
        return {"cls": found, "mean": found}

    origin = {"run": "", "step": 0, "parameters": COLOUR, "wavepath_version": __version__}
    return Encoder(COLOUR, origin, [], encode)


def colour_statistics(images: UInt8[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b 10"]:
    """Mean and standard deviation over all pixels of red, green and blue in [0, 1], and of the amounts of haematoxylin and eosin (Ruifrok and
    Johnston, as `ops.stain.separate_stains`; 1 is full absorption): five means (`COLOURS`), then five deviations."""
    rgb = to_float(images)
    planes = jnp.concatenate([rgb, separate_stains(rgb)[..., :2]], -1)
    reduce = partial(jnp.mean, axis=(1, 2))
    mean = reduce(planes)
    # Of the deviations, not of squares less the mean's square, which cancel in float32.
    return jnp.concatenate([mean, jnp.sqrt(reduce((planes - mean[:, None, None]) ** 2))], -1)


def digest(params: Any) -> str:
    """A short name of the parameters: features of other parameters are not mistaken for these."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]
