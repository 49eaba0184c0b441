"""Bad and odd input: each is refused by one line that names the file and says what to do, or read rightly."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import assert_backends_agree, picture, write_tiff

from wavepath.data.slides import Slide, open_slide
from wavepath.errors import MissingMppError, SlideError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A lossless pyramid of 300 x 205 px at 0.25 mpp."""
    return write_tiff(tmp_path_factory.mktemp("plain") / "plain.tiff", picture(205, 300), compression="deflate")


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
        open_slide(plain, backend="vips")
    with pytest.raises(SlideError, match="outside 0.05 to 20"):
        open_slide(plain, mpp=250)


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
    path.write_bytes(plain.read_bytes())
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
    slide = open_slide(plain)
    assert isinstance(slide, Slide)
    slide.close()
    with pytest.raises((SlideError, OSError)):
        slide.read_level(0, 0, 0, 8, 8)
