"""Super-resolution runs on test crops: what each mode may see, what is one row, and the numbers themselves."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath import cli
from wavepath.config import load_config, load_json
from wavepath.data import pyramid_source
from wavepath.data.pyramid_images import make_image_pyramids
from wavepath.data.pyramid_source import open_pyramids
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.superres import Enlarger, evaluate_superres, known_slides, read_rows, red_flags
from wavepath.evaluation.superres_report import busiest
from wavepath.files import write_json
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder, identity_of


class Crops:
    """Three crops of two slides in memory, as a pyramids dataset gives them."""

    def __init__(self, scale=2):
        rng = np.random.default_rng(0)
        self.samples = [dict(slide=name, x=10 * number, y=0, mpp=0.25, label="") for number, name in enumerate("aab")]
        self._images = []
        for number in range(3):
            hr = gaussian_filter(rng.normal(size=(64, 48, 3)), (1, 1, 0)) * (200 + 100 * number) + 128
            hr = np.clip(hr, 0, 255).astype(np.uint8)
            small = [np.asarray(Image.fromarray(hr).resize((48 // k, 64 // k), Image.Resampling.BICUBIC)) for k in (scale, scale // 2)]
            self._images.append({"hr": hr, "lr": small[0], **({"next": small[1]} if scale > 2 else {})})

    def whole(self, index):
        return self._images[index]


@pytest.fixture
def crops(monkeypatch, tmp_path):
    source = Crops()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(pyramid_source, "open_pyramids", lambda config, split: source)
    return source


def make_run(folder, data, network="srcnn", seed=0, **settings):
    """A run folder with a checkpoint of random parameters (fresh ones may begin as plain enlargement)."""
    config = load_config(f"configs/cwt_net.py:smoke,network={network}")
    with config.unlocked():
        config.seed, config.data.dir, config.data.order = seed, str(data), "global"
        config.optim.warmup, config.optim.halve_every = "0", "5"
        config.superres.srcnn.kernels, config.superres.srcnn.channels = (3, 1, 3), (4, 4)
        config.superres.channels, config.superres.blocks, config.superres.patch = 8, 1, 12
        config.superres.update(settings)
    task = build(config)
    task.constants = {"mean": [0.5, 0.5, 0.5], "train_slides": ["c"]}
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write_configs(config, config, {})
    run.write_constants(task.constants)
    checkpoints = Checkpointer(folder)
    state = jax.jit(task.init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: (leaf + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), state.params)
    checkpoints.save(5, state.replace(step=state.step + 5, params=params), {})
    checkpoints.close()
    write_json(folder / "status.json", {"status": "done", "step": 5, "steps": 5, "seconds": 60.0, "images_per_second": 1.0})
    return folder


def test_a_table_of_bicubic_a_baseline_of_two_seeds_and_both_modes(crops, tmp_path, capsys):
    data = tmp_path / "data"
    runs = [make_run(tmp_path / "runs" / name, data, seed=seed) for name, seed in (("s0", 0), ("s1", 1))]
    runs.append(make_run(tmp_path / "runs" / "cwt", data, "cwt-net"))
    flags = ["--tile", "16", "--overlap", "8", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", "--superres", *map(str, runs), *flags]) == 0
    shown = capsys.readouterr()
    assert "over bicubic" in shown.out and "weights not given" in shown.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["probes"]
    assert list(rows) == ["bicubic", "cwt-net", "cwt-net (ref)", "srcnn"] and rows["srcnn"]["seeds"] == 2 and rows["srcnn"]["steps"] == [5, 5]
    # The plain enlargement by hand, with scikit-image's own calls.
    pairs = [(np.asarray(Image.fromarray(images["lr"]).resize((48, 64), Image.Resampling.BICUBIC)), images["hr"]) for images in crops._images]
    options = dict(channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert rows["bicubic"]["psnr"]["value"] == pytest.approx(np.mean([peak_signal_noise_ratio(b, a) for a, b in pairs]), abs=1e-4)
    assert rows["bicubic"]["ssim"]["value"] == pytest.approx(np.mean([structural_similarity(a, b, **options) for a, b in pairs]), abs=1e-4)
    # Each row is the mean of its lines; the seeds' deviation is that of their means; the gain is over bicubic.
    with open(tmp_path / "out" / "images.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * (1 + 2 + 2) and {line["mode"] for line in lines if line["method"] == "srcnn"} == {"wr"}
    by_run = [np.mean([float(line["psnr"]) for line in lines if line["run"] == str(run)]) for run in runs[:2]]
    srcnn = rows["srcnn"]
    assert srcnn["psnr"]["value"] == pytest.approx(np.mean(by_run), abs=1e-5)
    assert 0 < srcnn["psnr"]["sd"] == pytest.approx(np.std(by_run, ddof=1), abs=1e-5)
    assert srcnn["psnr_gain"]["value"] == pytest.approx(srcnn["psnr"]["value"] - rows["bicubic"]["psnr"]["value"], abs=1e-5)
    assert srcnn["psnr_gain"]["low"] <= srcnn["psnr_gain"]["value"] <= srcnn["psnr_gain"]["high"]
    gain = srcnn["ssim_gain"]
    assert gain["value"] == pytest.approx(srcnn["ssim"]["value"] - rows["bicubic"]["ssim"]["value"], abs=1e-5) and gain["low"] <= gain["high"]
    assert f"{gain['value']:+.4f}" in shown.out and f"[{gain['low']:+.4f}, {gain['high']:+.4f}]" in shown.out
    # What the wavelet branch reads matters.
    before = {mode: [line["psnr"] for line in lines if line["method"].startswith("cwt-net") and line["mode"] == mode] for mode in ("wr", "ref")}
    assert before["wr"] != before["ref"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "2 px cut at each border" in text and "One seed" not in text and (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    assert [window["kind"] for window in results["windows"]] == ["highest", "median"]  # of three, the upper quartile is the highest too
    assert results["windows"][0]["image"] == 2


def test_what_cannot_be_scored_is_one_line(crops, tmp_path):
    one, other = (make_run(tmp_path / name, tmp_path / "data", scale=scale) for name, scale in (("a", 2), ("b", 4)))
    with pytest.raises(ConfigError, match=r"different config.superres.scale: 2 \(.*\), 4 \("):
        evaluate_superres([one, other], tmp_path / "out")
    for tile, overlap in ((7, 7), (-4, None)):  # before data are read
        with pytest.raises(ConfigError, match="at least"):
            evaluate_superres([one], tmp_path / "out", data=tmp_path / "moved", tile=tile, overlap=overlap)
    crops.samples.clear()
    with pytest.raises(DatasetError, match="no test samples"):
        evaluate_superres([one], tmp_path / "out")
    with pytest.raises(DatasetError, match="with --data"):
        evaluate_superres([one], tmp_path / "out", data=tmp_path / "moved")
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "task": "mae"}))
    with pytest.raises(ConfigError, match="is a run of task 'mae'"):
        evaluate_superres([one], tmp_path / "out")


def test_the_mode_wr_is_given_the_low_resolution_alone(crops, tmp_path):
    """Noise in place of everything else changes no pixel; the mode ref it changes."""
    run = make_run(tmp_path / "cwt", tmp_path / "data", "cwt-net")
    images = crops.whole(2)
    noise = {**images, "hr": np.random.default_rng(1).integers(0, 256, images["hr"].shape).astype(np.uint8)}
    for mode, same in (("wr", True), ("ref", False)):
        enlarged = Enlarger(run, mode, {}, 16, 8, 4)
        assert np.array_equal(enlarged(images), enlarged(noise)) == same


def test_red_flags():
    def flags(wr, ref, scale=2):
        entries = {"bicubic": ("", 34.0), "net": ("wr", wr), "net (ref)": ("ref", ref)}
        return red_flags({"scale": scale, "probes": {name: {"mode": mode, "psnr": {"value": value}} for name, (mode, value) in entries.items()}})

    assert flags(39.0, 44.0) == [] == flags(41.0, 44.0, scale=4) == flags(38.0, 38.06)
    assert len(flags(41.0, 44.0)) == 1 and "low resolution alone" in flags(41.0, 44.0)[0]
    assert "gains nothing (ref 38.04 dB, wr 38.00 dB)" in flags(38.0, 38.04)[0] and "no use of what it reads" in flags(38.0, 37.0)[0]


def test_training_slides_among_the_test_slides_are_named(tmp_path):
    """`wavepath pyramids` divides the run's own folder anew: what the run recorded counts, and not what lies there now."""
    images, folder = tmp_path / "images", tmp_path / "pyramids"
    images.mkdir()
    for number in range(4):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(images / f"i{number}.png")
    settings = prepare_defaults()
    settings.pyramids.update(dict(size=64, levels=2, min_tissue=0.0, min_size=32))
    make_image_pyramids(images, folder, settings)
    run = make_run(tmp_path / "run", folder, patch=12, margin=4)
    config = load_json(run / "config.json")
    trained, tested = open_pyramids(config, "train"), open_pyramids(config, "test")
    constants = {**build(config).measure(trained), "mean": [0.5, 0.5, 0.5]}
    assert constants["train_slides"] == sorted(trained.slides) and len(trained.slides) == 3
    rows, config = read_rows([run])
    for known in (constants, {"mean": [0.5, 0.5, 0.5]}):  # as it is recorded now; as older runs are
        write_json(run / "constants.json", known)
        write_json(run / "source.json", identity_of(trained))
        assert known_slides(rows, config, tested) == []
    settings.pyramids.test_share = 0.5
    make_image_pyramids(images, folder, settings)
    tested = open_pyramids(config, "test")
    (text,) = known_slides(rows, config, tested)
    assert "does not record its training slides" in text and "may be among them" in text
    write_json(run / "constants.json", constants)
    (text,) = known_slides(rows, config, tested)
    (moved,) = set(constants["train_slides"]) & set(tested.slides)
    assert f"trained on 1 of the 2 test slides ({moved})" in text
    results = evaluate_superres([run], tmp_path / "out", tile=16, overlap=8)
    assert results["warnings"][0] == text and text in (tmp_path / "out" / "results.md").read_text()


def test_a_network_that_never_read_a_reference_has_no_row_of_it(tmp_path):
    runs = {share: make_run(tmp_path / str(share), tmp_path, "cwt-net", wr_share=share) for share in (1.0, 0.5)}
    assert {share: [row.mode for row in read_rows([run])[0]] for share, run in runs.items()} == {1.0: ["", "wr"], 0.5: ["", "wr", "ref"]}


def test_the_window_lies_where_the_detail_is():
    hr = np.full((400, 600, 3), 200, np.uint8)
    hr[220:380, 300:560] = np.random.default_rng(0).integers(0, 256, (160, 260, 3))
    window = busiest(hr, 7, "highest", 2)
    assert (window.side, window.image) == (96, 7) and window.cut(hr, 2).shape == (192, 192, 3) and window.x in (144, 192) and window.y == 104
    assert busiest(hr[:40], 0, "median", 2).side == 20 and busiest(hr, 0, "median", 8).side == 48
