"""Colour conversions against scikit-image and closed forms; stain jitter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import color

from wavepath.ops import stain


@pytest.fixture(scope="module")
def colours():
    """Random colours, and the corners of the cube."""
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    values[0, :8] = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    return values


def test_to_float_spans_zero_to_one(colours):
    x = stain.to_float(colours)
    assert x.dtype == jnp.float32 and float(x.min()) == 0 and float(x.max()) == 1
    np.testing.assert_allclose(x, colours / 255, atol=1e-7)


def test_luminance_is_rec_601(colours):
    x = stain.to_float(colours)
    np.testing.assert_allclose(stain.luminance(x), colours / 255 @ np.array([0.299, 0.587, 0.114]), atol=1e-6)
    grey = jnp.full((1, 3), 0.5)
    np.testing.assert_allclose(stain.luminance(grey), 0.5, atol=1e-7)


def test_luminance_is_elementwise(colours):
    # A product with a vector would round to bfloat16 or TF32 on an accelerator and is slow on the CPU.
    text = jax.jit(stain.luminance).lower(stain.to_float(colours)).as_text()
    assert "dot" not in text
    assert "dot" not in jax.jit(stain.separate_stains).lower(stain.to_float(colours)).as_text()


def test_optical_density():
    x = jnp.array([[1.0, 0.1, 0.01], [0.0, 1 / 255, 2.0]])
    expected = [[0, 1, 2], [np.log10(255), np.log10(255), 0]]
    np.testing.assert_allclose(stain.optical_density(x), expected, atol=1e-5)


def test_stains_equal_scikit_image(colours):
    x = stain.to_float(colours)
    expected = color.rgb2hed(colours)
    got = stain.separate_stains(x)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(stain.hematoxylin_od(x)), np.asarray(got[..., 0]))
    np.testing.assert_allclose(stain.combine_stains(got), color.hed2rgb(expected), atol=1e-5)


def test_stains_of_real_tissue(shared_data):
    from PIL import Image

    tile = np.asarray(Image.open(sorted((shared_data / "crc_tiles").glob("TUM*"))[0]).convert("RGB"))
    np.testing.assert_allclose(stain.separate_stains(stain.to_float(tile)), color.rgb2hed(tile), atol=2e-6)


def test_haematoxylin_is_highest_in_nuclei():
    nucleus, cytoplasm, glass = jnp.array([[0.35, 0.25, 0.55], [0.9, 0.6, 0.75], [0.95, 0.95, 0.95]])
    values = [float(stain.hematoxylin_od(c)) for c in (nucleus, cytoplasm, glass)]
    assert values[0] > 0.03 and values[1] < values[0] / 4 and values[2] < values[0] / 4


def test_jitter_of_no_strength_is_the_identity(colours):
    x = jnp.maximum(stain.to_float(colours), 1 / 255)
    np.testing.assert_allclose(stain.jitter_stain(x, jax.random.key(0), 0.0), x, atol=1e-5)


def test_jitter_changes_the_stains_of_each_image_alike(colours):
    x = jnp.clip(stain.to_float(colours), 0.1, 0.9)
    keys = jax.random.split(jax.random.key(1), 3)
    batch = jax.jit(jax.vmap(lambda key: stain.jitter_stain(x, key, 0.3)))(keys)
    assert batch.shape == (3, *x.shape) and float(batch.min()) >= 0 and float(batch.max()) <= 1
    one = jax.jit(stain.jitter_stain)
    batch, plain = np.asarray(batch), np.asarray(x)
    for k in range(3):
        np.testing.assert_allclose(batch[k], one(x, keys[k], 0.3), atol=1e-6)
        assert np.abs(batch[k] - plain).max() > 0.01
        # Equal colours stay equal, wherever they are in the image.
        np.testing.assert_allclose(one(x[:, ::-1], keys[k], 0.3)[:, ::-1], batch[k], atol=1e-6)
    assert np.abs(batch[0] - batch[1]).max() > 0.01
    assert np.isfinite(jax.jit(jax.grad(lambda s: stain.jitter_stain(x, keys[0], s).sum()))(0.1))


@pytest.mark.parametrize("shift, most", [(1 / 6, 0.1), (0.05, 0.03)])
def test_jitter_scales_and_shifts_the_amount_of_each_stain(shift, most):
    """The most that a shift can be, in decadic density, at strength 0.1; with 1/6 it is the strength itself, as published."""
    x = stain.to_float(np.random.default_rng(0).integers(20, 60, (12, 16, 3), np.uint8))
    keys = jax.random.split(jax.random.key(1), 200)
    batch = np.asarray(jax.jit(jax.vmap(lambda key: stain.jitter_stain(x, key, 0.1, shift)))(keys), np.float64)
    # In the image and after it the amounts of each stain lie on a line: its slope is the scale, its intercept the shift.
    before = -np.log10(np.asarray(x, np.float64)) @ np.linalg.inv(stain.STAINS)
    after = -np.log10(batch) @ np.linalg.inv(stain.STAINS)
    for number in range(3):
        lines = [np.polyfit(before[..., number].ravel(), one[..., number].ravel(), 1, full=True) for one in after]
        scales, shifts = np.array([line[0] for line in lines]).T
        assert max(line[1][0] for line in lines) < 1e-6
        for drawn, middle, reach in ((scales, 1, 0.1), (shifts, 0, most)):
            assert 0.9 * reach < np.abs(drawn - middle).max() <= reach + 1e-4
            assert abs(drawn.mean() - middle) < 0.2 * reach
        assert abs(np.corrcoef(scales, shifts)[0, 1]) < 0.25


def test_integers_and_floats_are_not_mixed_up():
    for dtype in (np.float32, np.int32, bool):
        with pytest.raises(TypeError, match="takes uint8"):
            stain.to_float(np.zeros((4, 4, 3), dtype))
