"""One reading of a slide at low magnification, in strips: its pixels, spooled to disk where they are many, and what the tissue map is made from."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from wavepath.data.mpp import require_mpp
from wavepath.data.tissue import Features, TissueMap, cell_features, tissue_map

if TYPE_CHECKING:
    from wavepath.data.slides import Slide

_STRIP = 512  # overview rows in one read: the reader's own blocks
_MAX_CELLS = 1 << 24  # mask cells kept: beyond, cells double in side
_SPOOL_MEMORY = 64 << 20  # bytes of overview that stay in memory; larger ones go to a temporary file


class Overview:
    """The overview's pixels, written once from top to bottom and read back by rows; in memory while small, else in a temporary file."""

    def __init__(self, width: int):
        self.width, self.height = width, 0
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_MEMORY)

    def append(self, rows: np.ndarray) -> None:
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(rows).data)
        self.height += rows.shape[0]

    def rows(self, first: int, last: int) -> np.ndarray:
        """uint8[last - first, width, 3], cut at the bottom."""
        last = min(last, self.height)
        self._file.seek(first * self.width * 3)
        data = self._file.read((last - first) * self.width * 3)
        return np.frombuffer(data, np.uint8).reshape(last - first, self.width, 3)

    def close(self) -> None:
        self._file.close()


def overview_grid(slide: "Slide", settings: ConfigDict) -> tuple[float, float, int]:
    """(mpp, step, cell) of the overview: micrometres and level-0 pixels for each of its pixels, and its pixels for each cell of the mask.

    A slide coarser than `screen.mpp` is read at its own resolution.

    Args:
        settings: the `prepare` config.

    Raises:
        MissingMppError: the slide has no mpp.
    """
    mpp = slide.read_mpp(max(float(settings.screen.mpp), require_mpp(slide)))
    step = mpp / slide.mpp
    cell = max(1, 2 ** round(math.log2(settings.tissue.mpp / mpp)))
    while slide.dimensions[0] * slide.dimensions[1] / (step * cell) ** 2 > _MAX_CELLS:
        cell *= 2
    return mpp, step, cell


def read_overview(
    slide: "Slide", mpp: float, cell: int, report: Callable[[float], None] = lambda share: None, keep: bool = True
) -> tuple[Overview, Features, int]:
    """The one reading: strips of the overview, spooled (with `keep`) and reduced to cells. Also the number of level pixels that it took.

    Args:
        mpp, cell: as `overview_grid` gives them.
        report: called with the share that is done.

    Raises:
        SlideError: a damaged slide.
    """
    level, step = slide.level_for(mpp), mpp / slide.mpp
    factor = mpp / (slide.mpp * slide.levels[level].downsample)
    exact = abs(factor - 1) < 1e-9
    width, height = slide.levels[level][:2] if exact else (max(1, int(extent / step + 1e-6)) for extent in slide.dimensions)
    overview, parts = Overview(width), []
    for top in range(0, height, _STRIP):
        strip = slide.read(0, round(top * step), width, min(_STRIP, height - top), mpp)
        if keep:
            overview.append(strip)
        # A few rows at a time: the features' float intermediates are ten times the strip.
        parts += [cell_features(strip[first : first + 128], cell) for first in range(0, len(strip), 128)]
        report(min(1.0, (top + _STRIP) / height))
    features = Features.join(parts)
    rows, columns = -(-height // cell), -(-width // cell)
    features = Features(*(getattr(features, field.name)[:rows, :columns] for field in fields(Features)))
    return overview, features, round(width * height * factor**2)


def find_tissue(slide: "Slide", settings: ConfigDict, report: Callable[[float], None] = lambda share: None) -> tuple[TissueMap, Features]:
    """The tissue map of a slide as screening makes it, and the cells that it is made from; nothing of the overview is kept.

    Args:
        slide: an open slide with an mpp.
        settings: the `prepare` config.
        report: called with the share of the work that is done.

    Raises:
        MissingMppError: the slide has no mpp. SlideError: a damaged slide.
    """
    mpp, step, cell = overview_grid(slide, settings)
    overview, features, _ = read_overview(slide, mpp, cell, report, keep=False)
    overview.close()
    return tissue_map(features, settings.tissue, um=cell * mpp, cell=cell * step), features
