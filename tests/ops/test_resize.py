"""Bicubic resizing is Pillow's, to its rounding."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from wavepath.ops.resize import cubic_matrix, resize_bicubic


@pytest.mark.parametrize(("height", "width"), [(10, 14), (40, 56), (5, 9), (17, 30)])
def test_it_is_pillow(height, width):
    # Far enough from both ends that Pillow clips nothing between the axes.
    pixels = np.random.default_rng(0).integers(64, 192, (20, 28, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    ours = np.asarray(resize_bicubic(jnp.asarray(pixels[None], jnp.float32) / 255, height, width))[0] * 255
    # Pillow rounds to 8 bits after either axis.
    assert np.abs(ours - expected).max() < 1.6 and np.abs(ours - expected).mean() < 0.35


def test_weights():
    # Keys' kernel at 1/4, 3/4, 5/4, 7/4, and stretched by two at 1/4, 3/4, ... of it, with a sum of 2.
    np.testing.assert_allclose(cubic_matrix(4, 8)[3, :4], [-0.0703125, 0.8671875, 0.2265625, -0.0234375], atol=1e-12)
    np.testing.assert_allclose(cubic_matrix(16, 8)[4, 5:13] * 256, [-3, -9, 29, 111, 111, 29, -9, -3], atol=1e-9)
    np.testing.assert_allclose(cubic_matrix(9, 9), np.eye(9), atol=1e-12)
    # Without antialiasing a reduction by 4 sees four pixels, with it sixteen.
    assert ((cubic_matrix(64, 16, False)[8] != 0).sum(), (cubic_matrix(64, 16)[8] != 0).sum()) == (4, 16)
