"""Feature files: the TRIDENT layout, round trips, and damage."""

import h5py
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.interop.features import list_features, read_features, write_features


def _write(path, n=5):
    rng = np.random.default_rng(0)
    features, coords = rng.normal(size=(n, 7)).astype(np.float32), rng.integers(0, 9000, (n, 2))
    names = np.array([f"tile é {i}" for i in range(n)])
    write_features(path, features, coords, {"patch_size": 224, "mpp": 0.25, "encoder": None}, {"features_mean": features * 2, "names": names})
    return features, coords, names


def test_round_trip_keeps_every_column(tmp_path):
    features, coords, names = _write(tmp_path / "a.h5")
    back = read_features(tmp_path / "a.h5")
    np.testing.assert_array_equal(back.features, features)
    np.testing.assert_array_equal(back.coords, coords)
    np.testing.assert_array_equal(back.extra["features_mean"], features * 2)
    np.testing.assert_array_equal(back.extra["names"], names)
    assert back.attributes["patch_size"] == 224 and back.attributes["encoder"] == "None"


def test_layout_is_tridents(tmp_path):
    _write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].dtype == np.float32 and file["coords"].dtype == np.int64
        assert file["coords"].attrs["patch_size"] == 224 and file["features"].attrs["mpp"] == 0.25
        assert file["coords"].maxshape == (None, 2)


def test_attributes_that_trident_writes_on_the_coordinates_alone_are_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((2, 3), np.float32), np.zeros((2, 2), np.int64)
        file["features"].attrs["name"], file["coords"].attrs["patch_size_level0"] = "a", 512
    assert read_features(tmp_path / "a.h5").attributes == {"name": "a", "patch_size_level0": 512}


def test_no_tiles_is_legal(tmp_path):
    write_features(tmp_path / "a.h5", np.zeros((0, 7)), np.zeros((0, 2)), {})
    assert read_features(tmp_path / "a.h5").features.shape == (0, 7)


def test_columns_of_unequal_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="coords has 4 rows"):
        write_features(tmp_path / "a.h5", np.zeros((5, 7)), np.zeros((4, 2)), {})
    assert list(tmp_path.iterdir()) == []


def test_truncated_file_is_named(tmp_path):
    path = tmp_path / "a.h5"
    _write(path, 500)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DatasetError, match="a.h5.*wavepath embed"):
        read_features(path)


def test_list_uses_relative_ids(tmp_path):
    for name in ("x/a.h5", "y/a.h5"):
        _write(tmp_path / name)
    assert [name for name, _ in list_features(tmp_path)] == ["x/a", "y/a"]
    with pytest.raises(DatasetError, match="wavepath embed"):
        list_features(tmp_path / "x" / "none")


@pytest.mark.parametrize(("values", "said"), [
    (np.zeros(8, np.float32), r"features \[8\], not \[tiles, width\].*not of whole slides"), (np.array([b"a"]), "not numbers"),
    (np.zeros((2, 3, 4)), r"features \[2, 3, 4\]"),
])  # fmt: skip
def test_features_of_other_things_are_refused(tmp_path, values, said):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = values
    with pytest.raises(DatasetError, match=said):
        read_features(tmp_path / "a.h5")


def test_rows_that_do_not_match_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, 2), np.float32), np.zeros((4, 2), np.int32)
    with pytest.raises(DatasetError, match="3 rows of features and 4 of coords"):
        read_features(tmp_path / "a.h5")


def test_coordinates_of_another_shape_are_refused(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, 4), np.float32), np.zeros((3, 3), np.int64)
    with pytest.raises(DatasetError, match=r"`coords` is \[3, 3\]"):
        read_features(tmp_path / "s.h5")


def test_the_features_of_a_trident_job_are_found(tmp_path):
    job = tmp_path / "20x_224px_0px_overlap"
    for name in ("features_uni/b.h5", "features_uni/a.h5", "slide_features_titan/a.h5", "patches/a_patches.h5"):
        _write(job / name)
    assert [name for name, _ in list_features(tmp_path)] == [name for name, _ in list_features(job)] == ["a", "b"]
    _write(job / "features_phikon/a.h5")
    for given in (tmp_path, job):
        with pytest.raises(DatasetError, match="features_phikon, .*features_uni.*give one of them"):
            list_features(given)
    assert len(list_features(job / "features_phikon")) == 1
