"""Splits of slides: a case is on one side alone, every class on each side that learns, and tables mean what they say."""

import csv

import numpy as np
import pytest

from wavepath.config import load_config
from wavepath.data.bag_splits import bag_split, draw_cases, parts
from wavepath.data.bags import BagFile, BagSource
from wavepath.errors import ConfigError, DatasetError


def made(slides, labels, cases=None, classes=("normal", "tumour")):
    return BagSource("features", [BagFile(slide, None, 5, 4) for slide in slides], labels, slides if cases is None else cases, classes)


@pytest.fixture
def source():
    """Forty slides of twenty cases with one to three slides, a third of them tumours."""
    generator = np.random.default_rng(0)
    member = np.concatenate([np.arange(20), generator.integers(0, 20, 20)])
    return made([f"s{number:02d}" for number in range(40)], (member % 3 == 0).astype(int), [f"p{number:02d}" for number in member])


@pytest.fixture
def config():
    config = load_config("mil")
    config.mil.validation = 0.2
    return config


def sides(split):
    return {"train": split.train, "validation": split.validation, "test": split.test}


def assert_apart(source, split):
    cases = {name: set(source.cases[places]) for name, places in sides(split).items()}
    assert not cases["train"] & cases["validation"] and not (cases["train"] | cases["validation"]) & cases["test"]
    assert sorted(np.concatenate(list(sides(split).values())).tolist()) == list(range(len(source)))


def test_folds_test_every_slide_once_and_no_case_is_on_two_sides(source, config):
    tested = []
    for fold in range(5):
        config.data.fold = fold
        split = bag_split(source, config)
        assert_apart(source, split)
        again = bag_split(source, config)
        for name, places in sides(split).items():
            np.testing.assert_array_equal(places, sides(again)[name])
            assert set(source.labels[places]) == {0, 1}, name
        assert 2 <= len(set(source.cases[split.validation])) <= 5 and split.name == f"fold {fold} of 5"
        tested.append(split.test)
    assert sorted(np.concatenate(tested).tolist()) == list(range(40))
    config.data.fold_seed = 1
    assert bag_split(source, config).test.tolist() != tested[4].tolist()


def test_the_training_part_knows_the_others(source, config, capsys):
    split = bag_split(source, config)
    train = parts(source, split)
    assert len(train) == len(split.train) and train.held_out.slides == [source.slides[place] for place in split.validation]
    assert train.test.slides == [source.slides[place] for place in split.test] and train.split == "fold 0 of 5"
    assert f"{len(split.train)} to train on, {len(split.validation)} to validate, {len(split.test)} to test" in capsys.readouterr().err


def test_one_case_left_out_at_a_time(source, config, capsys):
    config.data.folds, config.data.fold = 0, 7
    split = bag_split(source, config)
    assert set(source.cases[split.test]) == {"p07"} and "p07" not in set(source.cases[split.train]) | set(source.cases[split.validation])
    assert_apart(source, split)
    assert "AUC" not in capsys.readouterr().err
    config.data.fold = 20
    with pytest.raises(ConfigError, match=r"fold=20 does not exist; folds are numbered 0 to 19"):
        bag_split(source, config)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_the_share_of_cases_that_validates(share):
    labels, cases = np.arange(60) % 3 // 2, np.array([f"p{number}" for number in range(60)])  # 40 and 20 cases
    drawn = draw_cases(labels, cases, share, 0)
    assert [int(drawn[labels == label].sum()) for label in (0, 1)] == [round(40 * share), round(20 * share)]


def test_at_least_one_case_of_each_class_is_drawn_and_one_stays():
    labels, cases = np.array([0, 0, 1, 1, 1]), np.array(["a", "b", "c", "d", "d"])
    for share in (0.01, 0.99):
        drawn = draw_cases(labels, cases, share, 3)
        assert sorted(set(labels[drawn])) == sorted(set(labels[~drawn])) == [0, 1] and drawn[3] == drawn[4]


def test_slides_of_one_case_may_differ_in_label(config):
    source = made([f"s{number}" for number in range(20)], [0, 1] * 10, [f"p{number // 2}" for number in range(20)])
    split = bag_split(source, config)
    assert_apart(source, split)


@pytest.mark.parametrize(("fields", "message"), [
    ({"folds": 1}, "folds=1 must be at least 2, or 0"),
    ({"folds": 5, "fold": 5}, "fold=5 does not exist"),
    ({"fold": -1}, "fold=-1 does not exist"),
    ({"folds": 30}, "30, but the slides come from 20 cases"),
])  # fmt: skip
def test_folds_that_there_are_not(source, config, fields, message):
    config.data.update(fields)
    with pytest.raises(ConfigError, match=message):
        bag_split(source, config)
    config.data.update({"folds": 5, "fold": 0})
    config.mil.validation = 1.0
    with pytest.raises(ConfigError, match="validation=1.0 is a share"):
        bag_split(source, config)


def test_a_part_without_a_class_names_class_fold_and_remedy(config):
    source = made([f"s{number}" for number in range(9)], [0] * 8 + [1])
    config.data.folds, config.mil.validation = 3, 0.0
    found = {}
    for fold in range(3):
        config.data.fold = fold
        try:
            bag_split(source, config)
        except DatasetError as error:
            found[fold] = str(error)
    ((fold, message),) = found.items()
    assert message.startswith(f"fold {fold} of 3: no slide of class tumour in the train part") and "fold_seed" in message
    two = made([f"s{number}" for number in range(10)], [0] * 8 + [1] * 2)
    config.mil.validation, config.data.folds, config.data.fold = 0.2, 2, 0
    with pytest.raises(DatasetError, match=r"no slide of class tumour in the (train|validation) part .*config.mil.validation=0"):
        bag_split(two, config)


def test_a_test_part_without_a_class_is_said(config, capsys):
    source = made([f"s{number}" for number in range(16)], [0] * 12 + [1] * 4)
    config.data.folds, config.mil.validation = 8, 0.0
    for fold in range(8):
        config.data.fold = fold
        bag_split(source, config)
    assert "no slide of class tumour in the test part; an AUC needs the folds together" in capsys.readouterr().err


# CAMELYON16 -----------------------------------------------------------------------------------------------------------------------------------


def camelyon(normal, tumor, test):
    names = [f"normal_{n:03d}" for n in range(1, normal + 1)] + [f"tumor_{n:03d}" for n in range(1, tumor + 1)]
    names += [f"sub/test_{n:03d}" for n in range(1, test + 1)]
    return made(names, [int("tumor" in name or name.endswith("1")) for name in names])


def test_the_official_split(config, capsys):
    config.data.splits = "camelyon16"
    source = camelyon(159, 111, 129)
    split = bag_split(source, config)
    assert len(split.test) == 129 and len(split.train) + len(split.validation) == 270 and len(split.validation) == 54
    assert all(source.slides[place].startswith("sub/test_") for place in split.test)
    assert_apart(source, split)
    said = capsys.readouterr().err
    assert "normal_* 159 of 159, tumor_* 111 of 111, test_* 129 of 130" in said and "part" not in said
    config.data.fold = 3  # there is one split
    np.testing.assert_array_equal(bag_split(source, config).validation, split.validation)


def test_a_part_of_it_is_said_and_other_names_are_refused(config, capsys):
    config.data.splits = "camelyon16"
    bag_split(camelyon(8, 8, 4), config)
    assert "normal_* 8 of 159" in (said := capsys.readouterr().err) and "not those of the whole" in said
    with pytest.raises(DatasetError, match=r"1 of 17 slides are not named as in CAMELYON16 .*'TCGA-01'"):
        bag_split(made([*camelyon(8, 8, 0).slides, "TCGA-01"], [0] * 8 + [1] * 9), config)
    with pytest.raises(DatasetError, match=r"no slide test_\*"):
        bag_split(camelyon(8, 8, 0), config)
    mixed = camelyon(8, 8, 4)
    mixed.cases[0] = mixed.cases[-1] = "one"
    with pytest.raises(DatasetError, match="slides of case 'one' in train and in test"):
        bag_split(mixed, config)


# Tables ---------------------------------------------------------------------------------------------------------------------------------------


def table(path, **columns):
    longest = max(map(len, columns.values()))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *columns])  # pandas' index, as CLAM writes it
        for row in range(longest):
            writer.writerow([row, *[values[row] if row < len(values) else "" for values in columns.values()]])
    return path


@pytest.fixture
def eight():
    return made([f"s{number}" for number in range(8)], [0, 1] * 4)


def test_a_table_of_splits(eight, config, tmp_path, capsys):
    config.data.splits = str(table(tmp_path / "splits_0.csv", train=["s3", "s0", "s4"], val=["s1", "s2"], test=["s5", "s6"]))
    split = bag_split(eight, config)
    assert {name: places.tolist() for name, places in sides(split).items()} == {"train": [0, 3, 4], "validation": [1, 2], "test": [5, 6]}
    assert split.name == "splits_0.csv" and "1 of 8 slides are on no side" in capsys.readouterr().err
    table(tmp_path / "splits_3.csv", train=["s3", "s0"], test=["s5", "s6"])
    config.data.splits, config.data.fold = str(tmp_path), 3
    split = bag_split(eight, config)
    assert split.train.tolist() == [0, 3] and not len(split.validation)
    config.data.fold = 4
    with pytest.raises(ConfigError, match=r"has no splits_4.csv"):
        bag_split(eight, config)
    config.data.splits = "camelyon17"
    with pytest.raises(ConfigError, match="'camelyon17' is no file; give camelyon16"):
        bag_split(eight, config)


@pytest.mark.parametrize(("columns", "message"), [
    (dict(train=["s0", "s1"], val=["s0"], test=["s3"]), "slide 's0' in train and in val"),
    (dict(train=["s0", "s1"], val=[], test=["s7"]), "slides of case 'both' in train and in test"),
    (dict(train=["s0", "s2"], val=[], test=["s3"]), "no slide of class tumour in the train part"),
    (dict(train=["s0", "s1"], val=["s2"], test=["s3"]), "no slide of class tumour in the validation part"),
    (dict(train=["s0", "s1"], val=[], test=["x"]), r"1 slides without features or label \(first: 'x'"),
    (dict(train=["s0", "s1"], check=["s2"]), "the columns train,val,test are needed"),
])  # fmt: skip
def test_tables_that_must_not_pass(eight, config, tmp_path, columns, message):
    eight.cases = eight.cases.astype("U8")
    eight.cases[[1, 7]] = "both"
    config.data.splits = str(table(tmp_path / "splits_0.csv", **columns))
    with pytest.raises(DatasetError, match=message):
        bag_split(eight, config)


def test_slides_of_a_table_that_are_not_there_may_be_left_out(eight, config, tmp_path, capsys):
    config.data.splits = str(table(tmp_path / "splits_0.csv", train=["s0", "s1", "y"], val=[], test=["x", "s3", "s4"]))
    config.data.missing = "skip"
    assert bag_split(eight, config).test.tolist() == [3, 4] and "2 of its slides have no features" in capsys.readouterr().err
    config.data.missing, eight.left_out = "error", {"x": "no tile", "y": "no tile"}
    assert bag_split(eight, config).train.tolist() == [0, 1]
