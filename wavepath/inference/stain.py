"""Virtual staining of a slide or an image by a trained network, in overlapping tiles (METHODS 3.3).

    slide at the resolution of the training -> tiles with tissue -> generator -> blended rows -> pyramidal TIFF
                                            -> the others: one colour, that of the slide's glass

A tile without tissue is not looked at. It does not keep its own pixels either, or the ink, dust and coverslip edges of the H&E slide would stand
beside the virtual stain as if they were of it. White would show as a frame round the tissue, where networks paint glass as bright as they have
seen it; so it takes the colour that glass has on this slide. Where an overview says where the tissue is, what is stained fades into that colour along
the tissue's outline, some 20 um away from it, and not along the tiles'.

A network that normalises by the image (`instance`, `group`), or that attends to a tile and has it encoded part by part (CoA), sees one tile at a
time: two tiles differ wherever they overlap, not at their borders alone. Larger tiles would be others than it was trained on. So its tiles overlap
by half, in which the difference fades.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from scipy import ndimage

from wavepath.console import progress, say
from wavepath.data.mpp import SAME_MPP
from wavepath.data.overview import find_tissue
from wavepath.data.slides import Slide, TileCache, open_slide
from wavepath.data.tissue import TissueMap
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError
from wavepath.inference.grid import tiling
from wavepath.inference.slide_input import (
    check_paths,
    file_digest,
    glass_like,
    is_glass,
    keep_rows,
    make_parallel,
    parameters_digest,
    run_config,
    say_own_pixels,
    view,
    warn_of_another_mpp,
)
from wavepath.inference.whole_slide import Fill, Finish, Pixels, Predict, Written, write_slide
from wavepath.training import checkpoint
from wavepath.training.run_folder import RunFolder

NOTICE = "Virtual stain, not a laboratory stain: computed from an H&E image by wavepath. Not for diagnosis."
LEAST_TILE = 64  # px
_GENERATOR, _HE = "generator", "he"
_LEAST_UM = 256.0  # a slide whose shorter side is less has too few cells of a tissue map
_ROWS = 64  # finished at once
_FRAGMENT_UM2 = 2500.0  # what is left out as a speck: training can do without small pieces of tissue, a stained slide cannot
_SHOWN = ("tissue", "blur")  # layers of the map
_SURE, _RAMP = 2, 3  # cells of the map: so far round the tissue all is stained, but for a mean over so many
_MARGIN = 4  # cells round a tile in which tissue counts as the tile's: beyond, nothing of what it gives would show


@dataclass(frozen=True)
class Stainer:
    """A trained generator with the encoder that it attends to, ready for tiles of any one shape."""

    predict: Predict  # uint8[batch, t, t, 3] of H&E -> [batch, t, t, 3] in [0, 1]; t divisible by 4 grid
    name: str  # ceff, pix2pix ...
    step: int
    parameters: str  # digest: networks of other parameters are not mistaken for this one
    devices: str
    crop: int  # side in px that it was trained on
    grid: int  # parts on a side in which a tile goes through the encoder; 1 where there is none
    mpp: float | None = None  # of the training, in um; None: not known, or several
    norm: str = "batch"  # of the generator

    def tiling(self, tile: int | None = None, overlap: int | None = None) -> tuple[int, int]:
        """Tile and overlap in px: what is asked for, else the training crop, at least 64 px, and half of it, or a quarter where
        what a network makes of a place does not depend on the tile (batch norm and no CoA).

        Raises:
            ConfigError: the network does not take such tiles, or they do not cover an image.
        """
        return tiles_of(self.crop, self.grid, self.norm, tile, overlap)


def tiles_of(crop: int, grid: int, norm: str, tile: int | None = None, overlap: int | None = None) -> tuple[int, int]:
    """`Stainer.tiling` for a run that was not restored: `crop` px, `grid` parts on a side in the encoder (1 without one), norm of the generator."""
    unit = 4 * grid
    if tile is None:
        tile = -(-max(LEAST_TILE, crop) // unit) * unit
    elif tile < unit or tile % unit:
        below = max(unit, tile // unit * unit)
        raise ConfigError(f"--tile {tile}: this network takes tiles of a multiple of {unit} px; choose {below} or {below + unit}")
    if overlap is None and (norm != "batch" or grid > 1):
        overlap = tile // 2
    return tiling(crop, tile, overlap)


def layout_of(config: Any, tile: int | None = None, overlap: int | None = None) -> tuple[int, int]:
    """`tiles_of` by the config of a run."""
    settings = config.stain
    return tiles_of(int(settings.crop), int(settings.grid) if settings.coa else 1, settings.norm, tile, overlap)


def load_stainer(run: Path, *, step: int | None = None, batch: int = 4, devices: int = 0) -> Stainer:
    """Restores a run of the task `stain`: its generator (averaged where kept), and the frozen H&E encoder that its checkpoints hold.

    Args:
        run: run folder of `wavepath train`; its newest whole checkpoint is used, or `step`. The encoders' own run is not needed.
        batch: tiles at once, over all devices. devices: the first so many; 0: as the run, at most those here.

    Raises:
        CheckpointError: no run folder, a run of another task, or no whole checkpoint.
        ConfigError: the batch does not divide.
    """
    used = make_parallel(run_config(run, "stain", "configs/ceff.py"), batch, devices)
    config, task, state = checkpoint.restore_run(Path(run), step, parallel=used)
    settings = config.stain
    # What only training needs, the discriminator and both optimisers with it, leaves the device here.
    state = state.replace(
        params={_GENERATOR: (state.ema or state.params)[_GENERATOR]}, opt={}, ema={}, stats={_GENERATOR: state.stats[_GENERATOR]},
        extra={"encoders": {_HE: state.extra["encoders"][_HE]}} if settings.coa else {},
    )  # fmt: skip
    compiled = used.predict(task, ("output",))

    def predict(tiles: np.ndarray) -> jax.Array:
        return compiled(state, used.put({_HE: tiles}))["output"]

    return Stainer(
        predict, network_name(config), int(state.step), parameters_digest(state.replace(step=0)), str(used), int(settings.crop),
        int(settings.grid) if settings.coa else 1, task.constants.get("mpp"), settings.norm,
    )  # fmt: skip


def network_name(config: Any) -> str:
    """In a word what was trained; what is other than in CEFF (or in pix2pix) stands behind it."""
    settings = config.stain
    if settings.encoder == "resnet" and not (settings.msfpm or settings.coa):
        name = "pyramid pix2pix" if settings.l1 == "pyramid" else "pix2pix"
        changes = {"adaptive L1": settings.l1 == "adaptive"}
    else:
        name = "ceff"
        changes = {
            "no VMFE": settings.encoder != "vmfe", "no MSFPM": not settings.msfpm, "no CoA": not settings.coa,
            f"{settings.l1} L1": settings.l1 != "adaptive",
        }  # fmt: skip
    changes["random encoders"] = config.encoders == "random" and (settings.coa or settings.l1 == "adaptive")
    other = ", ".join(change for change, made in changes.items() if made)
    return f"{name} ({other})" if other else name


def stain(
    slide: Path,
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 4,
    mpp: float | Literal["own"] | None = None,
    slide_mpp: float | None = None,
    region: Sequence[int] | None = None,
    devices: int = 0,
    quality: int = 90,
    everything: bool = False,
    overwrite: bool = False,
) -> Written:
    """Stains a slide, or a region of it, virtually, into a pyramidal TIFF at the mpp at which it was read; its description says what it is.

    Args:
        slide: any H&E slide or image that wavepath reads; one without a trustworthy mpp is taken at its own pixels, and the output has none.
        run, step, devices: as `load_stainer` takes them.
        out, quality, overwrite: as `whole_slide.write_slide` takes them. tile, overlap: as `Stainer.tiling` takes them.
        mpp: micrometres per pixel at which the slide is read; "own": those of level 0; None: those of the training, where the slide is as fine.
        slide_mpp: micrometres per pixel at level 0, ahead of what the file says.
        region: (x, y, width, height) in level-0 pixels; None: all.
        everything: glass goes through the network as well.

    Raises:
        SlideError: the slide cannot be read, or cannot be read at `mpp`, or the region is not within it.
        CheckpointError, ConfigError, LockedError, WavepathError: as `load_stainer` and `write_slide` say.
    """
    slide, out = check_paths(slide, out, "stains")
    tile, overlap = layout_of(run_config(run, "stain", "configs/ceff.py"), tile, overlap)  # refused before anything is loaded
    trained = (RunFolder(run).constants() or {}).get("mpp")
    cache = TileCache()
    with open_slide(slide, mpp=slide_mpp or None, cache=cache) as opened:
        image, area = view(opened, _resolution(mpp, trained, opened), region)
        if image.mpp is None:
            say_own_pixels(opened)
            if trained is not None:
                say(f"trained on {trained:.4g} um; whether this image shows tissue at that size is not known: --slide-mpp says what its pixels are")
        elif trained is None and mpp is None:
            say(f"the run does not know at what resolution it was trained; the slide is read at its own {image.mpp:.4g} um (--mpp for another)")
        network = load_stainer(run, step=step, batch=batch_size, devices=devices)
        keep_rows(cache, opened, max(tile, round(tile * area["step"])))
        warn_of_another_mpp(trained, image.mpp, opened.mpp)
        say(f"{network.name} of {run} at step {network.step}, {network.devices}")
        tissue, glass = (None, None) if everything else _tissue(opened)
        origin = {
            "virtual_stain": True, "network": network.name, "parameters": network.parameters, "step": network.step, "slide": slide.name,
            "slide_digest": file_digest(slide), "area": area, "skipped": "nothing" if everything else "no tissue" if tissue else "glass",
            "glass": None if glass is None else glass.tolist(),
        }  # fmt: skip
        finish = None
        if tissue is not None:
            image, finish = where_tissue_is(image, area, tissue), fade(area, tissue, glass)
        return write_slide(
            image, network.predict, out, task="stain", origin=origin, tile=tile, overlap=overlap, batch=batch_size,
            fill=None if glass is None else _one_colour(glass), finish=finish, quality=quality, overwrite=overwrite, notice=NOTICE,
        )  # fmt: skip


def _resolution(asked: float | Literal["own"] | None, trained: float | None, slide: Slide) -> float | None:
    """The mpp to read at; None: level 0."""
    if asked is not None:
        return None if asked == "own" else asked
    if trained is None or slide.mpp is None or slide.mpp > trained * (1 + SAME_MPP):
        return None
    return trained


def _tissue(slide: Slide) -> tuple[TissueMap | None, np.ndarray]:
    """Where the tissue is, None where only the tiles themselves can tell; and the colour of the slide's glass, uint8[3]."""
    if slide.mpp is None or min(slide.dimensions) * slide.mpp < _LEAST_UM:
        return None, _glass(slide.thumbnail(512).reshape(-1, 3))
    settings = prepare_defaults()
    settings.tissue.min_area_um2 = _FRAGMENT_UM2
    with progress("tissue", 100, "%") as bar:
        found, cells = find_tissue(slide, settings, lambda share: bar.advance(round(100 * share) - bar.done))
    if not found.verdict:
        say(f"{found.reason} by its overview: only tiles of bare glass are left out")
        return None, _glass(cells.rgb.reshape(-1, 3))
    return found, _glass(cells.rgb[~(found.tissue | found.blur | found.pen | found.padding)])


def _glass(colours: np.ndarray) -> np.ndarray:
    """uint8[3]: the median of those colours, uint8[n, 3], that could be glass; white where none could."""
    bare = colours[glass_like(colours)]
    return np.rint(np.median(bare, axis=0)).astype(np.uint8) if len(bare) else np.full(3, 255, np.uint8)


def where_tissue_is(image: Pixels, area: dict[str, Any], tissue: TissueMap) -> Pixels:
    """`image`, white wherever it is read in pieces without any tissue: those are never decoded. Tissue out of focus is tissue.

    Args:
        area: of the image, as `view` gives it.
        tissue: of the whole slide.
    """
    step, margin = area["step"], _MARGIN * tissue.cell

    def read(x: int, y: int, w: int, h: int) -> np.ndarray:
        box = ((area["x"] + x) * step - margin, (area["y"] + y) * step - margin, w * step + 2 * margin, h * step + 2 * margin)
        if max(tissue.fraction(*box, layer=layer) for layer in _SHOWN) > 1e-9:  # a sum of parts of cells: 0 but for rounding
            return image.read(x, y, w, h)
        return np.full((h, w, 3), 255, np.uint8)

    return Pixels(image.width, image.height, read, image.mpp)


def fade(area: dict[str, Any], tissue: TissueMap, glass: np.ndarray) -> Finish:
    """What `write_slide` does to finished rows: all that is further from tissue than a few cells of its map becomes glass, with a ramp between.

    Args:
        area: of the image, as `view` gives it. tissue: of the whole slide. glass: uint8[3].
    """
    shown = np.logical_or(*(getattr(tissue, layer) for layer in _SHOWN))
    grown = ndimage.maximum_filter(shown.view(np.uint8), 2 * _SURE + 1, mode="nearest").astype(np.float32)
    weights = ndimage.uniform_filter(grown, _RAMP, mode="nearest")
    columns = _between((area["x"] + np.arange(area["width"]) + 0.5) * area["step"] / tissue.cell - 0.5, weights.shape[1])

    def finish(rows: np.ndarray, top: int) -> np.ndarray:
        for first in range(0, len(rows), _ROWS):
            piece = rows[first : first + _ROWS]
            lines = (area["y"] + top + first + np.arange(len(piece)) + 0.5) * area["step"] / tissue.cell - 0.5
            low, high, share = _between(lines, weights.shape[0])
            cells = weights[low.min() : high.max() + 1]
            across = cells[:, columns[0]] * (1 - columns[2]) + cells[:, columns[1]] * columns[2]
            weight = across[low - low.min()] * (1 - share)[:, None] + across[high - low.min()] * share[:, None]
            faint = weight < 1 - 1e-5  # most of a slide is either far from tissue or well within it
            piece[faint] = np.rint(glass + (piece[faint].astype(np.float32) - glass) * weight[faint][:, None]).astype(np.uint8)
        return rows

    return finish


def _between(places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two cells of `size` between which each place lies, and the share of the second."""
    places = np.clip(places, 0, size - 1)
    low = places.astype(int)
    return low, np.minimum(low + 1, size - 1), (places - low).astype(np.float32)


def _one_colour(colour: np.ndarray) -> Fill:
    return lambda tile: np.broadcast_to(colour, tile.shape) if is_glass(tile) else None
