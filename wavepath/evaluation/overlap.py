"""Slides that an encoder was pretrained on: left out of the test by default, and said.

A score on tiles that the encoder has seen says less of new slides than it seems to, so downstream test sets leave them out; the classifier on top
may still train on them. Slides are compared by id. An id is a path below the folder of its data set, so a slide in another folder (`a/S1` here,
`b/S1` there) or with its suffix kept counts as the same one where its last part names one slide alone on either side; `1` in three folders does not.

Which slides an encoder has seen comes from its run, and those that it started from (`tasks.lineage`), by way of `embed.json`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from wavepath.data.mpp import strip_suffix
from wavepath.data.slide_lists import SUFFIXES
from wavepath.errors import DatasetError
from wavepath.files import read_json
from wavepath.interop.features import list_features
from wavepath.tasks import lineage

_SHOWN = 20  # slides that results name; a large overlap is a number


@dataclass(frozen=True)
class Overlap:
    """How many of the slides the encoder was pretrained on.

    Attributes:
        count: slides that were pretrained on; of: all slides. names: of the former, sorted.
        known: whether it is known what the encoder was pretrained on; otherwise `count` is a lower bound, mostly 0.
        kept: whether they are scored all the same.
    """

    count: int
    of: int
    names: tuple[str, ...] = ()
    known: bool = True
    kept: bool = False

    def describe(self, unit: str = "slides") -> str:
        """One clause for a table's head: `12 of 40 slides were pretrained on: not in the test`."""
        if not self.known and not self.count:
            return f"unknown which of the {self.of} {unit} the encoder was pretrained on"
        if not self.count:
            return f"none of the {self.of} {unit} was pretrained on"
        what = "scored all the same" if self.kept else "not in the test"
        more = "" if self.known else "; more of them may have been"
        return f"{self.count} of {self.of} {unit} {'were' if self.count > 1 else 'was'} pretrained on: {what}{more}"

    def to_json(self) -> dict:
        """For results.json: `count` is null where it is not known."""
        return {
            "count": self.count if self.known or self.count else None, "of": self.of, "known": self.known, "scored": self.kept,
            "slides": list(self.names[:_SHOWN]),
        }


def pretraining_slides(features: Path) -> frozenset[str] | None:
    """The slides that the encoder of a folder of features has learnt from.

    Args:
        features: as `wavepath embed` wrote it. `embed.json` says it; where that is missing, or of another encoder than the files, the run that the
            files name, if it is still there.

    Returns:
        Ids, as the features' own where it is a folder of images; empty for an untrained encoder. None: not known, as of imported weights and of
        features that other programs wrote, or where tiles of a folder of images were learnt, which may be of any slide.
    """
    features = Path(features)
    note = read_json(features / "embed.json") if (features / "embed.json").is_file() else {}
    run, parameters = _origin(features)
    if "parameters" in note and parameters and note["parameters"] != parameters:
        note = {}  # of an earlier encoder: embedding with this one was stopped before its end, where the note is written
    names = note.get(lineage.KEY)
    if lineage.KEY not in note:
        names = _of_run(note.get("run") or run)
    return _as_ids(names, features, note)


def start_slides(config: ConfigDict, constants: Mapping[str, Any], folders: bool) -> frozenset[str] | None:
    """The slides that the encoder which a run started from has learnt from.

    Args:
        config, constants: of the run.
        folders: whether its own tiles are those of a folder of images.

    Returns:
        Names as `tasks.lineage` gives them; empty where it started from no other run. None: not known.
    """
    if not config.init_from:
        return frozenset()
    names = constants.get(lineage.BEFORE, {}).get(lineage.KEY)
    if names is None or (not folders and any(Path(name).is_absolute() for name in names)):
        return None
    return frozenset(names)


def _as_ids(names: list[str] | None, features: Path, note: Mapping[str, Any]) -> frozenset[str] | None:
    """`pretraining_slides` from names as `tasks.lineage` gives them, and embed.json."""
    if names is None:
        return None
    ids = {name for name in names if not Path(name).is_absolute()}
    folders = {name for name in names if Path(name).is_absolute()}
    if not folders:
        return frozenset(ids)
    if note.get("kind") != "images":
        return None
    root = Path(note["source"])
    return frozenset(ids | {name for name, _ in list_features(features) if lineage.image_folder(root, name) in folders})


def _origin(features: Path) -> tuple[str, str]:
    """Run folder and checksum of the parameters that the first feature file names; each empty if it does not."""
    _, path = list_features(features)[0]
    try:
        with h5py.File(path, "r") as file:
            attributes = file["features"].attrs if "features" in file else {}
            return str(attributes.get("run", "")), str(attributes.get("parameters", ""))
    except OSError:  # reading its features says what is wrong with it
        return "", ""


def _of_run(run: str) -> list[str] | None:
    constants = Path(run) / "constants.json"
    return lineage.seen(read_json(constants)) if run and constants.is_file() else None


def split_overlap(slides: Sequence[str], pretraining: Iterable[str] | None) -> tuple[Int[np.ndarray, " k"], Overlap]:
    """Which entries may be tested on.

    Args:
        slides: slide ids; one may be there many times (a tile's slide each).
        pretraining: of `pretraining_slides`.

    Returns:
        Places in `slides` of those that were not pretrained on, int64[k], and the overlap, counted in distinct slides.
    """
    names, member = np.unique(np.asarray(slides, str), return_inverse=True)
    if pretraining is None:
        return np.arange(len(member)), Overlap(0, len(names), known=False)
    seen = _are_among(names.tolist(), set(map(str, pretraining)))
    return np.flatnonzero(~seen[member]), Overlap(int(seen.sum()), len(names), tuple(names[seen].tolist()))


def testable(
    slides: Sequence[str], pretraining: Iterable[str] | None, keep: bool = False, unit: str = "slides"
) -> tuple[Bool[np.ndarray, " n"], Overlap]:
    """As `split_overlap`, as a mask bool[n] of entries; with `keep` all of them.

    Raises:
        DatasetError: nothing is left to test on.
    """
    places, overlap = split_overlap(slides, pretraining)
    if keep:
        return np.ones(len(slides), bool), Overlap(overlap.count, overlap.of, overlap.names, overlap.known, kept=True)
    if len(slides) and not len(places):
        raise DatasetError(nothing_left(overlap, unit))
    mask = np.zeros(len(slides), bool)
    mask[places] = True
    return mask, overlap


def nothing_left(overlap: Overlap, unit: str = "slides") -> str:
    """What to tell who has no slide to test on."""
    example = f" (such as {overlap.names[0]})" if overlap.names else ""
    return (
        f"the encoder was pretrained on all {overlap.of} {unit}{example}, so none is left to test on; pretrain without some"
        " (--config.data.exclude_slides=FILE), or score them all the same with --keep-pretraining-slides"
    )


def union(overlaps: Sequence[Overlap]) -> Overlap:
    """What several encoders have seen of the same slides, together; where it is not known of each, `count` is the least it can be."""
    names = sorted({name for overlap in overlaps for name in overlap.names})
    known = all(overlap.known for overlap in overlaps)
    return Overlap(len(names), overlaps[0].of, tuple(names), known, any(overlap.kept for overlap in overlaps))


def overlap_results(overlaps: Mapping[str, Overlap], unit: str = "slides") -> dict[str, Any]:
    """What results.json says of it: `overlap` by encoder or arm, and `notes` for the table's head, where there is something to note."""
    told = {name: overlap.describe(unit) for name, overlap in overlaps.items() if overlap.count or not overlap.known}
    same = len(told) == len(overlaps) and len(set(told.values())) == 1
    notes = [next(iter(told.values()))] if same else [f"{name}: {note}" for name, note in told.items()]
    return {"overlap": {name: overlap.to_json() for name, overlap in overlaps.items()}, "notes": notes}


def _are_among(slides: list[str], others: set[str]) -> np.ndarray:
    """Which of the distinct `slides` are among `others`, by id, or by a last part that is one slide's alone on both sides."""
    stems, theirs = [_stem(name) for name in slides], Counter(map(_stem, others))  # of an image folder's whole path nothing is left out
    mine = Counter(stems)
    return np.array([name in others or mine[stem] == theirs[stem] == 1 for name, stem in zip(slides, stems, strict=True)], bool)


def _stem(slide: str) -> str:
    if PurePosixPath(slide).is_absolute():
        return slide
    name = PurePosixPath(slide).name
    return strip_suffix(name) if PurePosixPath(name).suffix.lower() in SUFFIXES - {""} else name
