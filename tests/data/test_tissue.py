"""Tissue, pen, focus and padding: on drawn images with known truth, and on real images that were looked at one by one."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from wavepath.data.tissue import Features, TissueMap, assess_image, cell_features, contours, on_white, tissue_map
from wavepath.defaults import prepare_defaults

PINK, PURPLE, GLASS = np.array([215, 140, 185.0]), np.array([100, 60, 140.0]), np.array([243, 243, 242.0])
INKS = {"red": (200, 20, 25), "green": (60, 165, 145), "blue": (60, 110, 200), "black": (35, 33, 36)}


@pytest.fixture
def settings():
    return prepare_defaults().tissue


def drawn(height=320, width=400, seed=0):
    """Glass with a noise of one grey level, and a rectangle of speckled tissue in rows 64 to 256, columns 80 to 320."""
    rng = np.random.default_rng(seed)
    rgb = GLASS + rng.normal(0, 1, (height, width, 1))
    grain = ndimage.gaussian_filter(rng.standard_normal((height, width)), 1.2)
    mix = np.clip(0.4 + 1.2 * grain, 0, 1)[..., None]
    tissue = PINK * (1 - mix) + PURPLE * mix
    rgb[64:256, 80:320] = tissue[64:256, 80:320]
    return np.clip(rgb, 0, 255).astype(np.uint8)


def inked(rgb, ink, rows, columns):
    """Multiplies a smooth stroke of ink over an image, as light does."""
    mask = np.zeros(rgb.shape[:2])
    mask[rows, columns] = 1
    share = ndimage.gaussian_filter(mask, 3)[..., None]
    return np.clip(rgb * (1 - share + share * np.array(ink) / 255), 0, 255).astype(np.uint8)


def truth(shape=(320, 400)):
    mask = np.zeros(shape, bool)
    mask[64:256, 80:320] = True
    return mask


def pixels(quality, layer, shape=(320, 400)):
    cell = int(quality.map.cell)
    return np.repeat(np.repeat(getattr(quality.map, layer), cell, 0), cell, 1)[: shape[0], : shape[1]]


def test_tissue_is_found_where_it_is(settings):
    quality = assess_image(drawn(), settings)
    found = pixels(quality, "tissue")
    assert quality.ok and quality.reason == "" and quality.pen == quality.blur == 0
    assert found[72:248, 88:312].all() and not found[:44].any() and not found[276:].any() and not found[:, :60].any() and not found[:, 340:].any()


@pytest.mark.parametrize("ink", INKS)
def test_pen_is_flagged_and_taken_out(settings, ink):
    rows, columns = slice(120, 160), slice(40, 360)  # across the tissue and over the glass
    quality = assess_image(inked(drawn(), INKS[ink], rows, columns), settings)
    pen = pixels(quality, "pen")
    assert pen[rows, columns].mean() > 0.9 and not pen[:100].any() and not pen[180:].any()
    assert not (pen & pixels(quality, "tissue")).any()
    assert quality.ok and pixels(quality, "tissue")[truth()].mean() > 0.6
    settings.pen = False
    assert assess_image(inked(drawn(), INKS[ink], rows, columns), settings).pen == 0


@pytest.mark.parametrize("ink", INKS)
def test_pen_alone_is_no_tissue(settings, ink):
    glass = np.clip(GLASS + np.random.default_rng(1).normal(0, 1, (320, 400, 1)), 0, 255).astype(np.uint8)
    quality = assess_image(inked(glass, INKS[ink], slice(60, 220), slice(50, 350)), settings)
    assert not quality.ok and quality.pen > 0.3 and "pen covers" in quality.reason


def test_loss_of_focus_is_flagged(settings):
    sharp = drawn()
    soft = sharp.copy()
    soft[:, :200] = ndimage.gaussian_filter(sharp.astype(np.float32), (3, 3, 0))[:, :200]
    quality = assess_image(soft, settings)
    blur = pixels(quality, "blur")
    assert blur[80:240, 100:180].all() and not blur[:, 232:].any() and not pixels(quality, "tissue")[80:240, 100:180].any()
    whole = assess_image(ndimage.gaussian_filter(sharp.astype(np.float32), (3, 3, 0)).astype(np.uint8), settings)
    assert not whole.ok and "out of focus covers" in whole.reason
    settings.blur = False
    assert assess_image(soft, settings).blur == 0


@pytest.mark.parametrize("value", [0, 255])
def test_padding_is_flagged(settings, value):
    rgb = drawn()
    rgb[:40], rgb[:, 380:] = value, value
    quality = assess_image(rgb, settings)
    padding = pixels(quality, "padding")
    assert padding[:40].all() and padding[:, 380:].all() and not padding[44:, :376].any()
    assert quality.ok and pixels(quality, "tissue")[80:240, 100:300].all()
    only = assess_image(np.full((320, 400, 3), value, np.uint8), settings)
    assert not only.ok and only.padding == 1 and "padding" in only.reason


def test_a_coverslip_edge_and_specks_are_not_tissue(settings):
    rgb = np.clip(GLASS + np.random.default_rng(1).normal(0, 1, (320, 400, 1)), 0, 255).astype(np.uint8)
    rgb[:, 100:108] = (40, 42, 41)
    rgb[200:212, 300:312] = PURPLE.astype(np.uint8)
    assert not assess_image(rgb, settings).ok


def test_rgba_is_composited_on_white(settings):
    rgb = drawn()
    alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    same = assess_image(np.concatenate([rgb, alpha], -1), settings)
    assert same.tissue == assess_image(rgb, settings).tissue
    clear = on_white(np.concatenate([rgb, np.zeros_like(alpha)], -1))
    assert (clear == 255).all()
    half = on_white(np.array([[[10, 20, 30, 128]]], np.uint8))
    assert half.tolist() == [[[132, 137, 142]]]
    assert on_white(np.array([[7]], np.uint8)).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (10, 10), (30, 50), (97, 61)])
def test_small_images(settings, size):
    quality = assess_image(drawn()[100 : 100 + size[0], 100 : 100 + size[1]], settings)
    assert quality.map.tissue.shape == size
    # Of a handful of pixels nothing is promised but an answer.
    assert quality.ok or min(size) < 10
    assert not assess_image(np.full((*size, 3), 255, np.uint8), settings).ok


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_features_do_not_depend_on_the_strips(cell):
    rgb = drawn(101, 75)
    whole = cell_features(rgb, cell)
    strips = Features.join([cell_features(rgb[top : top + 24], cell) for top in range(0, 101, 24)])
    for name in ("rgb", "fine", "coarse"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(strips, name))


def test_features_are_means_and_wavelet_energies():
    import pywt

    rgb = drawn(64, 64)
    features = cell_features(rgb, 4)
    mean = rgb.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(features.rgb - mean).max() <= 0.5
    grey = rgb @ np.array([0.299, 0.587, 0.114]) / 255
    half, first = pywt.dwt2(grey, "haar")
    _, second = pywt.dwt2(half, "haar")
    fine = np.mean(np.square(first), 0).reshape(16, 2, 16, 2).mean((1, 3))
    np.testing.assert_allclose(features.fine, fine, atol=1e-6)
    np.testing.assert_allclose(features.coarse, np.mean(np.square(second), 0), atol=1e-6)


def a_map(mask, cell):
    none = np.zeros_like(mask)
    return TissueMap(mask, none, none, none, cell, 8.0, True, "")


def test_fractions_are_exact_in_parts_of_cells():
    mask = np.random.default_rng(0).random((9, 12)) > 0.5
    cell = 4
    tissue = a_map(mask, float(cell))
    fine = np.repeat(np.repeat(mask, cell, 0), cell, 1)
    for x, y, w, h in [(0, 0, 48, 36), (3, 5, 7, 2), (11, 0, 1, 1), (40, 30, 8, 6)]:
        assert abs(tissue.fraction(x, y, w, h) - fine[y : y + h, x : x + w].mean()) < 1e-12
    # Outside nothing is covered.
    assert abs(tissue.fraction(40, 30, 16, 12) - fine[30:, 40:].sum() / (16 * 12)) < 1e-12
    assert tissue.fraction(100, 100, 5, 5) == 0 and tissue.fraction(-8, -8, 8, 8) == 0
    half = tissue.fraction(0, 0, 2.5, 4)
    assert half == float(mask[0, 0])
    many = tissue.fractions(np.array([0, 3]), np.array([0, 5]), 7, 2)
    assert many.tolist() == [tissue.fraction(0, 0, 7, 2), tissue.fraction(3, 5, 7, 2)]
    assert tissue.fraction(0, 0, 8, 8, "pen") == 0 and abs(tissue.share() - mask.mean()) < 1e-12


def test_contours_close_round_pieces_and_holes():
    mask = np.zeros((20, 30), bool)
    mask[2:18, 5:25] = True
    mask[8:12, 10:20] = False
    outer, hole = contours(mask, cell=32.0)
    assert (outer[0] == outer[-1]).all() and (hole[0] == hole[-1]).all()
    assert outer.min(0).tolist() == [4.5 * 32 + 16, 1.5 * 32 + 16] and outer.max(0).tolist() == [25 * 32, 18 * 32]
    full = contours(np.ones((4, 6), bool), 1.0)[0]
    assert full.min() >= 0 and full.max(0).tolist() == [6, 4]


def test_filters_follow_the_physical_size(settings):
    """The same picture at half the resolution, told so, gives the same map at half the size."""
    rgb = drawn(640, 800)
    rgb[64:512, 80:640] = np.clip(drawn(640, 800)[64:256, 80:320].repeat(3, 0).repeat(3, 1)[:448, :560].astype(int), 0, 255)
    features = cell_features(rgb, 8)
    fine = tissue_map(features, settings, um=8, cell=1).share()
    small = np.asarray(Image.fromarray(rgb).reduce(2))
    coarse = tissue_map(cell_features(small, 4), settings, um=8, cell=1).share()
    assert abs(fine - coarse) < 0.02


# The real images. Each was looked at with its masks drawn over it; the numbers are shares of the image.
REFUSED = ["no-tissue", "no-tissue2", "no-tissue-line", "no-tissue-green-pen", "no-tissue-red-pen", "almost-white-1", "almost-white-ihc"]
REFUSED += ["liver-level2-38626-13514-39426-14315"]
# name: (share of pen from, to), least share of tissue. What is pen was judged by eye; `diagnostic-slide-thumb` has strokes of four colours.
PEN = {
    "diagnostic-slide-thumb-rgb": ((0.40, 0.56), 0.2),
    "high-nuclei-score-red-pen-level1": ((0.08, 0.15), 0.8),
    "medium-nuclei-score-green-pen-level1": ((0.52, 0.62), 0.33),
    "tcga-green-pen": ((0.20, 0.26), 0.7),
    "tcga-red-pen": ((0.28, 0.36), 0.58),
    "very-low-nuclei-score-red-pen-level1": ((0.32, 0.42), 0.12),
    "wsi-blue-pen": ((0.05, 0.10), 0.38),
}
# Least share of tissue of all others: fat and torn tissue leave glass between their walls.
TISSUE = {
    "almost-white-2": 0.03, "high-nuclei-score-level2": 0.12, "kidney-ihc-level0-310-500-360-530": 0.8,
    "kidney-ihc-level0-330-480-380-510": 0.35, "kidney-ihc-level0-340-520-390-550": 0.8, "kidney-ihc-level0-350-530-360-540": 0.95,
    "liver-level2-10907-7808-11707-8608": 0.95, "liver-level2-20914-13715-21714-14515": 0.14, "liver-level2-57138-8209-57938-9009": 0.65,
    "low-nuclei-score-level0": 0.4, "low-nuclei-score-level1": 0.4, "medium-nuclei-score-level1-2": 0.98, "medium-nuclei-score-level1": 0.6,
    "medium-nuclei-score-level2": 0.75, "tcga-lung-rgb": 0.9, "tissue-level0-4302-10273-4814-10785": 0.85,
    "tissue-level0-7352-11762-7864-12274": 0.8, "tissue-level2-1784-6289-5880-10386": 0.7, "tissue-level2-3000-7666-7096-11763": 0.75,
    "tissue-level2-4640-4649-8736-8746": 0.7, "tissue-level2-4760-5241-8856-9338": 0.7, "very-low-nuclei-score-level0": 0.95,
}  # fmt: skip


def assess(shared_data, name, settings):
    with Image.open(shared_data / "qc" / f"{name}.png") as image:
        return assess_image(np.asarray(image), settings)


def test_every_real_image_is_in_one_list(shared_data):
    assert sorted([*REFUSED, *PEN, *TISSUE]) == sorted(path.stem for path in (shared_data / "qc").glob("*.png"))


@pytest.mark.parametrize("name", REFUSED)
def test_real_images_without_tissue_are_refused(shared_data, settings, name):
    quality = assess(shared_data, name, settings)
    assert not quality.ok and quality.tissue == 0 and quality.reason.startswith("no tissue")
    assert ("pen" in quality.reason) == ("-pen" in name) and (quality.pen > 0.55) == ("-pen" in name)


@pytest.mark.parametrize("name", PEN)
def test_real_pen_is_flagged_and_tissue_kept(shared_data, settings, name):
    (low, high), least = PEN[name]
    quality = assess(shared_data, name, settings)
    assert quality.ok and low <= quality.pen <= high and quality.tissue >= least
    assert not (quality.map.pen & quality.map.tissue).any()


@pytest.mark.parametrize("name", TISSUE)
def test_real_tissue_passes_without_a_pen(shared_data, settings, name):
    quality = assess(shared_data, name, settings)
    assert quality.ok and quality.tissue >= TISSUE[name] and quality.pen == 0 and quality.blur < 0.03


def test_the_other_real_tiles(shared_data, settings):
    """Colorectal and lung tiles, regions of several labs, H&E and IHC: no pen, hardly any blur, one known to be out of focus."""
    folders = ("crc_tiles", "regions", "pairs/mist/HE", "pairs/mist/IHC", "pairs/bci/HE")
    files = [path for folder in folders for path in (shared_data / folder).iterdir()]
    files += sorted((shared_data / "lung_tiles").glob("*/*_[05]_*.jpg"))
    soft = "28M2101987_31_31"
    for path in files:
        quality = assess_image(np.asarray(Image.open(path).convert("RGB")), settings)
        if path.parent.name == "IHC" and path.stem == soft:
            assert not quality.ok and quality.blur > 0.6
            continue
        assert quality.ok and quality.pen < 0.01 and quality.blur < 0.03 and quality.tissue > 0.4, path


def test_masks_never_overlap(shared_data, settings):
    quality = assess(shared_data, "diagnostic-slide-thumb-rgb", settings)
    layers = [quality.map.pen, quality.map.padding, quality.map.tissue]
    assert (np.sum(layers, 0) <= 1).all() and not (quality.map.blur & quality.map.tissue).any()


def test_ink_thresholds_are_settings(shared_data, settings):
    settings.pen_density = 5.0
    settings.pen_black = 5.0
    assert assess(shared_data, "tcga-red-pen", settings).pen == 0
