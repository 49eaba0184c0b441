"""Coordinate files of TRIDENT and CLAM: layout, what their readers compute from it, and what is refused."""

import h5py
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.interop.clam import clam_patch, write_clam_coords
from wavepath.interop.coords import (
    find_coords,
    flat_names,
    geometry,
    read_coords,
    trident_attributes,
    trident_folder,
    write_trident_coords,
)

COORDS = np.array([[0, 0], [423, 0], [0, 423], [845, 1268]], np.int64)


def trident_reader(path):
    """What TRIDENT's reader makes of a file: patch size, and the footprint on level 0."""
    with h5py.File(path) as file:
        said = file["coords"].attrs
        size, own, target = said["patch_size"], said["level0_magnification"], said["target_magnification"]
        assert None not in (size, own, target)
        return size, round(size * own / target)


def clam_reader(path, downsamples):
    """What CLAM's extractor reads: `patch_size` pixels of `patch_level`, so this many level-0 pixels."""
    with h5py.File(path) as file:
        said = file["coords"].attrs
        return said["patch_size"] * downsamples[said["patch_level"]]


def written(path, slide_mpp=0.265, mpp=0.5, size=224, coords=COORDS, columns=None, **more):
    said = trident_attributes(
        name="a", patch_size=size, level0_magnification=10 / slide_mpp, target_magnification=10 / mpp, dimensions=(4000, 3000), savetodir="here",
        more=more,
    )
    write_trident_coords(path, coords, said, columns)
    return path


def test_the_layout_is_tridents(tmp_path):
    path = written(tmp_path / "a_patches.h5", columns={"energy": np.arange(4, dtype=np.float32)}, mpp_note=1)
    with h5py.File(path) as file:
        coords = file["coords"]
        assert coords.dtype == np.int64 and coords.shape == (4, 2) and coords.chunks == (1, 2) and coords.maxshape == (None, 2)
        np.testing.assert_array_equal(coords[()], COORDS)
        named = {
            "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "name", "savetodir", "level0_width",
            "level0_height",
        }
        assert named <= set(coords.attrs) and not set(file.attrs)
        assert coords.attrs["name"] == "a" and coords.attrs["overlap"] == 0 and coords.attrs["savetodir"] == "here"
        assert (coords.attrs["level0_width"], coords.attrs["level0_height"]) == (4000, 3000)
        np.testing.assert_array_equal(file["energy"][()], [0, 1, 2, 3])


@pytest.mark.parametrize(("slide_mpp", "mpp", "size", "footprint"), [
    (0.265, 0.5, 512, 966),  # TRIDENT itself takes this slide for 40x, and 1024 px
    (0.265, 0.5, 224, 423), (0.499, 0.499, 224, 224), (0.25, 0.5, 256, 512), (0.2277, 1.0, 256, 1124), (0.5, 0.5, 224, 224),
])  # fmt: skip
def test_tridents_reader_finds_the_true_footprint(tmp_path, slide_mpp, mpp, size, footprint):
    path = written(tmp_path / "a_patches.h5", slide_mpp, mpp, size)
    assert trident_reader(path) == (size, footprint) and abs(footprint * slide_mpp - size * mpp) <= slide_mpp / 2
    with h5py.File(path) as file:
        assert file["coords"].attrs["patch_size_level0"] == footprint
    assert read_coords(path).geometry.footprint == pytest.approx(size * mpp / slide_mpp, rel=1e-12)


@pytest.mark.parametrize(("footprint", "pixels", "levels", "level", "size"), [
    (512.0, 256, [(1, 1, 1.0), (1, 1, 4.0), (1, 1, 16.0)], 0, 512),  # 20x of a 40x slide without a 20x level
    (512.0, 256, [(1, 1, 1.0), (1, 1, 2.0), (1, 1, 4.0)], 1, 256),  # with one: CLAM need not read four times the pixels
    (224.0, 224, [(1, 1, 1.0), (1, 1, 2.0)], 0, 224), (966.3, 512, [(1, 1, 1.0), (1, 1, 2.0)], 0, 966),
    (896.0 * 1.0001, 224, [(1, 1, 1.0), (1, 1, 4.0004)], 1, 224),  # a level of an odd downsample, whose own pixels the tiles are
])  # fmt: skip
def test_clams_reader_finds_the_footprint(tmp_path, footprint, pixels, levels, level, size):
    patch = clam_patch(footprint, pixels, levels)
    assert (patch.level, patch.size) == (level, size)
    write_clam_coords(tmp_path / "a.h5", COORDS, patch, "a", "here")
    assert abs(clam_reader(tmp_path / "a.h5", [level[2] for level in levels]) - footprint) <= 0.5
    assert patch.exact == (footprint != 966.3)


def test_the_layout_is_clams(tmp_path):
    write_clam_coords(tmp_path / "a.h5", COORDS, clam_patch(896, 224, [(4000, 3000, 1.0), (1000, 750, 4.0)]), "a", "here")
    with h5py.File(tmp_path / "a.h5") as file:
        coords = file["coords"]
        assert coords.dtype == np.int64 and coords.chunks == (32, 2) and coords.maxshape == (None, 2)
        said = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in coords.attrs.items()}
    assert said == {
        "patch_size": 224, "patch_level": 1, "downsample": [4.0, 4.0], "downsampled_level_dim": [1000, 750], "level_dim": [1000, 750], "name": "a",
        "save_path": "here",
    }  # fmt: skip
    found = read_coords(tmp_path / "a.h5")
    assert (found.geometry.patch_size, found.geometry.level, found.geometry.footprint) == (224, 1, None)
    np.testing.assert_array_equal(found.coords, COORDS)


@pytest.mark.parametrize("written_by", ["trident", "clam"])
def test_no_tiles_are_legal(tmp_path, written_by):
    path = tmp_path / "a_patches.h5"
    if written_by == "trident":
        written(path, coords=np.zeros((0, 2)))
        with h5py.File(path) as file:
            assert file["coords"].shape == (0, 2)
    else:
        write_clam_coords(path, np.zeros((0, 2)), clam_patch(224, 224, [(9, 9, 1.0)]), "a")
    assert read_coords(path).coords.shape == (0, 2)


@pytest.mark.parametrize(("attributes", "expected"), [
    (dict(patch_size=512, level0_magnification=40, target_magnification=20, overlap=64), (512, 1024.0, None, 64)),
    (dict(patch_size=512, patch_size_level0=1024, level0_magnification="None", target_magnification="None"), (512, 1024.0, None, 0)),
    (dict(patch_size=224, patch_level=2), (224, None, 2, 0)), (dict(patch_size=224, patch_size_level0=448.0, patch_level=2), (224, 448.0, None, 0)),
    (dict(patch_size=512), None), (dict(patch_level=0), None), (dict(patch_size="None", patch_size_level0=5), None),
    (dict(patch_size=1, patch_level=-1), None),
    (dict(patch_size=512, level0_magnification=float("nan"), target_magnification=0), None),
])  # fmt: skip
def test_what_attributes_say(attributes, expected):
    found = geometry(attributes)
    assert (found and (found.patch_size, found.footprint, found.level, found.overlap)) == expected


def _store(path, values, **attributes):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=values)
        dataset.attrs.update(attributes)
    return path


@pytest.mark.parametrize(("values", "attributes", "said"), [
    (COORDS, {}, "do not say how large a tile is"),
    (COORDS, dict(patch_size=512, level0_magnification=40.0, target_magnification=20.0, patch_size_level0=512), "patch_size_level0 is 512.*1024"),
    (COORDS[:, 0], dict(patch_size=2, patch_level=0), r"\[4\], not \[tiles, 2\]"), (COORDS + 0.5, dict(patch_size=2, patch_level=0), "not whole"),
    (np.array([[np.nan, 1.0]]), dict(patch_size=2, patch_level=0), "not whole"), (np.array([b"ab"]), dict(patch_size=2, patch_level=0), "no numbers"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, values, attributes, said):
    path = _store(tmp_path / "a.h5", values, **attributes)
    with pytest.raises(DatasetError, match=said) as caught:
        read_coords(path)
    assert "a.h5" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 9, 900])
def test_a_damaged_file_is_named(tmp_path, cut):
    path = written(tmp_path / "a_patches.h5")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DatasetError, match="a_patches.h5.*make it again"):
        read_coords(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = np.zeros(3)
    with pytest.raises(DatasetError, match="no dataset `coords`"):
        read_coords(tmp_path / "b.h5")


def test_a_column_of_another_length_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="energy has 3 rows"):
        written(tmp_path / "a.h5", columns={"energy": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_folders_of_a_job(tmp_path):
    for name in ("patches/a_patches.h5", "patches/b/c_patches.h5", "features_x/a.h5"):
        written(tmp_path / "20x_224px_0px_overlap" / name)
    written(tmp_path / ".hidden/patches/z_patches.h5")
    for given in (tmp_path, tmp_path / "20x_224px_0px_overlap", tmp_path / "20x_224px_0px_overlap/patches"):
        assert sorted(find_coords(given)) == ["a", "b/c"]
    assert sorted(find_coords(tmp_path / "20x_224px_0px_overlap/features_x")) == ["a"]
    one = tmp_path / "20x_224px_0px_overlap/patches/b/c_patches.h5"
    assert find_coords(one) == {"c": one}
    written(tmp_path / "10x_224px_0px_overlap/patches/a_patches.h5")
    with pytest.raises(DatasetError, match="several folders.*10x_224px_0px_overlap/patches, 20x.*give one"):
        find_coords(tmp_path)
    (tmp_path / "none").mkdir()
    for nothing in ("none", "not there"):
        with pytest.raises(DatasetError, match="no coordinate"):
            find_coords(tmp_path / nothing)


def test_names():
    assert trident_folder(10 / 0.499, 224) == "20x_224px_0px_overlap" and trident_folder(10 / 0.265, 512, 64) == "37.74x_512px_64px_overlap"
    assert trident_folder(1.25, 256) == "1.25x_256px_0px_overlap"
    assert flat_names(["a/case", "b/case", "c/other", "d"]) == {"a/case": "a__case", "b/case": "b__case", "c/other": "other", "d": "d"}
    # No two slides may come to one file, the later over the earlier.
    assert flat_names(["a/b__c", "a__b/c", "x/c"])["a/b__c"] == "b__c"
    with pytest.raises(DatasetError, match="'a/b' and 'a__b' would both be called 'a__b'"):
        flat_names(["a/b", "c/b", "a__b"])
    names = flat_names(["x/a__b", "a/b", "c/b"])
    assert sorted(names.values()) == ["a__b", "c__b", "x__a__b"]
