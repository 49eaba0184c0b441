"""Prepared datasets behind the interface of all sources; subsets, mixed resolutions, and what a user is told."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from wavepath.data import decode, manifest, records, sources, tiles
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.files import write_json, write_text

SIZE = 16


def tile(slide: int, place: int) -> np.ndarray:
    """A smooth tile that tells its slide and place by its colour."""
    ramp = np.linspace(0, 60, SIZE)
    return np.stack([np.full((SIZE, SIZE), 20 * slide + 10), np.full((SIZE, SIZE), 3 * place), ramp[:, None] + ramp[None]], -1).astype(np.uint8)


def write_dataset(folder, counts, codec="png", mpps=None, with_manifest=True):
    """A prepared folder as `wavepath prepare` lays it out, with `counts[k]` tiles of slide `k`."""
    mpps, rows = mpps or [0.25] * len(counts), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        name = records.shard_name(number, len(counts))
        with records.ShardWriter(folder / name) as writer:
            for place in range(count):
                data = tiles.encode_tile(tile(number, place), codec, 90)
                x = place * SIZE
                fields = dict(
                    tile=data, id=records.example_id(f"s{number}", x, 0, mpps[number]), slide=f"s{number}", x=x, y=0, mpp=mpps[number],
                    energy=0.5, region=place // 4,
                )
                writer.write(records.encode_example(fields))
        row = manifest.SlideRow(slide_id=f"s{number}", path=f"s{number}.svs", status="ok", tiles=count, mpp=0.125, tile_mpp=mpps[number], shard=name)
        rows.append(row)
    # What TFDS writes, as far as it is read: importing TFDS takes longer than all of these tests.
    image = {"encodingFormat": codec, "shape": {"dimensions": [str(SIZE), str(SIZE), "3"]}}
    write_json(folder / "features.json", {"featuresDict": {"features": {"tile": {"image": image}}}})
    write_json(folder / "dataset_info.json", {"splits": [{"name": "train", "shardLengths": [str(count) for count in counts]}]})
    if with_manifest:
        write_text(folder / "manifest.csv", manifest.manifest_text(rows))
    return folder


def config_for(**data):
    config = train_defaults()
    for name, value in data.items():
        config.data[name] = str(value) if name in ("dir", "slides", "exclude_slides") else value
    return config


def corrupt(folder, shard: int, count: int, record: int) -> None:
    """Flips one byte in the middle of a record's image."""
    path = folder / records.shard_name(shard, count)
    whole = bytearray(path.read_bytes())
    encoded = tiles.encode_tile(tile(shard, record), "png", 90)
    whole[whole.index(encoded) + len(encoded) // 2] ^= 255
    path.write_bytes(bytes(whole))


def test_prepared_dataset(tmp_path, capsys):
    write_dataset(tmp_path / "d", [3, 5, 2])
    source = sources.open_source(config_for(dir=tmp_path / "d"))
    assert "prepared dataset" in capsys.readouterr().err
    assert (len(source), source.image_shape, source.mpps, source.slides) == (10, (SIZE, SIZE, 3), (0.25,), ["s0", "s1", "s2"])
    assert source.blocks.tolist() == [3, 5, 2]
    images = source.images([9, 0, 4])
    assert images.dtype == np.uint8
    for image, (slide, place) in zip(images, [(2, 1), (0, 0), (1, 1)], strict=True):
        assert np.array_equal(image, tile(slide, place))
    assert np.array_equal(tiles.decode_tile(source.read([4])[0]), tile(1, 1))
    meta = source.meta(4)
    assert (meta["slide"], meta["x"], meta["region"], meta["id"]) == ("s1", SIZE, 0, records.example_id("s1", SIZE, 0, 0.25))
    assert source.span_of(4) == sources.Span("s1", 3, 8, 0.25, 0.125) and meta["slide_mpp"] == 0.125
    with pytest.raises(IndexError):
        source.read([10])


def test_prepared_without_a_manifest_reads_its_records(tmp_path):
    write_dataset(tmp_path, [3, 2], mpps=[0.25, 0.5], with_manifest=False)
    source = sources.PreparedSource(tmp_path)
    assert [(span.slide, span.mpp) for span in source.spans] == [("s0", 0.25), ("s1", 0.5)]


def test_a_manifest_of_other_shards_is_refused(tmp_path):
    write_dataset(tmp_path, [3, 2])
    rows = manifest.read_manifest(tmp_path)
    write_text(tmp_path / "manifest.csv", manifest.manifest_text([dataclasses.replace(rows[0], tiles=4), rows[1]]))
    with pytest.raises(DatasetError, match="says 4 tiles"):
        sources.PreparedSource(tmp_path)


@pytest.mark.parametrize("name", ["settings.json", "timings.csv", "prepare.lock"])
def test_unfinished_dataset_is_not_a_folder_of_images(tmp_path, name):
    (tmp_path / name).write_text("{}")
    Image.fromarray(tile(0, 0)).save(tmp_path / "thumbnail.png")
    with pytest.raises(DatasetError, match="not a whole prepared dataset"):
        sources.open_source(config_for(dir=tmp_path))


def test_corrupt_record_names_shard_and_index(tmp_path):
    write_dataset(tmp_path, [3, 5])
    corrupt(tmp_path, 1, 2, 2)
    source = sources.PreparedSource(tmp_path)
    with pytest.raises(DatasetError, match=r"array_record-00001-of-00002: record 2 \(example 5\)"):
        source.images(np.arange(8))
    assert len(source.images([0, 4, 6])) == 3


def test_undecodable_tile_names_its_example(tmp_path):
    write_dataset(tmp_path, [2])
    with records.ShardWriter(tmp_path / records.shard_name(0, 1)) as writer:
        for data in (tiles.encode_tile(tile(0, 0), "png"), b"\xff\xd8\xff\xe0 no image"):
            writer.write(records.encode_example(dict(tile=data, id=0, slide="s0", x=0, y=0, mpp=0.25, energy=0.5, region=0)))
    with pytest.raises(DatasetError, match="example 1 cannot be decoded"):
        sources.PreparedSource(tmp_path).images([0, 1])


@pytest.mark.parametrize("quality,subsampling", [(90, "444"), (75, "420")])
def test_jpeg_decoders_agree_to_the_bit(shared_data, quality, subsampling):
    """One decoder serves storage, stream and pipeline; TensorFlow's accurate transform and Pillow give the same pixels."""
    import imagecodecs

    from wavepath.data.pipeline import tensorflow

    tf = tensorflow()
    with Image.open(sorted((shared_data / "crc_tiles").glob("*.png"))[5]) as picture:
        data = imagecodecs.jpeg8_encode(np.asarray(picture.convert("RGB")), level=quality, subsampling=subsampling)
    ours = tiles.decode_tile(data)
    into = np.empty_like(ours)
    decode.decode_into(data, into, lambda: "tile")
    assert np.array_equal(into, ours)
    assert np.array_equal(tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy(), ours)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), ours)
    # The reason why it is said: TensorFlow's default is another transform.
    assert not np.array_equal(tf.io.decode_jpeg(data, channels=3).numpy(), ours)


def test_excluded_slides_and_max_tiles_map_indices(tmp_path, capsys):
    write_dataset(tmp_path / "d", [3, 5, 2, 4])
    (tmp_path / "out.txt").write_text("# test split\ns1\n\nnot-there\n")
    source = sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "out.txt"))
    assert "1 of 2 slides hold no tiles" in capsys.readouterr().err
    assert [(span.slide, span.start, span.stop) for span in source.spans] == [("s0", 0, 3), ("s2", 3, 5), ("s3", 5, 9)]
    assert source.blocks.tolist() == [3, 2, 4]
    assert [source.meta(index)["slide"] for index in range(9)] == ["s0"] * 3 + ["s2"] * 2 + ["s3"] * 4
    assert np.array_equal(source.images([3, 8]), np.stack([tile(2, 0), tile(3, 3)]))

    drawn = sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "out.txt", max_tiles=6))
    assert len(drawn) == 6 and drawn.blocks.sum() == 6 and drawn.spans[-1].stop == 6
    names = [(drawn.meta(index)["slide"], drawn.meta(index)["x"]) for index in range(6)]
    assert len(set(names)) == 6 and names == sorted(names)
    for span in drawn.spans:
        assert {drawn.meta(index)["slide"] for index in range(span.start, span.stop)} == {span.slide}
    again = sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "out.txt", max_tiles=6))
    assert [again.meta(index)["x"] for index in range(6)] == [name[1] for name in names]
    with pytest.raises(IndexError):
        drawn.images([6])


def test_wrong_exclusion_lists_are_errors(tmp_path):
    write_dataset(tmp_path / "d", [3])
    (tmp_path / "wrong.txt").write_text("other\n")
    with pytest.raises(DatasetError, match=r"none of which is in .*'s0'"):
        sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "wrong.txt"))
    (tmp_path / "all.txt").write_text("s0\n")
    with pytest.raises(DatasetError, match="no tiles are left"):
        sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "all.txt"))
    with pytest.raises(DatasetError, match=r"data\.exclude_slides: cannot read"):
        sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "missing.txt"))


def test_mixed_mpp_is_refused_by_name(tmp_path):
    write_dataset(tmp_path / "d", [3, 5], mpps=[0.25, 0.499])
    with pytest.raises(DatasetError, match=r"data\.mixed_mpp=True"):
        sources.open_source(config_for(dir=tmp_path / "d"))
    assert sources.open_source(config_for(dir=tmp_path / "d", mixed_mpp=True)).mpps == (0.25, 0.499)
    # Leaving the coarse slide out removes the mix.
    (tmp_path / "out.txt").write_text("s1\n")
    assert sources.open_source(config_for(dir=tmp_path / "d", exclude_slides=tmp_path / "out.txt")).mpps == (0.25,)
    # Levels within 1 % of what was asked for are one resolution.
    write_dataset(tmp_path / "near", [3, 5], mpps=[0.248, 0.2525])
    assert len(sources.open_source(config_for(dir=tmp_path / "near"))) == 8


def test_what_to_open_must_be_said_once(tmp_path):
    with pytest.raises(ConfigError, match="set one of"):
        sources.open_source(config_for())
    with pytest.raises(ConfigError, match="set one of"):
        sources.open_source(config_for(dir=tmp_path, slides=tmp_path))
    with pytest.raises(DatasetError, match="there is no folder"):
        sources.open_source(config_for(dir=tmp_path / "nowhere"))


def test_dataset_info_is_what_tfds_writes(tmp_path):
    """The hand-written metadata of these tests has the layout that the reader expects of TFDS."""
    info = json.loads((write_dataset(tmp_path, [2]) / "dataset_info.json").read_text())
    assert records.TileShards(tmp_path).lengths == [2] and info["splits"][0]["name"] == records.SPLIT
