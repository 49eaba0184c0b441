"""Texture classes: one histogram for all, co-occurrences that differ."""

import argparse

import numpy as np
import pytest
from PIL import Image
from skimage.feature import graycomatrix, graycoprops

from wavepath.commands import phantom as command
from wavepath.data.phantom_textures import CLASSES, make_textures, texture
from wavepath.errors import ConfigError, WavepathError

SIZE = 64


@pytest.fixture(scope="module")
def images():
    return {name: np.stack([texture(name, SIZE, np.random.default_rng((index, n))) for n in range(8)]) for index, name in enumerate(CLASSES)}


def test_all_images_have_one_histogram(images):
    values = [np.sort(image.reshape(-1, 3), axis=0) for stack in images.values() for image in stack]
    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])
    assert values[0].std(axis=0).min() > 10, "a texture without contrast"


def test_patches_differ_little_in_mean_and_variance(images):
    patches = {name: stack[..., 0].reshape(8, 4, 16, 4, 16).astype(float) for name, stack in images.items()}
    variances = np.array([found.var(axis=(2, 4)).mean() for found in patches.values()])
    assert variances.max() / variances.min() < 1.05
    spreads = np.array([found.mean(axis=(2, 4)).std() for found in patches.values()])
    assert spreads.max() < 0.15 * np.sqrt(variances.min()), spreads


def test_co_occurrences_tell_the_classes_apart(images):
    """Contrast along the four directions: between any two classes some direction differs by more than the spread within them."""

    def contrasts(image):
        matrix = graycomatrix(image[..., 0] // 8, [1], [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4], levels=32)
        return graycoprops(matrix, "contrast")[0]

    found = {name: np.array([contrasts(image) for image in stack]) for name, stack in images.items()}
    for a in CLASSES:
        for b in CLASSES:
            if a < b:
                gap = np.abs(found[a].mean(0) - found[b].mean(0)) / (found[a].std(0) + found[b].std(0))
                assert gap.max() > 3, (a, b, gap)
    # The lines run where the name says: contrast is least along them (angles of graycomatrix: 0, 45, 90, 135 degrees, rows downwards).
    for name, direction in (("horizontal", 0), ("diagonal", 1), ("vertical", 2), ("antidiagonal", 3)):
        assert found[name].mean(0).argmin() == direction, (name, found[name].mean(0))


def test_folder_and_seed(tmp_path):
    paths = make_textures(tmp_path / "a", 2, seed=5, size=32, progress=False)
    assert len(paths) == 2 * len(CLASSES) and {path.parent.name for path in paths} == set(CLASSES)
    again = make_textures(tmp_path / "b", 3, seed=5, size=32, progress=False)
    other = make_textures(tmp_path / "c", 1, seed=6, size=32, progress=False)
    assert paths[1].read_bytes() == again[1].read_bytes() and paths[0].read_bytes() != other[0].read_bytes()
    assert np.asarray(Image.open(paths[0])).shape == (32, 32, 3)


@pytest.mark.parametrize("arguments, message", [((0, 0, 64), "--textures 1"), ((1, -1, 64), "--seed 0"), ((1, 0, 8), "--size 16")])
def test_refuses(tmp_path, arguments, message):
    count, seed, size = arguments
    with pytest.raises(WavepathError, match=message):
        make_textures(tmp_path / "out", count, seed=seed, size=size, progress=False)
    with pytest.raises(WavepathError, match="choose one of"):
        texture("plaid", 32, np.random.default_rng(0))


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--out", str(tmp_path), "--textures", "1", "--size", "16"])) == 0
    for flag in (["--slides", "8"], ["--mpp", "0.25"]):
        with pytest.raises(ConfigError, match=f"{flag[0]} belongs to slides"):
            command.run(parser.parse_args(["--out", str(tmp_path), "--textures", "1", *flag]))
    assert "1 of 16 x 16 px in each of 6 classes" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/*.png"))) == 6
