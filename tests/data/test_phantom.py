"""Phantoms: the same bytes for a seed, truth that agrees with the picture, textures that differ between classes."""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import openslide
import pytest
import pywt

from wavepath.commands import phantom as command
from wavepath.data.phantom import make_phantoms, slide_label, strips
from wavepath.data.phantom_noise import CELL, PAD, hex_lattice, lattice_randoms, upsample
from wavepath.data.phantom_plan import make_plan
from wavepath.data.phantom_regions import ARTEFACTS, TISSUE_CLASSES, class_masks, outlines
from wavepath.data.phantom_tissue import make_tools, render_block
from wavepath.errors import WavepathError
from wavepath.interop.geojson import read_regions

SIZE = 1024


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "with space é"
    make_phantoms(out, 2, seed=3, size=SIZE, progress=False)
    return out


@pytest.fixture(scope="module")
def plan():
    return make_plan(0, 0, 4096, 0.25, tumour=True)


@pytest.fixture(scope="module")
def tools(plan):
    return make_tools(plan)


def test_a_set_goes_by_its_name(phantoms, tmp_path):
    make_phantoms(tmp_path, 1, seed=3, size=SIZE, progress=False, name="other-1")
    assert (tmp_path / "other-1_000.tiff").read_bytes() == (phantoms / "phantom_000.tiff").read_bytes()
    assert (tmp_path / "regions" / "other-1_000.geojson").is_file()
    assert (tmp_path / "labels.csv").read_text().splitlines()[1] == "case_000,other-1_000,tumour"
    with pytest.raises(WavepathError, match="--name letters"):
        make_phantoms(tmp_path, 1, seed=3, size=SIZE, name="a/b")


def deepest(plan, name: str, other: str | None = None) -> tuple[int, int]:
    """The corner of a 256-px block about the deepest place of a class (away from the field `other`)."""
    field = plan.fields[name].copy()
    if other:
        field = np.minimum(field, -plan.fields[other])
    for artefact in ARTEFACTS:
        if name != artefact:
            field[plan.fields[artefact] > -50] = -1e3
    field[: PAD + 10], field[-PAD - 10 :], field[:, : PAD + 10], field[:, -PAD - 10 :] = -1e3, -1e3, -1e3, -1e3
    iy, ix = np.unravel_index(np.argmax(field), field.shape)
    return (int(iy) - PAD - 8) * CELL, (int(ix) - PAD - 8) * CELL


def energy(rgb: np.ndarray) -> float:
    """db4 detail energy of the luminance at an eighth of the resolution."""
    light = rgb.astype(np.float64) @ [0.2126, 0.7152, 0.0722] / 255
    light = light.reshape(light.shape[0] // 8, 8, light.shape[1] // 8, 8).mean(axis=(1, 3))
    return float(sum(np.mean(band**2) for band in pywt.dwt2(light, "db4", mode="symmetric")[1]))


def test_slides_are_whole_pyramids_at_the_right_mpp(phantoms):
    for number in range(2):
        with openslide.OpenSlide(phantoms / f"phantom_{number:03d}.tiff") as slide:
            assert slide.level_dimensions == ((SIZE, SIZE), (SIZE // 2, SIZE // 2))
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)


def test_labels_alternate_and_cases_hold_several_slides(phantoms):
    with open(phantoms / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == ["phantom_000", "phantom_001"]
    assert [row["label"] for row in rows] == ["tumour", "normal"]
    table = [slide_label(number) for number in range(8)]
    assert [label for _, label in table].count("tumour") == 4
    cases = [case for case, _ in table]
    assert len(set(cases)) < 8 and len(set(table)) == len(set(cases)), "slides of a case share its label"


def test_regions_lie_in_the_slide_and_agree_with_the_picture(phantoms):
    for number in range(2):
        regions = read_regions(phantoms / "regions" / f"phantom_{number:03d}.geojson")
        area = {name: sum(shape.area for key, shape in regions if key == name) for name, _ in regions}
        large = [name for name in TISSUE_CLASSES if area.get(name, 0) > 0.04 * SIZE**2]
        assert len(large) >= 2, area
        assert ("tumour" in area) == (number == 0)
        assert all(shape.is_valid and shape.bounds[0] >= 0 and shape.bounds[3] <= SIZE for _, shape in regions)
        with openslide.OpenSlide(phantoms / f"phantom_{number:03d}.tiff") as slide:
            rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        plan = make_plan(3, number, SIZE, 0.25, tumour=number == 0)
        tissue = np.logical_or.reduce(list(class_masks(plan).values())).repeat(CELL, 0).repeat(CELL, 1)
        assert rgb[~tissue].mean() > 235 > 215 > rgb[tissue].mean()


def test_bytes_repeat_in_another_process(phantoms, tmp_path):
    code = (
        "import sys; from wavepath.data.phantom import make_phantoms;"
        "make_phantoms(sys.argv[1], 1, 3, 1024, progress=False)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")], check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""}
    )
    for name in ("phantom_000.tiff", "regions/phantom_000.geojson"):
        assert (tmp_path / "again" / name).read_bytes() == (phantoms / name).read_bytes()


def test_pixels_do_not_depend_on_strips_and_threads():
    plan = make_plan(5, 1, 600, 0.5, tumour=False)
    whole = np.concatenate(list(strips(plan, threads=2)))
    parts = list(strips(plan, threads=1, rows=37))
    assert whole.shape == (600, 600, 3) and {len(part) for part in parts[:-1]} == {37}
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_another_seed_or_number_gives_another_slide():
    pictures = [
        np.concatenate(list(strips(make_plan(*seeds, 512, 0.5, tumour=True)))) for seeds in ((0, 0), (1, 0), (0, 2))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pictures[a].astype(int) - pictures[b]).mean() > 5


@pytest.mark.parametrize("name", ["nest", "gland", "lymph", "fat", "vessel", "tissue", *ARTEFACTS])
def test_blocks_fit_together_to_the_bit(plan, tools, name):
    # The edge of each structure is where a block could see something that its neighbour does not.
    field = np.abs(plan.fields[name][PAD + 12 : -PAD - 12, PAD + 12 : -PAD - 12] + 3)
    iy, ix = np.unravel_index(np.argmin(field), field.shape)
    y, x = int(iy + 4) * CELL, int(ix + 4) * CELL
    whole = render_block(plan, tools, y, x, 256, 256)
    for dy in (0, 128):
        for dx in (0, 128):
            part = render_block(plan, tools, y + dy, x + dx, 128, 128)
            np.testing.assert_array_equal(part, whole[dy : dy + 128, dx : dx + 128])


def test_detail_energy_at_5x_tells_the_classes_apart(plan, tools):
    found = {}
    for name, other in (("nest", "lumen"), ("lymph", None), ("fat", None)):
        y, x = deepest(plan, name, other)
        found[name] = energy(render_block(plan, tools, y, x, 256, 256))
    glass = energy(render_block(plan, tools, 0, 0, 256, 256))
    assert found["lymph"] > 2 * found["nest"] > 2 * found["fat"] > 20 * glass > 0


def test_artefacts_do_what_they_are_called(plan, tools):
    def without(name: str):
        return dataclasses.replace(plan, fields=plan.fields | {name: np.full_like(plan.fields[name], -150)})

    for name in ARTEFACTS:
        y, x = deepest(plan, name)
        marked = render_block(plan, tools, y, x, 256, 256)
        clean = render_block(without(name), tools, y, x, 256, 256)
        inside = upsample(plan.fields[name], y, x, 256, 256) > 8
        assert inside.sum() > 500
        if name == "blur":
            assert energy(marked) < 0.5 * energy(clean)
        else:
            assert marked[inside].mean() < 0.8 * clean[inside].mean()


def test_small_slides_carry_no_artefacts_and_large_ones_all(phantoms, plan):
    names = {name for name, _ in read_regions(phantoms / "regions" / "phantom_000.geojson")}
    assert not names & set(ARTEFACTS)
    masks = class_masks(plan)
    assert all(0.002 < masks[name].mean() < 0.1 for name in ARTEFACTS)
    classes = np.stack([masks[name] for name in TISSUE_CLASSES])
    assert classes.sum(axis=0).max() == 1, "tissue classes do not overlap"
    assert all(0.005 < share < 0.7 for share in classes.mean(axis=(1, 2)))


def test_outlines_follow_a_mask_and_drop_what_is_small():
    mask = np.zeros((40, 50), bool)
    mask[5:25, 10:40] = True
    mask[10:18, 15:25] = False
    mask[20, 30] = False  # a hole too small to be drawn
    mask[35, 45] = True  # so is this speck
    (polygon,) = outlines(mask, 16, 3 * 16**2)
    assert len(polygon.interiors) == 1
    assert polygon.area == pytest.approx((20 * 30 - 8 * 10) * 16**2, rel=0.02)
    assert polygon.bounds == pytest.approx((160, 80, 640, 400), abs=4)
    assert outlines(np.zeros((4, 4), bool), 16, 1) == []


def test_upsampling_is_a_cubic_spline_of_the_grid():
    y, x = np.mgrid[-PAD : 20 + PAD, -PAD : 20 + PAD].astype(np.float32)
    plane = upsample(2 * y - 3 * x + 1, 32, 48, 64, 96)
    py, px = ((np.arange(start, start + n) + 0.5) / CELL - 0.5 for start, n in ((32, 64), (48, 96)))
    np.testing.assert_allclose(plane, 2 * py[:, None] - 3 * px[None] + 1, atol=1e-4)
    impulse = np.zeros((40, 40), np.float32)
    impulse[20, 20] = 1
    block = upsample(impulse, 0, 0, 160, 160)
    assert block.sum() == pytest.approx(CELL**2, rel=1e-5) and block.max() < 4 / 9


def test_lattice_randoms_are_uniform_and_local():
    iy, ix, y, x = hex_lattice(-50.0, 0.0, 400.0, 600.0, 5.0)
    draws = lattice_randoms(iy, ix, 17, 4)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=1) - 0.5).max() < 0.02 and np.abs(draws.var(axis=1) - 1 / 12).max() < 0.005
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.05
    some = (y > 100) & (x > 100)
    np.testing.assert_array_equal(lattice_randoms(iy[some], ix[some], 17, 4), draws[:, some])
    assert np.abs(lattice_randoms(iy, ix, 18, 4) - draws).mean() > 0.3


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_makes_slides(tmp_path, capsys):
    assert command.run(arguments("--out", str(tmp_path), "--slides", "1", "--size", "512", "--mpp", "0.5")) == 0
    assert json.loads((tmp_path / "regions" / "phantom_000.geojson").read_text())["features"]
    assert (tmp_path / "phantom_000.tiff").exists() and "512 x 512 px at 0.5 um" in capsys.readouterr().err
    defaults = arguments("--out", "x")
    assert (defaults.slides, defaults.seed, defaults.size, defaults.mpp, defaults.textures) == (None, 0, None, None, None)


@pytest.mark.parametrize(
    ("words", "fix"),
    [(("--slides", "0"), "--slides 1"), (("--size", "64"), "--size 512"), (("--mpp", "8"), "--mpp 0.25")],
)
def test_numbers_out_of_range_name_the_flag(tmp_path, words, fix):
    with pytest.raises(WavepathError, match=fix):
        command.run(arguments("--out", str(tmp_path), *words))


@pytest.mark.slow
def test_a_large_slide_is_cheap(tmp_path):
    # The peak is this process's own (VmHWM): ru_maxrss of a new process starts at the size of the one that started it.
    code = (
        "import resource, sys; from pathlib import Path; from wavepath.data.phantom import make_phantoms;"
        "make_phantoms(sys.argv[1], 1, 0, progress=False);"
        "use = resource.getrusage(resource.RUSAGE_SELF);"
        "print(use.ru_utime + use.ru_stime, Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    seconds, kilobytes = map(float, answer.split())
    assert seconds < 55 and kilobytes < 600_000
