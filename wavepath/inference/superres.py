"""Super-resolution of a slide or an image by a trained network, from the low resolution alone, in overlapping tiles (METHODS 4.3)."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from wavepath import config as configs
from wavepath.console import say, warn
from wavepath.data.mpp import MIN_MPP, SAME_MPP
from wavepath.data.slides import Slide, TileCache, open_slide
from wavepath.errors import CheckpointError, ConfigError, SlideError
from wavepath.files import writable_folder
from wavepath.inference.grid import tiling
from wavepath.inference.whole_slide import Pixels, Predict, Written, write_slide
from wavepath.tasks.base import build
from wavepath.training import checkpoint, parallel

# Glass: every pixel is about this bright and this grey, once the noise of the camera and of JPEG is averaged out of 4 x 4 pixels.
_GLASS_DARKEST, _GLASS_SPREAD, _GLASS_CONTRAST = 205.0, 16.0, 14.0
_ANOTHER_MPP = 1.25  # a slide this much finer or coarser than what was learned shows other sizes of nuclei


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
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{run} is no run folder (no config.json in it); give the --workdir of a `wavepath train`")
    config = configs.load_json(run / "config.json")
    if config.task != "superres":
        raise CheckpointError(f"{run} is a run of task {config.task!r}, not superres; give one of `wavepath train --config=configs/cwt_net.py`")
    trained = int(config.superres.scale)
    if scale is not None and scale != trained:
        raise ConfigError(f"--scale {scale} is asked for, but {run} was trained for {trained}; leave --scale out or give another --checkpoint")
    config.parallel.devices = devices or min(config.parallel.devices, jax.local_device_count())
    used = parallel.make(config.parallel)
    if batch < 1 or batch % len(used.devices):
        raise ConfigError(f"--batch-size {batch} does not divide over {len(used.devices)} devices; choose a multiple, or --devices 1")

    def low_resolution_alone(complete):
        with complete.unlocked():
            complete.superres.mode = "wr"
        return build(complete)

    config, task, state = checkpoint.restore_run(run, step, parallel=used, task_factory=low_resolution_alone)
    compiled = used.predict(task, ("output",))
    digest = json.dumps(checkpoint.checksums(state.ema or state.params), sort_keys=True)

    def predict(tiles: np.ndarray) -> jax.Array:
        return compiled(state, used.put({"lr": tiles}))["output"]

    return Network(
        predict, trained, config.superres.network, int(state.step), hashlib.sha256(digest.encode()).hexdigest()[:16], str(used),
        int(config.superres.patch), task.constants.get("mpp"),
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
    slide = Path(slide)
    if slide.is_dir():
        raise SlideError(f"{slide} is a folder; one call enlarges one slide, give a file in it")
    out = Path(out)
    if out.exists() and slide.exists() and os.path.samefile(slide, out):  # links too: what is replaced would be what is read
        raise ConfigError(f"--out {out} is the slide itself; choose another name")
    writable_folder(out.parent)  # said before the network is loaded
    cache = TileCache()
    with open_slide(slide, mpp=slide_mpp or None, cache=cache) as opened:
        image, area = view(opened, mpp, region)
        if image.mpp is None:
            reason = "; ".join(opened.mpp_refused) or "its metadata name none"
            say(f"{slide} has no trustworthy pixel size ({reason}): it is taken at its own pixels, and the output carries no mpp")
        network = load_network(run, scale=scale, step=step, batch=batch_size, devices=devices)
        tile, overlap = tiling(network.patch, tile, overlap)
        # Rows of tiles overlap, and one row of the slide's own tiles serves several: they must still be there for the next.
        native = max(height for _, height in opened.tile_sizes) if opened.backend != "image" else 0
        cache.limit_bytes = max(cache.limit_bytes, 2 * (native + tile) * opened.dimensions[0] * 3)
        _warn_of_another_mpp(network.mpp, image.mpp, opened.mpp)
        if image.mpp is not None and image.mpp / network.scale < MIN_MPP:
            warn(f"the output has {image.mpp / network.scale:g} um per pixel, finer than any scanner: readers may refuse to believe it")
        say(f"{network.name} {network.scale}x of {run} at step {network.step}, {network.devices}")
        origin = {
            "network": network.name, "parameters": network.parameters, "step": network.step, "slide": slide.name, "slide_digest": _digest(slide),
            "area": area, "skip_blank": skip_blank,
        }  # fmt: skip

        def glass(pixels: np.ndarray) -> np.ndarray | None:
            return bicubic(pixels, network.scale) if is_glass(pixels) else None

        return write_slide(
            image, network.predict, out, task="superres", origin=origin, scale=network.scale, tile=tile, overlap=overlap, batch=batch_size,
            fill=glass if skip_blank else None, quality=quality, overwrite=overwrite,
        )  # fmt: skip


def _warn_of_another_mpp(trained: float | None, read: float | None, slide: float | None) -> None:
    """Says that the slide is read at another resolution than the network has learned from, where both are known, and what to do about it."""
    if trained is None or read is None or 1 / _ANOTHER_MPP <= read / trained <= _ANOTHER_MPP:
        return
    finer = slide is not None and slide <= trained * (1 + SAME_MPP)
    remedy = f"--mpp {trained:.4g} reads it as trained" if finer else "it has no finer level, and a run trained at its own resolution will do better"
    warn(f"trained on {trained:.4g} um, the slide is read at {read:.4g}; {remedy}")


def view(slide: Slide, mpp: float | None = None, region: Sequence[int] | None = None) -> tuple[Pixels, dict]:
    """A slide, or a region of it, as pixels of one size; and in words what that is: its place, its size, its mpp.

    Args:
        mpp: micrometres per pixel; None: those of level 0. A level within 1 % is read as it is, and keeps its own mpp.
        region: (x, y, width, height) in level-0 pixels; None: the whole slide.

    Raises:
        SlideError: `mpp` is given and the slide has none or is coarser; the region is empty or not within the slide.
    """
    width, height = slide.dimensions
    x0, y0, w0, h0 = (int(value) for value in region) if region is not None else (0, 0, width, height)
    if w0 < 1 or h0 < 1 or x0 < 0 or y0 < 0 or x0 + w0 > width or y0 + h0 > height:
        raise SlideError(f"the region {x0},{y0},{w0},{h0} (x,y,width,height) is not within {slide.path}, which is {width} x {height} px at level 0")
    if mpp is None:
        own, level, factor = slide.mpp, 0, 1.0
    else:
        if slide.mpp is None:
            raise SlideError(f"{slide.path} has no trustworthy pixel size, so it cannot be read at {mpp:g} um; give --slide-mpp, or leave --mpp out")
        level = slide.level_for(mpp)
        own = slide.read_mpp(mpp)
        factor = own / slide.level_mpp(level)
        if abs(factor - 1) <= SAME_MPP:
            own, factor = slide.level_mpp(level), 1.0
    step = slide.levels[level].downsample * factor  # level-0 pixels for each pixel read
    whole = slide.levels[level][:2] if factor == 1.0 else (max(1, int(width / step)), max(1, int(height / step)))
    x, y = min(round(x0 / step), whole[0] - 1), min(round(y0 / step), whole[1] - 1)
    w, h = (max(1, min(round(size / step), limit - at)) for size, limit, at in ((w0, whole[0], x), (h0, whole[1], y)))
    if region is None:
        w, h = whole

    def read(left: int, top: int, wide: int, high: int) -> np.ndarray:
        if factor == 1.0:
            return slide.read_level(level, x + left, y + top, wide, high)
        # The nearest level-0 pixel: `read` finds the same point of its grid again.
        return slide.read(round((x + left) * step), round((y + top) * step), wide, high, own)

    area = {"x": x, "y": y, "width": w, "height": h, "level": level, "step": round(step, 6), "mpp": own}
    return Pixels(w, h, read, own), area


def bicubic(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8[h * scale, w * scale, 3]: bicubic enlargement (Keys, a = -1/2)."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def is_glass(tile: np.ndarray) -> bool:
    """Whether a tile, uint8[h, w, 3], is bare glass: bright, grey and flat everywhere. In doubt it is not: the network then does its work."""
    height, width = (side // 4 * 4 for side in tile.shape[:2])
    if not height or not width:
        return False
    # Quick: most tissue is dark somewhere.
    if tile[::4, ::4].min() < _GLASS_DARKEST - 40:
        return False
    means = tile[:height, :width].reshape(height // 4, 4, width // 4, 4, 3).mean(axis=(1, 3), dtype=np.float32)
    return bool(
        means.min() >= _GLASS_DARKEST
        and (means.max(axis=-1) - means.min(axis=-1)).max() <= _GLASS_SPREAD
        and np.ptp(means, axis=(0, 1)).max() <= _GLASS_CONTRAST
    )


def _digest(path: Path) -> str:
    """A short name of a file's content, from its size and both ends: a slide that was replaced is not taken for the old one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        for start in (0, max(0, size - (1 << 20))):
            file.seek(start)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
