"""The tile grid: every pixel covered, weights that sum to one, nothing used of a tile's outermost pixels."""

import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.inference.grid import Axis, Canvas, Grid, check_tiling, tiling


@pytest.mark.parametrize("length", [1, 7, 16, 17, 40, 41, 129])
@pytest.mark.parametrize(("tile", "overlap", "context", "scale"), [(16, 0, 0, 1), (16, 4, 2, 2), (16, 9, 3, 4), (12, 11, 5, 1), (16, 6, 0, 3)])
def test_weights_sum_to_one_everywhere(length, tile, overlap, context, scale):
    axis = Axis(length, tile, overlap, context, scale)
    total, reach = np.zeros(length * scale), 0
    for index, (start, weight) in enumerate(zip(axis.starts, axis.weights, strict=True)):
        low, high, offset = axis.used(index)
        assert low <= reach and weight.shape == (tile * scale,)  # no gap
        np.testing.assert_array_equal(np.flatnonzero(weight), np.arange(offset, offset + high - low))
        assert low == 0 or offset >= context * scale  # a tile's unused border, except where the image's own mirrored border is
        total[low:high] += weight[offset : offset + high - low]
        reach = high
        first, count, before, behind = axis.box(index)
        assert (first - before, before + count + behind) == (start, tile) and 0 <= first and first + count <= length
    assert reach == length * scale
    np.testing.assert_allclose(total, 1, atol=2e-7)
    steps = np.diff(axis.starts)
    assert all(step == tile - overlap for step in steps[:-1]) and all(0 < step <= tile - overlap for step in steps[-1:])
    assert axis.starts[0] == -context and (len(axis.starts) == 1 or axis.starts[-1] + tile == length + context)


def test_ramps_are_linear_and_borders_whole():
    weights = Axis(10, 6, 2, 0, 2).weights
    np.testing.assert_allclose(weights[0], [1] * 8 + [0.875, 0.625, 0.375, 0.125], atol=1e-7)
    np.testing.assert_allclose(weights[1], [0.125, 0.375, 0.625, 0.875] + [1] * 8, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (16, 16), (37, 50), (70, 21)])
@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_cut_from_an_image_blend_to_that_image_exactly(shape, scale):
    height, width = shape
    grid = Grid(height, width, 16, 6, 2, scale)
    large = np.random.default_rng(0).integers(0, 256, (height * scale, width * scale, 3), np.uint8)
    values = large.astype(np.float32) / np.float32(255)
    canvas, rows, done = Canvas(grid), [], 0
    edges = [grid.done(band.stop) for band in grid.bands(1)]
    assert edges == sorted(set(edges)) and edges[-1] == height * scale
    for row in range(len(grid.rows.starts)):
        for column in range(len(grid.columns.starts)):
            tile = np.full((16 * scale, 16 * scale, 3), 1e3, np.float32)  # whatever is beyond the image must not matter
            y, x = grid.rows.starts[row] * scale, grid.columns.starts[column] * scale
            inside = values[max(y, 0) : y + 16 * scale, max(x, 0) : x + 16 * scale]
            tile[max(-y, 0) :, max(-x, 0) :][: inside.shape[0], : inside.shape[1]] = inside
            canvas.add(row, column, tile)
        assert grid.reach(row) >= grid.done(row + 1) > done
        done = grid.done(row + 1)
        rows.append(canvas.take(done))
    np.testing.assert_array_equal(np.concatenate(rows), large)


def test_bands_hold_enough_tiles():
    grid = Grid(400, 100, 16, 4, 0, 1)
    bands = grid.bands(20)
    assert [row for band in bands for row in band] == list(range(len(grid.rows.starts)))
    assert all(len(band) * len(grid.columns.starts) >= 20 for band in bands[:-1])
    assert grid.count == len(grid.rows.starts) * len(grid.columns.starts)
    assert [len(band) for band in Grid(64, 5000, 16, 4).bands(20)] == [1] * 5  # a row has enough


def test_tiles_are_as_large_as_what_was_trained_on():
    assert tiling(64) == (64, 16) and tiling(12) == (32, 8) and tiling(64, 40) == (40, 10) and tiling(64, overlap=0) == (64, 0)
    for tile, overlap in ((7, 7), (-4, None), (0, None), (None, -1), (None, 64)):
        with pytest.raises(ConfigError, match="at least"):
            tiling(64, tile, overlap)


@pytest.mark.parametrize(
    ("sizes", "words"), [((0, 0, 0), "at least one pixel"), ((8, 8, 0), "less than the tile's 8"), ((8, 4, 3), "half of the overlap")]
)
def test_tiles_that_cannot_cover(sizes, words):
    with pytest.raises(ConfigError, match=words):
        check_tiling(*sizes)
