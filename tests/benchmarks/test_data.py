"""The reading benchmark measures what it says, and a differing pixel cannot pass."""

import json

import numpy as np
import pytest
import tifffile

from wavepath.benchmarks import data
from wavepath.cli import main
from wavepath.errors import SlideError


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "noise.tiff"
    rgb = np.random.default_rng(0).integers(0, 256, (700, 950, 3), dtype=np.uint8)
    tifffile.imwrite(path, rgb, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None)
    return path


def test_boxes_cover_the_level_or_its_middle_rows():
    boxes = data.boxes_of(950, 700, 2000)
    assert len(boxes) == 5 * 4 and boxes[0] == (0, 0, 224, 224) and boxes[-1] == (950 - 224, 700 - 224, 224, 224)
    middle = data.boxes_of(950, 2300, 10)
    assert [box[:2] for box in middle] == [(x, y) for y in (896, 1120) for x in (0, 224, 448, 672, 726)]
    assert data.boxes_of(100, 700, 10) == []
    assert len(data.boxes_of(224 * 50, 224, 10)) == 10


def test_report(slide):
    report = data.measure([("noise", slide)], runs=2, threads=[1, 2], most=2000)
    (result,) = report["slides"]
    assert (result["id"], result["tiles"], result["differing_pixels"], result["backend"]) == ("noise", 20, 0, "tiff")
    assert [reading["threads"] for reading in result["reading"]] == [1, 2]
    for reading in result["reading"]:
        assert len(reading["runs"]["wavepath"]) == len(reading["runs"]["openslide"]) == 2
        assert reading["ratio_range"][0] <= reading["ratio"] <= reading["ratio_range"][1]
    assert result["encode"] > 0 and result["write"] > 0
    assert "identical" in data.as_table(report)


def test_command_writes_json(slide, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "data", "--slides", str(slide), "--runs", "1", "--threads", "1", "--json", str(out)]) == 0
    assert "noise" in capsys.readouterr().out
    assert json.loads(out.read_text())["slides"][0]["tiles"] == 20


def test_differing_pixels_fail(slide, monkeypatch, capsys):
    real = data.OpenSlideReader._one
    monkeypatch.setattr(data.OpenSlideReader, "_one", lambda self, box: real(self, box) ^ np.uint8(box[0] == 224))
    assert data.differing_pixels(slide, data.boxes_of(950, 700, 2000)) == 4 * 224 * 224
    assert main(["bench", "data", "--slides", str(slide), "--runs", "1", "--threads", "1"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_a_slide_smaller_than_a_tile_is_refused(tmp_path):
    path = tmp_path / "small.tiff"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb")
    with pytest.raises(SlideError, match="smaller than one 224-px tile"):
        data.measure([("small", path)], runs=1, threads=[1], most=10)
