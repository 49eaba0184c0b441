"""CLAM's features and tables: dtypes and names as its training reads them, `.pt` by torch itself."""

import csv

import h5py
import numpy as np
import pytest

from wavepath.interop.clam import write_clam_features, write_dataset_csv, write_process_list
from wavepath.interop.features import list_features, read_features

FEATURES = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
COORDS = np.arange(14).reshape(7, 2) * 224


def test_features_are_clams(tmp_path):
    write_clam_features(tmp_path, "a", FEATURES, COORDS)
    with h5py.File(tmp_path / "h5_files/a.h5") as file:
        assert set(file) == {"features", "coords"} and file["features"].dtype == np.float32 and file["coords"].dtype == np.int32
        assert not file["features"].attrs and not file["coords"].attrs
        np.testing.assert_array_equal(file["features"][()], FEATURES)
        np.testing.assert_array_equal(file["coords"][()], COORDS)


def test_pt_files_load_in_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install torch, the oracle of .pt files")
    for name, features in (("a", FEATURES), ("none", FEATURES[:0])):
        write_clam_features(tmp_path, name, features, COORDS[: len(features)])
        tensor = torch.load(tmp_path / f"pt_files/{name}.pt", weights_only=True)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), features)


def test_our_reader_takes_what_torch_saved(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install torch, the oracle of .pt files")
    torch.save(torch.from_numpy(FEATURES), tmp_path / "case.1.pt")
    found = read_features(tmp_path / "case.1.pt")
    assert found.slide_id == "case.1" and found.coords.shape == (7, 2) and not found.coords.any()
    np.testing.assert_array_equal(found.features, FEATURES)
    torch.save({"features": torch.from_numpy(FEATURES).half()}, tmp_path / "b.pt")
    np.testing.assert_array_equal(read_features(tmp_path / "b.pt").features, FEATURES.astype(np.float16).astype(np.float32))


def test_a_result_folder_is_read_with_its_coordinates(tmp_path):
    for name in ("b", "a"):
        write_clam_features(tmp_path, name, FEATURES, COORDS)
    listed = list_features(tmp_path)
    assert [name for name, _ in listed] == ["a", "b"] and listed[0][1].parent.name == "h5_files"
    np.testing.assert_array_equal(read_features(listed[0][1]).coords, COORDS)
    assert [name for name, _ in list_features(tmp_path / "pt_files")] == ["a", "b"]


def test_unequal_lengths_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="coords has 6 rows"):
        write_clam_features(tmp_path, "a", FEATURES, COORDS[:6])
    assert not list(tmp_path.iterdir())


def test_tables(tmp_path):
    write_process_list(tmp_path / "list.csv", ["a.svs", "b, c.tiff"])
    write_dataset_csv(tmp_path / "data.csv", [("p1", "a", "tumour"), ("p1", "b, c", "normal")])
    with open(tmp_path / "list.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "slide_id", "process", "status", "seg_level", "sthresh", "mthresh", "close", "use_otsu", "keep_ids", "exclude_ids", "a_t", "a_h",
        "max_n_holes", "vis_level", "line_thickness", "use_padding", "contour_fn",
    ]  # fmt: skip
    assert [row["slide_id"] for row in rows] == ["a.svs", "b, c.tiff"] and rows[0]["status"] == "processed"
    with open(tmp_path / "data.csv", newline="") as file:
        assert list(csv.DictReader(file))[1] == {"case_id": "p1", "slide_id": "b, c", "label": "normal"}
