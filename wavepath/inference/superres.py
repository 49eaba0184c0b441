"""Super-resolution of a slide or an image by a trained network, from the low resolution alone, in overlapping tiles (METHODS 4.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from wavepath.console import say, warn
from wavepath.data.mpp import MIN_MPP
from wavepath.data.slides import TileCache, open_slide
from wavepath.errors import ConfigError
from wavepath.inference.grid import tiling
from wavepath.inference.slide_input import (
    check_paths,
    file_digest,
    is_glass,
    keep_rows,
    make_parallel,
    parameters_digest,
    run_config,
    say_own_pixels,
    view,
    warn_of_another_mpp,
)
from wavepath.inference.whole_slide import Predict, Written, write_slide
from wavepath.tasks.base import build
from wavepath.training import checkpoint


@dataclass(frozen=True)
class Network:
    """A trained super-resolution network, ready for tiles of any one shape."""

    predict: Predict
    scale: int
    name: str  # cwt-net, edsr ...
    step: int
    parameters: str  # digest: networks of other parameters are not mistaken for this one
    devices: str
    patch: int  # side in px of the low resolution that it was trained on
    mpp: float | None = None  # of that low resolution, in um; None: not known, or several


def load_network(run: Path, *, scale: int | None = None, step: int | None = None, batch: int = 16, devices: int = 0) -> Network:
    """Restores a run of the task `superres` for use on low resolution alone (mode `wr`, whatever the run's own evaluation is).

    Args:
        run: run folder of `wavepath train`; its newest whole checkpoint is used, or `step`.
        scale: what is asked for; None takes the run's.
        batch: tiles at once, over all devices. devices: the first so many; 0: as the run, at most those here.

    Raises:
        CheckpointError: no run folder, a run of another task, or no whole checkpoint.
        ConfigError: the run enlarges by another factor, or the batch does not divide.
    """
    run = Path(run)
    config = run_config(run, "superres", "configs/cwt_net.py")
    trained = int(config.superres.scale)
    if scale is not None and scale != trained:
        raise ConfigError(f"--scale {scale} is asked for, but {run} was trained for {trained}; leave --scale out or give another --checkpoint")
    used = make_parallel(config, batch, devices)

    def low_resolution_alone(complete):
        with complete.unlocked():
            complete.superres.mode = "wr"
        return build(complete)

    config, task, state = checkpoint.restore_run(run, step, parallel=used, task_factory=low_resolution_alone)
    compiled = used.predict(task, ("output",))

    def predict(tiles: np.ndarray) -> jax.Array:
        return compiled(state, used.put({"lr": tiles}))["output"]

    return Network(
        predict, trained, config.superres.network, int(state.step), parameters_digest(state.ema or state.params),
        str(used), int(config.superres.patch), task.constants.get("mpp"),
    )  # fmt: skip


def superres(
    slide: Path,
    run: Path,
    out: Path,
    *,
    scale: int | None = None,
    step: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 16,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    region: Sequence[int] | None = None,
    devices: int = 0,
    quality: int = 90,
    skip_blank: bool = True,
    overwrite: bool = False,
) -> Written:
    """Enlarges a slide, or a region of it, into a pyramidal TIFF whose mpp is the input's divided by the scale.

    Args:
        slide: any slide or image that wavepath reads; one without a trustworthy mpp is taken at its own pixels, and the output has none.
        run, scale, step, devices: as `load_network` takes them.
        out, quality, overwrite: as `whole_slide.write_slide` takes them. tile, overlap: as `grid.tiling` takes them, of the run's training patch.
        mpp: micrometres per pixel at which the slide is read; None: its own, level 0.
        slide_mpp: micrometres per pixel at level 0, ahead of what the file says.
        region: (x, y, width, height) in level-0 pixels; None: all.
        skip_blank: tiles of bare glass are enlarged by bicubic interpolation instead of the network.

    Raises:
        SlideError: the slide cannot be read, or cannot be read at `mpp`, or the region is not within it.
        CheckpointError, ConfigError, LockedError, WavepathError: as `load_network` and `write_slide` say.
    """
    slide, out = check_paths(slide, out, "enlarges")
    cache = TileCache()
    with open_slide(slide, mpp=slide_mpp or None, cache=cache) as opened:
        image, area = view(opened, mpp, region)
        if image.mpp is None:
            say_own_pixels(opened)
        network = load_network(run, scale=scale, step=step, batch=batch_size, devices=devices)
        tile, overlap = tiling(network.patch, tile, overlap)
        keep_rows(cache, opened, tile)
        warn_of_another_mpp(network.mpp, image.mpp, opened.mpp)
        if image.mpp is not None and image.mpp / network.scale < MIN_MPP:
            warn(f"the output has {image.mpp / network.scale:g} um per pixel, finer than any scanner: readers may refuse to believe it")
        say(f"{network.name} {network.scale}x of {run} at step {network.step}, {network.devices}")
        origin = {
            "network": network.name, "parameters": network.parameters, "step": network.step, "slide": slide.name, "slide_digest": file_digest(slide),
            "area": area, "skip_blank": skip_blank,
        }  # fmt: skip

        def glass(pixels: np.ndarray) -> np.ndarray | None:
            return bicubic(pixels, network.scale) if is_glass(pixels) else None

        return write_slide(
            image, network.predict, out, task="superres", origin=origin, scale=network.scale, tile=tile, overlap=overlap, batch=batch_size,
            fill=glass if skip_blank else None, quality=quality, overwrite=overwrite,
        )  # fmt: skip


def bicubic(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8[h * scale, w * scale, 3]: bicubic enlargement (Keys, a = -1/2)."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC))
