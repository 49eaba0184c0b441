"""Reading slides: the backends agree to the bit, and reads by mpp agree with each other."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import APERIO, assert_backends_agree, picture, write_tiff

from wavepath.data.slide_backends import build_levels
from wavepath.data.slide_tiff import ycbcr_to_rgb
from wavepath.data.slides import TileCache, open_slide
from wavepath.errors import SlideError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A lossless pyramid of 300 x 205 px at 0.25 mpp, and its pixels."""
    rgb = picture(205, 300)
    return write_tiff(tmp_path_factory.mktemp("plain") / "plain.tiff", rgb, compression="deflate", predictor=True), rgb


@pytest.mark.parametrize(
    "options",
    [
        dict(compression="jpeg", compressionargs=dict(level=85)),
        dict(compression="lzw", predictor=True),
        dict(compression="deflate"),
        dict(compression=None),
        dict(compression="jpeg", compressionargs=dict(level=85), description=APERIO.format(w=300, h=205)),
    ],
    ids=["jpeg", "lzw", "deflate", "none", "aperio-jpeg"],
)
def test_backends_agree_to_the_bit(tmp_path, options):
    # 300 / 75 is whole and 205 / 52 is not: OpenSlide's own scale of the levels is then not whole.
    path = write_tiff(tmp_path / "slide.tiff", picture(205, 300), **options)
    assert_backends_agree(path)


def test_grey_tiff_agrees(tmp_path):
    grey = picture(130, 140)[..., 0]
    path = tmp_path / "grey.tiff"
    tifffile.imwrite(path, grey, tile=(64, 64), photometric="minisblack", compression="deflate", metadata=None)
    assert_backends_agree(path)
    with open_slide(path) as slide:
        assert slide.backend == "tiff"
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 140, 130), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("code", [33003, 33005])
def test_jpeg2000_of_aperio_agrees(tmp_path, code):
    rgb = picture(128, 192)
    stored = np.asarray(Image.fromarray(rgb).convert("YCbCr")) if code == 33003 else rgb
    tiles = [
        imagecodecs.jpeg2k_encode(np.ascontiguousarray(stored[y : y + 64, x : x + 64]), codecformat="j2k", mct=code == 33005, level=40)
        for y in range(0, 128, 64)
        for x in range(0, 192, 64)
    ]
    path = tmp_path / "aperio.svs"
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter(tiles), shape=rgb.shape, dtype=np.uint8, tile=(64, 64), photometric="rgb", compression=code,
            description=APERIO.format(w=192, h=128), metadata=None,
        )
    assert_backends_agree(path)
    with open_slide(path) as slide:
        assert (slide.backend, slide.vendor, slide.objective, slide.mpp, slide.mpp_source) == ("tiff", "aperio", 40.0, 0.25, "aperio.MPP")
        assert np.abs(slide.read_level(0, 0, 0, 192, 128).astype(int) - rgb).mean() < 4


def test_ycbcr_conversion_is_that_of_bt601():
    ycbcr = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    y, cb, cr = (ycbcr[..., channel].astype(float) for channel in range(3))
    exact = np.stack([y + 1.402 * (cr - 128), y - 0.34414 * (cb - 128) - 0.71414 * (cr - 128), y + 1.772 * (cb - 128)], axis=-1)
    assert np.abs(ycbcr_to_rgb(ycbcr) - np.clip(exact, 0, 255)).max() <= 0.501


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_backends_agree_on_real_slides(shared_data, name):
    path = shared_data / "slides" / name
    with open_slide(path) as ours, open_slide(path, backend="openslide") as theirs:
        assert (ours.backend, theirs.backend) == ("tiff", "openslide")
        assert (ours.mpp, ours.objective, ours.vendor) == (theirs.mpp, theirs.objective, theirs.vendor)
        for level, (width, height, _) in enumerate(ours.levels):
            for region in [(700, 900, 500, 300), (-40, -50, 300, 200), (width - 260, height - 130, 300, 200), (width, height, 20, 20)]:
                np.testing.assert_array_equal(ours.read_level(level, *region), theirs.read_level(level, *region), err_msg=f"level {level} {region}")


def test_dicom_pyramid(shared_data):
    path = sorted((shared_data / "slides" / "cmu-1-dicom").glob("*.dcm"))[3]
    with open_slide(path) as slide:
        assert (slide.backend, slide.dimensions, len(slide.levels), slide.mpp) == ("openslide", (2220, 2967), 12, 0.499)
        assert [level.downsample for level in slide.levels] == [2.0**level for level in range(12)]
        # The level that OpenSlide scales by 2.0003 has one value a pixel, whatever region is asked.
        whole = slide.read_level(1, 0, 0, 1110, 1483)
        np.testing.assert_array_equal(slide.read_level(1, 601, 799, 224, 224), whole[799:1023, 601:825])


def test_dicom_whose_frames_belie_their_declaration_has_true_colours(shared_data):
    """The DICOM sample declares RGB and holds YCbCr; the same region as SVS is the oracle (both are lossy)."""
    folder = shared_data / "slides"
    with open_slide(sorted((folder / "cmu-1-dicom").glob("*.dcm"))[0]) as dicom, open_slide(folder / "CMU-1-Small-Region.svs") as svs:
        ours, oracle = (slide.read_level(0, 500, 500, 600, 600).astype(float) for slide in (dicom, svs))
        np.testing.assert_allclose(ours.mean((0, 1)), oracle.mean((0, 1)), atol=2)
        assert abs(ours - oracle).mean() < 6
        assert np.median(dicom.read_level(3, 10, 10, 100, 100), (0, 1)).min() > 235  # glass at the corner is white, on lower levels too


def test_phantom_pyramid_agrees(tmp_path):
    tiff = pytest.importorskip("wavepath.interop.tiff")
    tiff.write_pyramid(tmp_path / "phantom.tiff", picture(700, 900), 0.25)
    assert_backends_agree(tmp_path / "phantom.tiff")
    with open_slide(tmp_path / "phantom.tiff") as slide:
        assert slide.backend == "tiff" and slide.mpp == pytest.approx(0.25, rel=1e-3)


def test_ome_tiff_with_subifds(tmp_path):
    rgb = picture(200, 260)
    path = tmp_path / "slide.ome.tiff"
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        options = dict(tile=(64, 64), photometric="rgb", compression="deflate")
        size = {"PhysicalSizeX": 499.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 499.0, "PhysicalSizeYUnit": "nm"}
        writer.write(rgb, subifds=2, metadata={"axes": "YXS", **size}, **options)
        for step in (2, 4):
            writer.write(rgb[::step, ::step], subfiletype=1, **options)
        writer.write(picture(60, 90), metadata={"axes": "YXS"}, **options)
    with open_slide(path) as slide:
        assert (slide.backend, slide.vendor) == ("tiff", "ome-tiff")
        assert [level[:2] for level in slide.levels] == [(260, 200), (130, 100), (65, 50)]
        assert slide.mpp == pytest.approx(0.499) and slide.mpp_source == "OME PhysicalSize"
        np.testing.assert_array_equal(slide.read_level(1, 0, 0, 130, 100), rgb[::2, ::2])


def test_missing_tiles_are_white(tmp_path):
    rgb = picture(128, 192)
    tiles = [None if (x, y) == (64, 0) else rgb[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64, 128)]
    path = tmp_path / "sparse.tiff"
    tifffile.imwrite(path, iter(tiles), shape=rgb.shape, dtype=np.uint8, tile=(64, 64), photometric="rgb", compression="deflate", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].databytecounts[1] == 0
    expected = rgb.copy()
    expected[:64, 64:128] = 255
    with open_slide(path) as slide:
        assert slide.backend == "tiff"
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 192, 128), expected)
    assert_backends_agree(path)


def test_outside_is_white_and_inside_is_the_file(plain):
    path, rgb = plain
    with open_slide(path) as slide:
        assert (slide.backend, slide.dimensions, len(slide.levels)) == ("tiff", (300, 205), 3)
        padded = np.full((225, 330, 3), 255, np.uint8)
        padded[10:215, 10:310] = rgb
        np.testing.assert_array_equal(slide.read_level(0, -10, -10, 330, 225), padded)
        assert (slide.read_level(0, 1000, 1000, 5, 4) == 255).all()
        with pytest.raises(SlideError, match="levels 0 to 2"):
            slide.read_level(3, 0, 0, 1, 1)


def test_whole_scales_are_recognised():
    assert [level.downsample for level in build_levels([(4443, 3567), (2221, 1783), (1111, 892)])] == [1, 2, 4]
    assert [level.downsample for level in build_levels([(100, 90), (33, 30), (40, 36)])] == [1, 3, 2.5]


def test_read_at_a_levels_own_mpp_gives_its_pixels(plain):
    path, rgb = plain
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25) and slide.mpp_source == "TIFF resolution per cm"
        np.testing.assert_array_equal(slide.read(64, 32, 80, 60, 0.25), rgb[32:92, 64:144])
        np.testing.assert_array_equal(slide.read(64, 32, 80, 60, 0.502), rgb[::2, ::2][16:76, 32:112])
        assert (slide.level_for(0.5), slide.level_for(0.9), slide.level_for(7)) == (1, 1, 2)
        assert slide.read_mpp(0.502) == 0.5 and slide.read_mpp(0.7) == 0.7
        with pytest.raises(SlideError, match="coarser than the 0.2"):
            slide.read(0, 0, 8, 8, 0.2)


@pytest.mark.parametrize("mpp", [0.32, 0.7, 1.9, 5.0])
def test_overlapping_reads_agree_to_the_bit(plain, mpp):
    path, _ = plain
    step = mpp / 0.25
    with open_slide(path) as one, open_slide(path) as other:
        whole = one.read(0, 0, 60, 40, mpp)
        for column, row in [(0, 0), (7, 3), (20, 11), (33, 30)]:
            part = other.read(round(column * step), round(row * step), 19, 10, mpp)
            np.testing.assert_array_equal(part, whole[row : row + 10, column : column + 19])


def test_resampling_is_antialiased_and_in_place(tmp_path):
    checks = np.zeros((512, 512, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    path = write_tiff(tmp_path / "checks.tiff", checks, levels=1, compression="deflate")
    with open_slide(path) as slide:
        assert np.abs(slide.read(100, 100, 40, 40, 0.5).astype(int) - 128).max() == 0
        # The worst pattern for a mean of 3 x 3 pixels: 5 of one and 4 of the other.
        for factor, most in ((3.3, 14), (4.6, 2), (7.5, 4)):
            assert np.abs(slide.read(100, 100, 24, 24, 0.25 * factor).astype(int) - 127).max() <= most
    ramp = np.repeat(np.repeat(np.arange(512, dtype=np.uint16)[None, :, None] // 2, 512, axis=0), 3, axis=2).astype(np.uint8)
    path = write_tiff(tmp_path / "ramp.tiff", ramp, levels=1, compression="deflate")
    with open_slide(path) as slide:
        for factor in (1.5, 3.7, 5.0, 9.0):
            got = slide.read(120, 120, 20, 20, 0.25 * factor)[10, :, 0].astype(float)
            start = round(120 / factor) * factor
            np.testing.assert_allclose(got, (start + (np.arange(20) + 0.5) * factor - 1) / 2, atol=0.8)


@pytest.mark.parametrize(("mpp", "most"), [(1.0, 1), (1.25, 1), (2.15, 1.1)])
def test_strips_of_an_overview_decode_each_native_tile_once(tmp_path, mpp, most):
    path = write_tiff(tmp_path / "wide.tiff", picture(640, 1600), levels=1, compression="deflate")
    with open_slide(path, cache_mb=0.6) as slide, open_slide(path) as whole:
        step = mpp / 0.25
        width, height = int(1600 / step), int(640 / step)
        expected = whole.read(0, 0, width, height, mpp)
        for top in range(0, height, 16):
            np.testing.assert_array_equal(slide.read(0, round(top * step), width, 16, mpp)[: height - top], expected[top : top + 16])
        assert slide.native_decodes <= most * 25 * 10


def test_thumbnail_has_the_slides_shape_and_colours(plain):
    path, rgb = plain
    with open_slide(path) as slide:
        assert slide.thumbnail(100).shape == (68, 100, 3)
        assert slide.thumbnail(5000).shape == (205, 300, 3)
        assert np.abs(slide.thumbnail(50).mean((0, 1)) - rgb.mean((0, 1))).max() < 6


@pytest.mark.parametrize("threads", [1, 3])
def test_read_many_decodes_each_native_tile_once(plain, threads):
    path, _ = plain
    boxes = [(x, y, 50, 50) for y in range(-20, 220, 33) for x in range(-20, 320, 41)]
    np.random.default_rng(0).shuffle(boxes)
    with open_slide(path) as slide, open_slide(path) as reference:
        seen = []
        for index, tile in slide.read_many(0, boxes, threads=threads):
            np.testing.assert_array_equal(tile, reference.read_level(0, *boxes[index]))
            seen.append(index)
        assert sorted(seen) == list(range(len(boxes)))
        assert slide.native_decodes == 5 * 4


def test_read_many_may_be_left_early(plain):
    path, _ = plain
    before = threading.active_count()
    with open_slide(path) as slide:
        reading = slide.read_many(0, [(x, 0, 64, 64) for x in range(0, 300, 10)], threads=3)
        next(reading)
        reading.close()
    assert threading.active_count() == before


def test_many_threads_read_what_one_reads(plain):
    path, _ = plain
    rng = np.random.default_rng(1)
    boxes = [tuple(int(v) for v in (rng.integers(-30, 290), rng.integers(-30, 190), 40, 40)) for _ in range(200)]
    with open_slide(path) as slide, open_slide(path, cache_mb=0.05) as shared, ThreadPoolExecutor(8) as pool:
        for box, tile in zip(boxes, pool.map(lambda box: shared.read_level(0, *box), boxes), strict=True):
            np.testing.assert_array_equal(tile, slide.read_level(0, *box))


def test_cache_keeps_to_its_limit_and_shares_a_decode():
    cache = TileCache(10_000)
    for key in range(20):
        cache.get(key, lambda: np.zeros((10, 100, 3), np.uint8))
    assert cache.bytes <= 10_000 and len(cache) == 3

    def slow():
        time.sleep(0.05)
        return np.ones((2, 2, 3), np.uint8)

    cache = TileCache()
    with ThreadPoolExecutor(8) as pool:
        tiles = list(pool.map(lambda _: cache.get("tile", slow), range(8)))
    assert cache.decoded == 1 and cache.hits == 7 and all(tile is tiles[0] for tile in tiles)
    assert not tiles[0].flags.writeable


def test_cache_hands_an_error_to_all_who_wait_and_forgets_it():
    cache = TileCache()

    def fail():
        time.sleep(0.05)
        raise SlideError("damaged")

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.get, "tile", fail) for _ in range(4)]
        for future in waiting:
            with pytest.raises(SlideError, match="damaged"):
                future.result()
    assert cache.get("tile", lambda: np.ones((1, 1, 3), np.uint8)).sum() == 3


def test_cache_is_shared_between_slides_and_freed_by_closing(plain):
    path, rgb = plain
    cache = TileCache()
    with open_slide(path, cache=cache) as one, open_slide(path, cache=cache) as other:
        one.read_level(0, 0, 0, 64, 64)
        np.testing.assert_array_equal(other.read_level(0, 0, 0, 64, 64), rgb[:64, :64])
        assert len(cache) == 2
    assert len(cache) == 0 and cache.bytes == 0
