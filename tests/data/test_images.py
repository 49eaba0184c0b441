"""A folder of images: what is found, one size for all, odd kinds of pixels, and files that are broken or not tiles."""

import io

import numpy as np
import pytest
from PIL import Image

from wavepath.data import decode, sources, tiles
from wavepath.data.images import ImageFolder, decode_image, fit
from wavepath.defaults import train_defaults
from wavepath.errors import DatasetError

SIZE = 16


def tile(folder: int, place: int) -> np.ndarray:
    """A smooth tile that tells its folder and place by its colour."""
    ramp = np.linspace(0, 60, SIZE)
    return np.stack([np.full((SIZE, SIZE), 20 * folder + 10), np.full((SIZE, SIZE), 3 * place), ramp[:, None] + ramp[None]], -1).astype(np.uint8)


def config_for(folder):
    config = train_defaults()
    config.data.dir = str(folder)
    return config


def make_images(folder):
    (folder / "b c").mkdir(parents=True)
    (folder / "a").mkdir()
    Image.fromarray(tile(1, 1)).save(folder / "a" / "2.png")
    Image.fromarray(tile(1, 0)).save(folder / "a" / "1.PNG")
    Image.fromarray(tile(2, 0)).save(folder / "b c" / "é.tif")
    Image.fromarray(tile(0, 0)).save(folder / "0.png")
    (folder / ".hidden.png").write_bytes(b"no")
    (folder / "notes.txt").write_text("no image")


def test_image_folder(tmp_path, capsys):
    make_images(tmp_path / "tiles")
    source = sources.open_source(config_for(tmp_path / "tiles"))
    assert "folder of images" in capsys.readouterr().err
    assert (len(source), source.image_shape, source.mpps) == (4, (SIZE, SIZE, 3), ())
    assert [(span.slide, span.stop - span.start) for span in source.spans] == [("tiles", 1), ("a", 2), ("b c", 1)]
    assert np.array_equal(source.images([3, 0, 1, 2]), np.stack([tile(2, 0), tile(0, 0), tile(1, 0), tile(1, 1)]))
    assert source.meta(2)["name"] == "a/2" and source.meta(2)["slide"] == "a"
    assert source.read([0])[0] == (tmp_path / "tiles" / "0.png").read_bytes()


def test_images_of_unequal_size_are_fitted(tmp_path, capsys):
    gradient = np.tile(np.linspace(0, 255, 40)[None, :, None], (20, 1, 3)).astype(np.uint8)
    for name, size in (("a", (40, 20)), ("b", (30, 30)), ("c", (24, 50))):
        Image.fromarray(gradient).resize(size).save(tmp_path / f"{name}.png")
    config = config_for(tmp_path)
    source = sources.open_source(config)
    assert "have 3 sizes" in capsys.readouterr().err
    assert source.image_shape == (24, 24, 3)  # the median of 20, 30 and 24
    first = source.images([0])[0]
    # 40x20 becomes 48x24 and loses 12 columns on either side: black and white ends are gone, the middle stays.
    assert 50 < first[:, 0].mean() < 80 and 180 < first[:, -1].mean() < 205
    assert np.array_equal(first, source.images([0])[0])
    config.model.image_size = 8
    assert sources.open_source(config).image_shape == (16, 16, 3)  # at most twice the model's images


def test_fit_keeps_the_aspect():
    image = np.zeros((30, 10, 3), np.uint8)
    image[10:20] = 255
    assert fit(image, 10).min() == 255
    assert fit(np.full((7, 7, 3), 9, np.uint8), 7).shape == (7, 7, 3)
    assert fit(np.zeros((5, 3, 3), np.uint8), 9).shape == (9, 9, 3)


def test_odd_image_kinds():
    def encoded(image, kind="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    grey = Image.fromarray(tile(0, 0)[..., 0])
    assert np.array_equal(decode_image(encoded(grey)), np.repeat(tile(0, 0)[..., :1], 3, -1))
    assert decode_image(encoded(grey, "JPEG")).shape == (SIZE, SIZE, 3)
    assert decode_image(encoded(Image.fromarray(tile(0, 0)).convert("CMYK"), "JPEG")).shape == (SIZE, SIZE, 3)
    clear = np.concatenate([tile(0, 0), np.zeros((SIZE, SIZE, 1), np.uint8)], -1)
    assert decode_image(encoded(Image.fromarray(clear))).min() == 255
    with pytest.raises(ValueError, match="8-bit"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))


def test_broken_and_absent_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no prepared dataset and holds no"):
        ImageFolder(tmp_path / "empty", 16)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "x.svs").write_bytes(b"")
    with pytest.raises(DatasetError, match="wavepath prepare"):
        ImageFolder(tmp_path / "slides", 16)
    make_images(tmp_path / "mixed")
    (tmp_path / "mixed" / "0.png").write_bytes(b"not an image")
    source = ImageFolder(tmp_path / "mixed", 16)
    with pytest.raises(DatasetError, match=r"0\.png \(example 0\) cannot be decoded"):
        source.images([1, 0])
    assert len(source.images([1, 2, 3])) == 3


def test_truncated_jpeg_is_an_error(tmp_path):
    """Half an image must not become half a grey one."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = tiles.encode_tile(noise, "jpeg", 90)
    (tmp_path / "a.jpg").write_bytes(whole)
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    source = ImageFolder(tmp_path, 16)
    source.images([0])
    with pytest.raises(DatasetError, match=r"b\.jpg"):
        source.images([1])
    with pytest.raises(DatasetError):
        decode.decode_into(whole[: len(whole) // 2], np.empty((64, 64, 3), np.uint8), lambda: "tile")


def test_a_slide_in_an_image_folder_is_said(tmp_path):
    Image.new("1", (9000, 4)).save(tmp_path / "a.tif")
    with pytest.raises(DatasetError, match="a slide, not a tile"):
        ImageFolder(tmp_path, 16)


def test_links_in_circles_end(tmp_path):
    make_images(tmp_path / "tiles")
    (tmp_path / "tiles" / "a" / "round").symlink_to(tmp_path / "tiles")
    assert len(ImageFolder(tmp_path / "tiles", 16)) == 4
