"""Thumbnails and tiles from slides and from prepared folders, and the strips of the tiles with most and least."""

import numpy as np
import pytest
from PIL import Image

from wavepath.data.prepare import prepare
from wavepath.data.sources import PreparedSource
from wavepath.defaults import prepare_defaults
from wavepath.errors import DatasetError, SlideError
from wavepath.evaluation.slide_pictures import extremes, open_pixels, tile_strip
from wavepath.interop.tiff import write_pyramid

SIDE = 64


def _slide(path, mpp=0.5):
    """Tiles of 64 px, each of one colour that says where it is."""
    rgb = np.zeros((4 * SIDE, 6 * SIDE, 3), np.uint8)
    rgb[..., 0] = np.arange(6).repeat(SIDE)[None] * 40
    rgb[..., 1] = np.arange(4).repeat(SIDE)[:, None] * 50
    write_pyramid(path, rgb, mpp, quality=95)
    return rgb


def _colour(x, y):
    return 40 * (x // SIDE), 50 * (y // SIDE), 0


def test_slides_give_thumbnails_and_tiles(tmp_path):
    _slide(tmp_path / "site" / "a.tiff")
    _slide(tmp_path / "b.tiff", mpp=None)
    (tmp_path / "mpp.csv").write_text("slide,mpp\nb,0.25\n")
    coords = np.array([(0, 0), (128, 64), (320, 192)])
    with open_pixels(slides=tmp_path, mpp_csv=tmp_path / "mpp.csv") as pixels:
        backdrop = pixels.backdrop("site/a")
        assert backdrop.dimensions == (384, 256) and backdrop.mpp == pytest.approx(0.5) and backdrop.thumbnail.shape == (256, 384, 3)
        assert pixels.backdrop("b").mpp == 0.25
        assert pixels.backdrop("a").dimensions == (384, 256), "TRIDENT and CLAM name a slide without its folder"
        assert pixels.backdrop("c") is None and pixels.reader("c", coords, SIDE) is None
        for slide, side in (("site/a", SIDE), ("b", SIDE), ("b", SIDE - 0.4)):
            for tile, place in zip(pixels.reader(slide, coords, side)([2, 0, 1]), coords[[2, 0, 1]], strict=True):
                assert tile.shape == (224, 224, 3)
                np.testing.assert_allclose(np.median(tile, axis=(0, 1)), _colour(*place), atol=6)
    with pytest.raises(SlideError, match="no such file"), open_pixels(slides=tmp_path / "none"):
        pass
    with open_pixels() as pixels:
        assert pixels is None


def test_a_slide_name_that_two_have_is_no_name(tmp_path):
    _slide(tmp_path / "one" / "a.tiff")
    _slide(tmp_path / "two" / "a.tiff")
    with open_pixels(slides=tmp_path) as pixels:
        assert pixels.backdrop("a") is None and pixels.backdrop("two/a") is not None


def test_a_damaged_slide_has_no_thumbnail_and_that_is_said(tmp_path, capsys):
    _slide(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").write_bytes((tmp_path / "a.tiff").read_bytes()[:300])
    with open_pixels(slides=tmp_path) as pixels:
        assert pixels.backdrop("a") is None
    assert "no thumbnail of a" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    rgb = np.clip(rng.normal((200, 120, 170), 30, (512, 640, 3)) + 30 * np.sin(np.arange(640) / 40)[None, :, None], 0, 255).astype(np.uint8)
    write_pyramid(folder / "slides" / "s.tiff", rgb, 0.5)
    config = prepare_defaults()
    config.screen.mpp, config.screen.region_um, config.screen.min_region_um, config.select.mode = 2.0, 64.0, 64.0, "all"
    config.tiles.mpp, config.tiles.size, config.tiles.codec = 1.0, 32, "png"
    prepare(folder / "slides", folder / "tiles", config)
    return folder


def test_a_prepared_folder_gives_thumbnails_and_its_tiles(prepared):
    source = PreparedSource(prepared / "tiles")
    metas = [source.meta(index) for index in range(len(source))]
    coords = np.array([(meta["x"], meta["y"]) for meta in metas])
    images = source.images(np.arange(4)).copy()
    footprint = 32 * metas[0]["mpp"] / 0.5
    with open_pixels(tiles=prepared / "tiles") as pixels:
        backdrop = pixels.backdrop("s")
        assert backdrop.dimensions == (640, 512) and backdrop.mpp == 0.5 and backdrop.thumbnail.ndim == 3
        assert pixels.backdrop("case/s").dimensions == (640, 512)  # the one whose id ends the same
        np.testing.assert_array_equal(pixels.reader("case/s", coords, footprint)([2]), images[2:3])
        assert pixels.backdrop("other") is None and pixels.reader("other", coords, footprint) is None
        np.testing.assert_array_equal(pixels.reader("s", coords, footprint)([0, 1, 2, 3]), images)
        # In another order, or some of them, they are found by their places.
        np.testing.assert_array_equal(pixels.reader("s", coords[::-1], footprint)([len(coords) - 1, len(coords) - 2]), images[:2])
        np.testing.assert_array_equal(pixels.reader("s", coords[2:], footprint)([0, 1]), images[2:])
        # Tiles that are not stored come from the slide.
        (tile,) = pixels.reader("s", coords[:1] + 3, footprint)([0])
        assert tile.shape == (224, 224, 3) and abs(tile.mean() - images[0].mean()) < 12
    source.close()
    with pytest.raises(DatasetError, match="has no manifest.csv"), open_pixels(tiles=prepared / "slides"):
        pass


def test_tiles_that_are_nowhere_are_said(prepared):
    moved = (prepared / "slides").rename(prepared / "elsewhere")
    try:
        with open_pixels(tiles=prepared / "tiles") as pixels, pytest.raises(DatasetError, match="does not hold the tiles of s"):
            pixels.reader("s", np.array([(1, 1)]), 64)([0])
    finally:
        moved.rename(prepared / "slides")


def test_extremes():
    values = np.array([0.3, 0.1, np.nan, 0.9, 0.5, 0.7])
    high, low = extremes(values, 2)
    assert high.tolist() == [3, 5] and low.tolist() == [1, 0]
    high, low = extremes(values, 8)
    assert high.tolist() == [3, 5, 4] and low.tolist() == [1, 0], "none is in both"
    high, low = extremes(np.ones(5), 2)
    assert high.tolist() == [2, 3] and low.tolist() == [0, 1] and [part.tolist() for part in extremes(np.array([np.nan]))] == [[], []]
    assert [part.tolist() for part in extremes(np.array([2.0]))] == [[0], []]


def test_the_strip_shows_the_right_tiles(tmp_path):
    values = np.linspace(0, 1, 10)
    asked = []

    def tiles(indices):
        asked.extend(indices)
        return [np.full((16, 16, 3), (0, 0, 250) if index > 4 else (0, 250, 0), np.uint8) for index in indices]

    tile_strip(tmp_path / "a.png", tiles=tiles, values=values, names=[f"t{index}" for index in range(10)], count=3, title="slide")
    assert asked == [9, 8, 7, 0, 1, 2]
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    blue, green = ((abs(pixels - colour).max(-1) < 6) for colour in ((0, 0, 250), (0, 250, 0)))
    assert blue.mean() > 0.2 and green.mean() > 0.2
    assert np.nonzero(blue)[0].max() < np.nonzero(green)[0].min(), "the highest stand above"
    tile_strip(tmp_path / "one.png", tiles=tiles, values=values[:1])
    assert (tmp_path / "one.png").is_file()
    with pytest.raises(DatasetError, match="nothing to show"):
        tile_strip(tmp_path / "none.png", tiles=tiles, values=np.array([np.nan]))


def test_real_slides_have_pictures(shared_data):
    coords = np.array([(600, 1200), (900, 1500)])
    with open_pixels(slides=shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs") as pixels:
        backdrop = pixels.backdrop("TCGA-CR-7395-01A-01-TS1")
        assert backdrop.dimensions == (4443, 3567) and backdrop.mpp is None and max(backdrop.thumbnail.shape) == 1536
        assert all(tile.std() > 10 for tile in pixels.reader("TCGA-CR-7395-01A-01-TS1", coords, 200.5)([0, 1]))
