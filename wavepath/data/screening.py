"""Wavelet screening: which regions of a slide carry structure, judged at low magnification (METHODS 1.2, 1.4).

`screen` reads the slide once, in strips at the screening resolution. The strips give the tissue map, the thumbnail, and, spooled to a
temporary file, the pixels for the wavelet transform: which regions are worth transforming, and how large they are, is known only once
the tissue of the whole slide is. Memory is bounded whatever the size of the slide.

A region's energy is the mean square of its detail coefficients over its tissue,

    E = sum_l w_l sum_b sum_uv t_l(u,v) W_lb(u,v)^2 / (3 sum_l w_l sum_uv t_l(u,v)),

with b over the three detail bands, t_l the share of clean tissue under coefficient (u,v) of level l, and w_l = 1 unless weighted; the
relative energy is detail / (detail + approximation) with the same sums. `select` then ranks regions within the slide.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from ml_collections import ConfigDict
from PIL import Image
from scipy import ndimage

from wavepath.data.overview import Overview, overview_grid, read_overview
from wavepath.data.tissue import TissueMap, tissue_map
from wavepath.errors import ConfigError, DatasetError
from wavepath.files import write_text
from wavepath.ops.stain import hematoxylin_od, luminance, to_float
from wavepath.ops.wavelets import check_mode, dwt2, filter_bank

if TYPE_CHECKING:
    from wavepath.data.slides import Slide

_BATCH_PIXELS = 1 << 18  # transformed at once: what fits the cache; with the region's side it fixes the batch, so one program serves a run
_THUMBNAIL = 1024
MODES = ("wavelet", "random", "all", "threshold")


@dataclass(frozen=True)
class RegionTable:
    """One row for each region of the grid, in reading order. `x`, `y`, `size` in level-0 pixels; `tissue`, `pen`, `blur` are shares."""

    index: np.ndarray  # int64[n]
    x: np.ndarray  # int64[n]
    y: np.ndarray  # int64[n]
    size: np.ndarray  # float64[n]: 448 um need not be a whole number of pixels
    tissue: np.ndarray  # float64[n]
    pen: np.ndarray  # float64[n]
    blur: np.ndarray  # float64[n]
    energy: np.ndarray  # float64[n]; 0 where there is no tissue to average over
    eligible: np.ndarray  # bool[n]
    reason: np.ndarray  # str[n]: why a region is not eligible

    def __len__(self) -> int:
        return len(self.index)

    def to_csv(self, path: Path) -> None:
        """Writes the table; equal tables give equal bytes, and reading it back gives equal numbers."""
        columns = []
        for field in fields(self):
            values = getattr(self, field.name)
            columns.append([str(int(v)) if values.dtype.kind in "bi" else repr(float(v)) if values.dtype.kind == "f" else str(v) for v in values])
        lines = [",".join(field.name for field in fields(self)), *(",".join(row) for row in zip(*columns, strict=True))]
        write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def from_csv(cls, path: Path) -> "RegionTable":
        """Reads what `to_csv` wrote.

        Raises:
            DatasetError: for a file that is not such a table.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        names = [field.name for field in fields(cls)]
        rows = [line.split(",") for line in lines[1:]]
        if not lines or lines[0].split(",") != names or any(len(row) != len(names) for row in rows):
            raise DatasetError(f"{path} is not a region table; run `wavepath prepare` again to write it")
        kinds = dict(index=np.int64, x=np.int64, y=np.int64, eligible=np.bool_, reason=np.str_)
        columns = {}
        for place, name in enumerate(names):
            text = [row[place] for row in rows]
            kind = kinds.get(name, np.float64)
            try:
                columns[name] = np.array([value == "1" for value in text] if kind is np.bool_ else text, dtype=str if kind is np.bool_ else kind)
            except ValueError as error:
                raise DatasetError(f"{path} is damaged in column {name} ({error}); run `wavepath prepare` again to write it") from None
        columns["eligible"] = np.array([row[names.index("eligible")] == "1" for row in rows], bool)
        return cls(**columns)


@dataclass(frozen=True)
class Screening:
    """What screening a slide gave. `pixels_read`: pixels taken from the pyramid level that was read; `seconds`: wall time."""

    tissue: TissueMap
    regions: RegionTable
    thumbnail: np.ndarray  # uint8[h, w, 3]
    thumbnail_mpp: float
    pixels_read: int
    mpp: float = 0.0  # of the overview, as it was really read
    seconds: float = 0.0


def _pair(weights: Array, axis: int, taps: int, mode: str) -> Array:
    """Weights one level coarser: the mean of the two samples at the middle of each coefficient's filter."""
    size = weights.shape[axis]
    if mode == "periodization":
        first = 2 * np.arange((size + 1) // 2)
    else:
        first = 2 * np.arange((size + taps - 1) // 2) - taps // 2 + 1
    first, second = (np.clip(first + step, 0, size - 1) for step in (0, 1))
    return (jnp.take(weights, first, axis) + jnp.take(weights, second, axis)) / 2


@partial(jax.jit, static_argnames=("wavelet", "mode", "channel", "relative", "level_weights"))
def region_energies(
    images: Array, weights: Array, *, wavelet: str, mode: str, channel: str, relative: bool, level_weights: tuple[float, ...]
) -> Array:
    """Wavelet energy of a batch of regions (the module's formula).

    Each region's mean is taken off before the transform, so that a constant scores zero and not the square of its rounding; detail
    coefficients do not see a constant, and the approximation gets it back. Mode `zero` keeps the mean: there the step at the border is
    part of the definition.

    Args:
        images: uint8[b, h, w, 3]. weights: uint8 or bool[b, h, w], nonzero on clean tissue.
        level_weights: one for each level, the finest first.
        channel: `luminance` (Rec. 601, values 0 to 1) or `hematoxylin` (optical density; black counts as 1/255).

    Returns:
        float32[b]; 0 where there is no tissue.
    """
    rgb = to_float(images)
    grey = luminance(rgb) if channel == "luminance" else hematoxylin_od(jnp.maximum(rgb, 1 / 255))
    # Without the barrier XLA's CPU backend converts the colours anew for every tap of the filter.
    grey = lax.optimization_barrier(grey)
    mean = jnp.zeros((len(grey), 1, 1), grey.dtype) if mode == "zero" else grey.mean(2).mean(1)[:, None, None]
    approximation, share = grey - mean, (weights != 0).astype(grey.dtype)
    low = filter_bank(wavelet).dec_lo
    taps, gain = len(low), math.fsum(low) ** 2
    detail = count = jnp.zeros(len(grey), grey.dtype)

    def total(values: Array) -> Array:
        return values.sum(1).sum(1)

    for factor in level_weights:
        bands = dwt2(approximation, wavelet, mode, (-2, -1))
        share = _pair(_pair(share, 1, taps, mode), 2, taps, mode)
        energy = lax.optimization_barrier((jnp.square(bands.lh) + jnp.square(bands.hl) + jnp.square(bands.hh)) * share)
        detail, count = detail + factor * total(energy), count + 3 * factor * total(share)
        approximation, mean = bands.ll, mean * gain
    whole = detail + total(jnp.square(approximation + mean) * share) if relative else count
    return jnp.where(whole > 0, detail / jnp.where(whole > 0, whole, 1), 0)


def _options(settings: ConfigDict) -> dict:
    """The static arguments of `region_energies` from the `screen` tree, checked."""
    for name, known in (("energy", ("absolute", "relative")), ("channel", ("luminance", "hematoxylin"))):
        if settings[name] not in known:
            raise ConfigError(f"screen.{name} is {settings[name]!r}; choose from {', '.join(known)}")
    level, given = int(settings.level), tuple(float(w) for w in settings.level_weights)
    if level < 1 or len(given) not in (0, level) or any(weight < 0 for weight in given) or (given and not any(given)):
        raise ConfigError("screen.level is 1 or more, and screen.level_weights is empty or has one nonnegative weight for each level")
    filter_bank(settings.wavelet)
    check_mode(settings.boundary)
    return dict(
        wavelet=settings.wavelet, mode=settings.boundary, channel=settings.channel, relative=settings.energy == "relative",
        level_weights=given or (1.0,) * level,
    )


def _batches(
    overview: Overview, wanted: np.ndarray, tissue: TissueMap, side: int, cell: int, settings: ConfigDict
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Wanted regions in batches of one fixed shape: (indices[<= b], uint8[b, side, side, 3], uint8[b, side, side] weights).

    A region that the slide's right or lower border cuts is filled up by mirroring, which makes no edge, and carries no weight there.
    Coefficients that reach into pen or padding (round the region's border, where the transform wraps) carry none either: a step to black
    outshines any tissue.
    """
    size = max(1, _BATCH_PIXELS // side**2)
    columns = -(-overview.width // side)
    images, weights = np.zeros((size, side, side, 3), np.uint8), np.zeros((size, side, side), np.uint8)
    spoilt = tissue.pen | tissue.padding
    # Half the filter at the coarsest level, and the pair of pixels that a coefficient stands for.
    reach = 2 * math.ceil(len(filter_bank(settings.wavelet).dec_lo) * (2 ** int(settings.level) - 1) / 2) + 1
    border = "wrap" if settings.boundary in ("periodization", "periodic") else "nearest"
    indices: list[int] = []
    x = np.arange(overview.width) // cell
    for row in np.unique(wanted // columns):
        strip = overview.rows(row * side, (row + 1) * side)
        y = np.arange(row * side, row * side + strip.shape[0])[:, None] // cell
        cover, bad = tissue.tissue[y, x], spoilt[y, x]
        for index in wanted[wanted // columns == row]:
            here = np.s_[:, index % columns * side : (index % columns + 1) * side]
            image, weight, step = strip[here], cover[here], bad[here]
            missing = [(0, side - image.shape[0]), (0, side - image.shape[1])]
            if any(after for _, after in missing):
                image, step = np.pad(image, (*missing, (0, 0)), mode="symmetric"), np.pad(step, missing, mode="symmetric")
                weight = np.pad(weight, missing)
            if step.any():
                weight = weight & (ndimage.maximum_filter(step.view(np.uint8), reach, mode=border) == 0)
            images[len(indices)], weights[len(indices)] = image, weight
            indices.append(index)
            if len(indices) == size:
                yield np.array(indices), images, weights
                indices = []
    if indices:
        weights[len(indices) :] = 0
        yield np.array(indices), images, weights


def _judge(table: dict[str, np.ndarray], settings: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Which regions are eligible by their tissue, focus and pen, and why the others are not: the graver reason is given."""
    reason = np.full(len(table["x"]), "", dtype="<U13")
    reason[table["tissue"] < settings.min_tissue] = "little tissue"
    reason[table["blur"] > settings.max_blur] = "out of focus"
    reason[table["pen"] > settings.max_pen] = "pen"
    return reason == "", reason


def _grid(width: int, height: int, side: int, step: float, tissue: TissueMap) -> dict[str, np.ndarray]:
    """Squares of `side` overview pixels over the whole overview, the last row and column cut by its border."""
    columns, rows = -(-width // side), -(-height // side)
    x, y = (values.ravel() * (side * step) for values in np.meshgrid(np.arange(columns), np.arange(rows)))
    shares = {layer: tissue.fractions(x, y, side * step, side * step, layer) for layer in ("tissue", "pen", "blur")}
    return dict(x=np.rint(x).astype(np.int64), y=np.rint(y).astype(np.int64), size=np.full(len(x), side * step), **shares)


def _thumbnail(overview: Overview) -> tuple[np.ndarray, int]:
    """uint8 picture of at most 1024 px a side, and how many overview pixels one of its pixels is wide."""
    factor = max(1, -(-max(overview.width, overview.height) // _THUMBNAIL))
    block = factor * max(1, 256 // factor)
    strips = (Image.fromarray(overview.rows(top, top + block)) for top in range(0, overview.height, block))
    return np.concatenate([np.asarray(strip.reduce(factor)) for strip in strips]), factor


def screen(slide: "Slide", settings: ConfigDict, report: Callable[[float], None] = lambda share: None) -> Screening:
    """Screens one slide: tissue, then the wavelet energy of each region.

    The region's side is `screen.region_um`, halved (not below `screen.min_region_um`) while fewer than `screen.min_regions` regions are
    eligible. A slide coarser than `screen.mpp` is screened at its own resolution.

    Args:
        slide: an open slide with an mpp.
        settings: the `prepare` config.
        report: called with the share of the work that is done, for a progress bar.

    Raises:
        MissingMppError: the slide has no mpp. ConfigError, WaveletError: a setting that does not exist. SlideError: a damaged slide.
    """
    begin, options = time.perf_counter(), _options(settings.screen)
    mpp, step, cell = overview_grid(slide, settings)
    overview, features, pixels = read_overview(slide, mpp, cell, lambda share: report(0.7 * share))
    try:
        tissue = tissue_map(features, settings.tissue, um=cell * mpp, cell=cell * step)
        del features
        side = round(settings.screen.region_um / mpp)
        if mpp > settings.screen.mpp * 1.01:
            # Each coarser slide has an mpp of its own; multiples of 8 keep the number of compiled programs small.
            side = max(8, 8 * round(side / 8))
        while True:
            table = _grid(overview.width, overview.height, side, step, tissue)
            eligible, reason = _judge(table, settings.screen)
            if not tissue.verdict or eligible.sum() >= settings.screen.min_regions or side // 2 * mpp < 0.99 * settings.screen.min_region_um:
                break
            side //= 2
        energy = np.zeros(len(eligible))
        wanted, done = np.flatnonzero(table["tissue"] > 0), 0
        for indices, images, weights in _batches(overview, wanted, tissue, side, cell, settings.screen):
            # Fetched at once: the batch's arrays are used again for the next one.
            energy[indices] = np.asarray(region_energies(images, weights, **options))[: len(indices)]
            done += len(indices)
            report(0.7 + 0.3 * done / len(wanted))
        if eligible.any() and settings.screen.clip_percentile < 100:
            # "higher": a percentile that is one of the values, so that a slide of few regions does not lose its best.
            limit = np.percentile(energy[eligible], settings.screen.clip_percentile, method="higher")
            clipped = eligible & (energy > limit)
            reason[clipped], eligible[clipped] = "high energy", False
        regions = RegionTable(index=np.arange(len(eligible)), **table, energy=energy, eligible=eligible, reason=reason)
        thumbnail, factor = _thumbnail(overview)
    finally:
        overview.close()
    return Screening(tissue, regions, thumbnail, factor * mpp, pixels, mpp, time.perf_counter() - begin)


def select(
    regions: RegionTable,
    mode: str = "wavelet",
    top: float = 0.2,
    threshold: float | None = None,
    count: int | None = None,
    seed: int = 0,
    slide_id: str = "",
) -> np.ndarray:
    """Chooses among the eligible regions of one slide.

    Args:
        mode: `wavelet` (highest energy), `random` (as many, drawn by a hash of seed, slide and region: the control of METHODS 1.4),
            `all`, or `threshold` (energy at least `threshold`).
        top: share to take, rounded up, so that a slide with any eligible region yields one. `count`: a number instead.

    Returns:
        bool[n].

    Raises:
        ConfigError: an unknown mode, a share outside (0, 1], or a threshold mode without threshold.
    """
    candidates = np.flatnonzero(regions.eligible)
    chosen = np.zeros(len(regions), bool)
    if mode not in MODES:
        raise ConfigError(f"select.mode is {mode!r}; choose from {', '.join(MODES)}")
    if mode == "all":
        chosen[candidates] = True
        return chosen
    if mode == "threshold":
        if threshold is None:
            raise ConfigError("select.mode=threshold needs select.threshold, the lowest energy to take")
        chosen[candidates] = regions.energy[candidates] >= threshold
        return chosen
    if not count and not 0 < top <= 1:
        raise ConfigError(f"select.top is a share above 0 and up to 1, not {top:g}")
    # A hair below, since 0.1 * 30 is a little more than 3 in binary.
    number = min(count or math.ceil(top * len(candidates) - 1e-9), len(candidates))
    if mode == "wavelet":
        order = np.argsort(-regions.energy[candidates], kind="stable")
    else:
        keys = [hashlib.sha256(f"{seed}\n{slide_id}\n{regions.index[i]}".encode("utf-8", "backslashreplace")).digest() for i in candidates]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    chosen[candidates[order[:number]]] = True
    return chosen
