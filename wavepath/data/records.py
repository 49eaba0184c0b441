"""Tiles on disk: one deterministic array_record shard for each slide, of serialised `tf.train.Example`, readable by index.

TFDS reads the folder with `tfds.builder_from_directory(folder).as_data_source()`. The bytes are written here rather than by a TFDS builder,
because that one starts over after a kill and orders map fields differently from run to run. A shard holds the tiles of one slide as
`group_size:1` chunks (random access), stored uncompressed: the images inside are compressed already, and every chunk carries a hash.
"""

import bisect
import errno
import hashlib
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from wavepath.data.examples import FIELDS, decode_example, encode_example, tile_of
from wavepath.errors import DatasetError, WavepathError
from wavepath.files import atomic_path, read_json

__all__ = ["FIELDS", "Shards", "ShardWriter", "TileShards", "decode_example", "encode_example", "shard_name", "tile_of"]

DATASET = "tiles"
SPLIT = "train"
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access
_CAUSE = re.compile(r" \(|;|, chunk at")  # behind it array_record's messages go into hashes and addresses


def _open_readers() -> int:
    """Shards that a dataset holds open at a time: an eighth of the file descriptors that the process may have, since several are open together
    (training and validation data, or an image and its pair). Opening one costs as much as a third of a tile."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 128
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1024 if allowed == resource.RLIM_INFINITY else min(1024, max(32, allowed // 8))


OPEN_READERS = _open_readers()


class StorageError(WavepathError):
    """The output cannot be written (no space, no permission); everything stops, since the next slide would fail in the same way."""


class CorruptRecordError(DatasetError):
    """A record whose bytes are damaged; `index` is its number in the dataset, `shard` its file."""

    def __init__(self, message: str, shard: Path, index: int):
        super().__init__(message)
        self.shard, self.index = shard, index


def is_storage_error(error: BaseException) -> bool:
    """Whether an error says that the disk is full, over quota or not writable."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def storage_error(path: Path | str, error: BaseException) -> StorageError:
    """The one line for a failure to write `path`."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition(";")[0]
    return StorageError(f"cannot write {path}: {text}; free space or choose another folder and run this again (finished slides are kept)")


def example_id(slide: str, x: int, y: int, mpp: float) -> int:
    """A number in [0, 2**63) that names a tile whatever else is in the dataset: a hash of slide, level-0 position and mpp.

    It stays when slides are added or removed, so that a slide's shard never has to be rewritten for another slide's sake.
    """
    text = f"{slide}\n{x}\n{y}\n{float(np.float32(mpp))!r}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def shard_name(index: int, count: int, dataset: str = DATASET, split: str = SPLIT) -> str:
    """TFDS's name of shard `index` of `count`: `tiles-train.array_record-00000-of-00008`."""
    return f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


class ShardWriter:
    """Writes one shard under a temporary name, which becomes `path` when the block ends without an error.

    `records` counts what was written; after the block `bytes` is the size of the file.

    Raises:
        StorageError: the disk is full or not writable; no file is left behind.
    """

    def __init__(self, path: Path):
        self.path, self.records, self.bytes = Path(path), 0, 0

    def __enter__(self) -> Self:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._atomic = atomic_path(self.path)
        with _storage(self.path):
            self._temporary = self._atomic.__enter__()
            self._writer = ArrayRecordWriter(str(self._temporary), WRITER_OPTIONS)
        return self

    def write(self, record: bytes) -> None:
        with _storage(self.path):
            self._writer.write(record)
        self.records += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            try:
                self._writer.close()
            except RuntimeError:
                pass  # the first error is the one to report
            self._atomic.__exit__(kind, error, trace)
            return
        try:
            with _storage(self.path):
                self._writer.close()
                # The name must never appear before the contents, not even after a power failure.
                with open(self._temporary, "rb") as file:
                    os.fsync(file.fileno())
                self.bytes = self._temporary.stat().st_size
        except BaseException as failure:
            self._atomic.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._atomic.__exit__(None, None, None)


class _storage:
    """Turns failures to write into `StorageError`; array_record reports them as RuntimeError with the system's text."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError | RuntimeError):
            raise storage_error(self.path, error) from None


def write_metadata(folder: Path, shard_lengths: Sequence[int], shard_bytes: int, size: int, codec: str, description: str) -> None:
    """Writes the metadata of a dataset of tiles, see `write_dataset`.

    Args:
        shard_lengths: number of tiles of each shard, in the order of the shards' names.
        shard_bytes: bytes of all shards together.
        size: side of a tile in pixels.
        codec: `jpeg` or `png`.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({
        "tile": tfds.features.Image(shape=(size, size, 3), encoding_format=codec, doc="RGB tile"),
        "id": tfds.features.Scalar(np.int64, doc="Names the tile: a hash of slide, position and mpp"),
        "slide": tfds.features.Text(doc="Slide id: path below the slides folder, without suffix"),
        "x": tfds.features.Scalar(np.int64, doc="Left edge in level-0 pixels"),
        "y": tfds.features.Scalar(np.int64, doc="Upper edge in level-0 pixels"),
        "mpp": tfds.features.Scalar(np.float32, doc="Micrometres per pixel of this tile"),
        "energy": tfds.features.Scalar(np.float32, doc="Wavelet energy of the tile's region at the screening magnification"),
        "region": tfds.features.Scalar(np.int64, doc="Index of the region in the slide's regions.csv"),
    })
    write_dataset(folder, features, {SPLIT: (shard_lengths, shard_bytes)}, description)


def write_dataset(
    folder: Path, features: Any, splits: Mapping[str, tuple[Sequence[int], int]], description: str, dataset: str = DATASET
) -> None:
    """Writes TFDS's `features.json` and, last, `dataset_info.json`, whose presence says that the dataset is whole.

    Args:
        features: a TFDS `FeaturesDict`.
        splits: by name the number of examples of each shard, in the order of the shards' names, and the bytes of all of them.
        dataset: its name, the beginning of the shards' names.
    """
    import tensorflow_datasets as tfds

    def template(split: str, data_dir: str) -> Any:
        return tfds.core.ShardedFileTemplate(
            data_dir=data_dir, dataset_name=dataset, split=split, filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )

    infos = [
        tfds.core.SplitInfo(name=name, shard_lengths=list(lengths), num_bytes=size, filename_template=template(name, str(folder)))
        for name, (lengths, size) in splits.items()
    ]
    with tempfile.TemporaryDirectory(prefix=".metadata.", suffix=".tmp", dir=folder) as temporary:
        # TFDS looks at file names in `data_dir` to learn the format, and writes in place: so into a folder of its own first.
        for name, (lengths, _) in splits.items():
            (Path(temporary) / shard_name(0, len(lengths), dataset, name)).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=temporary, features=features, split_infos=infos, filename_template=template(next(iter(splits)), temporary),
            version="1.0.0", check_data=False, description=description,
        )
        for name in ("features.json", "dataset_info.json"):
            with atomic_path(folder / name) as path:
                path.write_bytes((Path(temporary) / name).read_bytes())


def described(folder: Path, command: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The splits and the features that a folder's metadata describe, as TFDS wrote them."""
    info, features = folder / "dataset_info.json", folder / "features.json"
    if not info.is_file() or not features.is_file():
        raise DatasetError(f"{folder} is not a whole prepared dataset (no {info.name}); run `{command}` on it (again: finished slides are kept)")
    try:
        return read_json(info)["splits"], read_json(features)["featuresDict"]["features"]
    except (KeyError, TypeError):
        raise DatasetError(f"{info} does not describe a dataset of wavepath; give a folder made by `{command}`") from None


class Shards:
    """Random access to the records of some shards as one sequence. Safe to use from several threads.

    Attributes: `folder`, `shards` (paths), `lengths` (records of each), `command` (that remakes what is missing).

    Raises:
        DatasetError: a shard is missing.
    """

    command = "wavepath prepare"

    def __init__(self, folder: Path, shards: Sequence[Path], lengths: Sequence[int]):
        self.folder, self.shards, self.lengths = Path(folder), list(shards), list(lengths)
        missing = [shard.name for shard in self.shards if not shard.is_file()]
        if missing:
            raise DatasetError(f"{folder} lacks {missing[0]} ({len(missing)} missing); run `{self.command}` again, it remakes what is not there")
        self._ends = np.cumsum(self.lengths, dtype=np.int64).tolist()
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Shard number and record number of example `index`.

        Raises:
            IndexError: outside of the dataset.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a dataset of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.lengths[shard])

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
            reader = open_shard(self.shards[shard], self.lengths[shard], self.command)
            self._readers[shard] = reader
            # Not closed here: another thread may be reading from it; the file is closed with the last reference.
            while len(self._readers) > OPEN_READERS:
                self._readers.popitem(last=False)
            return reader

    def record(self, index: int) -> bytes:
        """The serialised example `index`.

        One by one and in the caller's thread: array_record's batched read wakes a pool of its own, at three times the processor time.

        Raises:
            CorruptRecordError: the record's bytes do not match their hash; names shard and index.
            DatasetError: a shard that cannot be opened or is shorter than the dataset says.
            IndexError: outside of the dataset.
        """
        shard, record = self.locate(index)
        try:
            return self._reader(shard).read([record])[0]
        except RuntimeError as error:
            raise CorruptRecordError(
                f"{self.shards[shard]}: record {record} (example {index}) is damaged ({_CAUSE.split(str(error))[0]}); delete this file and run "
                f"`{self.command}` again to remake it, or train with --config.data.on_corrupt=replace", self.shards[shard], index,
            ) from None

    def read(self, indices: Iterable[int]) -> list[bytes]:
        """The serialised examples at `indices`, in their order; raises as `record`."""
        return [self.record(int(index)) for index in indices]


class TileShards(Shards):
    """The tiles of a prepared folder, all shards as one sequence; also `codec` (`jpeg` or `png`) and `image_shape` (height, width, 3).

    Raises:
        DatasetError: the folder is not a whole prepared dataset.
    """

    def __init__(self, folder: Path):
        splits, features = described(Path(folder), self.command)
        try:
            (split,) = (split for split in splits if split["name"] == SPLIT)
            lengths = [int(length) for length in split["shardLengths"]]
            image = features["tile"]["image"]
            self.codec = str(image["encodingFormat"])
            height, width, channels = (int(size) for size in image["shape"]["dimensions"])
        except (KeyError, ValueError, TypeError):
            raise DatasetError(f"{folder}/dataset_info.json does not describe wavepath tiles; give a folder made by `{self.command}`") from None
        self.image_shape = (height, width, channels)
        super().__init__(folder, [Path(folder) / shard_name(index, len(lengths)) for index in range(len(lengths))], lengths)

    def tiles(self, indices: Iterable[int]) -> list[bytes]:
        """The encoded images at `indices`; raises as `read` does."""
        return [self.tile(int(index)) for index in indices]

    def tile(self, index: int) -> bytes:
        """The encoded image of one example; raises as `record` does."""
        return tile_of(self.record(index))

    def meta(self, index: int) -> dict[str, Any]:
        """Slide, x, y, mpp, energy, region and id of one example, without its image."""
        fields = decode_example(self.record(index))
        del fields["tile"]
        return fields


def slide_of(path: Path) -> str | None:
    """The slide whose tiles a shard holds, or None where its first record cannot be read."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return str(decode_example(ArrayRecordReader(str(path), READER_OPTIONS).read([0])[0])["slide"])
    except (RuntimeError, ValueError, KeyError, IndexError):
        return None


def open_shard(path: Path, expected: int, command: str = "wavepath prepare") -> Any:
    """An array_record reader of a shard that holds `expected` records.

    Raises:
        DatasetError: it is cut short, damaged in its index, or holds another number of records.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), READER_OPTIONS)
    if not reader.ok() or reader.num_records() != expected:
        raise DatasetError(
            f"{path} is damaged: {reader.num_records() if reader.ok() else 0} of {expected} records can be found; delete this file and run "
            f"`{command}` again to remake it"
        )
    return reader
