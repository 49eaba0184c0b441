"""Labels of sources in their forms, folds by case, and the label column of batches."""

import csv

import numpy as np
import pytest
from PIL import Image

from wavepath.data.labelled import LabelledSource, SlideTiles, _say_unstratified, assign_folds, find_labels, open_labelled, split
from wavepath.data.pipeline import batches, eval_batches
from wavepath.data.sources import open_source
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError

CASES, TILES = 9, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<class>/<case>_<tile>.png of three classes; every pixel of a tile is its class * 80."""
    root = tmp_path_factory.mktemp("tiles")
    for case in range(CASES):
        for tile in range(TILES):
            path = root / "abc"[case % 3] / f"{case}_{tile}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), 80 * (case % 3), np.uint8)).save(path)
    return root


def make(folder, **fields):
    config = train_defaults()
    config.model.image_size = 16
    config.data.dir, config.data.label_pattern, config.data.case_pattern, config.data.folds = str(folder), "^(.)/", "/([0-9]+)_", 3
    for name, value in fields.items():
        config.data[name] = value
    return config


def test_labels_by_name(folder, capsys):
    source = open_labelled(make(folder))
    assert source.classes == ("a", "b", "c") and source.counts() == {"a": 12, "b": 12, "c": 12} and len(source) == 36
    assert set(source.cases) == {str(case) for case in range(CASES)}
    assert source.meta(13)["label"] == "b" and source.meta(13)["case"] == source.cases[13] and source.tile_name(0) == "a/0_0"
    assert (source.images(np.arange(36))[:, 0, 0, 0] == 80 * source.labels).all()
    assert "36 tiles of 9 cases in 3 classes (a 12, b 12, c 12)" in capsys.readouterr().err


def test_a_table_by_tile_and_the_names_agree(folder, tmp_path):
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["tile_id", "label", "case_id"])
        table.writerows([f"{'abc'[case % 3]}/{case}_{tile}", "abc"[case % 3], case] for case in range(CASES) for tile in range(TILES))
    one = open_labelled(make(folder))
    other = open_labelled(make(folder, label_pattern="", labels=str(tmp_path / "labels.csv")))
    assert one.digest() == other.digest()
    assert one.digest() != open_labelled(make(folder, case_pattern="/([0-9]+_[0-9])")).digest()


def test_tiles_without_a_label_are_left_out_and_ids_stay_without_gaps(folder, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("slide_id,label,case_id\na,tumour,1\nc,normal,2\n")
    config = make(folder, label_pattern="", labels=str(tmp_path / "labels.csv"))
    source, base = open_labelled(config), open_source(config)
    assert len(source) == 24 and "12 tiles without a label are left out" in capsys.readouterr().err
    assert [(span.slide, span.start, span.stop) for span in source.spans] == [("a", 0, 12), ("c", 12, 24)]
    assert source.blocks.sum() == 24 and (source.images(np.arange(24))[12:, 0, 0, 0] == 160).all()
    assert source.read([12]) == base.read([24]) and [source.classes[label] for label in source.labels[[0, 23]]] == ["tumour", "normal"]
    with pytest.raises(IndexError):
        source.images([24])


def test_regions_label_by_the_tiles_centre(tmp_path):
    from wavepath.interop.geojson import polygon_feature, write_features

    box = [(0, 0), (50, 0), (50, 50), (0, 50)]
    write_features(tmp_path / "s1_x.geojson", [polygon_feature(box, "tumour", "tumour")])
    slides = [SlideTiles(name, 2, lambda: None, lambda: np.array([(25.0, 25.0), (75.0, 25.0)])) for name in ("s1_x", "s2_x")]
    kind, found = find_labels(slides, tmp_path, case_pattern="(.)_")
    assert kind == "regions" and found == [(["tumour", ""], ["1", "1"]), (["", ""], ["2", "2"])]


SLIDES = [SlideTiles(name, 1, lambda name=name: [f"{name}_0_0"], lambda: np.zeros((1, 2))) for name in ("P1-a", "P1-b", "P2-a", "other")]


@pytest.mark.parametrize("key, end", [("slide_id", ""), ("tile_id", "_0_0")])
def test_a_table_without_cases_takes_them_by_the_pattern(tmp_path, key, end):
    path = tmp_path / "labels.csv"
    path.write_text(f"{key},label\n" + "".join(f"{slide}{end},{label}\n" for slide, label in (("P1-a", "x"), ("P1-b", "y"), ("P2-a", "y"))))
    assert [cases for _, cases in find_labels(SLIDES, path)[1]] == [["P1-a"], ["P1-b"], ["P2-a"], ["other"]]
    found = find_labels(SLIDES, path, case_pattern="^(P[0-9]+)-")[1]
    assert found == [(["x"], ["P1"]), (["y"], ["P1"]), (["y"], ["P2"]), ([""], ["other"])]
    with pytest.raises(DatasetError, match="finds nothing in 'P2-a"):
        find_labels(SLIDES, path, case_pattern="^(P1)-")
    path.write_text(f"{key},label,case_id\nP1-a{end},x,A\nP1-b{end},y,\n")
    assert [cases for _, cases in find_labels(SLIDES, path, case_pattern="^(P[0-9]+)-")[1]][:2] == [["A"], ["P1"]]


@pytest.mark.parametrize("key", ["slide_id", "tile_id"])
def test_rows_that_contradict_one_another_are_refused_by_their_id(tmp_path, key):
    path = tmp_path / "labels.csv"
    path.write_text(f"case_id,{key},label\n1,P1-a,x\n1,P1-a,x\n,,\n2,,y\n")
    find_labels(SLIDES, path)
    for row, name in (("1,P1-a,y", "label 'x' and 'y'"), ("2,P1-a,x", "case_id '1' and '2'")):
        path.write_text(f"case_id,{key},label\n1,P1-a,x\n{row}\n")
        with pytest.raises(DatasetError, match=f"{key} 'P1-a' with {name}"):
            find_labels(SLIDES, path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_never_share_a_case(seed, folds):
    rng = np.random.default_rng(seed)
    cases = np.sort(rng.integers(0, 12, 200)).astype(str)
    truth = rng.integers(0, 3, 200)
    fold = assign_folds(truth, cases, folds, seed)
    assert set(fold) == set(range(folds))
    for case in set(cases):
        assert len(set(fold[cases == case])) == 1
    np.testing.assert_array_equal(fold, assign_folds(truth, cases, folds, seed))


def test_folds_are_stratified_and_follow_the_seed():
    cases = np.repeat(np.arange(30), 4).astype(str)
    truth = np.repeat(np.arange(30) % 3 == 0, 4).astype(int)
    for index in range(5):
        assert truth[assign_folds(truth, cases, 5, 0) == index].mean() == pytest.approx(1 / 3)
    assert (assign_folds(truth, cases, 5, 0) != assign_folds(truth, cases, 5, 1)).any()


def test_folds_that_are_not_stratified_are_said_once(capsys):
    _say_unstratified.cache_clear()
    cases, truth = np.repeat(np.arange(6), 4).astype(str), np.repeat(np.arange(6) == 0, 4).astype(int)
    for _ in range(3):
        assign_folds(truth, cases, 3, 0)
    assert capsys.readouterr().err.count("3 folds by case are not stratified (a class comes from 1 of 6 cases alone)") == 1
    assign_folds(np.repeat(np.arange(6) % 2, 4), cases, 3, 0)
    assert not capsys.readouterr().err


def test_the_parts_of_all_folds_cover_every_tile_once(folder):
    source = open_labelled(make(folder))
    held = []
    for fold in range(3):
        train = split(source, 3, fold, 0)
        assert not set(train.cases) & set(train.held_out.cases) and len(train) + len(train.held_out) == 36
        assert train.whole == source.digest()
        assert (train.images(np.arange(len(train)))[:, 0, 0, 0] == 80 * train.labels).all()
        held += [train.held_out.tile_name(index) for index in range(len(train.held_out))]
    assert sorted(held) == sorted(source.tile_name(index) for index in range(36))


def test_batches_carry_the_label_of_the_tile_they_show(folder):
    train = split(open_labelled(make(folder)), 3, 0, 0)
    with batches(train, batch_size=8, seed=0) as stream:
        for _ in range(5):
            batch = next(stream)
            assert batch["label"].dtype == np.int32
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 80 * batch["label"])
    with eval_batches(train.held_out, 8) as stream:
        seen = [batch for batch in stream]
    assert sum(batch["mask"].sum() for batch in seen) == len(train.held_out)
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in seen])[: len(train.held_out)], train.held_out.labels)
    with eval_batches(open_source(make(folder)), 8) as stream:
        assert "label" not in next(stream)


def test_a_replaced_tile_brings_its_own_label(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "tiles")
    broken = tmp_path / "tiles" / "a" / "6_3.png"  # the last of class a: the next readable one is of class b
    source = open_labelled(make(tmp_path / "tiles"))
    broken.write_bytes(b"no image")
    with eval_batches(source, 36, on_corrupt="replace") as stream:
        batch = next(stream)
    assert batch["example_id"][11] == 12 and batch["label"][11] == 1 and batch["image"][11, 0, 0, 0] == 80


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(label_pattern=""), ConfigError, "config.data.label_pattern"),
        (dict(labels="x.csv"), ConfigError, "not both"),
        (dict(label_pattern="(q)/"), DatasetError, "looks like 'a/0_0'"),
        (dict(label_pattern="/[0-9]+(_)"), DatasetError, "labels of two classes"),
        (dict(label_pattern="^(./"), DatasetError, "regular expressions with one group"),
        (dict(case_pattern="/(0)_"), DatasetError, "finds nothing in 'a/3_0'"),
        (dict(label_pattern="", labels="missing.csv"), DatasetError, "does not exist"),
    ],
)
def test_errors_name_what_to_do(folder, fields, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        open_labelled(make(folder, **fields))


def test_a_table_without_a_label_column_says_which_columns_it_needs(folder, tmp_path):
    (tmp_path / "labels.csv").write_text("slide_id,diagnosis\na,x\n")
    with pytest.raises(DatasetError, match="case_id,slide_id,label"):
        open_labelled(make(folder, label_pattern="", labels=str(tmp_path / "labels.csv")))


@pytest.mark.parametrize(
    "arguments, message", [((1, 0), "at least 2"), ((3, 3), "numbered 0 to 2"), ((3, -1), "numbered 0 to 2"), ((10, 0), "config.data.folds=9")]
)
def test_impossible_folds_are_refused(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        split(open_labelled(make(folder)), *arguments, 0)


def test_a_training_part_of_one_class_is_refused_and_a_missing_class_is_said(folder, capsys):
    base = open_source(make(folder))
    cases = np.array(["1"] * 12 + ["2"] * 24)
    two = LabelledSource(base, np.arange(36), np.repeat([0, 1], [12, 24]), cases, ("x", "y"))
    with pytest.raises(DatasetError, match="one class to train on"):
        split(two, 2, 0, 0)
    three = LabelledSource(base, np.arange(36), np.repeat([0, 1, 2], 12), np.where(np.arange(36) < 12, "1", "2"), ("x", "y", "z"))
    for fold in range(2):
        try:
            split(three, 2, fold, 0)
        except DatasetError:
            continue
    assert "no training tile of x" in capsys.readouterr().err


def test_tiles_as_cases_of_their_own_are_warned_about(folder, capsys):
    assert len(set(open_labelled(make(folder, case_pattern="")).cases)) == 36
    assert "no config.data.case_pattern" in capsys.readouterr().err


def test_thirteen_slides_of_lung_in_five_folds(shared_data):
    config = make(shared_data / "lung_tiles", label_pattern="^([^/]+)/", case_pattern="^([^/]+/[0-9]+)_")
    source = open_labelled(config)
    assert source.counts() == {"LUAD": 70, "LUSC": 60} and len(set(source.cases)) == 13
    for fold in range(5):
        train = split(source, 5, fold, 0)
        assert not set(train.cases) & set(train.held_out.cases)
        assert 0 < min(train.held_out.counts().values()), "stratified: each fold has both classes"
