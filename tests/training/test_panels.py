"""Panels: the right pixels in the right place."""

import numpy as np
from PIL import Image

from wavepath.training.panels import columns_of, panel, panel_steps, side_by_side, write_panel


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


def test_panels_of_several_runs_share_what_they_have_in_common(tmp_path):
    rng = np.random.default_rng(0)
    same = {name: rng.random((2, 112, 112, 3)) for name in ("input", "masked")}
    paths = {}
    for number, name in enumerate(("a", "b", "c")):
        outputs = {**same, "reconstruction": np.full((2, 112, 112, 3), number / 4)}
        paths[name] = write_panel(tmp_path / name, 1, panel(outputs), columns_of(outputs))
    one, whole = np.asarray(Image.open(paths["a"])), side_by_side(paths)
    assert whole.shape == (one.shape[0], one.shape[1] + 2 * 116, 3)
    np.testing.assert_array_equal(whole[:, : 2 * 116], one[:, : 2 * 116])
    for number in range(3):
        np.testing.assert_array_equal(whole[60, 4 + (2 + number) * 116 + 50], round(255 * number / 4))
    other = {**same, "input": 1 - same["input"], "reconstruction": np.zeros((2, 112, 112, 3))}
    different = write_panel(tmp_path / "e", 1, panel(other), columns_of(other))
    assert side_by_side({"a": paths["a"], "e": different}) is None, "other examples"
    smaller = {name: value[:, :16, :16] for name, value in same.items()}
    paths["d"] = write_panel(tmp_path / "d", 1, panel(smaller), columns_of(smaller))
    assert side_by_side(paths) is None, "panels of different runs do not fit"
    write_panel(tmp_path / "a", 1, one)
    assert side_by_side({"a": paths["a"]}) is None, "a panel of an older version does not name its columns"
