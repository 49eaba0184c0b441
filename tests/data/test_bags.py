"""Bags of tile features: what a folder holds, how labels find it, and everything that must not pass."""

import csv

import h5py
import numpy as np
import pytest

from wavepath.config import load_config
from wavepath.data.bags import feature_bags, open_bags
from wavepath.data.synthetic_bags import make_bags
from wavepath.errors import ConfigError, DatasetError
from wavepath.interop.features import read_features, write_features
from wavepath.training.run_folder import identity_of


def write(folder, slide, features, *, name="", **attributes):
    features = np.asarray(features, np.float32)
    coords = np.arange(2 * len(features)).reshape(-1, 2)
    write_features(folder / f"{slide}.h5", features, coords, attributes, {"features_mean": -features})


def label(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label"), *rows])
    return path


@pytest.fixture
def folder(tmp_path):
    """Four slides of three cases, one in a subfolder, and their labels."""
    features = tmp_path / "features"
    generator = np.random.default_rng(0)
    for number, slide in enumerate(["a", "b", "site/c", "d"]):
        write(features, slide, generator.normal(size=(3 + number, 4)), encoder="vit")
    label(tmp_path / "labels.csv", [("p1", "d", "tumour"), ("p2", "a", "normal"), ("p2", "b", "normal"), ("p3", "c", "tumour")])
    return tmp_path


def bags(folder, **given):
    return feature_bags(folder / "features", labels=folder / "labels.csv", **given)


def test_bags_of_a_folder(folder):
    source = bags(folder)
    assert source.slides == ["a", "b", "d", "site/c"] and source.cases.tolist() == ["p2", "p2", "p1", "p3"]
    assert source.classes == ("normal", "tumour") and source.labels.tolist() == [0, 0, 1, 1]
    assert source.lengths.tolist() == [3, 4, 6, 5] and source.width == 4 and len(source) == 4 and source.encoder == ("vit",)
    assert source.counts() == {"normal": 2, "tumour": 2} and "4 slides of 3 cases" in source.describe()
    for index, slide in enumerate(source.slides):
        found, file = source.read(index), read_features(folder / "features" / f"{slide}.h5")
        assert found.slide_id == slide and found.attributes["encoder"] == "vit"
        np.testing.assert_array_equal(found.features, file.features)
        np.testing.assert_array_equal(found.coords, file.coords)
        np.testing.assert_array_equal(source.bag(index), file.features)


def test_the_mean_column(folder):
    source = bags(folder, pool="mean")
    np.testing.assert_array_equal(source.bag(1), -bags(folder).bag(1))
    np.testing.assert_array_equal(source.read(1).features, source.bag(1))
    with h5py.File(folder / "features" / "b.h5", "a") as file:
        del file["features_mean"]
    with pytest.raises(DatasetError, match=r"b\.h5 has no dataset `features_mean`.*config.mil.pool=cls"):
        bags(folder, pool="mean")
    with pytest.raises(ConfigError, match="pool='median' is unknown; choose one of cls, mean"):
        bags(folder, pool="median")


def test_without_labels_every_slide_is_a_case_of_its_own(folder):
    source = feature_bags(folder / "features")
    assert source.slides == source.cases.tolist() == ["a", "b", "d", "site/c"]
    assert source.labels.tolist() == [-1] * 4 and source.classes == () and "label" not in source.meta(0) and "no labels" in source.describe()


def test_nothing_is_read_before_it_is_wanted_and_kept_up_to_a_limit(folder, monkeypatch):
    import wavepath.data.bags as module

    read, column = [], module._column
    monkeypatch.setattr(module, "_column", lambda path, name: read.append(path.stem) or column(path, name))
    source = bags(folder, cache_mb=100 / (1 << 20))  # room for a (48 bytes), not for a and b (64) together
    assert read == []
    for _ in range(2):
        for index in (0, 1):
            source.bag(index)
    assert read == ["a", "b", "b"]
    source.part([0]).bag(0)
    assert read == ["a", "b", "b"]


def test_a_part_and_what_makes_it_other_data(folder):
    source = bags(folder)
    part = source.part([3, 0])
    assert part.slides == ["site/c", "a"] and part.labels.tolist() == [1, 0] and part.classes == source.classes
    np.testing.assert_array_equal(part.bag(0), source.bag(3))
    before, digest = identity_of(source), source.digest()
    assert bags(folder).digest() == digest and part.digest() != digest
    label(folder / "labels.csv", [("p1", "d", "normal"), ("p2", "a", "normal"), ("p2", "b", "normal"), ("p3", "c", "tumour")])
    assert bags(folder).digest() != digest and identity_of(bags(folder)) == before
    write(folder / "features", "d", np.ones((7, 4)), encoder="vit")
    assert identity_of(bags(folder)) != before


def test_excluded_slides_go_by_either_name(folder):
    assert bags(folder, exclude=["a", "c"]).slides == ["b", "d"]
    left = bags(folder, exclude=["site/c"])
    assert left.slides == ["a", "b", "d"] and left.left_out["c"] == left.left_out["site/c"] == "excluded"  # by either name in a table of splits


# CLAM's layout ------------------------------------------------------------------------------------------------------------------------------


def test_the_folder_above_clams_two_and_its_torch_files(folder, tmp_path_factory):
    torch = pytest.importorskip("torch", reason="install torch (the extra `bench`) to write CLAM's files as it does")
    clam = tmp_path_factory.mktemp("clam")
    (clam / "pt_files").mkdir()
    source = bags(folder)
    for index, slide in enumerate(["a", "b", "d", "c"]):
        found = source.read(index)
        write_features(clam / "h5_files" / f"{slide}.h5", found.features, found.coords, {})
        torch.save(torch.from_numpy(found.features.copy()), clam / "pt_files" / f"{slide}.pt")
    both = feature_bags(clam, labels=folder / "labels.csv")
    assert both.files[0].path.suffix == ".h5"
    alone = feature_bags(clam / "pt_files", labels=folder / "labels.csv")
    assert alone.slides == both.slides == ["a", "b", "c", "d"] and alone.lengths.tolist() == both.lengths.tolist()
    for index in range(4):
        one, other = both.read(index), alone.read(index)
        np.testing.assert_array_equal(one.features, other.features)
        np.testing.assert_array_equal(one.coords, other.coords)  # of the HDF5 file beside it
    with pytest.raises(DatasetError, match="holds one kind of features"):
        feature_bags(clam / "pt_files", labels=folder / "labels.csv", pool="mean")
    torch.save({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, clam / "pt_files" / "a.pt")
    with pytest.raises(DatasetError, match="no single tensor"):
        feature_bags(clam / "pt_files", labels=folder / "labels.csv")


# What must not pass -------------------------------------------------------------------------------------------------------------------------


def test_slides_without_a_tile_are_left_out_and_said(folder, capsys):
    write(folder / "features", "b", np.zeros((0, 4)), encoder="vit")
    source = bags(folder)
    assert source.slides == ["a", "d", "site/c"] and source.left_out == {"b": "no tile"}
    assert "1 of 4 slides" in (said := capsys.readouterr().err) and "have no tile and are left out (first: b)" in said


def test_labelled_slides_without_features(folder, capsys):
    (folder / "features" / "a.h5").unlink()
    with pytest.raises(DatasetError, match=r"1 of 4 slides .* have no feature file .* \(first: 'a'\).*config.data.missing=skip"):
        bags(folder)
    source = bags(folder, missing="skip")
    assert source.slides == ["b", "d", "site/c"] and source.left_out == {"a": "no feature file"} and "are left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="missing='ignore'"):
        bags(folder, missing="ignore")
    label(folder / "labels.csv", [("p1", "x", "tumour"), ("p2", "y", "normal")])
    with pytest.raises(DatasetError, match="2 of 2 slides"):
        bags(folder, missing="skip")


def test_features_without_a_label_are_not_used_and_said(folder, capsys):
    write(folder / "features", "e", np.zeros((3, 9)))  # of another width: not looked at
    assert len(bags(folder)) == 4 and "1 of 5 feature files have no row" in capsys.readouterr().err


@pytest.mark.parametrize(("features", "attributes", "message"), [
    (np.zeros((3, 5)), {"encoder": "vit"}, r"several widths \(a: 4, d: 5\)"),
    (np.zeros((3, 4)), {"encoder": "resnet"}, r"several encoders or checkpoints \(a: vit; d: resnet\)"),
    (np.zeros((3, 4)), {"encoder": "vit", "parameters": "0123"}, "d: vit 0123"),
    (np.zeros((3, 4)), {}, "d: not told"),
])  # fmt: skip
def test_features_of_several_kinds(folder, features, attributes, message):
    write(folder / "features", "d", features, **attributes)
    with pytest.raises(DatasetError, match=message):
        bags(folder)


def test_features_that_are_not_finite(folder):
    values = np.ones((5, 4))
    values[1, 2], values[4, :] = np.nan, np.inf
    write(folder / "features", "b", values, encoder="vit")
    source = bags(folder)
    with pytest.raises(DatasetError, match=r"slide b: 2 of 5 tiles have features that are not finite .*exclude_slides"):
        source.bag(1)
    with pytest.raises(DatasetError, match="slide b"):
        source.read(1)


def test_a_file_that_changed_while_it_was_used(folder):
    source = bags(folder)
    write(folder / "features", "b", np.ones((9, 4)), encoder="vit")
    with pytest.raises(DatasetError, match=r"b\.h5 changed while it was used"):
        source.bag(1)


def test_damaged_and_odd_files(folder):
    path = folder / "features" / "b.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"cannot read .*b\.h5"):
        bags(folder)
    path.unlink()
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros(4, np.float32)  # of a whole slide
    with pytest.raises(DatasetError, match="features of whole slides are no bag"):
        bags(folder)
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((1, 3, 4), np.float32)  # some writers keep a batch axis
        file["features"].attrs["encoder"] = "vit"
    assert bags(folder).lengths[1] == 3 and bags(folder).bag(1).shape == (3, 4)
    with h5py.File(path, "a") as file:
        file["coords"] = np.zeros((2, 2), np.int64)
    with pytest.raises(DatasetError, match="3 rows of `features` and 2 of `coords`"):
        bags(folder)
    with h5py.File(path, "w") as file:
        file.create_group("features")
    with pytest.raises(DatasetError, match="no dataset `features`"):
        bags(folder)


def test_labels_of_one_class_or_of_two_names(folder):
    label(folder / "labels.csv", [("p1", "d", "normal"), ("p2", "a", "normal")])
    with pytest.raises(DatasetError, match="all 2 slides .* are 'normal'; give labels of two classes"):
        bags(folder)
    label(folder / "labels.csv", [("p1", "c", "normal"), ("p2", "site/c", "normal"), ("p2", "a", "tumour")])
    with pytest.raises(DatasetError, match="names the slide 'site/c' by its id and by its file name"):
        bags(folder)


def test_an_ambiguous_file_name_is_no_name(folder):
    write(folder / "features", "other/c", np.ones((2, 4)), encoder="vit")
    with pytest.raises(DatasetError, match="first: 'c'"):
        bags(folder)


def test_a_config_without_bags_or_labels(folder):
    config = load_config("mil")
    with pytest.raises(ConfigError, match="config.data.bags"):
        open_bags(config)
    config.data.bags = str(folder / "nowhere")
    with pytest.raises(ConfigError, match="config.data.labels"):
        open_bags(config)
    config.data.labels = str(folder / "labels.csv")
    with pytest.raises(DatasetError, match="there is no folder .*wavepath embed"):
        open_bags(config)
    config.data.bags, config.mil.max_tiles = str(folder / "features"), 3
    (folder / "out.txt").write_text("a\n")
    config.data.exclude_slides = str(folder / "out.txt")
    source = open_bags(config)
    assert source.slides == ["b", "d", "site/c"] and source.part([0]).max_tiles == 3
    (folder / "out.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(DatasetError, match="no slide of .* is left"):
        open_bags(config)


def test_synthetic_bags_are_the_same_each_time(tmp_path):
    one = make_bags(tmp_path / "one", 6, classes=3)
    other = make_bags(tmp_path / "other", 6, classes=3)
    assert [path.read_bytes() for path in sorted(one[0].iterdir())] == [path.read_bytes() for path in sorted(other[0].iterdir())]
    source = feature_bags(one[0], labels=one[1])
    assert source.counts() == {"class_0": 2, "class_1": 2, "class_2": 2}
    assert [int(source.read(index).extra["evidence"].sum()) > 0 for index in range(6)] == [False, True, True] * 2
