"""Heatmaps: grids by closed forms, ranks, what QuPath expects of the tiles, and pictures of the right shape."""

import json
import uuid

import numpy as np
import pytest
from PIL import Image

from wavepath.errors import ConfigError, DatasetError
from wavepath.inference.heatmap import CLASSES, attention_grid, draw_heatmap, heatmap_geojson, normalised, scale_bar_um
from wavepath.interop.geojson import read_regions

COORDS = np.array([(0, 0), (64, 0), (64, 64), (128, 64)])
VALUES = np.array([1.0, 2.0, 3.0, 4.0])


def test_a_cell_a_tile():
    nan = np.nan
    grid = attention_grid(COORDS, 64, VALUES, 192, 160, 64)
    assert grid.shape == (3, 3) and grid.dtype == np.float32
    np.testing.assert_array_equal(grid, [[1, 2, nan], [nan, 3, 4], [nan, nan, nan]])


def test_overlapping_tiles_are_averaged_by_the_area_they_cover():
    coords = np.array([(0, 0), (32, 0)])
    np.testing.assert_array_equal(attention_grid(coords, 64, np.array([1.0, 3.0]), 96, 64, 32), [[1, 2, 3], [1, 2, 3]])
    # In cells of 64 px the second tile covers half of each of two.
    np.testing.assert_allclose(attention_grid(coords, 64, np.array([1.0, 3.0]), 96, 64, 64), [[(1 + 3 / 2) / 1.5, 3]])


def test_grids_of_footprints_that_are_not_whole():
    # 3 x 3 tiles of 482.6 px side by side; their coordinates are rounded, so that edges miss the cells' by less than a pixel.
    side = 482.6
    places = np.round(np.array([(x * side, y * side) for y in range(3) for x in range(3)])).astype(int)
    grid = attention_grid(places, side, np.arange(9.0), round(3 * side) + 100, round(3 * side), side / 8)
    np.testing.assert_allclose(grid[:24, :24][4::8, 4::8], np.arange(9.0).reshape(3, 3))
    assert np.isfinite(grid[:24, :24]).all() and np.isnan(grid[:, 24:]).all()


def test_tiles_smaller_than_a_cell_and_beyond_the_border_are_seen():
    grid = attention_grid(np.array([(100, 100), (290, 10)]), 16, np.array([5.0, 7.0]), 300, 300, 150)
    np.testing.assert_array_equal(grid, [[5, 7], [np.nan, np.nan]])
    # What is not finite is no tile.
    np.testing.assert_array_equal(attention_grid(np.array([(0, 0), (0, 0)]), 8, np.array([np.nan, 2.0]), 8, 8, 8), [[2]])
    with pytest.raises(ValueError, match="cannot be drawn"):
        attention_grid(COORDS, 0, VALUES, 8, 8, 8)


def test_the_whole_is_kept():
    rng = np.random.default_rng(0)
    coords, values = rng.integers(0, 900, (50, 2)) // 100 * 100, rng.random(50)
    grid = attention_grid(coords, 100, values, 1000, 1000, 100)
    for (x, y) in np.unique(coords, axis=0) // 100:
        assert grid[y, x] == pytest.approx(values[(coords == (100 * x, 100 * y)).all(1)].mean(), rel=1e-6)


def test_tiles_of_many_cells_are_what_each_cell_sees_of_them():
    # A small slide under a large thumbnail: 9 tiles of 770 x 770 cells each.
    coords, values = np.array([(x, y) for y in (0, 300, 900) for x in (-500, 10, 700)]), np.arange(9.0)
    grid = attention_grid(coords, 1024, values, 2048, 2048, 4 / 3)
    assert grid.shape == (1536, 1536)
    for row, column in np.random.default_rng(0).integers(0, 1536, (200, 2)):
        cell = np.array([column, row]) * 4 / 3
        share = np.clip(np.minimum(cell + 4 / 3, coords + 1024) - np.maximum(cell, coords), 0, None).prod(1)
        expected = (share * values).sum() / share.sum() if share.sum() >= 0.05 * 16 / 9 else np.nan
        np.testing.assert_allclose(grid[row, column], expected, rtol=1e-5)


def test_normalised():
    values = np.array([0.1, 0.5, 0.1, np.nan, 0.2, np.inf])
    np.testing.assert_allclose(normalised(values), [0.5 / 3, 1, 0.5 / 3, np.nan, 2 / 3, np.nan], rtol=1e-6)
    np.testing.assert_allclose(normalised(values, "minmax"), [0, 1, 0, np.nan, 0.25, np.nan], atol=1e-6)
    np.testing.assert_allclose(normalised(values, "none"), [0.1, 0.5, 0.1, np.nan, 0.2, np.nan], rtol=1e-6)
    assert (normalised(np.full(3, 7.0)) == 0.5).all() and (normalised(np.full(3, 7.0), "minmax") == 0.5).all()
    assert normalised(np.array([])).shape == (0,)
    # Whatever is monotone has the same ranks.
    x = np.random.default_rng(0).normal(size=50)
    np.testing.assert_array_equal(normalised(x), normalised(np.exp(3 * x)))
    with pytest.raises(ConfigError, match="rank or minmax"):
        normalised(np.array([0.0, 2.0]), "none")
    with pytest.raises(ConfigError, match="rank, minmax, none"):
        normalised(x, "ranks")


def test_tiles_are_what_qupath_expects(tmp_path):
    ranks = normalised(VALUES)
    columns = {"attention": np.array([0.1, np.nan, 0.2, 0.7], np.float32), "attention_rank": ranks}
    heatmap_geojson(tmp_path / "a.geojson", coords=COORDS, size_level0=60.5, columns=columns, classification_by="attention_rank")
    content = json.loads((tmp_path / "a.geojson").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 4
    for feature, (x, y) in zip(content["features"], COORDS.tolist(), strict=True):
        assert feature["type"] == "Feature" and uuid.UUID(feature["id"])
        ring = [[x, y], [x + 60.5, y], [x + 60.5, y + 60.5], [x, y + 60.5], [x, y]]
        assert feature["geometry"] == {"type": "Polygon", "coordinates": [ring]}
        assert feature["properties"]["objectType"] == "tile"
    found = [feature["properties"]["measurements"] for feature in content["features"]]
    assert [each["attention"] for each in found] == [0.1, "NaN", 0.2, 0.7]
    np.testing.assert_allclose([each["attention_rank"] for each in found], [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    classes = [feature["properties"]["classification"] for feature in content["features"]]
    assert [each["name"] for each in classes] == ["low", "low", "middle", "high"] == sorted(CLASSES, key=CLASSES.get)[:1] * 2 + ["middle", "high"]
    assert len({tuple(each["color"]) for each in classes}) == 3
    assert all(len(each["color"]) == 3 and all(0 <= part <= 255 for part in each["color"]) for each in classes)
    # And what we read back has the tiles' area.
    assert [name for name, _ in read_regions(tmp_path / "a.geojson")] == ["low", "low", "middle", "high"]
    assert all(shape.area == pytest.approx(60.5**2) for _, shape in read_regions(tmp_path / "a.geojson"))


def test_thresholds_and_tiles_without_a_class(tmp_path):
    values = np.array([0.2, 0.5, 0.9, np.nan])
    heatmap_geojson(
        tmp_path / "a.geojson", coords=COORDS, size_level0=64, columns={"p": values}, classification_by="p",
        thresholds={"tumour": 0.9, "unsure": 0.5}, object_type="detection",
    )  # fmt: skip
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert [feature["properties"].get("classification", {}).get("name") for feature in features] == [None, "unsure", "tumour", None]
    assert {feature["properties"]["objectType"] for feature in features} == {"detection"}
    heatmap_geojson(tmp_path / "b.geojson", coords=COORDS, size_level0=64, columns={"p": values})
    assert "classification" not in (tmp_path / "b.geojson").read_text()
    with pytest.raises(ValueError, match="there are 4 tiles"):
        heatmap_geojson(tmp_path / "c.geojson", coords=COORDS, size_level0=64, columns={"p": values[:3]})
    with pytest.raises(ValueError, match="not one of p"):
        heatmap_geojson(tmp_path / "c.geojson", coords=COORDS, size_level0=64, columns={"p": values}, classification_by="q")
    assert not (tmp_path / "c.geojson").exists()


def test_scale_bars_are_round_and_at_most_a_third():
    for width, length in ((1107.8, 200), (300, 100), (299, 50), (6000, 2000), (1.5e5, 50000), (7, 2)):
        assert scale_bar_um(width) == length and length <= width / 3


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_picture_shows_slide_and_colours(tmp_path):
    thumbnail = np.full((50, 60, 3), (200, 150, 180), np.uint8)
    draw_heatmap(tmp_path / "a.png", coords=COORDS, size_level0=64, values=VALUES, thumbnail=thumbnail, dimensions=(240, 200), title="s", mpp=0.5)
    pixels = _pixels(tmp_path / "a.png")
    height, width, _ = pixels.shape
    assert width > 1.5 * height > 1.5 * 300
    # The left panel is the slide as it is; the right one has the highest tile in magma's brightest yellow and no slide colour.
    left, right = pixels[:, : width * 2 // 5], pixels[:, width // 2 : width * 4 // 5]
    assert (left == (200, 150, 180)).all(-1).mean() > 0.3
    assert not (right == (200, 150, 180)).all(-1).any()
    assert (abs(right - (252, 253, 191)).max(-1) < 8).mean() > 0.05
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_pictures_without_a_slide_and_of_broad_ones(tmp_path):
    draw_heatmap(tmp_path / "bare.png", coords=COORDS + 100_000, size_level0=64, values=VALUES, mode="minmax", colormap="viridis")
    assert (abs(_pixels(tmp_path / "bare.png") - (68, 1, 84)).max(-1) < 8).mean() > 0.02, "viridis' lowest is drawn, cut to the tiles' own extent"
    thumbnail = np.full((20, 120, 3), 220, np.uint8)
    draw_heatmap(tmp_path / "broad.png", coords=COORDS, size_level0=64, values=VALUES, thumbnail=thumbnail, dimensions=(1200, 200))
    broad = _pixels(tmp_path / "broad.png")
    assert broad.shape[1] > 2 * broad.shape[0], "one under another"


def test_what_cannot_be_drawn_is_said(tmp_path):
    given = dict(coords=COORDS, size_level0=64)
    with pytest.raises(DatasetError, match="no tile has a finite value"):
        draw_heatmap(tmp_path / "a.png", values=np.full(4, np.nan), **given)
    with pytest.raises(DatasetError, match="no tile"):
        draw_heatmap(tmp_path / "a.png", coords=COORDS[:0], size_level0=64, values=VALUES[:0])
    with pytest.raises(ConfigError, match="no colour map 'jets'"):
        draw_heatmap(tmp_path / "a.png", values=VALUES, colormap="jets", **given)
    with pytest.raises(ValueError, match="dimensions"):
        draw_heatmap(tmp_path / "a.png", values=VALUES, thumbnail=np.zeros((4, 4, 3), np.uint8), **given)
    assert not list(tmp_path.iterdir())
