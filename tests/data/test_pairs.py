"""Pairs on disk: shifts found, kept, left out or corrected; divided by slide; whole or absent; bad ones listed."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from test_prepare import Killed, texture, tree

from wavepath.cli import main
from wavepath.data import manifest as mf
from wavepath.data import pair_records as pr
from wavepath.data.pair_files import PairFiles, from_ab, from_folders, with_patterns
from wavepath.data.pair_folder import checkerboard
from wavepath.data.pairs import make_pairs
from wavepath.data.tiles import decode_tile
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError

SHIFTS = {"s1_a": (0, 0), "s1_b": (5, -3), "s2_a": (-24, 10), "s3_a": (2, 2)}


def settings(**changes):
    config = prepare_defaults()
    config.pairs.update(changes)
    return config


def write_pair(root, name, seed, dx, dy, size=160):
    """Immunostain: the same structures in other colours, moved by (dx, dy)."""
    picture = texture(seed, size + 64 + 128, size + 64)[:, : size + 64]
    sides = {"HE": picture[32 : 32 + size, 32 : 32 + size], "IHC": picture[32 - dy : 32 - dy + size, 32 - dx : 32 - dx + size][..., ::-1] // 2 + 100}
    for side, image in sides.items():
        (root / side).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(root / side / f"{name}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stained")
    for seed, (name, (dx, dy)) in enumerate(SHIFTS.items()):
        write_pair(folder, name, seed, dx, dy)
    return folder


def given(root):
    return with_patterns(from_folders(root), "^([^_]+)_")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "pairs"
    result = make_pairs(given(root), root, out, settings(), mpp=0.5)
    assert result.exit_code == 0 and result.count("tiles") == 4 and result.count("shifted") == 1 and result.count("corrected") == 0
    return out


def test_stored_as_given(root, finished):
    shards = pr.PairShards(finished)
    assert len(shards) == 4 and [len({row.slide_id for row in shards.rows if row.split == split}) for split in ("train", "test")] == [2, 1]
    for index, row in enumerate(shards.rows):
        for side, data in zip(("HE", "IHC"), shards.images(index), strict=True):
            assert np.array_equal(decode_tile(data), np.asarray(Image.open(root / side / f"{row.name}.png")))
        assert (row.dx, row.dy) == SHIFTS[row.name] and row.sure == 1 and row.slide_id == row.name[:2] and row.peak > 4.7
        meta = shards.meta(index)
        assert (meta["dx"], meta["dy"]) == SHIFTS[row.name] and meta["slide"] == row.slide_id and meta["mpp"] == 0.5
        assert row.he_tissue > 0.5 and row.ihc_sharpness > 0.4 and not row.blur
    assert {row.slide_id: row.split for row in shards.rows if row.slide_id == "s1"}.keys() == {"s1"}
    picture = Image.open(finished / "overview.jpg")
    assert picture.width > 3 * 384 and picture.height > 4 * 384


@pytest.mark.slow
def test_tfds_reads_it(finished):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(finished).as_data_source()
    assert {split: len(part) for split, part in source.items()} == {row.split: len([r for r in pr.PairShards(finished).rows if r.split == row.split])
                                                                   for row in pr.PairShards(finished).rows}
    example = source["train"][0]
    assert example["he"].shape == example["ihc"].shape == (160, 160, 3)


def test_drop_and_correct(root, tmp_path):
    dropped = make_pairs(given(root), root, tmp_path / "drop", settings(on_shift="drop"))
    assert dropped.count("tiles") == 3 and dropped.exit_code == 0
    assert [(row.name, row.status, row.reason) for row in dropped.pairs if row.status != pr.STORED] == [("s2_a", "left out", "shifted by -24, 10 px")]
    assert {row.slide_id: row.status for row in dropped.rows} == {"s1": "ok", "s2": "empty", "s3": "ok"}
    assert not any((tmp_path / "drop/slides/s2").glob("*.array_record")) and len(pr.PairShards(tmp_path / "drop")) == 3
    # The same folder again, another rule: only what differs is shown in the table, and the earlier shards are replaced.
    right = make_pairs(given(root), root, tmp_path / "drop", settings(on_shift="correct", max_shift=3.0))
    assert right.count("tiles") == 4 and right.count("corrected") == 2 and right.reused == 0
    shards = pr.PairShards(tmp_path / "drop")
    rows = {row.name: (index, row) for index, row in enumerate(shards.rows)}
    index, row = rows["s2_a"]
    assert (row.width, row.height, row.corrected, row.dx, row.dy) == (136, 144, 1, -24, 10) and shards.meta(index)["dx"] == 0
    he, ihc = (decode_tile(data) for data in shards.images(index))
    assert he.shape == ihc.shape == (144, 136, 3)
    assert np.array_equal(ihc, he[..., ::-1] // 2 + 100), "now pixel on pixel"
    whole = np.asarray(Image.open(root / "HE/s2_a.png"))
    assert np.array_equal(he, whole[row.y : row.y + 144, row.x : row.x + 136])
    index, row = rows["s1_b"]
    assert row.corrected and (row.width, row.height) == (152, 152)
    assert not rows["s1_a"][1].corrected and not rows["s3_a"][1].corrected


def test_bad_pairs_are_listed(root, tmp_path):
    folder = tmp_path / "stained"
    shutil.copytree(root, folder)
    (folder / "HE/s1_b.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((160, 152, 3), np.uint8)).save(folder / "IHC/s3_a.png")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "HE/s2_b.png")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "IHC/s2_b.png")
    flat = np.full((96, 96, 3), 200, np.uint8)
    for side in ("HE", "IHC"):
        Image.fromarray(flat).save(folder / side / "s4_a.png")
    result = make_pairs(given(folder), folder, tmp_path / "out", settings(on_unsure="drop"))
    found = {row.name: (row.status, row.reason) for row in result.pairs}
    assert found["s1_a"] == found["s2_a"] == ("stored", "") and result.exit_code == 3
    assert found["s1_b"][0] == found["s3_a"][0] == "bad" and "cannot be read" in found["s1_b"][1] and "152 x 160" in found["s3_a"][1]
    assert found["s2_b"] == ("left out", "small: 40 x 40 px") and found["s4_a"][0] == "left out" and "unsure" in found["s4_a"][1]
    assert {row.slide_id: row.status for row in result.rows} == {"s1": "ok", "s2": "ok", "s3": "failed", "s4": "empty"}
    assert mf.read_manifest(tmp_path / "out", pr.PairRow, mf.PAIRS) == result.pairs
    again = make_pairs(given(folder), folder, tmp_path / "out", settings(on_unsure="drop"))
    assert again.reused == 4 and again.rows == result.rows and again.exit_code == 3
    write_pair(folder, "s3_a", 3, 0, 0)
    assert make_pairs(given(folder), folder, tmp_path / "out", settings(on_unsure="drop")).reused == 3


@pytest.mark.slow
def test_killed_at_renames(root, finished, tmp_path, monkeypatch):
    """Dying at any rename, the same command gives the same bytes; another share moves shards and reads nothing again."""
    out, real = tmp_path / "out", os.replace
    for stage in (0, 1, 2, 4, 6, 8, 10, 12, 14, 15):
        shutil.rmtree(out, ignore_errors=True)
        count = [0]

        def replace(source, target, count=count, stage=stage):
            if count[0] == stage:
                raise Killed
            count[0] += 1
            real(source, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", replace)
            make_pairs(given(root), root, out, settings(), mpp=0.5)
        (out / pr.LOCK).write_text(json.dumps({"pid": 999999999, "host": os.uname().nodename}))
        make_pairs(given(root), root, out, settings(), mpp=0.5)
        assert tree(out) == tree(finished), stage
    again = make_pairs(given(root), root, out, settings(test_share=0.6), mpp=0.5)
    assert again.reused == 3 and sum(row.test > 0 for row in again.rows) == 2
    assert make_pairs(given(root), root, out, settings(), mpp=0.5).reused == 3 and tree(out) == tree(finished)


def test_splits_and_labels_from_names(root, tmp_path, capsys):
    pairs = [PairFiles(pair.name, pair.he, pair.ihc, "one", "3+", "test" if pair.name == "s3_a" else "train") for pair in from_folders(root)]
    result = make_pairs(pairs, root, tmp_path / "out", settings())
    assert (result.count("train"), result.count("test")) == (3, 1) and "too good" in capsys.readouterr().err
    shards = pr.PairShards(tmp_path / "out")
    assert [row.name for row in shards.rows] == ["s1_a", "s1_b", "s2_a", "s3_a"] and shards.meta(3)["label"] == "3+"
    assert np.array_equal(decode_tile(shards.images(3)[0]), np.asarray(Image.open(root / "HE/s3_a.png")))


def test_refused(root, tmp_path):
    pairs = given(root)
    one = [pair for pair in pairs if pair.slide == "s1"]
    for changes, some, message in (
        (dict(on_shift="mend"), pairs, "on_shift"), (dict(codec="gif"), pairs, "codec"), (dict(max_shift=-1.0), pairs, "max_shift"),
        (dict(test_share=2.0), pairs, "test_share"), ({}, one, "one slide cannot be on both sides"),
        ({}, [PairFiles(pairs[0].name, pairs[0].he, pairs[0].ihc, "s1", "", "train"), *pairs[1:]], "name all or none"),
        ({}, [PairFiles("a", pairs[0].he, pairs[0].ihc, "../a"), *pairs], "no name that a folder can have"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_pairs(some, root, tmp_path / "out", settings(**changes))
    with pytest.raises(ConfigError, match="folder of the pairs"):
        make_pairs(pairs, root, root, settings())
    assert make_pairs(one, root, tmp_path / "all", settings(test_share=0.0)).count("train") == 2
    with pytest.raises(DatasetError, match="other slides"):
        make_pairs([pair for pair in pairs if pair.slide != "s1"], root, tmp_path / "all", settings())
    with pytest.raises(DatasetError, match="not a whole"):
        pr.PairShards(tmp_path)


def test_command(root, tmp_path, capsys):
    command = ["pairs", "--folders", str(root), "--out", str(tmp_path / "out"), "--group-pattern", "^([^_]+)_", "--max-shift", "8"]
    assert main([*command, "--config.pairs.on_shift=drop"]) == 0
    said = capsys.readouterr().err
    assert "3 of 4 stored" in said and "left out: s2_a: shifted by -24, 10 px" in said
    assert main(["pairs", "--out", str(tmp_path / "no")]) != 0 and "give one of --folders" in capsys.readouterr().err


def test_out_among_the_pairs(root, tmp_path):
    folder = tmp_path / "ab"
    folder.mkdir()
    for name in SHIFTS:
        sides = [np.asarray(Image.open(root / side / f"{name}.png")) for side in ("HE", "IHC")]
        Image.fromarray(np.concatenate(sides, 1)).save(folder / f"{name}.png")
    for reused in (0, 4):
        result = make_pairs(from_ab(folder), folder, folder / "out", settings())
        assert result.reused == reused and [(row.name, row.dx) for row in sorted(result.pairs, key=lambda row: row.name)] == [
            (name, dx) for name, (dx, _) in SHIFTS.items()
        ]


def test_checkerboard():
    first, second = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    board = checkerboard(first, second, 3)
    assert board[0, 0, 0] == 0 and board[0, 5, 0] == 255 and board[5, 5, 0] == 0 and board.shape == (12, 12, 3)


@pytest.mark.slow
def test_real_pairs(shared_data, tmp_path):
    pairs = with_patterns(from_folders(shared_data / "pairs/mist"), "^([^_]+)_")
    result = make_pairs(pairs, shared_data / "pairs/mist", tmp_path / "mist", settings(on_shift="correct", on_unsure="drop"), mpp=0.4661)
    rows = {row.name: row for row in result.pairs}
    assert rows["28M2101987_31_31"].blur == "ihc" and rows["28M2101987_31_31"].status == "left out"
    assert rows["15M2102762_15_26"].split == rows["15M2102762_21_24"].split and rows["15M2102762_15_26"].status == "stored"
    assert rows["100M2004069_21_13"].ihc_tissue < 0.85 < rows["100M2004069_21_13"].he_tissue
