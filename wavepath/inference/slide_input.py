"""What comes before the tiles, alike for every network that makes pixels: the run, the slide and what of it is read, where there is only glass."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import say, warn
from wavepath.data.mpp import SAME_MPP
from wavepath.data.slides import Slide, TileCache
from wavepath.errors import CheckpointError, ConfigError, SlideError
from wavepath.files import writable_folder
from wavepath.inference.whole_slide import Pixels
from wavepath.training import checkpoint, parallel

# Glass: every pixel is about this bright and this grey, once the noise of the camera and of JPEG is averaged out of 4 x 4 pixels.
_GLASS_DARKEST, _GLASS_SPREAD, _GLASS_CONTRAST = 205.0, 16.0, 14.0
_ANOTHER_MPP = 1.25  # a slide this much finer or coarser than what was learned shows other sizes of nuclei

# The run ------------------------------------------------------------------------------------------------------------------------------------


def run_config(run: Path, task: str, example: str) -> ConfigDict:
    """The config of a run of `task`, as it lies in the run folder; `example` names a config file that makes such a run.

    Raises:
        CheckpointError: no run folder, or a run of another task.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{run} is no run folder (no config.json in it); give the --workdir of a `wavepath train`")
    config = configs.load_json(run / "config.json")
    if config.task != task:
        raise CheckpointError(f"{run} is a run of task {config.task!r}, not {task}; give one of `wavepath train --config={example}`")
    return config


def make_parallel(config: ConfigDict, batch: int, devices: int = 0) -> parallel.Parallel:
    """The first `devices` local devices under the run's backend; 0: as many as the run's, at most those here.

    Raises:
        ConfigError: `batch` does not divide over them, or there are not so many.
    """
    used = parallel.for_tools(config.parallel, devices)
    if batch < 1 or batch % len(used.devices):
        raise ConfigError(f"--batch-size {batch} does not divide over {len(used.devices)} devices; choose a multiple, or --devices 1")
    return used


def parameters_digest(tree: Any) -> str:
    """A short name of the values of a tree of arrays: networks of other parameters are not mistaken for these."""
    return hashlib.sha256(json.dumps(checkpoint.checksums(tree), sort_keys=True).encode()).hexdigest()[:16]


# The slide ----------------------------------------------------------------------------------------------------------------------------------


def check_paths(slide: Path, out: Path, does: str) -> tuple[Path, Path]:
    """The two as paths; said before anything is loaded.

    Args:
        does: what one call does to one slide, for the message.

    Raises:
        SlideError: `slide` is a folder. ConfigError: `out` is the slide. WavepathError: nothing can be written there.
    """
    slide, out = Path(slide), Path(out)
    if slide.is_dir():
        raise SlideError(f"{slide} is a folder; one call {does} one slide, give a file in it")
    if out.exists() and slide.exists() and os.path.samefile(slide, out):  # links too: what is replaced would be what is read
        raise ConfigError(f"--out {out} is the slide itself; choose another name")
    writable_folder(out.parent)
    return slide, out


def keep_rows(cache: TileCache, slide: Slide, tile: int) -> None:
    """Makes room in the cache for two rows of tiles: they overlap, and one row of the slide's own tiles serves several of them."""
    native = max(height for _, height in slide.tile_sizes) if slide.backend != "image" else 0
    cache.limit_bytes = max(cache.limit_bytes, 2 * (native + tile) * slide.dimensions[0] * 3)


def say_own_pixels(slide: Slide) -> None:
    """Says that a slide without a trustworthy mpp is read as it is."""
    reason = "; ".join(slide.mpp_refused) or "its metadata name none"
    say(f"{slide.path} has no trustworthy pixel size ({reason}): it is taken at its own pixels, and the output carries no mpp")


def warn_of_another_mpp(trained: float | None, read: float | None, slide: float | None) -> None:
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


def glass_like(colours: np.ndarray) -> np.ndarray:
    """bool[n]: which of the colours, uint8[n, 3], could be bare glass."""
    colours = colours.astype(np.float32)
    return (colours.min(axis=-1) >= _GLASS_DARKEST) & (np.ptp(colours, axis=-1) <= _GLASS_SPREAD)


def file_digest(path: Path) -> str:
    """A short name of a file's content, from its size and both ends: a slide that was replaced is not taken for the old one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        for start in (0, max(0, size - (1 << 20))):
            file.seek(start)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
