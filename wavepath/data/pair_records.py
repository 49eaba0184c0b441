"""Stained pairs on disk: H&E and immunostain of one place, stored as a TFDS dataset with the splits `train` and `test`.

    OUT/pairs-train.array_record-…, pairs-test.array_record-…   one shard for each slide (in each split, where the pairs' names divide one slide)
    OUT/pairs.csv       every pair: stored or why not, size, label, shift with its confidence, tissue, sharpness, where its record is
    OUT/manifest.csv    every slide: status, reason, counts
    OUT/settings.json   version, config
    OUT/overview.jpg    a few pairs with a checkerboard of both sides

A record is a `tf.train.Example` with `he` and `ihc` (encoded images of one size), `slide`, `label`, `x`, `y` (upper left corner in px of the given
H&E image), `dx`, `dy` (shift in px that remains, as estimated), `mpp` (NaN where it is not known) and `id`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.data import manifest as mf
from wavepath.data import records
from wavepath.data.examples import decode_example, field_of
from wavepath.errors import DatasetError
from wavepath.files import read_json

DATASET = "pairs"
SPLITS = ("train", "test")
SIDES = ("he", "ihc")
COMMAND = "wavepath pairs"
LOCK = "pairs.lock"
STORED, LEFT_OUT, BAD = "stored", "left out", "bad"  # of a pair: by a rule of the config, because it cannot be used at all


@dataclasses.dataclass(frozen=True)
class PairSlideRow:
    """One slide of the manifest, or one pair where no slides are known. What is not known is None."""

    slide_id: str
    path: str
    status: str = mf.FAILED
    reason: str = ""
    mpp: float | None = None
    tiles: int = 0  # pairs that are stored
    train: int = 0
    test: int = 0
    places: int = 0  # pairs that were given
    bad: int = 0  # of these: unreadable, or of two sizes
    small: int = 0  # below pairs.min_size, before or after a correction
    shifted: int = 0  # surely by more than pairs.max_shift
    corrected: int = 0  # of the shifted ones
    unsure: int = 0  # whose shift cannot be told
    blurred: int = 0  # with a side out of focus


@dataclasses.dataclass(frozen=True)
class PairRow:
    """One pair of `pairs.csv`. The shift is that of the images as they were given, see `wavepath.data.registration.Shift`; shares are 0 to 1."""

    slide_id: str
    name: str
    split: str = ""
    status: str = BAD
    reason: str = ""
    label: str = ""
    width: int | None = None  # as stored
    height: int | None = None
    x: int | None = None
    y: int | None = None
    mpp: float | None = None
    dx: int | None = None
    dy: int | None = None
    correlation: float | None = None
    peak: float | None = None
    fine: float | None = None
    sure: int | None = None
    corrected: int = 0
    he_tissue: float | None = None
    ihc_tissue: float | None = None
    he_sharpness: float | None = None
    ihc_sharpness: float | None = None
    blur: str = ""  # the sides that are out of focus
    he: str = ""
    ihc: str = ""
    shard: str = ""
    record: int | None = None


_SHARDS = {split: f"{split}.array_record" for split in SPLITS}
LAYOUT = mf.Layout(DATASET, _SHARDS, PairSlideRow, files=(mf.INFO, *_SHARDS.values()), needed=())
KINDS = dict.fromkeys(SIDES, "bytes") | {"slide": "bytes", "label": "bytes"} | dict.fromkeys(("x", "y", "dx", "dy", "id"), "int") | {"mpp": "float"}


def write_metadata(folder: Path, splits: dict[str, tuple[list[int], int]], codec: str, description: str) -> None:
    """Writes TFDS's metadata: `splits` holds for each the pairs of its shards and the bytes of all of them."""
    import tensorflow_datasets as tfds

    def scalar(kind: type, doc: str) -> Any:
        return tfds.features.Scalar(kind, doc=doc)

    features = tfds.features.FeaturesDict({
        "he": tfds.features.Image(shape=(None, None, 3), encoding_format=codec, doc="H&E, RGB"),
        "ihc": tfds.features.Image(shape=(None, None, 3), encoding_format=codec, doc="Immunostain of the same place, RGB, of the same size"),
        "slide": tfds.features.Text(doc="Slide, or the pair's name where no slides are known"),
        "label": tfds.features.Text(doc="Label of the pair, such as its HER2 score; empty where there is none"),
        "x": scalar(np.int64, "Left edge in the H&E image that was given"),
        "y": scalar(np.int64, "Upper edge in the H&E image that was given"),
        "dx": scalar(np.int64, "Estimated shift of the immunostain to the right in px"),
        "dy": scalar(np.int64, "Estimated shift of the immunostain down in px"),
        "id": scalar(np.int64, "Names the pair: a hash of slide, name, position and mpp"),
        "mpp": scalar(np.float32, "Micrometres per pixel; NaN where it is not known"),
    })
    records.write_dataset(folder, features, splits, description, DATASET)


def is_pairs(folder: Path) -> bool:
    """Whether `wavepath pairs` has worked here, wholly or not."""
    folder = Path(folder)
    return (folder / LOCK).exists() or any(folder.glob(f"{DATASET}-*.array_record-*"))


class PairShards(records.Shards):
    """Random access to the pairs of a folder, all splits as one sequence: train, then test.

    Attributes: `rows` (a `PairRow` of each), `codec`, `config` (of `pairs`, as they were made).

    Raises:
        DatasetError: the folder is not a whole set of pairs.
    """

    command = COMMAND

    def __init__(self, folder: Path):
        folder = Path(folder)
        splits, features = records.described(folder, self.command)
        listed: list[PairRow] = mf.read_manifest(folder, PairRow, mf.PAIRS, self.command)
        try:
            self.codec = str(features["he"]["image"]["encodingFormat"])
            self.config: dict[str, Any] = read_json(folder / mf.SETTINGS)["config"]["pairs"]
            known = {split["name"]: [int(length) for length in split["shardLengths"]] for split in splits}
        except (KeyError, ValueError, TypeError, FileNotFoundError):
            raise DatasetError(f"{folder} does not hold pairs of this version; make them with `{self.command}`") from None
        paths, lengths = [], []
        for split in (name for name in SPLITS if name in known):
            paths += [folder / records.shard_name(index, len(known[split]), DATASET, split) for index in range(len(known[split]))]
            lengths += known[split]
        super().__init__(folder, paths, lengths)
        self.rows = [row for row in listed if row.status == STORED]
        told = [(row.shard, row.record) for row in self.rows]
        if told != [(path.name, record) for path, length in zip(paths, lengths, strict=True) for record in range(length)]:
            raise DatasetError(f"{folder}: {mf.PAIRS} does not list what the shards hold; run `{self.command}` again")

    def images(self, index: int) -> list[bytes]:
        """The encoded images of one pair, H&E and immunostain; raises as `read`."""
        record = self.read([index])[0]
        return [field_of(record, side) for side in SIDES]

    def meta(self, index: int) -> dict[str, Any]:
        """The fields of a record without its images."""
        fields = decode_example(self.read([index])[0])
        return {name: value for name, value in fields.items() if name not in SIDES}
