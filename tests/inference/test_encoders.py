"""What makes features: colour statistics against closed forms, and the encoder as it was before the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from wavepath.cli import main
from wavepath.errors import ConfigError
from wavepath.files import read_json
from wavepath.inference.embed import embed
from wavepath.inference.encoders import colour_statistics
from wavepath.interop.features import read_features
from wavepath.ops.stain import separate_stains


def test_colour_statistics_are_means_and_deviations_of_colours_and_stains():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    found = np.asarray(colour_statistics(images))
    rgb = images.astype(np.float64) / 255
    stains = np.asarray(separate_stains(jnp.asarray(rgb, jnp.float32)), np.float64)[..., :2]
    planes = np.concatenate([rgb, stains], -1)
    np.testing.assert_allclose(found, np.concatenate([planes.mean((1, 2)), planes.std((1, 2))], 1), atol=2e-6)
    flat = np.asarray(colour_statistics(np.full((1, 4, 4, 3), 255, np.uint8)))
    np.testing.assert_allclose(flat[0], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], atol=1e-6)


@pytest.fixture
def tiles(tmp_path):
    rng = np.random.default_rng(0)
    for slide in "ab":
        (tmp_path / "tiles" / slide).mkdir(parents=True)
        for tile in range(3):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "tiles" / slide / f"{tile}.png")
    return tmp_path / "tiles"


def test_colours_are_features_like_any_others(tiles, tmp_path, capsys):
    assert main(["embed", "--colour-statistics", "--data", str(tiles), "--out", str(tmp_path / "out")]) == 0
    slide = read_features(tmp_path / "out" / "b.h5")
    images = np.stack([np.asarray(Image.open(tiles / f"{name}.png")) for name in slide.extra["names"]])
    np.testing.assert_allclose(slide.features, np.asarray(jax.jit(colour_statistics)(images)), atol=1e-6)
    np.testing.assert_array_equal(slide.features, slide.extra["features_mean"])
    assert slide.attributes["encoder"] == "colour-statistics" and slide.features.shape == (3, 10)
    known = read_json(tmp_path / "out" / "embed.json")
    assert known["train_slides"] == [] and known["kind"] == "images" and known["source"] == str(tiles)
    assert main(["embed", "--colour-statistics", "--data", str(tiles), "--out", str(tmp_path / "out")]) == 0
    assert "2, 2 whole already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(run=None), "give --checkpoint RUN, whose encoder makes the features, or --colour-statistics"),
        (dict(run=None, colours=True, untrained=True), "leave --untrained and --step out"),
        (dict(run=None, colours=True, step=3), "leave --untrained and --step out"),
    ],
)
def test_contradictions_are_refused(given, message, tiles, tmp_path):
    with pytest.raises(ConfigError, match=message):
        embed(out=tmp_path / "out", data=tiles, **given)
