"""The pyramid must be read whole by OpenSlide and tifffile, and must not depend on how its rows arrive."""

import numpy as np
import openslide
import pytest
import tifffile

from wavepath.errors import WavepathError
from wavepath.interop.tiff import PyramidWriter, halve, pyramid_levels, write_pyramid


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture, on which JPEG errs little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(y / rng.uniform(20, 60) + rng.uniform(0, 6)) + np.cos(x / rng.uniform(20, 60)) for _ in range(3)]
    return (127 + 55 * np.stack(waves, axis=-1)).astype(np.uint8)


def means(rgb: np.ndarray) -> np.ndarray:
    """2 x 2 means in floating point, rounded half up: an independent computation of `halve`."""
    rgb = rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2].astype(np.float64)
    return np.floor(rgb.reshape(rgb.shape[0] // 2, 2, rgb.shape[1] // 2, 2, 3).mean(axis=(1, 3)) + 0.5).astype(np.uint8)


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_openslide_sees_every_level_with_the_right_mpp_and_pixels(tmp_path, codec):
    rgb = picture(1101, 1303)
    write_pyramid(tmp_path / "a.tiff", rgb, 0.499, codec=codec, description="a test")
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.level_dimensions == ((1303, 1101), (651, 550), (325, 275))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.499, rel=1e-6)
        assert slide.properties["openslide.comment"] == "a test"
        want = rgb
        for level, (width, height) in enumerate(slide.level_dimensions):
            got = np.asarray(slide.read_region((0, 0), level, (width, height)).convert("RGB"))
            error = np.abs(got.astype(int) - want).mean()
            assert error == 0 if codec == "deflate" else error < 2.0
            want = means(want)


def test_tifffile_sees_a_flat_bigtiff_pyramid_with_halved_resolutions(tmp_path):
    rgb = picture(600, 1200)
    write_pyramid(tmp_path / "a.tiff", rgb, 0.25)
    with tifffile.TiffFile(tmp_path / "a.tiff") as file:
        assert file.is_bigtiff
        assert len(file.pages) == len(file.series[0].levels) == 3
        for level, page in enumerate(file.pages):
            assert page.tags["NewSubfileType"].value == (1 if level else 0)
            numerator, denominator = page.tags["XResolution"].value
            assert numerator / denominator == pytest.approx(40000 / 2**level)
            assert page.is_tiled and page.tile == (256, 256)
            assert page.photometric == tifffile.PHOTOMETRIC.YCBCR
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
        assert np.abs(file.pages[0].asarray().astype(int) - rgb).mean() < 2.0


def test_bytes_do_not_depend_on_the_strips_nor_on_the_threads(tmp_path):
    rgb = picture(700, 530)
    files = []
    for number, (rows, workers) in enumerate([(700, 1), (1, 2), (97, 3), (256, 2)]):
        path = tmp_path / f"{number}.tiff"
        with PyramidWriter(path, 530, 700, 0.25, levels=3, workers=workers) as writer:
            for y in range(0, 700, rows):
                writer.write_rows(rgb[y : y + rows])
        files.append(path.read_bytes())
    assert len(set(files)) == 1


def test_a_failed_slide_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="out of ink"), PyramidWriter(tmp_path / "a.tiff", 300, 300, 0.25) as writer:
        writer.write_rows(picture(100, 300))
        raise RuntimeError("out of ink")
    with (
        pytest.raises(ValueError, match="100 of 300 rows"),
        PyramidWriter(tmp_path / "a.tiff", 300, 300, 0.25) as writer,
    ):
        writer.write_rows(picture(100, 300))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_keeps_the_old_slide(tmp_path):
    path = tmp_path / "a.tiff"
    write_pyramid(path, picture(64, 64), 0.25)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), PyramidWriter(path, 64, 64, 0.25) as writer:
        writer.write_rows(picture(32, 64, seed=1))
        raise KeyboardInterrupt
    assert path.read_bytes() == before


def test_rows_of_the_wrong_shape_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"uint8\[h, 64, 3\]"),
        PyramidWriter(tmp_path / "a.tiff", 64, 64, 0.25) as writer,
    ):
        writer.write_rows(np.zeros((8, 63, 3), np.uint8))
    with pytest.raises(ValueError, match="65 rows"), PyramidWriter(tmp_path / "a.tiff", 64, 64, 0.25) as writer:
        writer.write_rows(np.zeros((65, 64, 3), np.uint8))
    for wrong in ({"tile": 100}, {"codec": "gif"}, {"levels": 9}):
        with pytest.raises(ValueError):
            PyramidWriter(tmp_path / "a.tiff", 64, 64, 0.25, **wrong)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WavepathError, match="choose another folder") as caught:
        write_pyramid(tmp_path / "file" / "a.tiff", picture(64, 64), 0.25)
    assert "\n" not in str(caught.value)


def test_without_mpp_no_size_is_claimed(tmp_path):
    write_pyramid(tmp_path / "a.tiff", picture(64, 80), None)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert "openslide.mpp-x" not in slide.properties
        assert slide.dimensions == (80, 64)


def test_halve_is_the_rounded_mean_and_drops_odd_edges():
    rgb = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(halve(rgb), means(rgb))
    assert halve(rgb).shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("size", "levels"), [((512, 512), 1), ((513, 40), 1 + 1), ((8192, 8192), 5), ((40000, 30000), 8), ((1, 1), 1)]
)
def test_levels_end_at_about_a_thumbnail(size, levels):
    assert pyramid_levels(*size) == levels


def test_a_slide_of_one_pixel_and_a_thin_slide(tmp_path):
    for number, shape in enumerate([(1, 1), (3, 700)]):
        rgb = picture(*shape)
        write_pyramid(tmp_path / f"{number}.tiff", rgb, 0.5, codec="deflate")
        np.testing.assert_array_equal(tifffile.imread(tmp_path / f"{number}.tiff", key=0), rgb)


def test_an_ome_tiff_has_its_levels_in_subifds(tmp_path):
    from wavepath.data.slides import open_slide

    rgb = picture(1101, 1303)
    path = tmp_path / 'a "b" é.ome.tiff'
    write_pyramid(path, rgb, 0.265, codec="deflate", description='{"é": "<&>"}')
    with tifffile.TiffFile(path) as file:
        assert file.is_ome and file.is_bigtiff and len(file.pages) == len(file.series) == 1
        assert [level.shape for level in file.series[0].levels] == [(1101, 1303, 3), (550, 651, 3), (275, 325, 3)]
        want = rgb
        for level in file.series[0].levels:
            np.testing.assert_array_equal(level.asarray(), want)
            want = means(want)
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
    assert image["Description"] == '{"é": "<&>"}' and image["Name"] == path.name
    assert image["Pixels"]["PhysicalSizeX"] == image["Pixels"]["PhysicalSizeY"] == 0.265 and image["Pixels"]["PhysicalSizeXUnit"] == "µm"
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source, len(slide.levels)) == (0.265, "OME PhysicalSize", 3)
        np.testing.assert_array_equal(slide.read_level(1, 100, 50, 64, 32), means(rgb)[50:82, 100:164])


@pytest.mark.parametrize(("name", "ome", "expected"), [("a.tiff", None, False), ("a.OME.TIF", None, True), ("a.tiff", True, True)])
def test_ome_by_name_or_on_request(tmp_path, name, ome, expected):
    write_pyramid(tmp_path / name, picture(700, 600), None, ome=ome)
    with tifffile.TiffFile(tmp_path / name) as file:
        assert file.is_ome == expected and len(file.series[0].levels) == 2
        assert "PhysicalSizeX" not in (file.ome_metadata or "")
