import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.evaluation.image_metrics import CONVENTIONS, RESTORATION, restoration
from wavepath.ops.similarity import luma, psnr, ssim


def test_equal_to_the_operators_with_the_border_cut_in_luma_alone():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (48, 40, 3)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    x, y = (jnp.asarray(image[None], jnp.float32) / 255 for image in (a, b))
    inner_x, inner_y = (luma(image)[:, 4:-4, 4:-4] for image in (x, y))
    want = psnr(x, y)[0], ssim(x, y, value_range=1.0)[0], psnr(inner_x, inner_y)[0], ssim(inner_x, inner_y, value_range=1.0)[0]
    found = restoration(a, b, 4)
    assert tuple(found) == RESTORATION == tuple(CONVENTIONS)
    np.testing.assert_allclose(list(found.values()), want, atol=1e-4)
    framed = b.copy()
    framed[:4], framed[-4:], framed[:, :4], framed[:, -4:] = 0, 0, 0, 0
    other = restoration(a, framed, 4)
    assert other["psnr_y"] == found["psnr_y"] and other["psnr"] < found["psnr"] - 3
    assert restoration(a, b, 0)["psnr_y"] == pytest.approx(float(psnr(luma(x), luma(y))[0]), abs=1e-4)


def test_equal_images_and_what_cannot_be_compared():
    image = np.full((20, 20, 3), 200, np.uint8)
    assert restoration(image, image, 2) == {"psnr": np.inf, "ssim": 1.0, "psnr_y": np.inf, "ssim_y": 1.0}
    with pytest.raises(DatasetError, match="20 x 18 px cannot be compared"):
        restoration(image[:18], image, 2)
    with pytest.raises(DatasetError, match="too small"):
        restoration(image, image, 5)
