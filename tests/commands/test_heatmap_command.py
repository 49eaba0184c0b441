"""`wavepath heatmap`: attention files to pictures, with slides, without them, and what goes wrong."""

import json

import numpy as np
import pytest

from wavepath.cli import main
from wavepath.interop.attention import Attention, write_attention
from wavepath.interop.tiff import write_pyramid

COORDS = np.array([(x, y) for y in (0, 64, 128) for x in (0, 64, 128)])


def _attention(path, slide, rows=1, **changes):
    values = np.random.default_rng(0).random((rows, 9)).astype(np.float32)
    values /= values.sum(1, keepdims=True)
    given = {"coords": COORDS, "attention": values[0] if rows == 1 else values, "probability": np.array([0.25, 0.75]), **changes}
    attributes = {"patch_size": 32, "patch_size_level0": 64, "level0_mpp": 0.5}
    found = Attention(slide, classes=("normal", "tumour"), predicted="tumour", label="normal", attributes=attributes, **given)
    write_attention(path, found)
    return found


@pytest.fixture
def folder(tmp_path):
    for slide in ("a", "site/b"):
        _attention(tmp_path / "attention" / f"{slide}.h5", slide, rows=1 if slide == "a" else 2)
    rgb = np.random.default_rng(0).integers(100, 255, (256, 256, 3)).astype(np.uint8)
    write_pyramid(tmp_path / "slides" / "a.tiff", rgb, 0.5)
    return tmp_path


def test_slides_that_are_there_are_drawn_over(folder, capsys):
    given = ["heatmap", str(folder / "attention"), "--slides", str(folder / "slides"), "--out", str(folder / "out"), "--count", "2"]
    assert main(given) == 0
    written = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*.*")}
    assert written == {"a.png", "a.geojson", "a_tiles.png", "site/b.png", "site/b.geojson"}
    assert "without tiles  1" in capsys.readouterr().err
    features = json.loads((folder / "out" / "site" / "b.geojson").read_text())["features"]
    assert {"attention", "attention_rank", "attention normal", "attention tumour"} == set(features[0]["properties"]["measurements"])
    assert sum(feature["properties"]["measurements"]["attention tumour"] for feature in features) == pytest.approx(1, abs=1e-5)
    assert all(each["properties"]["measurements"]["attention"] == each["properties"]["measurements"]["attention tumour"] for each in features)


def test_another_class_and_one_file(folder):
    out = folder / "out"
    assert main(["heatmap", str(folder / "attention" / "site" / "b.h5"), "--class", "normal", "--out", str(out), "--mode", "minmax"]) == 0
    values = json.loads((out / "b.geojson").read_text())["features"][0]["properties"]["measurements"]
    assert values["attention"] == values["attention normal"] != values["attention tumour"]


def test_a_slide_that_fails_leaves_the_others(folder, capsys):
    _attention(folder / "attention" / "c.h5", "c", attention=np.full(9, np.nan, np.float32))
    (folder / "attention" / "d.h5").write_bytes(b"no")
    _attention(folder / "attention" / "e.h5", "e", coords=COORDS * 0)
    assert main(["heatmap", str(folder / "attention"), "--out", str(folder / "out")]) == 3
    said = capsys.readouterr().err
    assert "warning: c: " in said and "no tile has a finite value" in said and "warning: d: cannot read" in said and "3 of 5" in said
    assert "e: its features carry no coordinates" in said and not (folder / "out" / "e.png").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["{folder}/none.h5", "--out", "{folder}/o"], "none.h5 is not there"),
    (["{folder}/slides", "--out", "{folder}/o"], "holds no attention file"),
    (["{folder}/attention", "--out", "{folder}/o", "--class", "tumor"], "no class 'tumor'; the classes are normal, tumour"),
    (["{folder}/attention", "--out", "{folder}/o", "--colormap", "jets"], "no colour map 'jets'"),
    (["{folder}/attention", "--out", "{folder}/o", "--count", "-1"], "not a number of tiles"),
    (["{folder}/attention", "--out", "{folder}/o", "--slide-mpp", "0.5"], "belong to --slides"),
    (["{folder}/attention", "--out", "{folder}/o", "--tiles", "{folder}/slides"], "no manifest.csv"),
    (["{folder}/attention/a.h5", "{folder}/copy/a.h5", "--out", "{folder}/o"], "would both be drawn as a"),
])  # fmt: skip
def test_bad_input_is_said(folder, capsys, flags, message):
    _attention(folder / "copy" / "a.h5", "a")
    assert main(["heatmap", *(flag.format(folder=folder) for flag in flags)]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
