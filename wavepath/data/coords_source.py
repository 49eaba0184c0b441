"""Tiles where TRIDENT's or CLAM's coordinates say they are, in place of screening's choice: for `prepare --coords` and `embed --coords`.

Positions, order and footprint are the file's; the physical scale is the slide's. A footprint of 1024 level-0 pixels, which TRIDENT took for
512 px at 20x of a slide it counted as 40x, is read as 512 px of 0.53 um where the slide has 0.265 um per pixel, and recorded as that.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data.manifest import SETTINGS, one_line
from wavepath.data.mpp import SAME_MPP, given_mpp, strip_suffix
from wavepath.data.stream import PlannedSlide, StreamSource
from wavepath.data.tiles import TilePlan
from wavepath.errors import DatasetError, SlideError, WavepathError
from wavepath.files import read_json
from wavepath.interop.coords import Geometry, TileCoords, find_coords, number, read_coords

if TYPE_CHECKING:
    from wavepath.data.screening import RegionTable
    from wavepath.data.slides import Slide, SlideRef

_BLOCK = 64  # consecutive tiles that a stream reads together
_SAME_FLOAT = 1e-6


@dataclass(frozen=True)
class CoordsSet:
    """The coordinate files of a run: `files` by slide id, `without` the ids of slides that have none, `size` of the tiles in pixels.

    `size` is the files' own, or the one that was asked for; `overlap` that of all files in pixels of that size, 0 where they differ.
    """

    path: Path
    files: Mapping[str, Path]
    without: tuple[str, ...]
    size: int
    overlap: int = 0


def match_coords(path: Path, refs: "Sequence[SlideRef]", size: int = 0, strict: bool = False) -> CoordsSet:
    """Finds the coordinate file of each slide by name, and the size of the tiles.

    A file is a slide's if it bears its id, the id with `__` for `/`, or, where these are unique, the last part of the id or the name of the
    slide's file. What does not match is listed.

    Args:
        path: a folder of TRIDENT's or CLAM's, or one file.
        size: side of the tiles in pixels; 0: the files' own.
        strict: a slide without coordinates, or coordinates without a slide, are an error.

    Raises:
        DatasetError: no coordinates, none for any slide, tiles of several sizes without `size`, or, with `strict`, what does not match.
    """
    found = find_coords(path)
    ids = {ref.id for ref in refs}
    stems: dict[str, list[str]] = {}
    for ref in refs:
        for name in {strip_suffix(ref.path.name), ref.id.rsplit("/", 1)[-1]}:
            stems.setdefault(name, []).append(ref.id)
    files, used = {}, set()
    for ref in refs:
        names = [ref.id, ref.id.rsplit("/", 1)[-1], ref.id.replace("/", "__"), strip_suffix(ref.path.name)]
        # A name that is another slide's id, or that several bear, says nothing.
        mine = (name for name in names if name in found and (name == ref.id or (name not in ids and len(stems.get(name, [])) <= 1)))
        if name := next(mine, None):
            files[ref.id] = found[name]
            used.add(name)
    if not files:
        raise DatasetError(
            f"{path} has coordinates for none of the {len(refs)} slides (it has {next(iter(found))!r}, they are like {refs[0].id!r}); "
            "a file is named <slide>_patches.h5 or <slide>.h5"
        )
    without, unknown = tuple(ref.id for ref in refs if ref.id not in files), sorted(found.keys() - used)
    for what, names in (("slides have no coordinates in " + str(path), without), ("coordinate files belong to no slide", unknown)):
        if names:
            line = f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            if strict:
                raise DatasetError(f"{line}; add or remove them, or leave out --strict to go on without them")
            console.warn(line)
    stated: dict[str, Geometry] = {}
    first = None
    for slide_id, file in files.items():
        try:
            stated[slide_id] = read_coords(file).geometry
        except DatasetError as error:  # has its own turn to say so
            first = first or error
    if not stated and not size:
        raise first or DatasetError("no coordinates")
    size = size or _common_size(stated)
    shares = {each.overlap / each.patch_size for each in stated.values()}
    return CoordsSet(Path(path), files, without, size, round(size * shares.pop()) if len(shares) == 1 else 0)


def stored_overlap(folder: Path) -> int:
    """Overlap in pixels of the tiles of a prepared folder: that of the coordinates they were made from, 0 of screened ones."""
    return int(read_json(folder / SETTINGS).get("overlap", 0)) if (folder / SETTINGS).is_file() else 0


def _common_size(stated: Mapping[str, Geometry]) -> int:
    """The `patch_size` of all."""
    sizes: dict[int, str] = {}
    for slide_id, each in stated.items():
        sizes.setdefault(each.patch_size, slide_id)
    if len(sizes) > 1:
        shown = ", ".join(f"{size} px ({slide_id})" for size, slide_id in sorted(sizes.items())[:3])
        raise DatasetError(f"the coordinates are of tiles of several sizes: {shown}; give the size that all are read at with --tile-size")
    return next(iter(sizes))


def digest(path: Path) -> str:
    """A short name of a coordinate file's content: what was made from other coordinates is outdated."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def coords_resolution(slide: "Slide", found: TileCoords, size: int) -> tuple[float, float]:
    """The footprint of a slide's tiles in level-0 pixels, and the mpp of their pixels when they are `size` wide.

    Raises:
        MissingMppError: the slide has no mpp. SlideError: no such level, or tiles with more pixels than the slide has there.
    """
    from wavepath.data.slides import require_mpp

    own, stated = require_mpp(slide), found.geometry
    if stated.footprint is not None:
        footprint = stated.footprint
    elif stated.level < len(slide.levels):
        footprint = stated.patch_size * slide.levels[stated.level].downsample
    else:
        raise SlideError(f"{found.path.name} counts in pixels of level {stated.level}, but the slide has {len(slide.levels)} levels; make it again")
    mpp = footprint * own / size
    if mpp < own * (1 - SAME_MPP):
        raise SlideError(
            f"its tiles are {footprint:g} px wide at full resolution, less than the {size} px asked for; give --tile-size {int(footprint)} or less"
        )
    for level in slide.levels:
        # Such a level is read as it is, so its own mpp counts, and what is covered is not quite the file's footprint.
        if abs(own * level.downsample / mpp - 1) <= SAME_MPP:
            return size * level.downsample, own * level.downsample
    written = number(found.attributes.get("mpp"))
    # To the last bit where our own file says it: the grid that is resampled depends on it.
    if written is not None and abs(written / mpp - 1) < _SAME_FLOAT and size == stated.patch_size:
        return footprint, written
    return footprint, float(f"{mpp:.12g}")


def coords_plan(slide: "Slide", found: TileCoords, size: int, regions: "RegionTable | None" = None) -> TilePlan:
    """The tiles of a coordinate file, in its order.

    Args:
        slide: open, with an mpp.
        found: the slide's coordinates.
        size: side of the tiles in pixels; the footprint is the file's whatever it is.
        regions: the slide's screening, for the region and the energy of each tile (that of its centre); without them energy is NaN, and every 64
            tiles count as a region, which a stream reads together.

    Raises:
        SlideError: coordinates made for a slide of another size, or outside of this one; see also `coords_resolution`.
    """
    footprint, mpp = coords_resolution(slide, found, size)
    _check_places(slide, found, footprint)
    x, y = found.coords[:, 0], found.coords[:, 1]
    if regions is None:
        region, energy = np.arange(len(x)) // _BLOCK, np.full(len(x), np.nan, np.float32)
        selected = np.ones(-(-len(x) // _BLOCK), bool)
    else:
        owner = _owners(regions, x, y, footprint)
        inside = owner >= 0
        region = np.where(inside, np.asarray(regions.index, np.int64)[owner], -1)
        energy = np.where(inside, np.asarray(regions.energy, np.float32)[owner], np.float32(np.nan)).astype(np.float32)
        selected = np.zeros(len(regions), bool)
        selected[owner[inside]] = True
    column, row = ((values // max(1, int(footprint))).astype(np.int64) for values in (x, y))
    if len(x) > 1 and np.count_nonzero(np.diff(x) < 0) < np.count_nonzero(np.diff(y) < 0):
        # Column by column, as CLAM orders: reading goes the same way, so that few tiles wait for their turn.
        column, row = row, column
    return TilePlan(
        x=x, y=y, column=column, row=row, region=region, energy=energy, size=size, mpp=mpp, footprint=footprint, level=None, coarser=False,
        selected=selected, candidates=len(x),
    )


def _check_places(slide: "Slide", found: TileCoords, footprint: float) -> None:
    width, height = slide.dimensions
    made_for = [number(found.attributes.get(f"level0_{side}")) for side in ("width", "height")]
    if all(made_for) and tuple(made_for) != (width, height):
        raise SlideError(f"{found.path.name} was made for a slide of {made_for[0]:g} x {made_for[1]:g} px, this one has {width} x {height}")
    x, y = found.coords[:, 0], found.coords[:, 1]
    # At the borders tiles may reach beyond the slide, which both tools allow; what is there is white.
    outside = np.flatnonzero((x >= width) | (y >= height) | (x + footprint <= 0) | (y + footprint <= 0))
    if outside.size:
        shown = ", ".join(f"({x[i]}, {y[i]})" for i in outside[:3].tolist())
        raise SlideError(
            f"{outside.size} of {len(x)} tiles of {found.path.name} lie outside of the slide ({width} x {height} px), such as {shown}; "
            "they are of another slide, or not in level-0 pixels"
        )
    stated = number(found.attributes.get("level0_mpp"))
    if stated is not None and abs(stated / slide.mpp - 1) > SAME_MPP:
        console.warn(f"{found.path.name} takes the slide for {stated:.4g} um per pixel; it has {slide.mpp:.4g}, which counts")


def _owners(regions: "RegionTable", x: np.ndarray, y: np.ndarray, footprint: float) -> np.ndarray:
    """Position in the table of the region that holds each tile's centre, the first in reading order, -1 where none does: int64[n]."""
    owner = np.full(len(x), -1, np.int64)
    left, top = np.asarray(regions.x, np.float64), np.asarray(regions.y, np.float64)
    side = np.broadcast_to(np.asarray(regions.size, np.float64), left.shape)
    # A corner on wavepath's own lattice was rounded from it; the centre is that of the lattice.
    centre_x, centre_y = (_unrounded(values, footprint) + footprint / 2 for values in (x, y))
    for number_ in np.lexsort((left, top))[::-1].tolist():
        mine = (centre_x >= left[number_]) & (centre_x < left[number_] + side[number_])
        mine &= (centre_y >= top[number_]) & (centre_y < top[number_] + side[number_])
        owner[mine] = number_
    return owner


def _unrounded(values: np.ndarray, footprint: float) -> np.ndarray:
    place = np.rint(values / footprint) * footprint
    return np.where(np.rint(place) == values, place, values)


class CoordsStream(StreamSource):
    """A stream of tiles at given coordinates. `origins`: by slide id, what its features are to say of where the tiles came from; `empty`: the
    slides whose coordinates are none."""

    origins: Mapping[str, Mapping[str, Any]]
    empty: Sequence[str]


def open_coords_stream(config: ConfigDict, path: Path, size: int = 0, strict: bool = False) -> CoordsStream:
    """Opens the slides below `config.data.slides` that have coordinates as a source, without screening, in the coordinates' order.

    Args:
        config: of a run; `data.slides`, `data.mpp_csv`, `data.slide_mpp`, `data.threads` and `data.cache_mb` count, and how `prepare.tiles` encodes.
        path, size, strict: see `match_coords`.

    Raises:
        DatasetError: no slide has a tile; see also `match_coords`. With `strict`: whatever is wrong with a slide.
    """
    from wavepath.data.slides import TileCache, find_slides, open_slide, read_mpp_csv

    data = config.data
    refs = find_slides(Path(data.slides))
    coords = match_coords(path, refs, size, strict)
    given = given_mpp(refs, read_mpp_csv(Path(data.mpp_csv)) if data.mpp_csv else {}, data.slide_mpp or None)
    settings = ConfigDict(config.prepare.to_dict())
    settings.tiles.size = coords.size
    half = max(1, data.cache_mb // 2)
    native = TileCache(half << 20)
    planned: list[PlannedSlide] = []
    left_out: dict[str, str] = {}
    origins, empty = {}, []
    with console.progress("reading coordinates", len(coords.files), "slides") as bar:
        for ref in refs:
            if ref.id not in coords.files:
                continue
            try:
                found = read_coords(coords.files[ref.id])
                with open_slide(ref.path, mpp=given[ref.id]) as slide:
                    plan = coords_plan(slide, found, coords.size)
                    width, height, own = *slide.dimensions, slide.mpp
            except Exception as error:  # whatever is wrong with one slide concerns that slide
                if strict:
                    raise
                left_out[ref.id] = one_line(error if isinstance(error, WavepathError) else f"{type(error).__name__}: {error}")
                console.warn(f"{ref.id}: left out, {left_out[ref.id]}")
                continue
            finally:
                bar.advance(1, ref.id)
            if not len(plan):
                console.warn(f"{ref.id}: gives no tiles (its coordinates are none)")
                empty.append(ref.id)
                continue
            planned.append(PlannedSlide(ref.id, ref.path, given[ref.id], plan))
            origins[ref.id] = dict(
                overlap=round(found.geometry.overlap * coords.size / found.geometry.patch_size), level0_width=width, level0_height=height,
                level0_mpp=own, level0_magnification=10.0 / own, coords=digest(found.path),
            )
    if not planned:
        raise DatasetError(f"none of {len(refs)} slides has a tile in {path} ({len(left_out)} cannot be used); see the reasons above")

    def opener(chosen: PlannedSlide) -> "Slide":
        return open_slide(chosen.path, mpp=chosen.mpp, cache=native)

    source = CoordsStream(str(data.slides), planned, settings, threads=data.threads, cache_mb=half, opener=opener, left_out=left_out)
    source.origins, source.empty = origins, empty
    console.say(f"data: tiles of {len(planned)} slides at the coordinates of {path}: {source.describe()}")
    return source
