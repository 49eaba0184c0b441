"""Registration: known shifts of phantom pairs and of cut pictures, no confidence where there is nothing to find, what pictures share, sharpness."""

import numpy as np
import pytest
from scipy import ndimage
from test_prepare import texture

from wavepath.data.images import decode_image
from wavepath.data.phantom_pairs import draw_pairs
from wavepath.data.registration import MIN_SHARPNESS, correlations, estimate_shift, overlap, sharpness


def test_correlations_are_those_of_the_overlaps():
    rng = np.random.default_rng(0)
    first, second = rng.random((20, 26)).astype(np.float32), rng.random((20, 26)).astype(np.float32) + 3
    surface = correlations(first, second, 6)
    assert surface.shape == (13, 13)
    for dy, dx in ((0, 0), (3, -5), (-6, 6), (2, 1)):
        one, two = overlap(20, 26, dx, dy)
        assert surface[6 + dy, 6 + dx] == pytest.approx(np.corrcoef(first[one].ravel(), second[two].ravel())[0, 1], abs=1e-4)
    assert not correlations(np.ones((16, 16), np.float32), second[:16, :16], 4).any()


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (23, -9), (-40, 61)])
def test_cut_pictures(dx, dy):
    picture = texture(0, 560, 420)[:, :420]
    he, ihc = picture[70:390, 70:390], 60 + picture[70 - dy : 390 - dy, 70 - dx : 390 - dx] // 2
    shift = estimate_shift(he, ihc)
    assert (shift.dx, shift.dy) == (dx, dy) and shift.sure and shift.fine > 0.9 and shift.size == pytest.approx(np.hypot(dx, dy))


def test_phantom_pairs_to_a_pixel():
    for pair in draw_pairs(0, 3, 160, shift=8, local=1.5):
        shift = estimate_shift(pair.he, pair.ihc)
        assert shift.sure and abs(shift.dx - pair.dx) <= 1 and abs(shift.dy - pair.dy) <= 1, pair.name


def test_pictures_of_different_things():
    # Of other places of other tissue: at most one in ten is taken for a pair.
    others = [estimate_shift(texture(2 * n, 256 + 128, 256)[:, :256], texture(2 * n + 1, 256 + 128, 256)[:, :256]) for n in range(10)]
    assert sum(shift.sure for shift in others) <= 1 and max(shift.correlation for shift in others) < 0.3
    blank = np.full((64, 64, 3), 240, np.uint8)
    assert not estimate_shift(blank, blank).sure


def test_what_is_shared():
    assert overlap(10, 12, 0, 0) == ((slice(0, 10), slice(0, 12)),) * 2
    first, second = overlap(100, 90, 5, -12, 8)
    for one, two, moved, extent in ((first[0], second[0], -12, 100), (first[1], second[1], 5, 90)):
        size = one.stop - one.start
        assert two.start - one.start == moved and two.stop - two.start == size and size % 8 == 0
        assert min(one.start, two.start) >= 0 and max(one.stop, two.stop) <= extent and extent - abs(moved) - size < 8
    with pytest.raises(ValueError, match="share nothing"):
        overlap(20, 20, 15, 0, 8)


def test_sharpness():
    picture = texture(1)[:, :400]
    blurred = ndimage.gaussian_filter(picture, (4, 4, 0))
    assert sharpness(picture) > MIN_SHARPNESS > sharpness(blurred)


@pytest.mark.slow
def test_real_pairs(shared_data):
    """What is known of the eight real pairs: which lie on top of each other, which cannot be told, which one is out of focus."""

    def of(folder, name):
        return [decode_image((shared_data / "pairs" / folder / side / name).read_bytes()) for side in ("HE", "IHC")]

    near = {"00052_test_3+.png": (0, 0), "00118_test_0.png": (0, 1)}
    for name, (dx, dy) in near.items():
        shift = estimate_shift(*of("bci", name))
        assert shift.sure and abs(shift.dx - dx) <= 1 and abs(shift.dy - dy) <= 1
    for folder, name in (("bci", "00361_test_2+.png"), ("mist", "28M2101987_31_31.jpg")):
        assert not estimate_shift(*of(folder, name)).sure
    he, ihc = of("mist", "28M2101987_31_31.jpg")
    assert sharpness(ihc) < MIN_SHARPNESS < sharpness(he)
    he, ihc = of("mist", "15M2102762_15_26.jpg")
    shift = estimate_shift(he, ihc)
    assert shift.sure and 5 < shift.size < 20
    # Another 37, 21 px of misalignment is found on top of it.
    more = estimate_shift(he[:960, :960], ihc[21:981, 37:997])
    assert more.sure and abs(more.dx - (shift.dx - 37)) <= 3 and abs(more.dy - (shift.dy - 21)) <= 3
