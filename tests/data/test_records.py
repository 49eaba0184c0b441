"""Shards: deterministic bytes, random access, what damage looks like, and that TFDS and TensorFlow read them."""

import hashlib
import shutil

import numpy as np
import pytest

from wavepath.data import records
from wavepath.data.tiles import decode_tile, encode_tile
from wavepath.errors import DatasetError
from wavepath.files import read_json


def _example(slide: str, index: int, size: int = 16) -> dict:
    rgb = np.random.default_rng([index, len(slide)]).integers(0, 256, (size, size, 3), dtype=np.uint8)
    x, y = 224 * index, -5
    number = records.example_id(slide, x, y, 0.25)
    return dict(tile=encode_tile(rgb, "png"), id=number, slide=slide, x=x, y=y, mpp=0.25, energy=1.5 + index, region=index // 2)


@pytest.fixture
def dataset(tmp_path):
    """Three shards of 3, 5 and 2 tiles with their metadata."""
    lengths, size = [3, 5, 2], 0
    for number, length in enumerate(lengths):
        with records.ShardWriter(tmp_path / records.shard_name(number, len(lengths))) as writer:
            for index in range(length):
                writer.write(records.encode_example(_example(f"ä/slide {number}", index)))
        size += writer.bytes
    records.write_metadata(tmp_path, lengths, size, 16, "png", "three slides")
    return tmp_path


def test_example_round_trip():
    fields = _example("a/ß", 3)
    back = records.decode_example(records.encode_example(fields))
    assert back == {**fields, "mpp": 0.25, "energy": 4.5}
    assert records.tile_of(records.encode_example(fields)) == fields["tile"]


def test_example_is_what_protobuf_writes():
    """Byte for byte the deterministic serialisation of the same message by protobuf itself."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example_for_test.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for number, (field, kind, label, type_name) in enumerate(fields, start=1):
            added.field.add(name=field, number=number, type=kind, label=label, type_name=type_name)
        return added

    many, one = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    message("BytesList", ("value", kinds.TYPE_BYTES, many, None))
    message("FloatList", ("value", kinds.TYPE_FLOAT, many, None))
    message("Int64List", ("value", kinds.TYPE_INT64, many, None))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    message("Feature", *((name, kinds.TYPE_MESSAGE, one, f".t.{kind}") for name, kind in lists))
    features = message("Features", ("feature", kinds.TYPE_MESSAGE, many, ".t.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, label=one, type_name=".t.Feature")
    message("Example", ("features", kinds.TYPE_MESSAGE, one, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    example = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    fields = _example("slide", 2)
    for name, kind in records.FIELDS.items():
        value = fields[name].encode() if isinstance(fields[name], str) else fields[name]
        target = example.features.feature[name]
        {"bytes": target.bytes_list, "float": target.float_list, "int": target.int64_list}[kind].value.append(value)
    assert records.encode_example(fields) == example.SerializeToString(deterministic=True)


def test_example_id_names_the_tile():
    ids = {records.example_id(slide, x, y, 0.25) for slide in ("a", "b") for x in range(4) for y in range(4)}
    assert len(ids) == 32 and all(0 <= number < 2**63 for number in ids)
    assert records.example_id("a", 1, 2, 0.25) == 4565667765508260075  # golden: ids are stored, they must not change


def test_shards_are_deterministic(tmp_path):
    digests = set()
    for run in range(3):
        path = tmp_path / f"{run}.array_record"
        with records.ShardWriter(path) as writer:
            for index in range(200):
                writer.write(records.encode_example(_example("s", index)))
        assert writer.records == 200 and writer.bytes == path.stat().st_size
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_failed_shard_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), records.ShardWriter(tmp_path / "shard") as writer:
        writer.write(b"one")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, path, options):
            self.real = array_record_module_writer("/dev/full", options)

        def write(self, record):
            self.real.write(record)

        def close(self):
            self.real.close()

    array_record_module_writer = array_record_module.ArrayRecordWriter
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(records.StorageError, match="No space left on device.*finished slides are kept"):
        with records.ShardWriter(tmp_path / "shard") as writer:
            for index in range(2000):
                writer.write(np.random.default_rng(index).bytes(10_000))
    assert list(tmp_path.iterdir()) == []


def test_random_access(dataset):
    shards = records.TileShards(dataset)
    assert len(shards) == 10 and shards.codec == "png" and shards.image_shape == (16, 16, 3)
    order = [9, 0, 4, 4, 2, 8]
    got = [records.decode_example(record) for record in shards.read(order)]
    where = [("ä/slide 2", 1), ("ä/slide 0", 0), ("ä/slide 1", 1), ("ä/slide 1", 1), ("ä/slide 0", 2), ("ä/slide 2", 0)]
    assert [(fields["slide"], fields["x"] // 224) for fields in got] == where
    assert shards.tiles(order) == [_example(slide, index)["tile"] for slide, index in where]
    assert shards.meta(9)["region"] == 0 and "tile" not in shards.meta(9)
    assert shards.read([]) == []
    for outside in (10, -1):
        with pytest.raises(IndexError):
            shards.read([outside])


def test_more_shards_than_open_readers(dataset, monkeypatch):
    monkeypatch.setattr(records, "OPEN_READERS", 1)
    shards = records.TileShards(dataset)
    assert [shards.meta(index)["slide"] for index in (0, 9, 1, 5)] == ["ä/slide 0", "ä/slide 2", "ä/slide 0", "ä/slide 1"]
    assert len(shards._readers) == 1


def test_flipped_bytes_name_shard_and_index(dataset):
    path = dataset / records.shard_name(1, 3)
    data = bytearray(path.read_bytes())
    data[data.find(_example("ä/slide 1", 2)["tile"]) + 20] ^= 255
    path.write_bytes(data)
    shards = records.TileShards(dataset)
    with pytest.raises(records.CorruptRecordError, match=r"00001-of-00003: record 2 \(example 5\).*on_corrupt=replace") as caught:
        shards.read([0, 4, 5, 6])
    assert caught.value.index == 5 and caught.value.shard == path
    assert len(shards.read([0, 3, 4, 6, 7, 8, 9])) == 7


def test_a_shard_cut_short_is_named(dataset):
    path = dataset / records.shard_name(2, 3)
    path.write_bytes(path.read_bytes()[:-40_000])
    shards = records.TileShards(dataset)
    shards.read([0, 7])
    with pytest.raises(DatasetError, match="00002-of-00003 is damaged: 0 of 2 records"):
        shards.read([8])


def test_unfinished_or_foreign_folders_are_refused(dataset, tmp_path):
    (dataset / records.shard_name(0, 3)).unlink()
    with pytest.raises(DatasetError, match=r"lacks tiles-train.*\(1 missing\)"):
        records.TileShards(dataset)
    (dataset / "dataset_info.json").unlink()
    with pytest.raises(DatasetError, match="not a whole prepared dataset"):
        records.TileShards(dataset)


def test_tfds_reads_it(dataset):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(dataset)
    source = builder.as_data_source(split="train")
    assert len(source) == 10 and builder.info.splits["train"].num_examples == 10
    example, wanted = source[4], _example("ä/slide 1", 1)
    assert example["slide"].decode() == wanted["slide"] and int(example["id"]) == wanted["id"]
    assert (int(example["x"]), int(example["y"]), float(example["mpp"]), int(example["region"])) == (224, -5, 0.25, 0)
    np.testing.assert_array_equal(example["tile"], decode_tile(wanted["tile"]))


def test_metadata_are_deterministic(dataset, tmp_path_factory):
    before = {name: (dataset / name).read_bytes() for name in ("dataset_info.json", "features.json")}
    other = tmp_path_factory.mktemp("other") / "a b"
    shutil.copytree(dataset, other)
    size = sum(path.stat().st_size for path in other.glob("*.array_record*"))
    records.write_metadata(other, [3, 5, 2], size, 16, "png", "three slides")
    assert before == {name: (other / name).read_bytes() for name in before}
    assert sum(map(int, read_json(other / "dataset_info.json")["splits"][0]["shardLengths"])) == 10


@pytest.mark.slow
def test_tensorflow_parses_the_examples(dataset):
    import tensorflow as tf

    record = records.TileShards(dataset).read([4])[0]
    example = tf.train.Example.FromString(record)
    assert list(example.features.feature["y"].int64_list.value) == [-5]
    assert example.features.feature["slide"].bytes_list.value[0].decode() == "ä/slide 1"
    spec = {"tile": tf.io.FixedLenFeature([], tf.string), "energy": tf.io.FixedLenFeature([], tf.float32)}
    assert float(tf.io.parse_single_example(record, spec)["energy"]) == 2.5
