"""`wavepath superres`: a run, a slide, a TIFF that OpenSlide reads; and what it says to input that cannot be used."""

import json

import jax
import numpy as np
import openslide
import pytest
from PIL import Image
from slide_files import APERIO, picture, write_tiff

from wavepath.cli import main
from wavepath.config import load_config, save_json
from wavepath.data.slides import open_slide
from wavepath.errors import SlideError
from wavepath.inference.grid import Grid
from wavepath.inference.superres import bicubic, is_glass, load_network, view
from wavepath.inference.whole_slide import described, enlarge
from wavepath.interop.tiff import write_pyramid
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.durations import resolve
from wavepath.training.run_folder import RunFolder


def untrained(folder, *overrides, noise=0.0, **constants):
    """A run folder whose network has random weights; `noise` is added to those that begin at 0, too."""
    config = resolve(load_config("configs/cwt_net.py:scale=2,smoke", ["parallel.devices=1", *overrides]), 64)
    task = build(config)
    task.constants = {"mean": [0.7, 0.45, 0.65], **constants}
    save_json(config, folder / "config.json")
    RunFolder(folder).write_constants(task.constants)
    checkpoints, rng = Checkpointer(folder), np.random.default_rng(0)
    state = task.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: (leaf + noise * rng.normal(size=leaf.shape)).astype(leaf.dtype), state.params)
    checkpoints.save(3, state.replace(step=np.int32(3), params=params), {})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A slide of 100 x 80 px at 0.5 um with a corner of glass, the same without mpp, and a run; not to be changed."""
    folder = tmp_path_factory.mktemp("job")
    pixels = picture(80, 100)
    pixels[:48, :48] = 236
    write_tiff(folder / "slide.svs", pixels, levels=2, description=APERIO.format(w=100, h=80).replace("0.2500", "0.5000"))
    Image.fromarray(pixels).save(folder / "photo.png", dpi=(300, 300))
    untrained(folder / "run", "superres.network=srcnn", "superres.skip=none")
    (folder / "mae").mkdir()
    save_json(load_config("configs/wise_mae.py:smoke"), folder / "mae" / "config.json")
    return folder


def superres(job, slide, out, *more):
    return ["superres", str(job / slide), f"--checkpoint={job / 'run'}", f"--out={out}", "--tile=32", "--overlap=8", "--batch-size=4", *more]


def test_a_slide_becomes_a_slide_of_twice_the_size(job, tmp_path, capfd):
    out = tmp_path / "out.tiff"
    assert main(superres(job, "slide.svs", out, "--scale=2", "--quality=100")) == 0
    said = capfd.readouterr().err
    assert "srcnn 2x" in said and "at step 3" in said and "200 x 160 px" in said and "0.25" in said and "of bare glass" in said
    with openslide.OpenSlide(out) as slide:
        assert slide.dimensions == (200, 160) and float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        read = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
    with open_slide(job / "slide.svs") as slide:
        given = slide.read_level(0, 0, 0, 100, 80)
    want = enlarge(load_network(job / "run", batch=4).predict, given, 2, tile=32, overlap=8, batch=4)
    write_pyramid(tmp_path / "want.tiff", want, 0.25, quality=100)
    with open_slide(tmp_path / "want.tiff") as slide:
        want = slide.read_level(0, 0, 0, 200, 160).astype(int)
    np.testing.assert_array_equal(read[64:, 64:], want[64:, 64:])  # away from the one tile of glass
    assert np.abs(read[:40, :40] - bicubic(given, 2)[:40, :40]).max() <= 2 < np.abs(want[:40, :40] - bicubic(given, 2)[:40, :40]).mean()
    before = out.read_bytes()
    assert main(superres(job, "slide.svs", out, "--quality=100")) == 0 and out.read_bytes() == before
    assert "nothing to do" in capfd.readouterr().err
    assert main(superres(job, "slide.svs", out, "--no-skip")) == 1 and "--overwrite" in capfd.readouterr().err
    assert main(superres(job, "slide.svs", out, "--no-skip", "--overwrite")) == 0 and out.read_bytes() != before


def test_an_image_without_a_trustworthy_mpp_stays_without(job, tmp_path, capfd):
    assert main(superres(job, "photo.png", tmp_path / "out.tiff")) == 0
    said = capfd.readouterr().err
    assert "300 dpi, a screen or print resolution" in said and "carries no mpp" in said and "none (the input has none)" in said
    with openslide.OpenSlide(tmp_path / "out.tiff") as slide:
        assert slide.dimensions == (200, 160) and "openslide.mpp-x" not in slide.properties
    with open_slide(tmp_path / "out.tiff") as slide:
        assert slide.mpp is None
    assert main(superres(job, "photo.png", tmp_path / "given.tiff", "--slide-mpp=0.8", "--devices=2")) == 0
    with open_slide(tmp_path / "given.tiff") as slide, open_slide(tmp_path / "out.tiff") as other:
        assert slide.mpp == pytest.approx(0.4)
        # Two devices give the same: the last bits may differ, and with them a rounding here and there.
        assert np.abs(slide.read_level(0, 0, 0, 200, 160).astype(int) - other.read_level(0, 0, 0, 200, 160)).mean() < 0.1


def test_a_region_at_another_mpp(job, tmp_path):
    assert main(superres(job, "slide.svs", tmp_path / "out.tiff", "--mpp=1.0", "--region=20,40,60,40")) == 0
    with open_slide(tmp_path / "out.tiff") as slide:
        assert slide.dimensions == (60, 40) and slide.mpp == pytest.approx(0.5)
    facts = json.loads(described(tmp_path / "out.tiff").removeprefix("wavepath superres "))
    assert facts["area"] == {"x": 10, "y": 20, "width": 30, "height": 20, "level": 1, "step": 2.0, "mpp": 1.0}
    assert (facts["network"], facts["step"], facts["slide"]) == ("srcnn", 3, "slide.svs")


def test_a_view_gives_the_pixels_of_its_grid(job):
    with open_slide(job / "slide.svs") as slide:
        pixels, area = view(slide, None, (7, 9, 50, 40))
        np.testing.assert_array_equal(pixels.read(3, 4, 20, 10), slide.read_level(0, 10, 13, 20, 10))
        assert (pixels.width, pixels.height, pixels.mpp) == (50, 40, 0.5) == (area["width"], area["height"], area["mpp"])
        pixels, _ = view(slide, 1.0)
        np.testing.assert_array_equal(pixels.read(0, 0, 50, 40), slide.read_level(1, 0, 0, 50, 40))
        pixels, _ = view(slide, 0.7)  # between the levels: resampled on one grid, so pieces agree with the whole
        whole = slide.read(0, 0, pixels.width, pixels.height, 0.7)
        assert (pixels.width, pixels.height) == (71, 57)
        for x, y in ((0, 0), (13, 5), (31, 29), (58, 45)):
            np.testing.assert_array_equal(pixels.read(x, y, 12, 11), whole[y : y + 11, x : x + 12])
        with pytest.raises(SlideError, match="coarser than the 0.2"):
            view(slide, 0.2)


def test_glass_is_told_from_the_palest_tissue():
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal((238, 236, 240), 3, (64, 64, 3)), 0, 255).astype(np.uint8)
    assert is_glass(glass)
    pale = glass.copy()
    pale[20:28, 20:28] = (225, 190, 215)  # a wisp of eosin
    assert not is_glass(pale)
    grey = glass.copy()
    grey[40:48, 10:18] = 200  # dust, or counterstain without colour
    assert not is_glass(grey)
    assert not is_glass(picture(64, 64)) and not is_glass(np.full((64, 64, 3), (240, 215, 235), np.uint8))


def test_what_cannot_be_done_is_one_line(job, tmp_path, capfd):
    whole = (job / "slide.svs").read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
    out = f"--out={tmp_path / 'out.tiff'}"
    (tmp_path / "file").touch()
    run, slide = f"--checkpoint={job / 'run'}", str(job / "slide.svs")
    for argv, *words in (
        (["missing.svs", run, out], "cannot open missing.svs"),
        ([str(tmp_path / "cut.svs"), run, out], "cut.svs", "copy it again"),
        ([str(job), run, out], "is a folder; one call enlarges one slide"),
        ([slide, f"--checkpoint={tmp_path}", out], "no run folder", "--workdir"),
        ([slide, f"--checkpoint={job / 'mae'}", out], "a run of task 'mae', not superres"),
        ([slide, run, out, "--scale=4"], "--scale 4", "trained for 2"),
        ([slide, run, out, "--region=90,0,20,20"], "not within", "100 x 80"),
        ([slide, run, out, "--region=9,0,20"], "x,y,width,height"),
        ([slide, run, f"--out={tmp_path / 'file' / 'out.tiff'}"], "cannot write to", "choose another folder"),
        ([slide, run, f"--out={tmp_path / 'out.png'}"], "end in .tiff"),
        ([str(job / "photo.png"), run, out, "--mpp=1.0"], "no trustworthy pixel size", "--slide-mpp"),
        ([slide, run, out, "--mpp=0.25"], "coarser than the 0.25"),
        ([slide, run, out, "--tile=16", "--overlap=16"], "less than the tile's 16"),
        ([slide, run, out, "--tile=-4"], "at least one pixel, got -4"),
        ([slide, run, out, "--step=4"], "step 4"),
        ([slide, run, out, "--batch-size=3", "--devices=2"], "does not divide over 2 devices"),
    ):
        capfd.readouterr()
        assert main(["superres", *argv]) == 1, argv
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith("wavepath: error: ") and all(word in said[-1] for word in words), (argv, said)
        assert not (tmp_path / "out.tiff").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.svs", "file"]


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_the_slide_itself_is_never_written_over(job, tmp_path, capfd, link):
    slide = tmp_path / "slide.tiff"
    slide.write_bytes(whole := (job / "slide.svs").read_bytes())
    out = tmp_path / "link.tiff" if link else slide
    if link:
        getattr(out, link)(slide)
    assert main(["superres", str(slide), f"--checkpoint={job / 'run'}", f"--out={out}", "--overwrite"]) == 1
    assert "is the slide itself; choose another name" in capfd.readouterr().err
    assert slide.read_bytes() == whole and not list(tmp_path.glob("*.parts"))


def test_tiles_are_those_of_the_training_and_another_resolution_is_said(job, tmp_path, capfd):
    run = untrained(tmp_path / "run", "superres.network=srcnn", "superres.patch=36", mpp=1.0)
    command = ["superres", str(job / "slide.svs"), f"--checkpoint={run}", "--step=3", "--region=0,0,100,60"]
    assert main([*command, f"--out={tmp_path / 'fine.tiff'}"]) == 0
    assert "trained on 1 um, the slide is read at 0.5; --mpp 1 reads it as trained" in " ".join(capfd.readouterr().err.split())
    facts = json.loads(described(tmp_path / "fine.tiff").removeprefix("wavepath superres "))
    assert (facts["tile"], facts["overlap"], facts["context"]) == (36, 9, 2)
    assert main([*command, f"--out={tmp_path / 'as_trained.tiff'}", "--mpp=1"]) == 0
    assert main([*command, f"--out={tmp_path / 'coarse.tiff'}", "--slide-mpp=1.2"]) == 0  # within a quarter
    assert "trained on" not in capfd.readouterr().err
    assert main([*command, f"--out={tmp_path / 'coarser.tiff'}", "--slide-mpp=1.3"]) == 0
    assert "it has no finer level" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_the_whole_real_slide_as_it_is_read_back(shared_data, tmp_path, seams):
    """All 2220 x 2967 px: sizes and mpp of every level, and no seams in the pixels that come out of the file's JPEG.

    Tiles begin every 100 px of the output, the control's every 182: at many phases of the JPEG's own 8 and 16 px, which both files share.
    """
    run = untrained(tmp_path / "run", "superres.network=srcnn", "superres.skip=bicubic", "superres.srcnn.channels=(6,4)", noise=0.1)
    slide = shared_data / "slides" / "CMU-1-Small-Region.svs"

    def made(tile, overlap):
        out = tmp_path / f"{tile}.tiff"
        options = [f"--tile={tile}", f"--overlap={overlap}", "--no-skip", "--quality=95", f"--out={out}"]
        assert main(["superres", str(slide), f"--checkpoint={run}", *options]) == 0
        with openslide.OpenSlide(out) as opened:
            assert opened.level_dimensions[0] == (4440, 5934) and opened.level_count >= 4
            own = float(opened.properties["openslide.mpp-x"])
            assert own == pytest.approx(0.499 / 2) == pytest.approx(float(opened.properties["openslide.mpp-y"]))
            levels = [np.asarray(opened.read_region((0, 0), n, size).convert("RGB")) for n, size in enumerate(opened.level_dimensions)]
        with open_slide(out) as opened:
            assert [opened.level_mpp(n) for n in range(len(levels))] == pytest.approx([own * 2**n for n in range(len(levels))], rel=2e-3)
        for fine, coarse in zip(levels, levels[1:], strict=False):
            height, width = (side // 2 for side in fine.shape[:2])
            half = fine[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3), dtype=np.float32)
            assert abs(coarse.shape[0] - height) <= 1 >= abs(coarse.shape[1] - width)
            # Tiles side by side are made to be seen as such below, not as a picture.
            assert np.abs(half - coarse[:height, :width]).mean() < (3 if overlap else 6)
        return levels[0], Grid(2967, 2220, tile, overlap, overlap // 4, 2)

    control = made(107, 16)
    ratio, z = seams(*made(66, 16), *control)
    assert abs(ratio - 1) < 0.02 and abs(z) < 3
    ratio, z = seams(*made(53, 0), *control)  # side by side: the same statistic sees them in the same file format
    assert abs(ratio - 1) > 0.05 and abs(z) > 6


@pytest.mark.slow
def test_the_real_slide_opens_in_openslide_and_has_no_seams(shared_data, tmp_path, seams):
    """CWT-Net with random weights: harder than trained ones, since nothing has taught it to be alike in two tiles."""
    run = untrained(tmp_path / "run", "superres.skip=none")
    slide, out = shared_data / "slides" / "CMU-1-Small-Region.svs", tmp_path / "out.tiff"
    command = ["superres", str(slide), f"--checkpoint={run}", "--tile=32", "--overlap=8", f"--out={out}"]
    assert main([*command, "--region=900,1500,400,300"]) == 0
    with openslide.OpenSlide(out) as made:
        assert made.level_dimensions == ((800, 600), (400, 300))
        assert float(made.properties["openslide.mpp-x"]) == pytest.approx(0.499 / 2)
        levels = [np.asarray(made.read_region((0, 0), n, size).convert("RGB")) for n, size in enumerate(made.level_dimensions)]
    for fine, coarse in zip(levels, levels[1:], strict=False):
        half = fine.reshape(coarse.shape[0], 2, coarse.shape[1], 2, 3).mean(axis=(1, 3))
        assert np.abs(half - coarse).mean() < 3
    with open_slide(slide) as opened:
        given = opened.read_level(0, 900, 1500, 300, 300)
    network = load_network(run)

    def made(tile, overlap, context):
        return enlarge(network.predict, given, 2, tile=tile, overlap=overlap, context=context), Grid(300, 300, tile, overlap, context, 2)

    control = made(48, 26, 6)
    ratio, z = seams(*made(32, 8, 2), *control)
    assert abs(ratio - 1) < 0.02 and abs(z) < 3
    ratio, z = seams(*made(32, 0, 0), *control)  # side by side: the same statistic sees them
    assert abs(ratio - 1) > 0.1 and abs(z) > 6
