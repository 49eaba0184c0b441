"""Which slides a network has learnt from, its ancestors included: what is measured on those is not held out.

A run's constants record the slides that it trained on (`train_slides`) and those of the run that it started from (`init_from`). The slide of tiles
that were cut from slides is its id. A folder of images has no slides: there the "slide" is the folder, by its whole path, since names such
as `tumour` are in every other data set too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "train_slides"
BEFORE = "init_from"


def slides_of(source: Any) -> list[str]:
    """What a run is to remember of the slides that `source` shows it, sorted."""
    return sorted({slide_name(source, str(name)) for name in getattr(source, "slides", ())})


def slide_name(source: Any, slide: str) -> str:
    """What a slide of `source` is called here: its id; of a folder of images the whole path of its folder."""
    return image_folder(Path(source.name), slide) if getattr(source, "kind", "") == "images" else slide


def image_folder(root: Path, name: str) -> str:
    """The whole path of what an image folder calls a slide: `name` below `root`, or `root` itself where images lie in it."""
    root = Path(root).resolve()
    return str(root if name == root.name and not (root / name).is_dir() else root / name)


def seen(constants: Mapping[str, Any]) -> list[str] | None:
    """All slides that a network has learnt from.

    Args:
        constants: of its run.

    Returns:
        Sorted; None where they, or those of a run that it started from, are not known (imported weights, runs that did not record them).
    """
    own = constants.get(KEY)
    if own is None:
        return None
    names = set(map(str, own))
    if BEFORE in constants:
        before = constants[BEFORE].get(KEY)
        if before is None:
            return None
        names |= set(map(str, before))
    return sorted(names)
