"""`wavepath stain`: a run, a slide, a TIFF that says what it is; where there is no tissue; and what it says to input that cannot be used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import openslide
import pytest
from PIL import Image
from slide_files import APERIO, picture, write_tiff

from wavepath.cli import main
from wavepath.config import load_config, save_json
from wavepath.data.slides import open_slide
from wavepath.data.tissue import TissueMap
from wavepath.errors import ConfigError
from wavepath.inference.grid import Grid
from wavepath.inference.stain import NOTICE, Stainer, _glass, fade, load_stainer, network_name, where_tissue_is
from wavepath.inference.whole_slide import Pixels, described, enlarge
from wavepath.interop.tiff import write_pyramid
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.durations import resolve
from wavepath.training.run_folder import RunFolder

PIX2PIX = ("stain.encoder=resnet", "stain.msfpm=False", "stain.coa=False", "stain.l1=fixed", "stain.blocks=1", "stain.channels=4")


def untrained(folder, *overrides, **constants):
    """A run folder whose networks have random weights (from NumPy: nothing is compiled), a discriminator and optimisers among them."""
    config = resolve(load_config("configs/ceff.py:smoke", ["parallel.devices=1", "stain.discriminator_channels=4", *overrides]), 64)
    task, rng = build(config), np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path[-1:])
        if "kernel" in name:
            return (2 * rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5).astype(leaf.dtype)  # so that the image gets through
        return np.full(leaf.shape, "scale" in name or "var" in name, leaf.dtype)

    state = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(task.init, jax.random.key(0)))
    save_json(config, folder / "config.json")
    RunFolder(folder).write_constants(constants)
    checkpoints = Checkpointer(folder)
    checkpoints.save(3, state.replace(step=np.int32(3)), {})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A slide of 200 x 160 px at 0.5 um with a corner of glass, the same without mpp, and runs; not to be changed."""
    folder = tmp_path_factory.mktemp("job")
    pixels = picture(160, 200)
    pixels[:80, :80] = (238, 236, 240)
    write_tiff(folder / "slide.svs", pixels, levels=2, description=APERIO.format(w=200, h=160).replace("0.2500", "0.5000"))
    Image.fromarray(pixels).save(folder / "photo.png", dpi=(300, 300))
    untrained(folder / "run", *PIX2PIX, mpp=0.5)
    (folder / "mae").mkdir()
    save_json(load_config("configs/wise_mae.py:smoke"), folder / "mae" / "config.json")
    return folder


def stain(job, slide, out, *more, run="run"):
    return ["stain", str(job / slide), f"--checkpoint={job / run}", f"--out={out}", "--tile=64", "--overlap=16", *more]


def facts_of(path):
    head, _, facts = described(path).partition(" wavepath stain ")
    assert head == NOTICE
    return json.loads(facts)


def test_a_slide_becomes_a_slide_that_says_what_it_is(job, tmp_path, capfd):
    out = tmp_path / "out.tiff"
    assert main(stain(job, "slide.svs", out, "--quality=100")) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "pix2pix of" in said and "at step 3" in said and "200 x 160 px" in said and "mpp 0.5" in said and "1 without tissue" in said
    with openslide.OpenSlide(out) as slide:
        assert slide.dimensions == (200, 160) and float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        for name in ("openslide.comment", "tiff.ImageDescription"):
            assert slide.properties[name].startswith("Virtual stain, not a laboratory stain") and "Not for diagnosis" in slide.properties[name]
        read = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
    facts = facts_of(out)
    assert facts["virtual_stain"] is True and (facts["network"], facts["step"], facts["slide"], facts["scale"]) == ("pix2pix", 3, "slide.svs", 1)
    assert facts["glass"] == [238, 236, 240] and len(facts["parameters"]) == 16
    with open_slide(job / "slide.svs") as slide:
        given = slide.read_level(0, 0, 0, 200, 160)
    want = enlarge(load_stainer(job / "run").predict, given, 1, tile=64, overlap=16, batch=4)
    write_pyramid(tmp_path / "want.tiff", want, 0.5, quality=100)
    with open_slide(tmp_path / "want.tiff") as slide:
        want = slide.read_level(0, 0, 0, 200, 160).astype(int)
    np.testing.assert_array_equal(read[64:, 64:], want[64:, 64:])  # away from the one tile of glass
    assert np.abs(read[:40, :40] - (238, 236, 240)).max() <= 1 < np.abs(want[:40, :40] - (238, 236, 240)).mean()
    before = out.read_bytes()
    assert main(stain(job, "slide.svs", out, "--quality=100", "--batch-size=2")) == 0 and out.read_bytes() == before
    assert "nothing to do" in capfd.readouterr().err
    assert main(stain(job, "slide.svs", out, "--all")) == 1 and "--overwrite" in capfd.readouterr().err
    assert main(stain(job, "slide.svs", out, "--all", "--overwrite")) == 0 and facts_of(out)["skipped"] == "nothing"


def test_an_image_without_a_trustworthy_mpp_stays_without(job, tmp_path, capfd):
    assert main(stain(job, "photo.png", tmp_path / "out.tiff")) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "300 dpi, a screen or print resolution" in said and "carries no mpp" in said and "trained on 0.5 um" in said and "--slide-mpp" in said
    with openslide.OpenSlide(tmp_path / "out.tiff") as slide:
        assert slide.dimensions == (200, 160) and "openslide.mpp-x" not in slide.properties
    with open_slide(tmp_path / "out.tiff") as slide:
        assert slide.mpp is None


def test_it_is_read_as_trained(job, tmp_path, capfd):
    run = untrained(tmp_path / "run", *PIX2PIX, mpp=1.0)
    command = ["stain", str(job / "slide.svs"), f"--checkpoint={run}", "--tile=64"]
    for name, size, mpp, *more in (("trained", (100, 80), 1.0), ("own", (200, 160), 0.5, "--mpp=own"), ("given", (71, 57), 1.4, "--mpp=1.4")):
        out = tmp_path / f"{name}.tiff"
        assert main([*command, f"--out={out}", *more]) == 0
        with open_slide(out) as slide:
            assert (slide.dimensions, slide.mpp) == (size, pytest.approx(mpp))
        warned = "--mpp 1 reads it as trained" in " ".join(capfd.readouterr().err.split())
        assert warned == (name != "trained")
    assert main([*command, f"--out={tmp_path / 'coarse.tiff'}", "--slide-mpp=1.3", "--region=0,0,100,64"]) == 0  # as fine as there is, and said
    assert "it has no finer level" in " ".join(capfd.readouterr().err.split())
    facts = facts_of(tmp_path / "coarse.tiff")
    assert facts["area"]["level"] == 0 and facts["mpp"] == 1.3 and (facts["tile"], facts["overlap"], facts["context"]) == (64, 32, 8)


def test_tiles_fit_the_network():
    stainer = Stainer(None, "ceff", 1, "", "", crop=100, grid=2, norm="batch")
    assert stainer.tiling() == (104, 52) and stainer.tiling(64) == (64, 32) and stainer.tiling(64, 8) == (64, 8)  # attention: half of it
    assert Stainer(None, "pix2pix", 1, "", "", crop=100, grid=1, norm="batch").tiling() == (100, 25)
    assert Stainer(None, "ceff", 1, "", "", crop=32, grid=1, norm="instance").tiling() == (64, 32)  # by the image: half of it
    with pytest.raises(ConfigError, match="multiple of 8 px; choose 96 or 104"):
        stainer.tiling(100)
    with pytest.raises(ConfigError, match="choose 8 or 16"):
        stainer.tiling(-5)


def test_names_of_what_was_trained():
    for method, name in (
        ("ceff", "ceff"), ("no-vmfe", "ceff (no VMFE)"), ("no-coa", "ceff (no CoA)"), ("fixed-l1", "ceff (fixed L1)"),
        ("random-encoders", "ceff (random encoders)"), ("pix2pix", "pix2pix"), ("pyramid", "pyramid pix2pix"),
    ):  # fmt: skip
        assert network_name(load_config(f"configs/ceff.py:method={method}")) == name
    for method, fields, name in (
        ("pix2pix", ["stain.l1=adaptive"], "pix2pix (adaptive L1)"), ("pix2pix", ["stain.l1=adaptive", "encoders=random"],
         "pix2pix (adaptive L1, random encoders)"), ("pix2pix", ["encoders=random"], "pix2pix"), ("pyramid", ["encoders=random"], "pyramid pix2pix"),
        ("no-coa", ["stain.l1=fixed", "encoders=random"], "ceff (no CoA, fixed L1)"),
        ("fixed-l1", ["encoders=random"], "ceff (fixed L1, random encoders)"),
    ):  # fmt: skip
        assert network_name(load_config(f"configs/ceff.py:method={method}", fields)) == name


def a_map(tissue):
    nothing = np.zeros_like(tissue)
    return TissueMap(tissue, nothing, nothing.copy(), nothing, 16.0, 8.0, True, "")


def test_what_lies_far_from_tissue_is_not_read():
    tissue = np.zeros((40, 50), bool)
    tissue[20, 30] = True  # level-0 px 480 to 496, 320 to 336
    asked = []
    image = Pixels(400, 320, lambda x, y, w, h: asked.append((x, y)) or np.zeros((h, w, 3), np.uint8), 1.0)
    seen = where_tissue_is(image, {"x": 0, "y": 0, "step": 2.0}, a_map(tissue))
    for x, read in ((280, False), (279, True), (190, True), (145, True), (144, False)):  # four cells, 32 px, around each tile
        assert (seen.read(x, 128, 64, 64).max() == 0) == read, x
    assert [x for x, _ in asked] == [279, 190, 145]
    region = where_tissue_is(image, {"x": 100, "y": 0, "step": 2.0}, a_map(tissue))
    assert region.read(190, 128, 64, 64).min() == 255 and region.read(90, 128, 64, 64).max() == 0


def test_the_stain_fades_round_the_tissue_in_pieces_as_in_one():
    tissue, rng = np.zeros((40, 50), bool), np.random.default_rng(0)
    tissue[10:20, 10:30] = True
    area = {"x": 20, "y": 40, "width": 600, "height": 500, "step": 1.0}
    rows = rng.integers(0, 200, (500, 600, 3), np.uint8)
    glass = np.array([240, 238, 242], np.uint8)
    whole = fade(area, a_map(tissue), glass)(rows.copy(), 0)
    y, x = (slice(10 * 16 - 40, 20 * 16 - 40), slice(10 * 16 - 20, 30 * 16 - 20))
    near = (slice(y.start - 8, y.stop + 8), slice(x.start - 8, x.stop + 8))
    np.testing.assert_array_equal(whole[near], rows[near])  # tissue, and half a cell round it
    np.testing.assert_array_equal(whole[: y.start - 64], np.broadcast_to(glass, rows.shape)[: y.start - 64])
    white = fade(area, a_map(tissue), glass)(np.zeros_like(rows), 0)[y.start - 80 : y.start, 250, 1].astype(int)
    assert white[0] == 238 and white[-1] == 0 and (np.diff(white) <= 0).all() and np.abs(np.diff(white)).max() < 20  # no step
    pieces = [fade(area, a_map(tissue), glass)(rows[a:b].copy(), a) for a, b in ((0, 7), (7, 300), (300, 301), (301, 500))]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_the_colour_of_glass():
    colours = np.array([[240, 238, 239]] * 5 + [[180, 90, 150]] * 9 + [[20, 120, 40]] * 9, np.uint8)
    assert _glass(colours).tolist() == [240, 238, 239] and _glass(colours[5:]).tolist() == [255, 255, 255]


def test_what_cannot_be_done_is_one_line(job, tmp_path, capfd):
    whole = (job / "slide.svs").read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
    out = f"--out={tmp_path / 'out.tiff'}"
    run, slide = f"--checkpoint={job / 'run'}", str(job / "slide.svs")
    for argv, *words in (
        (["missing.svs", run, out], "cannot open missing.svs"),
        ([str(tmp_path / "cut.svs"), run, out], "cut.svs", "copy it again"),
        ([str(job), run, out], "is a folder; one call stains one slide"),
        ([slide, f"--checkpoint={tmp_path}", out], "no run folder", "--workdir"),
        ([slide, f"--checkpoint={job / 'mae'}", out], "a run of task 'mae', not stain", "configs/ceff.py"),
        ([slide, run, out, "--region=190,0,20,20"], "not within", "200 x 160"),
        ([slide, run, f"--out={tmp_path / 'out.png'}"], "end in .tiff"),
        ([slide, run, f"--out={slide}"], "is the slide itself"),
        ([str(job / "photo.png"), run, out, "--mpp=1.0"], "no trustworthy pixel size", "--slide-mpp"),
        ([slide, run, out, "--mpp=0.25"], "coarser than the 0.25"),
        ([slide, run, out, "--mpp=trained"], "'trained' is not a positive number of micrometres per pixel"),
        ([slide, run, out, "--tile=66"], "a multiple of 4 px; choose 64 or 68"),
        ([slide, run, out, "--tile=64", "--overlap=64"], "less than the tile's 64"),
        ([slide, run, out, "--step=4"], "step 4"),
        ([slide, run, out, "--batch-size=3", "--devices=2"], "does not divide over 2 devices"),
    ):
        capfd.readouterr()
        assert main(["stain", *argv]) == 1, argv
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith("wavepath: error: ") and all(word in said[-1] for word in words), (argv, said)
        assert not (tmp_path / "out.tiff").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.svs"]
    shutil.copytree(job / "run", tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["stain", slide, f"--checkpoint={tmp_path / 'empty'}", out, "--tile=66"]) == 1  # ahead of any checkpoint
    assert "choose 64 or 68" in capfd.readouterr().err
    assert (job / "slide.svs").read_bytes() == whole


@pytest.mark.slow
def test_the_whole_network_with_its_frozen_encoder(job, tmp_path):
    """CEFF as `smoke` trains it: its encoder is in the checkpoint and in the digest, the discriminator and the other encoder are not needed."""
    run = untrained(tmp_path / "run", "stain.channels=4", "stain.encoder_channels=4", mpp=0.5)
    network = load_stainer(run, batch=2)
    assert (network.name, network.grid, network.crop, network.mpp) == ("ceff (random encoders)", 2, 64, 0.5)
    tiles = np.stack([picture(64, 64), picture(64, 64)[::-1]])
    given = np.asarray(network.predict(tiles))
    assert given.shape == (2, 64, 64, 3) and 0 <= given.min() < given.max() <= 1 and given.std() > 0.01
    out = tmp_path / "out.tiff"
    assert main(stain(job, "slide.svs", out, run=run)) == 0
    assert facts_of(out)["parameters"] == network.parameters


@pytest.mark.slow
def test_the_real_slide_killed_and_gone_on_with(shared_data, tmp_path, seams):
    """Half of the CMU region: every level and its mpp, glass where there is no tissue, no seams; a kill half-way changes no byte."""
    run, slide = untrained(tmp_path / "run", *PIX2PIX, "stain.norm=batch", mpp=0.5), shared_data / "slides" / "CMU-1-Small-Region.svs"
    command = ["stain", str(slide), f"--checkpoint={run}", "--region=0,0,2220,1500", "--quality=95"]
    assert main([*command, f"--out={tmp_path / 'out.tiff'}"]) == 0
    with openslide.OpenSlide(tmp_path / "out.tiff") as made:
        assert made.level_dimensions[0] == (2220, 1500) and made.level_count >= 3
        assert float(made.properties["openslide.mpp-x"]) == pytest.approx(0.499) == pytest.approx(float(made.properties["openslide.mpp-y"]))
        pixels = [np.asarray(made.read_region((0, 0), n, size).convert("RGB")).astype(int) for n, size in enumerate(made.level_dimensions)]
    with open_slide(tmp_path / "out.tiff") as made:
        assert [made.level_mpp(n) for n in range(len(pixels))] == pytest.approx([0.499 * 2**n for n in range(len(pixels))], rel=2e-3)
    glass = facts_of(tmp_path / "out.tiff")["glass"]
    assert all(np.abs(level[: len(level) // 8, : len(level) // 8] - glass).max() <= 2 for level in pixels)  # the speck of dirt there is gone
    tissue = pixels[0][900:1400, 900:1400]
    assert tissue.std() > 3 and np.abs(tissue - glass).mean() > 5

    killed = tmp_path / "killed.tiff"
    process = subprocess.Popen([sys.executable, "-m", "wavepath", *command, f"--out={killed}"], stderr=subprocess.DEVNULL)
    parts = killed.with_name("killed.tiff.parts")
    while not (len(list(parts.glob("band_*.part"))) >= 2 or process.poll() is not None):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert parts.is_dir() and not killed.exists()
    assert main([*command, f"--out={killed}"]) == 0
    assert killed.read_bytes() == (tmp_path / "out.tiff").read_bytes() and not parts.exists()
    shutil.rmtree(run)

    with open_slide(slide) as opened:
        given = opened.read_level(0, 900, 1000, 400, 400)
    stainer = load_stainer(untrained(tmp_path / "again", *PIX2PIX, "stain.norm=batch"))

    def made(tile, overlap, context):
        return enlarge(stainer.predict, given, 1, tile=tile, overlap=overlap, context=context), Grid(400, 400, tile, overlap, context, 1)

    control = made(88, 40, 8)  # multiples of 4, as the others: what a network of two steps down repeats every 4 px stays in its place
    ratio, z = seams(*made(64, 32, 8), *control)
    assert abs(ratio - 1) < 0.03 and abs(z) < 3
    ratio, z = seams(*made(64, 0, 0), *control)  # side by side: the same statistic sees them
    assert abs(ratio - 1) > 0.05 and abs(z) > 4
