"""Pyramids: aligned to the pixel, divided by slide, whole or absent; from slides, from a table of places, from single images."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_prepare import Killed, texture, tree

from wavepath.cli import main
from wavepath.data import manifest as mf
from wavepath.data import pyramid_places as places
from wavepath.data import pyramid_records as pr
from wavepath.data import records
from wavepath.data.pyramid_folder import read_rows
from wavepath.data.pyramid_images import make_image_pyramids
from wavepath.data.pyramids import make_pyramids
from wavepath.data.slide_lists import SlideRef
from wavepath.data.slides import open_slide
from wavepath.data.tiles import decode_tile
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.files import read_json
from wavepath.interop.tiff import write_pyramid


def settings(**changes):
    config = prepare_defaults()
    config.screen.region_um = config.screen.min_region_um = 128.0
    config.pyramids.update(dict(mpp=1.0, size=64, levels=3, min_tissue=0.3) | changes)
    return config


def ruler(path, factors=(1, 2, 4), shape=(512, 640), mpp=0.5):
    """A slide whose pixels at every level say where their centres are on level 0: red in x, green in y, a grey level for 4 px, dithered."""
    (height, width), rng = shape, np.random.default_rng(0)
    with tifffile.TiffWriter(path) as file:
        for number, factor in enumerate(factors):
            y, x = np.mgrid[: round(height / factor), : round(width / factor)]
            centres = np.stack([(x + 0.5) * factor / 4, (y + 0.5) * factor / 4, np.full(x.shape, 200)], -1)
            rgb = np.floor(centres + rng.random(centres.shape)).astype(np.uint8)
            file.write(
                rgb, tile=(64, 64), photometric="rgb", resolution=(1e4 / mpp / factor, 1e4 / mpp / factor), resolutionunit="CENTIMETER",
                subfiletype=int(number > 0), metadata=None,
            )
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a", "b ü", "c")):
        write_pyramid(folder / f"{name}.tiff", texture(seed, 320, 256), 1.0, codec="deflate")
    return folder


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    make_pyramids(slides, out, settings())
    return out


@pytest.mark.parametrize(("factors", "mpp", "own"), [
    ((1, 2, 4), 0.5, (0, 1, 2)), ((1, 4), 0.5, (0, None, 1)), ((1, 2.06), 0.5, (0, None, None)), ((1, 2, 4), 1.0, (1, 2, None)),
    ((1, 4), 1.0, (None, 1, None)), ((1, 2), 0.62, (None, None, None)), ((1, 2, 4), 0, (0, 1, 2)),
])  # fmt: skip
def test_levels_cover_the_same_area(tmp_path, factors, mpp, own):
    """Whatever the slide has: its own levels, levels that are a little off, none; and resolutions between its levels."""
    config = settings(mpp=mpp).pyramids
    with open_slide(ruler(tmp_path / "ruler.tiff", factors)) as slide:
        ladder = places.make_ladder(slide, config)
        assert ladder.own == own and ladder.mpp == pytest.approx(mpp or 0.5)
        corner = ladder.corner(places.Place(301, 259), 64)
        assert all(start % 4 == 0 for start in corner) and ladder.inside(corner, 64)
        assert np.abs(np.subtract(ladder.centre(corner, 64), (301, 259))).max() <= 2 * ladder.step + 1
        crops = places.read_levels(slide, ladder, corner, 64)
    for level, crop in enumerate(crops):
        assert crop.shape == (64 >> level, 64 >> level, 3)
        step = ladder.step * 2**level
        expected = [start * ladder.step + (np.arange(64 >> level) + 0.5) * step for start in corner]
        for found, truth in zip((crop[..., 0].mean(0), crop[..., 1].mean(1)), expected, strict=True):
            # What dithering and rounding (of halves, upwards) leave; a shift by one pixel would be seen.
            assert np.abs(found * 4 - truth).max() < 2.5 and abs((found * 4 - truth).mean()) < 0.8, (level, own)


def test_a_dataset_of_three_slides(slides, finished):
    import tensorflow_datasets as tfds

    shards = pr.PyramidShards(finished)
    rows = read_rows(finished)
    assert [(row.slide_id, row.status, row.places, row.finest_mpp) for row in rows] == [(name, "ok", 20, 1.0) for name in ("a", "b ü", "c")]
    assert all(row.tiles + row.blank == row.places and row.blank >= 4 and (row.train == 0) != (row.test == 0) for row in rows)
    assert sum(row.test > 0 for row in rows) == 1 and shards.levels == 3 and shards.codec == "png"
    builder = tfds.builder_from_directory(finished)
    total = np.zeros(3)
    for split in pr.SPLITS:
        mine, source = [row for row in shards.rows if row.split == split], builder.as_data_source(split=split)
        assert len(source) == len(mine) > 0
        for row, example in zip(mine, source, strict=True):
            assert (example["slide"].decode(), int(example["x"]), int(example["y"])) == (row.slide_id, row.x, row.y)
            assert [example[f"level_{level}"].shape for level in range(3)] == [(64, 64, 3), (32, 32, 3), (16, 16, 3)]
            total += example["level_0"].mean((0, 1)) / 255 / len(mine) * (split == "train")
    np.testing.assert_allclose(shards.mean, total, atol=1e-5)
    # Pixels are the slide's own, at all levels.
    index = len(shards) // 2
    row = shards.rows[index]
    with open_slide(slides / f"{row.slide_id}.tiff") as slide:
        for level, data in enumerate(shards.images(index, range(3))):
            side = 64 >> level
            corner = [(centre - 32) >> level for centre in (row.x, row.y)]
            whole = slide.read_level(0, row.x - 32, row.y - 32, 64, 64)
            wanted = slide.read_level(level, *corner, side, side) if level < len(slide.levels) else np.array(Image.fromarray(whole).reduce(2**level))
            assert np.abs(decode_tile(data).astype(int) - wanted).max() <= (0 if level < len(slide.levels) else 1)
    assert Image.open(finished / "overview.jpg").size[0] > 900


def test_places_of_a_table(slides, tmp_path, capsys):
    table = tmp_path / "places.txt"
    table.write_text("\n# made by hand\na, 100,100 ,tumour\na,101,100\na,5,100\nb ü.tiff,60,50\nTumor_024,1,2\n", encoding="utf-8")
    labels = tmp_path / "labels.csv"
    labels.write_text("case_id,slide_id,label\np1,a,normal\np2,b ü,normal\n")
    result = make_pyramids(slides, tmp_path / "out", settings(), coords=table, labels=labels)
    counts = {name: result.count(name) for name in ("places", "tiles", "edge", "repeated")}
    assert counts == dict(places=4, tiles=2, edge=1, repeated=1) and len(result.rows) == 2
    rows = pr.PyramidShards(tmp_path / "out").rows
    assert {(row.slide_id, row.x, row.y, row.label) for row in rows} == {("a", 100, 100, "tumour"), ("b ü", 60, 52, "normal")}
    assert "names 1 slides that are not there (first: 'Tumor_024')" in capsys.readouterr().err
    with_header = places.read_places(_written(tmp_path, "Slide_ID,y,label,x\na,7,t,9.5\n"))
    assert with_header == {"a": [places.Place(9.5, 7.0, "t")]}
    for text, message in (
        ("a,1,2\na,x,2\n", "line 2: 'a,x,2' is not slide,x,y"), ("a,1\n", "line 1"), ("slide,x\n", "columns slide,x,y are needed"),
        ("", "names no place"), ("a,nan,2\n", "line 1"),
    ):
        with pytest.raises(DatasetError, match=message):
            places.read_places(_written(tmp_path, text))
    with pytest.raises(DatasetError, match="names none of the slides"):
        make_pyramids(slides, tmp_path / "none", settings(), coords=_written(tmp_path, "z,1,2\n"))


def _written(folder, text):
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return folder / "table.csv"


def test_splits():
    names = {f"s{n}": f"s{n}" for n in range(60)}
    sides = places.split_slides(names, 1 / 6, 0)
    assert sum(side == "test" for side in sides.values()) == 10
    # A slide that comes or goes moves hardly any other; a case stays together; another seed divides otherwise.
    fewer = places.split_slides({name: name for name in names if name != "s7"}, 1 / 6, 0)
    assert sum(sides[name] != fewer[name] for name in fewer) <= 1
    cases = places.split_slides({name: name[:2] for name in names}, 0.3, 0)
    assert all(cases[one] == cases[two] for one in names for two in names if one[:2] == two[:2])
    assert places.split_slides(names, 1 / 6, 1) != sides
    assert sorted(places.split_slides({"a": "a", "b": "b"}, 1 / 6, 0).values()) == ["test", "train"]
    with pytest.raises(ConfigError, match="--split=sample"):
        places.split_slides({"a": "a"}, 1 / 6, 0)
    assert set(places.split_slides({"a": "a"}, 0, 0).values()) == {"train"}
    corners = [(n, 0) for n in range(12)]
    drawn = places.split_samples("a", corners, 1 / 6, 0)
    assert drawn.count("test") == 2 and places.split_samples("a", corners[:2], 1 / 6, 0).count("test") == 1
    kept = places.draw("a", corners, 5, 0)
    assert places.overlaps({(0, 0): "train", (40, 63): "test", (64, 0): "test", (0, 64): "train"}, 64) == 1
    assert len(kept) == 5 and kept == sorted(kept) and places.draw("a", corners, 0, 0) == corners


def test_a_number_of_samples_over_all_slides(slides, finished, tmp_path, capsys):
    arguments = ["pyramids", f"--slides={slides}", f"--out={tmp_path}", "--mpp=1", "--size=64", "--config.pyramids.min_tissue=0.3"]
    arguments += ["--config.screen.region_um=128.0", "--config.screen.min_region_um=128.0"]
    assert main([*arguments, "--count=8"]) == 0 and "fewer than --count" not in capsys.readouterr().err
    rows = pr.PyramidShards(tmp_path).rows
    counts = [sum(row.slide_id == name for row in rows) for name in ("a", "b ü", "c")]
    assert sorted(counts) == [2, 3, 3]
    whole = {(row.slide_id, row.x, row.y) for row in pr.PyramidShards(finished).rows}
    assert {(row.slide_id, row.x, row.y) for row in rows} < whole  # places are those that a run without a limit takes
    assert len({tuple(places.shares(["a", "b", "c"], 8, seed).values()) for seed in range(9)}) > 1
    assert main([*arguments, "--count=2"]) == 1 and "less than one sample of each of the 3 slides" in capsys.readouterr().err


def test_places_of_slides_spelt_in_other_case(capsys):
    refs = [SlideRef(Path(f"{name}.tif"), name) for name in ("tumor_024", "normal_1", "Normal_1")]
    place = [places.Place(1, 2)]
    found = places.match_places(refs, {"Tumor_024": place, "Normal_1": place, "NORMAL_1": place})
    assert found == {"tumor_024": place, "Normal_1": place}  # an exact name goes first; of two that differ in case neither is guessed
    told = capsys.readouterr().err
    assert "'Tumor_024' is 'tumor_024'" in told and "1 slides that are not there (first: 'NORMAL_1' (of several slides))" in told


def test_killed_at_renames_and_another_split(slides, finished, tmp_path, monkeypatch):
    """Dying at any rename, the same command gives the same bytes; another share moves shards and reads nothing again."""
    out, real = tmp_path / "out", os.replace
    # Within and after the first slide, before the shards move, between their moves, among the tables, before the very last.
    for stage in (0, 3, 5, 6, 18, 19, 20, 21, 23, 25, 26):
        shutil.rmtree(out, ignore_errors=True)
        count = [0]

        def replace(source, target, count=count, stage=stage):
            if count[0] == stage:
                raise Killed
            count[0] += 1
            real(source, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", replace)
            make_pyramids(slides, out, settings())
        with pytest.raises(DatasetError, match="not a whole"):
            pr.PyramidShards(out)
        (out / "pyramids.lock").write_text(json.dumps({"pid": 999999999, "host": os.uname().nodename}))
        make_pyramids(slides, out, settings())
        assert tree(out) == tree(finished), stage
    again = make_pyramids(slides, out, settings(test_share=0.6))
    assert again.reused == 3 and sum(row.test > 0 for row in again.rows) == 2
    assert make_pyramids(slides, out, settings()).reused == 3 and tree(out) == tree(finished)
    by_sample = make_pyramids(slides, out, settings(split="sample"))
    assert by_sample.reused == 0 and all(row.train > row.test > 0 for row in by_sample.rows)
    assert len(pr.PyramidShards(out).shards) == 6


def test_a_full_disk_and_a_slide_that_is_none(slides, tmp_path, monkeypatch):
    folder = tmp_path / "slides"
    folder.mkdir()
    for path in slides.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "broken.tiff").write_bytes((slides / "a.tiff").read_bytes()[:3000])
    write_pyramid(folder / "small.tiff", texture(5, 160, 40), 1.0, codec="deflate")
    write_pyramid(folder / "unscaled.tiff", texture(6, 320, 256), None, codec="deflate")
    result = make_pyramids(folder, tmp_path / "out", settings(per_slide=3))
    assert {row.slide_id: row.status for row in result.rows} == {
        "a": "ok", "b ü": "ok", "broken": "failed", "c": "ok", "small": "failed", "unscaled": "failed",
    }
    reasons = {row.slide_id: row.reason for row in result.rows}
    assert "less than one crop of 64 px" in reasons["small"] and "--slide-mpp" in reasons["unscaled"] and result.exit_code == 3
    assert all(row.tiles == 3 and row.limit > 0 for row in result.rows if row.status == "ok")

    def write(self, record):
        with records._storage(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(records.StorageError, match="No space left on device; free space"):
        patch.setattr(records.ShardWriter, "write", write)
        make_pyramids(slides, tmp_path / "full", settings())
    assert not list((tmp_path / "full").rglob("*.array_record*"))
    with pytest.raises(DatasetError, match="not a whole prepared dataset.*wavepath pyramids"):
        pr.PyramidShards(tmp_path / "full")


def test_single_images(tmp_path, capsys):
    import tensorflow_datasets as tfds

    folder = tmp_path / "images"
    for number, (name, size) in enumerate({"p1_a": (101, 90), "p1_b": (128, 132), "p2_a": (64, 70), "p3_a": (30, 200)}.items()):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(number, size[0] + 128, size[1])[:, : size[0]]).save(folder / "sub" / f"{name}.png")
    (folder / "p4_a.png").write_bytes(b"no image")
    out, config = tmp_path / "out", settings(min_size=48)
    arguments = ["pyramids", "--images", str(folder), "--out", str(out), "--size", "64", "--config.pyramids.min_size=48"]
    assert main([*arguments, "--group-pattern", "(p[0-9])"]) == 3
    text = capsys.readouterr().err
    assert "1 below 48 px" in text and "no mpp known: 6" in text and "p4: failed" in text.replace("  ", " ") and "mean RGB" in text
    shards = pr.PyramidShards(out)
    sizes = sorted((row.slide_id, row.width, row.height) for row in shards.rows)
    # Halves evenly; two crops or more a side are cut; a group has one side of the split.
    assert sizes == [("p1", 64, 64)] * 4 + [("p1", 100, 88), ("p2", 64, 68)]
    assert len({(row.slide_id, row.split) for row in shards.rows}) == 2 and all(row.mpp is None for row in shards.rows)
    index = next(number for number, row in enumerate(shards.rows) if row.width == 100)
    levels = [decode_tile(data) for data in shards.images(index, range(3))]
    whole = np.asarray(Image.open(folder / "sub" / "p1_a.png"))
    assert np.array_equal(levels[0], whole[1:89, :100])
    assert np.array_equal(levels[1], Image.fromarray(levels[0]).resize((50, 44), Image.Resampling.BICUBIC))
    assert np.array_equal(levels[2], Image.fromarray(levels[1]).resize((25, 22), Image.Resampling.BICUBIC))
    assert np.isnan(shards.meta(index)["mpp"]) and "5 samples of 1 groups of images" in text
    # Images of a group have equal positions: file and id tell their samples apart, in the records and in the table.
    metas = [shards.meta(number) for number in range(len(shards))]
    assert [meta["file"] for meta in metas] == [row.image for row in shards.rows] and len({meta["id"] for meta in metas}) == 6
    assert {row.image for row in shards.rows} == {f"sub/{name}.png" for name in ("p1_a", "p1_b", "p2_a")}
    assert tfds.builder_from_directory(out).as_data_source(split="train")[0]["file"].decode().startswith("sub/p")
    lines = (out / "samples.csv").read_text().splitlines()
    (out / "samples.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")  # as of an earlier version
    assert {row.image for row in pr.PyramidShards(out).rows} == {""}
    with pytest.raises(ConfigError, match="finds nothing in 'p4_a'"):
        make_image_pyramids(folder, out, config, group_pattern="sub/(p.)")
    assert main(["pyramids", "--out", str(out)]) == 1 and "give one of --slides" in capsys.readouterr().err


def test_pyramids_leave_tiles_whole(slides, tmp_path):
    """The fields of pyramids say nothing about tiles: those made before stay whole."""
    from wavepath.data.prepare import prepare

    config = settings()
    config.tiles.mpp, config.tiles.size = 1.0, 32
    prepare(slides, tmp_path, config)
    config.pyramids.size = 128
    assert prepare(slides, tmp_path, config).reused == 3 and not pr.is_pyramids(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(DatasetError, match="holds another kind of dataset"):
        make_pyramids(slides, tmp_path, settings())
    assert tree(tmp_path) == before
    assert read_json(tmp_path / mf.SETTINGS)["config"]["pyramids"]["size"] == 128
