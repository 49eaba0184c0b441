"""Panels: the right pixels in the right place."""

import numpy as np
from PIL import Image

from wavepath.training.panels import panel, panel_steps, write_panel


def solid(value, size=16, count=3):
    return np.full((count, size, size, 3), value, np.float32)


def test_columns_stand_in_order_and_keep_their_values():
    outputs = {"reconstruction": solid(1.0), "input": solid(0.25), "masked": solid(0.5), "cls": np.zeros((3, 8))}
    pixels = panel(outputs, rows=2)
    cell = 112  # 16 enlarged by 7
    assert pixels.shape == (16 + 4 + 2 * (cell + 4), 4 + 3 * (cell + 4), 3)
    middle = 16 + 4 + cell // 2
    assert [int(pixels[middle, 4 + column * (cell + 4) + cell // 2, 0]) for column in range(3)] == [64, 128, 255]
    assert (pixels[middle, 4 + cell + 2] == 255).all()  # the gap is white


def test_values_out_of_range_and_nan_do_not_break_the_picture():
    images = solid(2.0, count=1)
    images[0, 0, 0] = np.nan
    images[0, 8:, :] = -1.0
    pixels = panel({"input": images})
    assert pixels[20, 4, 0] == 0 and pixels[22, 60, 0] == 255 and pixels[120, 60, 0] == 0


def test_tiles_of_two_sizes_fill_the_same_cell():
    pixels = panel({"input": solid(0.0, 16, 1), "output": solid(0.0, 64, 1)})
    assert (pixels[30, 8] == 0).all() and (pixels[16 + 4 + 120, 4 + 128 + 4 + 120] == 0).all()


def test_a_task_without_pictures_draws_nothing():
    assert panel({"cls": np.zeros((3, 8))}) is None


def test_panels_are_files_in_order_of_their_steps(tmp_path):
    for step in (1_000_000, 20, 100):
        path = write_panel(tmp_path, step, panel({"input": solid(0.5, count=1)}))
    assert path.name == "step_000100.png" and Image.open(path).mode == "RGB"
    assert [step for step, _ in panel_steps(tmp_path)] == [20, 100, 1_000_000]
    assert panel_steps(tmp_path / "nothing") == []
