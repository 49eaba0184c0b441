"""Staining runs on test pairs: what stands in the table, what is warned of, and the numbers themselves."""

import csv
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath import cli
from wavepath.config import load_config
from wavepath.data.pair_files import from_folders, with_patterns
from wavepath.data.pairs import make_pairs
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation import stain
from wavepath.evaluation.frechet import Features
from wavepath.evaluation.runs_table import correlation
from wavepath.evaluation.stain import evaluate_stain, known_slides, random_crop, read_rows, red_flags
from wavepath.evaluation.stain_metrics import NAMES, dab_positive
from wavepath.evaluation.stain_report import fitted, tinted
from wavepath.files import write_json
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder

BROWN = np.array([150, 100, 60])


class Pairs:
    """Pairs in memory, as a pairs dataset gives them: brown squares of several sizes on pale blue."""

    def __init__(self, name="pairs", count=4, size=(64, 80)):
        rng = np.random.default_rng(count)
        self.name, self.samples, self._images = name, [], []
        for number in range(count):
            he = np.clip(gaussian_filter(rng.normal(size=(*size, 3)), (1, 1, 0)) * 150 + 180, 0, 255).astype(np.uint8)
            ihc = np.clip(gaussian_filter(rng.normal(size=(*size, 3)), (2, 2, 0)) * 60 + [220, 225, 240], 0, 255).astype(np.uint8)
            ihc[: 8 + 12 * number, :40] = BROWN + rng.integers(0, 10, 3)
            self._images.append({"he": he, "ihc": ihc})
            facts = dict(name=f"p{number}", slide="aabc"[number % 4], label="2+", mpp=0.5, height=size[0], width=size[1])
            self.samples.append(facts | dict(dx=3, dy=4, sure=number != 1))

    def whole(self, index):
        return self._images[index]


@pytest.fixture
def pairs(monkeypatch):
    """Test pairs in memory, other ones to train on, and runs that turn the H&E darker by their seed."""
    tested, trained = Pairs(), Pairs("trained", 3, (32, 32))
    monkeypatch.setattr(stain, "open_test", lambda config, split="test": tested if split == "test" else trained)
    monkeypatch.setattr(stain, "parameters_of", lambda config: 12345)

    def load_stainer(run, *, batch, devices):
        seed = int(run.name.removeprefix("seed"))
        return SimpleNamespace(predict=lambda tiles: np.asarray(tiles, np.float32) / 255 * (0.9 - 0.2 * seed), name="ceff", step=5 + seed)

    monkeypatch.setattr(stain, "load_stainer", load_stainer)
    return tested


def make_run(folder, arg="", constants=None, data="data", **settings):
    config = load_config(f"configs/ceff.py:smoke{arg}")
    with config.unlocked():
        config.data.dir = str(data)
        config.stain.update(settings)
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write_configs(config, config, {})
    run.write_constants({"train_slides": ["z"], "encoders": {"train_slides": ["z"]}} if constants is None else constants)
    write_json(folder / "status.json", {"status": "done", "step": 5, "steps": 5, "seconds": 60.0, "images_per_second": 1.0})
    return folder


def test_a_table_of_two_baselines_and_a_run_of_two_seeds(pairs, tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path / "arm" / f"seed{seed}")
    assert cli.main(["evaluate", "--stain", str(tmp_path / "arm"), "--tile", "32", "--overlap", "8", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["probes"]
    (name,) = set(rows) - {"copy-input", "mean-colour"}
    run = rows[name]
    assert "random encoders" in name and run["steps"] == [5, 6] and run["seeds"] == 2
    assert [line[0] for line in results["table"][1]] == ["copy-input", "mean-colour", name] and "-" in results["table"][1][0]
    # By hand, with scikit-image's own calls.
    images = [pairs.whole(number) for number in range(4)]
    assert rows["copy-input"]["psnr"]["value"] == pytest.approx(np.mean([peak_signal_noise_ratio(x["ihc"], x["he"]) for x in images]), abs=1e-4)
    one = [structural_similarity(x["ihc"], x["he"], channel_axis=2, data_range=255) for x in images]
    assert rows["copy-input"]["ssim"]["value"] == pytest.approx(np.mean(one), abs=1e-4)
    colour = np.rint(np.mean([Pairs("trained", 3, (32, 32)).whole(k)["ihc"].reshape(-1, 3).mean(0) for k in range(3)], axis=0)).astype(np.uint8)
    assert results["mean_colour"]["rgb"] == colour.tolist() and "3 training pairs" in results["mean_colour"]["of"]
    flat = [peak_signal_noise_ratio(x["ihc"], np.broadcast_to(colour, x["ihc"].shape)) for x in images]
    assert rows["mean-colour"]["psnr"]["value"] == pytest.approx(np.mean(flat), abs=1e-4)
    darker = [[peak_signal_noise_ratio(x["ihc"], np.rint(x["he"] * factor).astype(np.uint8)) for x in images] for factor in (0.9, 0.7)]
    assert run["psnr"]["value"] == pytest.approx(np.mean(darker), abs=0.02)  # tiles are blended in float32
    assert run["psnr"]["sd"] == pytest.approx(np.std(np.mean(darker, axis=1), ddof=1), abs=0.02) and run["psnr"]["low"] < run["psnr"]["high"]
    assert run["psnr_gain"]["value"] == pytest.approx(run["psnr"]["value"] - rows["copy-input"]["psnr"]["value"], abs=1e-5)
    # What is positive.
    true = [dab_positive(x["ihc"]).mean() for x in images]
    assert results["positive_area"]["value"] == pytest.approx(np.mean(true), abs=1e-6) and rows["mean-colour"]["area_correlation"]["value"] is None
    copied = [dab_positive(x["he"]).mean() for x in images]
    assert rows["copy-input"]["area_correlation"]["value"] == pytest.approx(np.corrcoef(copied, true)[0, 1], abs=1e-5)
    assert rows["copy-input"]["dab_bias"]["value"] == pytest.approx(np.mean(copied) - np.mean(true), abs=1e-5)
    with open(tmp_path / "out" / "images.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 4 and {line["pair"] for line in lines} == {"p0", "p1", "p2", "p3"}
    by_run = np.mean([float(line["dab_error"]) for line in lines if line["method"] == name])
    assert run["dab_error"]["value"] == pytest.approx(by_run, abs=1e-5)
    assert results["registration"] == {"sure": 3, "unsure": 1, "mean_shift": 5.0, "max_shift": 5.0}
    assert results["pictured"] == {"3": "highest", "2": "upper quartile", "1": "median"}
    text = (tmp_path / "out" / "results.md").read_text()
    assert "tiles of 32 px that overlap by 8" in text and "shifted by 5 px in the mean" in text and "of 1 of 4 pairs the shift is not known" in text
    assert all(f"* {metric}: " in text for metric in NAMES) and "true immunostain" in text and "no features given" in text
    assert "positive area" in shown.out and "of 3 slides" in shown.err
    for picture in ("comparison.png", "scatter.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 2000


def test_one_random_crop_of_each_image_by_the_seed_alone(pairs, tmp_path, monkeypatch):
    seen = []

    def load_stainer(run, *, batch, devices):
        def predict(tiles):
            seen.extend(tiles)
            return np.asarray(tiles, np.float32) / 255

        return SimpleNamespace(predict=predict, name="ceff", step=5)

    monkeypatch.setattr(stain, "load_stainer", load_stainer)
    run = make_run(tmp_path / "seed0", crop=32)
    places = [random_crop((64, 80), 32, 7, number, {}) for number in range(4)]
    assert len({(y.start, x.start) for y, x in places}) == 4 and all(y.stop <= 64 and x.stop <= 80 for y, x in places)
    results = evaluate_stain([run], tmp_path / "out", protocol="crop", seed=7)
    assert len(seen) == 4 and all(np.array_equal(tile, pairs.whole(k)["he"][places[k]]) for k, tile in enumerate(seen))
    assert results["crop"] == 32 and "drawn from seed 7" in (tmp_path / "out" / "results.md").read_text()
    entries = results["probes"]
    assert entries["copy-input"]["psnr"] == entries["ceff (random encoders)"]["psnr"]  # the same crops, and this network changes nothing
    assert evaluate_stain([run], tmp_path / "out", protocol="crop", seed=8)["probes"]["copy-input"]["psnr"] != entries["copy-input"]["psnr"]
    other = make_run(tmp_path / "other" / "seed0", crop=128)
    with pytest.raises(ConfigError, match=r"the runs have several: 32 \(.*\), 128 \("):
        evaluate_stain([run, other], tmp_path / "out", protocol="crop")
    with pytest.raises(DatasetError, match="p0 has 80 x 64 px, and the crops 128"):
        evaluate_stain([other], tmp_path / "out", protocol="crop")


def test_the_true_image_is_never_given(pairs, tmp_path):
    run = make_run(tmp_path / "seed0")
    facts = {}
    paint = stain.Painter(run, facts, 32, 8, 4)
    he = pairs.whole(0)["he"]
    assert paint(he).shape == he.shape and np.abs(paint(he).astype(int) - np.rint(he * 0.9)).max() <= 1 and facts == {"steps": [5]}


def test_slides_that_a_run_or_its_encoders_have_seen_are_named(pairs, tmp_path):
    runs = [
        make_run(tmp_path / "fresh"), make_run(tmp_path / "seen", constants={"train_slides": ["a", "z"]}),
        make_run(tmp_path / "encoders", constants={"train_slides": ["z"], "encoders": {"train_slides": ["b", "c"]}}),
        make_run(tmp_path / "old", constants={}), make_run(tmp_path / "unknown", constants={"train_slides": ["z"], "encoders": {"step": 5}}),
    ]  # fmt: skip
    told = [known_slides(read_rows([run])[0], pairs) for run in runs]
    assert told[0] == [] and [len(each) for each in told[1:]] == [1, 1, 1, 1]
    assert "unknown's encoder pair does not record" in told[4][0]
    assert "seen was trained on 1 of the 3 test slides (a)" in told[1][0]
    assert "encoders's encoder pair was trained on 2 of the 3 test slides (b, c)" in told[2][0] and "does not record" in told[3][0]


def test_features_of_another_resolution_are_warned_of(pairs, tmp_path, monkeypatch, capsys):
    features = Features("mae", "mean colours", 3, "whole", lambda images: images.mean((1, 2)))
    features.mpp = 0.25
    monkeypatch.setattr(Features, "of_run", lambda run: features)
    results = evaluate_stain([make_run(tmp_path / "seed0")], tmp_path / "out", tile=32, overlap=8, max_images=2, features_of=tmp_path / "mae")
    assert sum("features of mae: trained at 0.25 um per px" in text for text in results["warnings"]) == 1
    assert "2 images have others (first: 0.5)" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_scored_is_one_line(pairs, tmp_path, monkeypatch):
    run, other = make_run(tmp_path / "seed0"), make_run(tmp_path / "seed1", data="elsewhere")
    with pytest.raises(ConfigError, match="trained from different data"):
        evaluate_stain([run, other], tmp_path / "out")
    for tile, overlap in ((36, None), (0, None), (32, 32)):  # before data are read
        with pytest.raises(ConfigError, match="--tile|overlap"):
            evaluate_stain([run], tmp_path / "out", tile=tile, overlap=overlap)
    encoders = make_run(tmp_path / "encoders")
    config = json.loads((encoders / "config.json").read_text())
    (encoders / "config.json").write_text(json.dumps({**config, "task": "stain_encoders"}))
    with pytest.raises(ConfigError, match="is a run of task 'stain_encoders'; --stain takes runs of configs/ceff.py"):
        evaluate_stain([encoders], tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="not at elsewhere.*--data"):
        evaluate_stain([other], tmp_path / "out")


def test_red_flags():
    def flags(psnr, area=0.2, true=0.2, groups=9):
        entries = {"copy-input": (0, 14.0, 0.1), "mean-colour": (0, 15.0, 0.0), "net": (1, psnr, area)}
        probes = {name: {"seeds": seeds, "psnr": {"value": p}, "dab_output": {"value": a}} for name, (seeds, p, a) in entries.items()}
        return red_flags({"groups": groups, "positive_area": {"value": true}, "probes": probes})

    assert flags(16.0) == []
    assert ["fewer" not in text and "of 2 slides" in text for text in flags(16.0, groups=2)] == [True]
    (text,) = flags(14.5)
    assert "no run has a higher PSNR than one colour everywhere (15.00 dB" in text
    assert len(flags(13.0)) == 2 and "not better than that of the H&E itself (14.00 dB)" in flags(13.0)[1]
    assert "net paints no DAB" in flags(16.0, area=0.001)[0] and "next to negative" in flags(16.0, 0.001, 0.005)[0]


def test_correlation_over_images():
    rng = np.random.default_rng(0)
    true, slides = rng.random(12), [f"s{k // 3}" for k in range(12)]
    runs = np.stack([true + 0.1 * rng.random(12), 1 - true])
    found = correlation(runs, true, slides, 0)
    assert found["value"] == pytest.approx((np.corrcoef(runs[0], true)[0, 1] - 1) / 2, abs=1e-6) and found["low"] <= found["value"] <= found["high"]
    assert correlation(np.zeros((1, 12)), true, slides, 0)["value"] is None and correlation(runs[:, :2], true[:2], slides[:2], 0)["value"] is None
    assert correlation(runs, true, ["s"] * 12, 0)["low"] is None


def test_pictures_show_what_is_positive():
    image = np.full((20, 30, 3), 230, np.uint8)
    image[5:15, 5:10] = BROWN
    painted = tinted(image)
    red = (painted == (170, 20, 60)).all(-1)
    assert red.sum() == 50 and red[5:15, 5:10].all() and painted[0, 0].min() > 240
    assert fitted(image).size == (360, 240) and fitted(np.zeros((1000, 500, 3), np.uint8)).size == (192, 384)


@pytest.mark.slow
def test_stored_pairs_and_a_checkpoint(tmp_path, capsys):
    """Nothing replaced: pairs as `wavepath pairs` stores them, a State of fresh networks, features of nothing."""
    given = Pairs(count=4, size=(96, 96))
    for number in range(4):
        for side, column in (("HE", "he"), ("IHC", "ihc")):
            (tmp_path / "raw" / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(given.whole(number)[column]).save(tmp_path / "raw" / side / f"s{number}_0.png")
    settings = prepare_defaults()
    settings.pairs.update(dict(test_share=0.5, min_size=32))
    folder = tmp_path / "pairs"
    make_pairs(with_patterns(from_folders(tmp_path / "raw"), "^([^_]+)_"), tmp_path / "raw", folder, settings, mpp=0.5)
    run = make_run(tmp_path / "run", ",method=random-encoders", {"train_slides": ["z"]}, data=folder, channels=4, blocks=4, encoder_channels=4)
    config = load_config("configs/ceff.py:smoke,method=random-encoders")
    with config.unlocked():
        config.data.dir, config.optim.warmup, config.optim.hold, config.train.steps = str(folder), "0", "3", 5
        config.stain.update(dict(channels=4, blocks=4, encoder_channels=4))
    RunFolder(run).write_configs(config, config, {})
    task = build(config)
    checkpoints = Checkpointer(run)
    checkpoints.save(5, jax.jit(task.init)(jax.random.key(0)).replace(step=np.int32(5)), {})
    checkpoints.close()
    assert cli.main(["evaluate", "--stain", str(run), "--out", str(tmp_path / "out"), "--max-images", "2"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["probes"]["ceff (random encoders)"]
    assert results["images"] == 2 and results["groups"] == 2 and entry["parameters"] > 1000 and entry["encoders"] == "random"
    assert results["tiles"] == {"ceff (random encoders)": [64, 32]} and np.isfinite(entry["psnr"]["value"])
    assert "tiles of 64 px that overlap by 32" in capsys.readouterr().err
