"""Where pyramids are taken: the ladder of levels of a slide, places on it from a table or from tissue, and which of them are for testing.

Places lie on the pixels of the finest level, their corners at multiples of 2^(levels-1): so the crop of every coarser level begins and ends on
whole pixels too, and covers the same area exactly.
"""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data.mpp import SAME_MPP, require_mpp
from wavepath.data.slide_grid import average
from wavepath.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from wavepath.data.slides import Slide, SlideRef

_ROUNDING = 1.5  # px by which a level's size may differ from an exact fraction of the finest one's: scanners round up or down
_NAMES = ("slide", "slide_id", "wsi", "name")


class Place(NamedTuple):
    """A centre in level-0 pixels, and its label."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Ladder:
    """The levels of a slide's samples.

    Attributes:
        step: level-0 pixels for each pixel of the finest level.
        mpp: micrometres per pixel of the finest level.
        width, height: the slide in pixels of the finest level.
        own: for each level the slide's own that holds its very pixels; None where they are made from the next finer one.
    """

    step: float
    mpp: float
    width: int
    height: int
    own: tuple[int | None, ...]

    @property
    def unit(self) -> int:
        """Corners lie at multiples of so many pixels."""
        return 2 ** (len(self.own) - 1)

    def corner(self, place: Place, size: int) -> tuple[int, int]:
        """Column and row of the crop round a place."""
        return tuple(self.unit * math.floor((centre / self.step - size / 2) / self.unit + 0.5) for centre in place[:2])

    def centre(self, corner: tuple[int, int], size: int) -> tuple[int, int]:
        """Of a crop, in whole level-0 pixels."""
        return tuple(math.floor((start + size / 2) * self.step + 0.5) for start in corner)

    def inside(self, corner: tuple[int, int], size: int) -> bool:
        """Whether the crop lies on the slide wholly."""
        return 0 <= corner[0] <= self.width - size and 0 <= corner[1] <= self.height - size


def make_ladder(slide: "Slide", settings: ConfigDict) -> Ladder:
    """The levels that a slide gives: from `pyramids.mpp` (an upper resolution; 0: the slide's own) downwards.

    A level of the slide is taken as it is where its mpp agrees within 1 % and it covers the slide at an exact power of two: a level that
    is a pixel in a hundred off would not lie under the finer ones.

    Raises:
        MissingMppError: the slide has no mpp.
    """
    own_mpp = require_mpp(slide)
    asked = max(float(settings.mpp), own_mpp)
    exact = next((n for n, level in enumerate(slide.levels) if abs(own_mpp * level.downsample / asked - 1) <= SAME_MPP), None)
    step = asked / own_mpp if exact is None else slide.levels[exact].downsample
    own: list[int | None] = [exact]
    for number in range(1, int(settings.levels)):
        wanted = step * 2**number
        own.append(next((
            n for n, level in enumerate(slide.levels)
            if abs(level.downsample / wanted - 1) <= SAME_MPP
            and all(abs(have - whole / wanted) <= _ROUNDING for have, whole in zip(level[:2], slide.dimensions, strict=True))
        ), None))
    if exact is None:
        width, height = (int(extent / step + 1e-6) for extent in slide.dimensions)
    else:
        width, height = slide.levels[exact][:2]
    return Ladder(step, own_mpp * step, width, height, tuple(own))


def read_levels(slide: "Slide", ladder: Ladder, corner: tuple[int, int], size: int) -> list[np.ndarray]:
    """The crops of one place, uint8[size / 2^k, size / 2^k, 3] for each level k.

    A level that the slide lacks is the mean over blocks of the next finer crop: exactly its area, with no edge effect.

    Raises:
        SlideError: the slide is damaged there.
    """
    crops: list[np.ndarray] = []
    finest = 0  # the nearest level whose pixels were read
    for number, own in enumerate(ladder.own):
        (column, row), side = (start >> number for start in corner), size >> number
        if own is not None:
            crops.append(slide.read_level(own, column, row, side, side))
            finest = number
        elif number == 0:
            crops.append(slide.read(corner[0] * ladder.step, corner[1] * ladder.step, side, side, ladder.mpp))
        else:
            crops.append(average(crops[finest], 2 ** (number - finest)))
    return crops


def tissue_grid(ladder: Ladder, size: int) -> list[tuple[int, int]]:
    """Corners of crops that do not overlap, over the whole slide, row by row."""
    return [(column, row) for row in range(0, ladder.height - size + 1, size) for column in range(0, ladder.width - size + 1, size)]


# Tables -------------------------------------------------------------------------------------------------------------------------------------


def read_places(path: Path) -> dict[str, list[Place]]:
    """A table `slide,x,y[,label]` of centres in level-0 pixels, with or without a header; blank lines and lines that begin with # do not count.

    Raises:
        DatasetError: the file cannot be read, or a line is not as it must be; names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(number, [cell.strip() for cell in cells]) for number, cells in enumerate(csv.reader(file), start=1)]
    except OSError as error:
        raise DatasetError(f"cannot read the table of coordinates {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"the table of coordinates {path} is not a CSV in UTF-8 ({error}); save it as one") from None
    lines = [(number, cells) for number, cells in lines if any(cells) and not cells[0].startswith("#")]
    columns = ["slide", "x", "y", "label"]
    if lines and lines[0][1][0].lower() in _NAMES:
        columns = ["slide" if name.lower() in _NAMES else name.lower() for name in lines.pop(0)[1]]
        if not {"slide", "x", "y"} <= set(columns):
            raise DatasetError(f"{path}: the header has {','.join(columns)}; the columns slide,x,y are needed (label where there is one)")
    places: dict[str, list[Place]] = {}
    for number, cells in lines:
        row = dict(zip(columns, cells, strict=False))
        try:
            x, y = float(row["x"]), float(row["y"])
        except (KeyError, ValueError):
            x = y = math.nan
        if not (row.get("slide") and math.isfinite(x) and math.isfinite(y)):
            line = ",".join(cells)
            raise DatasetError(f"{path} line {number}: {line!r} is not slide,x,y[,label] with x,y in level-0 pixels; mend or delete the line")
        name = row["slide"].replace("\\", "/").removeprefix("./")
        places.setdefault(name, []).append(Place(x, y, row.get("label", "")))
    if not places:
        raise DatasetError(f"the table of coordinates {path} names no place; a line is slide,x,y with the centre in level-0 pixels")
    return places


def match_places(refs: "Sequence[SlideRef]", table: Mapping[str, list[Place]]) -> dict[str, list[Place]]:
    """The places of each slide, named by its id, path or file name; says which names are unknown, and which match but for case.

    Raises:
        DatasetError: the table names none of the slides.
    """
    called: dict[str, set[str]] = {}
    for ref in refs:
        for name in (ref.id, ref.path.name, ref.path.stem, ref.id.rpartition("/")[2]):
            called.setdefault(name, set()).add(ref.id)
    folded: dict[str, set[str]] = {}
    for name, owners in called.items():
        folded.setdefault(name.casefold(), set()).update(owners)
    ids, unknown, found, respelt = {ref.id for ref in refs}, [], {}, []
    for name, places in table.items():
        # An id is an id; a bare file name must be that of one slide alone.
        owners = {name} if name in ids else called.get(name, set())
        if not owners and (owners := folded.get(name.casefold(), set())) and len(owners) == 1:  # lists have Tumor_024, files are tumor_024.tif
            respelt.append(f"{name!r} is {next(iter(owners))!r}")
        if len(owners) == 1:
            found.setdefault(next(iter(owners)), []).extend(places)
        else:
            unknown.append(f"{name!r}" + (" (of several slides)" if owners else ""))
    if not found:
        wrong = f"it has {unknown[0]}, they are like {refs[0].id!r}"
        raise DatasetError(f"the table of coordinates names none of the slides ({wrong}); check its first column")
    if respelt:
        console.warn(f"the table of coordinates spells {len(respelt)} slides in other upper and lower case (first: {respelt[0]}); they are taken")
    if unknown:
        console.warn(f"the table of coordinates names {len(unknown)} slides that are not there (first: {unknown[0]}); their places are left out")
    return found


# Splits -------------------------------------------------------------------------------------------------------------------------------------


def _turn(seed: int, *names: object) -> float:
    """A number in [0, 1) that a name draws, whatever else there is."""
    text = "\n".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little") / 2**64


def split_slides(cases: Mapping[str, str], share: float, seed: int) -> dict[str, str]:
    """`train` or `test` for each slide, slides of one case together: the cases whose draw is lowest are for testing, at least one on each side.

    Args:
        cases: slide id -> its case (its own id where there is none).

    Raises:
        ConfigError: one case only.
    """
    names = sorted(set(cases.values()), key=lambda name: (_turn(seed, "split", name), name))
    count = round(share * len(names))
    if 0 < share < 1:
        if len(names) < 2:
            raise ConfigError(
                "one slide (or case) cannot be on both sides of training and test; give more, --split=sample to divide its samples, "
                "or --test-share=0 to keep all for training"
            )
        count = min(max(count, 1), len(names) - 1)
    test = set(names[:count])
    return {slide: "test" if case in test else "train" for slide, case in cases.items()}


def split_samples(slide_id: str, corners: Sequence[tuple[int, int]], share: float, seed: int) -> list[str]:
    """`train` or `test` for each sample of a slide; at least one on each side where there are two."""
    turns = [_turn(seed, "sample", slide_id, *corner) for corner in corners]
    if len(corners) < 2 or not 0 < share < 1:
        return ["test" if turn < share else "train" for turn in turns]
    count = min(max(round(share * len(corners)), 1), len(corners) - 1)
    test = set(sorted(range(len(corners)), key=lambda index: (turns[index], index))[:count])
    return ["test" if index in test else "train" for index in range(len(corners))]


def overlaps(sides: Mapping[tuple[int, int], str], size: int) -> int:
    """How many crops for testing share pixels with one for training; `sides` by corner."""
    train = np.array([corner for corner, side in sides.items() if side == "train"], np.int64).reshape(-1, 2)
    test = [corner for corner, side in sides.items() if side == "test"]
    return sum(bool((np.abs(train - corner) < size).all(1).any()) for corner in test)


def shares(slides: Sequence[str], count: int, seed: int) -> dict[str, int]:
    """How many of `count` samples each slide gives: equal numbers, what remains one each to the slides whose draw is lowest.

    Raises:
        ConfigError: fewer samples than slides.
    """
    if count < len(slides):
        raise ConfigError(f"--count {count} is less than one sample of each of the {len(slides)} slides; give more samples, or fewer slides")
    each, rest = divmod(count, len(slides))
    more = set(sorted(slides, key=lambda slide: (_turn(seed, "count", slide), slide))[:rest])
    return {slide: each + (slide in more) for slide in slides}


def draw(slide_id: str, corners: Sequence[tuple[int, int]], count: int, seed: int) -> list[tuple[int, int]]:
    """At most `count` corners of a slide, drawn evenly, in their order; all where `count` is 0."""
    if not 0 < count < len(corners):
        return list(corners)
    turns = [_turn(seed, "draw", slide_id, *corner) for corner in corners]
    keep = set(sorted(range(len(corners)), key=lambda index: (turns[index], index))[:count])
    return [corner for index, corner in enumerate(corners) if index in keep]
