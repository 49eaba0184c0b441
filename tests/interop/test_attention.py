"""Attention on disk: what is written comes back, tile sizes are found, and other files are refused."""

import h5py
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.interop.attention import Attention, attention_path, read_attention, write_attention

COORDS = np.array([(0, 0), (512, 0), (0, 512)])


def one(attention, **attributes):
    probability = np.array([0.25, 0.75], np.float32)
    return Attention("a/s", COORDS, np.asarray(attention, np.float32), probability, ("x", "yé"), "yé", "x", attributes, {"fold": 3})


@pytest.mark.parametrize("attention", [[0.5, 0.25, 0.25], [[1, 0, 0], [0.5, 0.25, 0.25]]])
def test_what_is_written_comes_back(tmp_path, attention):
    path = attention_path(tmp_path, "a/s")
    write_attention(path, one(attention, patch_size=256, level0_magnification=37.7, target_magnification=20.0, overlap=None))
    found = read_attention(path, "a/s")
    np.testing.assert_array_equal(found.attention, np.asarray(attention, np.float32))
    np.testing.assert_array_equal(found.of_class(), np.float32([0.5, 0.25, 0.25]))
    np.testing.assert_array_equal(found.coords, COORDS)
    np.testing.assert_array_equal(found.probability, np.float32([0.25, 0.75]))
    assert found.classes == ("x", "yé") and (found.predicted, found.label, found.model) == ("yé", "x", {"fold": 3}) and path.parent.name == "a"
    assert found.size_level0 == pytest.approx(256 * 37.7 / 20) and found.attributes["overlap"] == "None"
    first = path.read_bytes()
    write_attention(path, one(attention, patch_size=256, level0_magnification=37.7, target_magnification=20.0, overlap=None))
    assert path.read_bytes() == first


def test_without_attributes_the_tiles_are_as_wide_as_their_grid(tmp_path):
    assert one([0.5, 0.25, 0.25]).size_level0 == 512
    # CLAM lays a grid over each piece of tissue: between pieces any step may come.
    pieces = np.array([(x, y) for y in (10, 266, 522) for x in (13, 269, 525)] + [(x, y) for y in (1811, 2067) for x in (1016, 1272)])
    assert Attention("s", pieces, np.full(13, 1 / 13), np.ones(1), ("x",), "x").size_level0 == 256
    assert Attention("s", pieces[:1], np.ones(1), np.ones(1), ("x",), "x").size_level0 == 1
    assert one([0.5, 0.25, 0.25], patch_size=256, patch_size_level0=1000, level0_magnification=40.0, target_magnification=20.0).size_level0 == 512


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 tiles, 2 classes"):
        write_attention(tmp_path / "s.h5", one([0.5, 0.5]))
    assert not list(tmp_path.iterdir())
    (tmp_path / "cut.h5").write_bytes(b"no")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["coords"] = COORDS
    for name, words in (("cut", "cannot read"), ("other", "no dataset `attention`"), ("gone", "cannot read")):
        with pytest.raises(DatasetError, match=words):
            read_attention(tmp_path / f"{name}.h5")


@pytest.mark.parametrize(("name", "value"), [
    ("attention", np.ones(2)), ("attention", np.ones((3, 3))), ("attention", np.array([b"a", b"b", b"c"])), ("coords", np.zeros((3, 3), int)),
    ("coords", COORDS + 0.5), ("probability", np.ones(3)), ("predicted", "z"), ("classes", "5"), ("classes", "{"),
])  # fmt: skip
def test_a_file_that_contradicts_itself_is_one_line(tmp_path, name, value):
    path = tmp_path / "s.h5"
    write_attention(path, one([0.5, 0.25, 0.25]))
    with h5py.File(path, "r+") as file:
        if name in file:
            kept = dict(file[name].attrs)
            del file[name]
            file[name] = value
            file[name].attrs.update(kept)
        else:
            file["attention"].attrs[name] = value
    with pytest.raises(DatasetError, match="cannot read .*; run `wavepath evaluate` again"):
        read_attention(path)
