"""`wavepath info`."""

import json

import numpy as np
import pytest
import tifffile

from wavepath.cli import main


@pytest.fixture
def folder(tmp_path):
    rgb = np.full((130, 200, 3), 180, np.uint8)
    with tifffile.TiffWriter(tmp_path / "good one.tiff") as writer:
        for level in range(2):
            writer.write(
                rgb[:: 2**level, :: 2**level], tile=(64, 64), photometric="rgb", subfiletype=level, compression="deflate",
                resolution=(4e4 / 2**level,) * 2, resolutionunit="CENTIMETER", metadata=None,
            )
    return tmp_path


def test_text(folder, capsys):
    assert main(["info", str(folder / "good one.tiff")]) == 0
    out = capsys.readouterr().out
    for part in ("good one", "200 x 130 px", "0.25 um per pixel (from TIFF resolution per cm)", "DEFLATE", "read by      tiff"):
        assert part in out
    assert "level 1      100 x 65, 1/2, 0.5 um" in out


def test_json_of_one_and_of_a_folder(folder, capsys):
    path = str(folder / "good one.tiff")
    assert main(["info", path, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["width"], info["height"], info["mpp"], info["backend"]) == (200, 130, pytest.approx(0.25), "tiff")
    assert info["levels"][1] == {"width": 100, "height": 65, "downsample": 2.0, "tile": [64, 64]}
    assert info["bytes"] == (folder / "good one.tiff").stat().st_size
    assert main(["info", str(folder), "--json"]) == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == ["good one"]


def test_a_slide_without_mpp_is_shown_with_the_reason(folder, capsys):
    black = np.zeros((64, 64, 3), np.uint8)
    tifffile.imwrite(folder / "dpi.tif", black, tile=(64, 64), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    assert main(["info", str(folder / "dpi.tif")]) == 0
    assert "none (TIFF resolution per inch is 72 dpi" in capsys.readouterr().out


def test_bad_slides_are_named_and_the_rest_is_shown(folder, capsys):
    (folder / "bad.svs").write_text("text")
    assert main(["info", str(folder)]) == 3
    captured = capsys.readouterr()
    assert "good one" in captured.out and "bad.svs is no slide or image" in captured.err
    assert main(["info", str(folder / "bad.svs")]) == 1
    assert main(["info", str(folder / "none.svs")]) == 1
