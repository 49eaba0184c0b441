"""Reading slides: the backends agree to the bit, reads by mpp agree with each other, bad files are refused with a reason."""

import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from wavepath.data.slide_backends import build_levels
from wavepath.data.slide_tiff import ycbcr_to_rgb
from wavepath.data.slides import Slide, TileCache, open_slide
from wavepath.errors import MissingMppError, SlideError

APERIO = "Aperio Image Library v11\n{w}x{h} (64x64) |AppMag = 40|MPP = 0.2500"


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth stains with fine noise: what JPEG codecs and resampling both have to work for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + 2 * c) + np.cos(y / (7 + c)) for c in range(3)], axis=-1)
    return np.clip(150 + 40 * waves + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def write_tiff(path, rgb, levels=3, tile=64, description=None, **options):
    """A flat pyramid by plain subsampling: the levels' pixels need only be known, not good."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(levels):
            writer.write(
                rgb[:: 2**level, :: 2**level], tile=(tile, tile), photometric="rgb", subfiletype=int(level > 0), metadata=None,
                resolution=(4e4 / 2**level,) * 2, resolutionunit="CENTIMETER", description=description if level == 0 else None, **options,
            )
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A lossless pyramid of 300 x 205 px at 0.25 mpp, and its pixels."""
    rgb = picture(205, 300)
    return write_tiff(tmp_path_factory.mktemp("plain") / "plain.tiff", rgb, compression="deflate", predictor=True), rgb


def assert_backends_agree(path):
    with open_slide(path, backend="tiff") as ours, open_slide(path, backend="openslide") as theirs:
        assert [level[:2] for level in ours.levels] == [level[:2] for level in theirs.levels]
        for level, (width, height, _) in enumerate(ours.levels):
            regions = [
                (width // 3, height // 3, 50, 40), (-7, -9, 60, 60), (width - 20, height - 30, 64, 64),
                (width + 5, 0, 10, 10), (-3, -3, width + 6, height + 6),
            ]  # fmt: skip
            for region in regions:
                np.testing.assert_array_equal(ours.read_level(level, *region), theirs.read_level(level, *region), err_msg=f"level {level} {region}")


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
        assert np.abs(slide.read(100, 100, 40, 40, 0.25 * 3.3).astype(int) - 127).max() <= 3
    ramp = np.repeat(np.repeat(np.arange(512, dtype=np.uint16)[None, :, None] // 2, 512, axis=0), 3, axis=2).astype(np.uint8)
    path = write_tiff(tmp_path / "ramp.tiff", ramp, levels=1, compression="deflate")
    with open_slide(path) as slide:
        for factor in (1.5, 3.7, 5.0, 9.0):
            got = slide.read(120, 120, 20, 20, 0.25 * factor)[10, :, 0].astype(float)
            start = round(120 / factor) * factor
            np.testing.assert_allclose(got, (start + (np.arange(20) + 0.5) * factor - 0.5) / 2, atol=0.8)


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


# Bad input: every message names the file and says what to do.


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.9, 0.999])
def test_truncated_svs_is_refused(shared_data, tmp_path, share):
    data = (shared_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideError, match="cut.svs.*(truncated|damaged).*copy it again") as caught, open_slide(path) as slide:
        slide.read_level(0, 0, 0, *slide.dimensions)
    assert "\n" not in str(caught.value)


def test_damaged_tile_is_named_and_the_others_are_read(tmp_path):
    path = write_tiff(tmp_path / "hole.tiff", picture(128, 192), levels=1, compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[4], tiff.pages[0].databytecounts[4]
    good = path.read_bytes()
    for hole in (slice(0, count), slice(count // 2, count)):
        data = bytearray(good)
        data[offset + hole.start : offset + hole.stop] = bytes(hole.stop - hole.start)
        path.write_bytes(data)
        with open_slide(path) as slide:
            assert slide.read_level(0, 0, 0, 192, 64).shape == (64, 192, 3)
            for threads in (1, 2):
                with pytest.raises(SlideError, match="hole.tiff is damaged: tile"):
                    list(slide.read_many(0, [(0, 0, 64, 64), (64, 64, 64, 64)], threads=threads))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"This is a text file.\n" * 40, "no slide or image"), (b"II*\0" + b"\xff" * 300, "damaged or truncated"),
                            (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "damaged or truncated"), (b"\0" * 128 + b"DICM" + b"\0" * 200, "DICOM")],
    ids=["empty", "text", "tiff-header", "png-header", "dicom-header"],
)  # fmt: skip
def test_files_that_are_no_slides(tmp_path, content, reason):
    path = tmp_path / "bad slide.svs"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=reason) as caught:
        open_slide(path)
    assert "bad slide.svs" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_folder_and_wrong_backend(tmp_path, plain):
    with pytest.raises(SlideError, match="No such file"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(SlideError, match="is a folder"):
        open_slide(tmp_path)
    with pytest.raises(SlideError, match="choose one of auto, tiff"):
        open_slide(plain[0], backend="vips")
    with pytest.raises(SlideError, match="outside 0.05 to 20"):
        open_slide(plain[0], mpp=250)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_one_pixel_and_a_path_with_spaces_and_letters(tmp_path, suffix):
    folder = tmp_path / "Schnitt Nr. 1 – Gewebe ü 標本"
    folder.mkdir()
    path = folder / f"één beeld.{suffix}"
    Image.new("RGB", (1, 1), (200, 30, 90)).save(path)
    with open_slide(path) as slide:
        assert (slide.backend, slide.dimensions, slide.mpp) == ("image", (1, 1), None)
        assert slide.read_level(0, -1, -1, 3, 3)[0, 0].tolist() == [255, 255, 255]
        assert np.abs(slide.read_level(0, 0, 0, 1, 1)[0, 0].astype(int) - (200, 30, 90)).max() < 8
        with pytest.raises(MissingMppError):
            slide.read(0, 0, 1, 1, 0.5)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.read(0, 0, 4, 4, 4.0).shape == (4, 4, 3) and slide.thumbnail(64).shape == (1, 1, 3)


def test_tiled_slide_in_a_path_with_spaces_and_letters(tmp_path, plain):
    folder = tmp_path / "Mappe mit Ä und space"
    folder.mkdir()
    path = folder / "ß 1.tiff"
    path.write_bytes(plain[0].read_bytes())
    assert_backends_agree(path)


def test_images_with_alpha_grey_and_untiled_tiff(tmp_path):
    rgb = picture(40, 50)
    alpha = np.full((40, 50, 1), 255, np.uint8)
    alpha[:10] = 0
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        got = slide.read_level(0, 0, 0, 50, 40)
        assert (got[:10] == 255).all() and (got[10:] == rgb[10:]).all()
    Image.fromarray(rgb[..., 0]).save(tmp_path / "g.png")
    with open_slide(tmp_path / "g.png") as slide:
        assert (slide.read_level(0, 0, 0, 50, 40) == rgb[..., :1]).all()
    tifffile.imwrite(tmp_path / "u.tif", rgb, photometric="rgb", compression="lzw", rowsperstrip=7)
    with open_slide(tmp_path / "u.tif") as slide:
        assert slide.backend == "image"
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 50, 40), rgb)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_200, 40_000])
def test_large_untiled_images_are_refused_with_the_reason(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(SlideError, match="bomb.png is too large to read untiled.*limit 80 megapixels.*vips"):
        open_slide(tmp_path / "bomb.png")


def test_deep_and_damaged_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    tifffile.imwrite(tmp_path / "stack.ome.tiff", np.zeros((5, 64, 64), np.uint8), tile=(16, 16), metadata={"axes": "CYX"})
    for name in ("deep.png", "deep.tif", "stack.ome.tiff"):
        with pytest.raises(SlideError, match=f"{name}.*8-bit RGB"):
            open_slide(tmp_path / name)
    Image.fromarray(picture(100, 100)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError, match="cut.jpg is a damaged or truncated image"), open_slide(tmp_path / "cut.jpg") as slide:
        slide.read_level(0, 0, 0, 100, 100)


def test_closing_makes_reads_fail(plain):
    slide = open_slide(plain[0])
    assert isinstance(slide, Slide)
    slide.close()
    with pytest.raises((SlideError, OSError)):
        slide.read_level(0, 0, 0, 8, 8)
