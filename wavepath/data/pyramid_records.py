"""Pyramids on disk: aligned crops of one place at several magnifications, stored as a TFDS dataset with the splits `train` and `test`.

    OUT/pyramids-train.array_record-…, pyramids-test.array_record-…   one shard for each slide (with pyramids.split=sample one in each split)
    OUT/samples.csv     every sample: slide, split, centre, size, mpp, label, share of tissue, and where its record is
    OUT/manifest.csv    every slide: status, reason, counts, which levels were the slide's own
    OUT/settings.json   version, config, and the mean RGB of the training split
    OUT/overview.jpg    a few samples, level beside level

A record is a `tf.train.Example` with `level_0` (the finest) to `level_<n-1>` (encoded images, each half as wide as the one before), `slide`, `x`, `y`
(centre in level-0 pixels), `mpp` (of level_0; NaN where it is not known), `label` and `id`; of single images also `file`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.data import manifest as mf
from wavepath.data import records
from wavepath.data.examples import decode_example, field_of
from wavepath.errors import DatasetError
from wavepath.files import read_json

DATASET = "pyramids"
SPLITS = ("train", "test")
COMMAND = "wavepath pyramids"
LOCK = "pyramids.lock"


@dataclasses.dataclass(frozen=True)
class PyramidRow:
    """One slide of the manifest. Lengths in level-0 pixels, mpp in micrometres per pixel; what is not known is None."""

    slide_id: str
    path: str
    status: str = mf.FAILED
    reason: str = ""
    mpp: float | None = None  # level 0
    mpp_source: str = ""
    width: int | None = None
    height: int | None = None
    backend: str = ""
    tiles: int = 0  # samples that are stored
    train: int = 0
    test: int = 0
    places: int = 0  # looked at: of the grid, of the table, or of the images
    blank: int = 0  # of these left out: too little tissue,
    edge: int = 0  # over the slide's edge,
    small: int = 0  # images below pyramids.min_size,
    unreadable: int = 0  # images that cannot be read,
    repeated: int = 0  # places named twice,
    limit: int = 0  # more than pyramids.per_slide
    finest_mpp: float | None = None  # of the samples' finest level
    own_levels: str = ""  # numbers of the samples' levels that are the slide's own pixels; the others were made from the next finer
    case_id: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One sample of `samples.csv`. `x`, `y`: centre in level-0 pixels; `width`, `height`: of the finest level; `record`: place in its shard.

    `image`: of single images the file, below the folder of images; empty of slides, and in folders of earlier versions.
    """

    slide_id: str
    split: str
    x: int
    y: int
    width: int
    height: int
    mpp: float | None
    label: str
    tissue: float
    shard: str
    record: int
    image: str = dataclasses.field(default="", metadata={"later": True})


_SHARDS = {split: f"{split}.array_record" for split in SPLITS}
LAYOUT = mf.Layout(DATASET, _SHARDS, PyramidRow, files=(mf.INFO, *_SHARDS.values()), needed=())


def level_name(level: int) -> str:
    """The field of a level; 0 is the finest."""
    return f"level_{level}"


def kinds(levels: int, single: bool = False) -> dict[str, str]:
    """The fields of a record with so many levels; `single` images have their file's path too."""
    images = {level_name(level): "bytes" for level in range(levels)} | ({"file": "bytes"} if single else {})
    return images | {"slide": "bytes", "label": "bytes", "x": "int", "y": "int", "id": "int", "mpp": "float"}


def write_metadata(
    folder: Path, splits: dict[str, tuple[list[int], int]], levels: int, codec: str, description: str, single: bool = False
) -> None:
    """Writes TFDS's metadata: `splits` holds for each the samples of its shards and the bytes of all of them; `single` as of `kinds`."""
    import tensorflow_datasets as tfds

    images = {
        level_name(level): tfds.features.Image(shape=(None, None, 3), encoding_format=codec, doc=f"RGB, 1/{2**level} of the finest level")
        for level in range(levels)
    }
    file = {"file": tfds.features.Text(doc="The image file: path below the images folder")} if single else {}
    features = tfds.features.FeaturesDict({
        **images,
        **file,
        "slide": tfds.features.Text(doc="Slide id: path below the slides folder, without suffix"),
        "label": tfds.features.Text(doc="Label of the place or its slide; empty where there is none"),
        "x": tfds.features.Scalar(np.int64, doc="Centre in level-0 pixels"),
        "y": tfds.features.Scalar(np.int64, doc="Centre in level-0 pixels"),
        "id": tfds.features.Scalar(np.int64, doc="Names the sample: a hash of slide (and file), position and mpp"),
        "mpp": tfds.features.Scalar(np.float32, doc="Micrometres per pixel of level_0; NaN where it is not known"),
    })
    records.write_dataset(folder, features, splits, description, DATASET)


def is_pyramids(folder: Path) -> bool:
    """Whether `wavepath pyramids` has worked here, wholly or not."""
    folder = Path(folder)
    return (folder / LOCK).exists() or any(folder.glob(f"{DATASET}-*.array_record-*"))


class PyramidShards(records.Shards):
    """Random access to the samples of a folder of pyramids, all splits as one sequence: train, then test.

    Attributes: `rows` (a `SampleRow` of each), `levels` (how many), `codec`, `mean` (RGB of the training split, 0 to 1), `config` (of
    `pyramids`, as it was made). `made` tells which slides lack a level of their own.

    Raises:
        DatasetError: the folder is not a whole set of pyramids.
    """

    command = COMMAND

    def __init__(self, folder: Path):
        folder = Path(folder)
        splits, features = records.described(folder, self.command)
        self.rows: list[SampleRow] = mf.read_manifest(folder, SampleRow, mf.SAMPLES, self.command)
        try:
            self.levels = sum(name.startswith("level_") for name in features)
            self.codec = str(features[level_name(0)]["image"]["encodingFormat"])
            settings = read_json(folder / mf.SETTINGS)
            self.config: dict[str, Any] = settings["config"]["pyramids"]
            self.mean = tuple(float(value) for value in settings["mean_rgb"])
            known = {split["name"]: [int(length) for length in split["shardLengths"]] for split in splits}
        except (KeyError, ValueError, TypeError, FileNotFoundError):
            raise DatasetError(f"{folder} does not hold pyramids of this version; make them with `{self.command}`") from None
        paths, lengths = [], []
        for split in (name for name in SPLITS if name in known):
            paths += [folder / records.shard_name(index, len(known[split]), DATASET, split) for index in range(len(known[split]))]
            lengths += known[split]
        super().__init__(folder, paths, lengths)
        told = [(row.shard, row.record) for row in self.rows]
        if told != [(path.name, record) for path, length in zip(paths, lengths, strict=True) for record in range(length)]:
            raise DatasetError(f"{folder}: {mf.SAMPLES} does not list what the shards hold; run `{self.command}` again")

    def made(self, level: int) -> dict[str, str]:
        """Slide id -> how the level was made, of those slides whose own pixels it does not hold: `bicubic halving` or `block means`."""
        rows = mf.read_manifest(self.folder, PyramidRow, command=self.command)
        lacking = [row for row in rows if row.tiles and str(level) not in row.own_levels.split()]
        return {row.slide_id: "bicubic halving" if row.backend == "image" else "block means" for row in lacking}

    def images(self, index: int, levels: Sequence[int]) -> list[bytes]:
        """The encoded images of some levels of one sample.

        Raises:
            CorruptRecordError, IndexError: as `read`. DatasetError: a level that is not stored.
        """
        record = self.read([index])[0]
        try:
            return [field_of(record, level_name(level)) for level in levels]
        except ValueError:
            raise DatasetError(f"{self.folder} holds levels 0 to {self.levels - 1}, not {max(levels)}; make more with --levels") from None

    def meta(self, index: int) -> dict[str, Any]:
        """The fields of a record without its images."""
        fields = decode_example(self.read([index])[0])
        return {name: value for name, value in fields.items() if not name.startswith("level_")}
