"""Metrics of staining: known shifts are found, known DAB is measured, flat images give numbers."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import hed2rgb, rgb2hed
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath.data.phantom_pairs import draw_pairs
from wavepath.errors import DatasetError
from wavepath.evaluation import stain_metrics
from wavepath.evaluation.image_metrics import restoration
from wavepath.evaluation.stain_metrics import CONVENTIONS, MORE_IS_BETTER, NAMES, best_shifts, dab, dab_positive, scores


def texture(side=96, seed=0):
    """Smooth noise in colour."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side, 3)), (1.5, 1.5, 0))
    return np.clip(150 + 400 * noise, 0, 255).astype(np.uint8)


def painted(brown):
    """A picture with this DAB on a little haematoxylin."""
    amounts = np.stack([np.full_like(brown, 0.02), np.zeros_like(brown), brown], -1)
    return (hed2rgb(amounts) * 255 + 0.5).astype(np.uint8)


def test_fidelity_is_that_of_scikit_image():
    target = texture()
    output = np.clip(target + np.random.default_rng(1).normal(0, 9, target.shape), 0, 255).astype(np.uint8)
    found = scores(output, target)
    assert tuple(found) == NAMES == tuple(CONVENTIONS) and set(MORE_IS_BETTER) < set(NAMES)
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())
    assert found["ssim"] == structural_similarity(target, output, channel_axis=2) != found["ssim_g"]
    assert found["psnr"] == peak_signal_noise_ratio(target, output) == restoration(output, target, 0)["psnr"]
    assert found["ssim_g"] == pytest.approx(restoration(output, target, 0)["ssim"], abs=1e-12)
    # In place already: nothing is gained by a shift.
    assert (found["psnr_shift"], found["ssim_shift"]) == (found["psnr"], found["ssim"])


@pytest.mark.parametrize("dy, dx", [(5, -3), (-8, 8), (0, 1)])
def test_a_shift_is_found_and_forgiven(dy, dx):
    whole = texture(116)
    target = whole[10:106, 10:106]
    output = np.clip(whole[10 + dy : 106 + dy, 10 + dx : 106 + dx] + np.random.default_rng(1).normal(0, 3, target.shape), 0, 255).astype(np.uint8)
    assert best_shifts(output, target, 8) == ((dy, dx), (dy, dx))
    found, strict = scores(output, target, 8), scores(output, target, 0)
    inner, same = whole[20:80, 20:80].astype(float), output[20 - dy - 10 : 80 - dy - 10, 20 - dx - 10 : 80 - dx - 10]
    assert found["psnr_shift"] == pytest.approx(10 * np.log10(255**2 / np.square(inner - same).mean()), abs=0.3)
    assert found["psnr_shift"] > found["psnr"] + 3
    assert found["ssim_shift"] > 0.95 > found["ssim"] + 0.1
    assert (strict["psnr_shift"], strict["ssim_shift"]) == (found["psnr"], found["ssim"])
    # Too far away to be reached: still never worse than no shift.
    short = scores(output, target, 1)
    assert short["psnr_shift"] >= found["psnr"] and short["ssim_shift"] >= found["ssim"]


def test_errors_of_all_shifts_and_windows_are_those_of_the_overlap():
    a, b = texture(40, 1)[:36], texture(40, 2)[:36]
    errors, similarity = stain_metrics._errors(a, b, 4), stain_metrics._Structure(a, b)
    grey = [image.astype(np.float32) @ np.array(stain_metrics.LUMA, np.float32) for image in (a, b)]
    for dy, dx in ((0, 0), (4, -4), (-3, 2)):
        first, second = stain_metrics.overlap(36, 40, dx, dy)
        assert errors[4 + dy, 4 + dx] == pytest.approx(np.square(a[first].astype(float) - b[second]).mean(), rel=1e-9)
        # Sample covariances, which scikit-image takes, are 49/48 of these: ranks do not mind.
        want = structural_similarity(grey[0][first], grey[1][second], data_range=255, use_sample_covariance=False)
        assert similarity(dy, dx) == pytest.approx(want, abs=2e-5)


def test_dab_is_measured_in_the_units_of_rgb2hed():
    image = texture()
    np.testing.assert_allclose(dab(image), rgb2hed(image)[..., 2], atol=1e-5)
    assert (dab_positive(image) == (rgb2hed(image)[..., 2] > stain_metrics.DAB_THRESHOLD)).mean() > 0.999
    brown = np.zeros((96, 96), np.float32)
    brown[:24] = 0.08  # a quarter
    target, half = painted(brown), painted(np.where(np.arange(96) < 48, brown, 0))
    found = scores(half, target, 0)
    assert (found["dab_output"], found["dab_target"], found["dab_error"]) == (0.125, 0.25, 0.125)


def test_where_the_dab_is_counts_in_cells_that_forgive_a_misregistration():
    where = np.kron(np.random.default_rng(0).random((3, 3)) < 0.5, np.ones((32, 32))).astype(np.float32) * 0.07
    target = painted(where)
    assert scores(painted(np.roll(where, 4, 1)), target, 0)["dab_correlation"] > 0.95
    assert scores(painted(0.07 - where), target, 0)["dab_correlation"] == pytest.approx(-1, abs=1e-3)
    # At 2 um per px a cell has 8 px, at 0.1 the whole image is less than a cell.
    fine = painted(np.kron(np.indices((12, 12)).sum(0) % 2, np.ones((8, 8))).astype(np.float32) * 0.07)
    assert scores(fine, fine, 0)["dab_correlation"] == 0 and scores(fine, fine, 0, mpp=2.0)["dab_correlation"] == pytest.approx(1)
    assert scores(target, target, 0, mpp=0.1)["dab_correlation"] == 0


def test_flat_and_equal_images_give_numbers():
    white, brown = np.full((96, 96, 3), 255, np.uint8), painted(np.full((96, 96), 0.1, np.float32))
    equal = scores(white, white)
    assert equal == {**dict.fromkeys(NAMES, 0.0), **dict.fromkeys(("ssim", "ssim_g", "ssim_shift"), 1.0), "psnr": np.inf, "psnr_shift": np.inf}
    other = scores(white, brown)
    assert not any(np.isnan(value) for value in other.values())
    assert (other["dab_output"], other["dab_target"], other["dab_error"], other["dab_correlation"]) == (0, 1, 1, 0)
    black = scores(np.zeros_like(white), texture())
    assert not any(np.isnan(value) for value in black.values())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DatasetError, match="40 x 30 px cannot be compared with a target of 40 x 40"):
        scores(texture(40)[:30], texture(40))
    with pytest.raises(DatasetError, match="10 x 10 px are too small"):
        scores(texture(10), texture(10))
    assert np.isfinite(scores(texture(11), texture(11, 1))["ssim_shift"])


def test_phantom_pairs_have_the_dab_that_they_say():
    for pair in draw_pairs(3, 0, 96, count=1, shift=4):
        mask = dab_positive(pair.ihc)
        assert 2 * (mask & pair.dab).sum() / (mask.sum() + pair.dab.sum()) > 0.95
        assert mask.mean() == pytest.approx(pair.dab.mean(), abs=0.02)
