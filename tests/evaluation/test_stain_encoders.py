"""Contrastive encoders on test windows: the sweep against brute force, where the threshold comes from, which non-pairs are which."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from wavepath import cli
from wavepath.config import load_config
from wavepath.data.pair_files import from_folders, with_patterns
from wavepath.data.pairs import make_pairs
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation import stain_encoders
from wavepath.evaluation.pair_sweep import THRESHOLDS, accuracy, auc, best, rates, sweep
from wavepath.evaluation.stain_encoders import evaluate_encoders, lay_windows, red_flags
from wavepath.files import write_json
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder


def embeddings(count, noise, seed=0, width=24):
    """Unit vectors, the second set the first with noise."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(count, width))
    second = first + noise * rng.normal(size=(count, width))
    return [(part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32) for part in (first, second)]


def test_the_sweep_is_what_counting_gives(monkeypatch):
    monkeypatch.setattr("wavepath.evaluation.pair_sweep._BLOCK", 7)  # several blocks, the last one shorter
    he, ihc = embeddings(40, 1.5)
    slides = np.array([f"s{k % 3}" for k in range(40)])
    found = sweep(he, ihc, slides, (0.3,))
    cosines = (he @ ihc.T).astype(np.float64)
    pair, same = np.eye(40, dtype=bool), (slides[:, None] == slides[None])
    assert found.pairs.sum() == 40 and found.same_slide.sum() == (same & ~pair).sum() and found.other_slides.sum() == (~same).sum()
    values = accuracy(found)
    for threshold in (-0.5, 0.1, 0.3, 0.44, 0.9):
        by_hand = ((cosines[pair] >= threshold).mean() + (cosines[~pair] < threshold).mean()) / 2
        assert values[np.searchsorted(THRESHOLDS, threshold - 1e-9)] == pytest.approx(by_hand, abs=1e-9)
    assert found.right[0.3].mean() == pytest.approx(values[np.searchsorted(THRESHOLDS, 0.3 - 1e-9)])
    assert found.right[0.3][5] == pytest.approx(((cosines[5, 5] >= 0.3) + np.delete(cosines[5] < 0.3, 5).mean()) / 2)
    for part, mask in ((found.others, ~pair), (found.same_slide, same & ~pair), (found.other_slides, ~same)):
        truth = np.r_[np.ones(40), np.zeros(mask.sum())]
        assert auc(found.pairs, part) == pytest.approx(roc_auc_score(truth, np.r_[cosines[pair], cosines[mask]]), abs=1e-4)
    np.testing.assert_array_equal(found.rank, [(np.delete(cosines[k], k) >= cosines[k, k]).sum() for k in range(40)])
    assert np.allclose(found.cosine, cosines[pair])


def test_the_best_threshold_lies_in_the_middle_of_equals():
    he, ihc = np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32)
    ihc[:, 0] += 0.2
    ihc /= np.linalg.norm(ihc, axis=1, keepdims=True)
    threshold, value = best(sweep(he, ihc, np.array(list("aabbcc"))))
    assert value == 1.0 and threshold == pytest.approx((1 / np.sqrt(1.04) + 0.2 / np.sqrt(1.04)) / 2, abs=2e-4)
    alike = sweep(np.tile(he[:1], (6, 1)), np.tile(he[:1], (6, 1)), np.array(list("aabbcc")))  # encoders that make all images one
    assert best(alike)[1] == 0.5 and auc(alike.pairs, alike.others) == 0.5 and alike.rank.min() == 5
    lone = sweep(he[:2], ihc[:2], np.array(["a", "b"]))
    assert np.isnan(auc(lone.pairs, lone.same_slide)) and np.isnan(rates(lone.pairs, lone.same_slide)[1]).all()
    with pytest.raises(DatasetError, match="not finite"):
        sweep(he * np.nan, ihc, np.array(list("aabbcc")))


class Pairs:
    """Facts of pairs; the windows hold their own place, which the fakes below embed."""

    name = "pairs"

    def __init__(self, split, slides="aabbc", size=(40, 56)):
        self.split = split
        self.samples = [dict(slide=slide, name=f"{slide}{k}", height=size[0], width=size[1]) for k, slide in enumerate(slides)]


def test_windows_lie_beside_one_another():
    source = Pairs("test")
    windows = lay_windows(source, 16, 0)
    assert len(windows.places) == 5 * 2 * 3 and windows.slides.tolist().count("a") == 12
    seen = np.zeros((5, 40, 56), int)
    for number, top, left in windows.places:
        seen[number, top : top + 16, left : left + 16] += 1
    assert seen.max() == 1
    few = lay_windows(source, 16, 4)
    assert len(few.places) == 4 and {tuple(place) for place in few.places} <= {tuple(place) for place in windows.places}
    with pytest.raises(DatasetError, match="1 windows of 40 px in its test pairs; two at least"):
        lay_windows(Pairs("test", "a"), 40, 0)


@pytest.fixture
def faked(monkeypatch):
    """Pairs of which only facts are known; encoders whose embeddings are better on training windows, worse with each seed."""
    monkeypatch.setattr(stain_encoders, "open_test", lambda config, split="test": Pairs(split, "aabbc" if split == "test" else "xyz"))

    class Embedder:
        def __init__(self, run, facts, batch):
            self._seed = int(run.name.removeprefix("seed"))
            facts.setdefault("steps", []).append(7)

        def __call__(self, source, windows):
            return embeddings(len(windows.places), 0.3 if source.split == "train" else 1.0 + self._seed, seed=self._seed)

    monkeypatch.setattr(stain_encoders, "Embedder", Embedder)


def make_run(folder, constants=None, data="data", **settings):
    config = load_config("configs/ceff_encoders.py:smoke")
    with config.unlocked():
        config.data.dir = str(data)
        config.stain.update(dict(crop=16) | settings)
        config.optim.warmup, config.optim.hold, config.train.steps = "0", "3", 5
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.write_configs(config, config, {})
    run.write_constants({"train_slides": ["x", "y", "z"]} if constants is None else constants)
    write_json(folder / "status.json", {"status": "done", "step": 5, "steps": 5, "seconds": 60.0, "images_per_second": 1.0})
    return config


def test_a_table_of_two_seeds(faked, tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path / "arm" / f"seed{seed}")
    assert cli.main(["evaluate", "--stain-encoders", str(tmp_path / "arm"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["probes"]["arm"]
    assert (results["windows"], results["images"], results["groups"], entry["seeds"]) == (30, 5, 3, 2)
    slides = np.repeat(list("aabbc"), 6)
    by_hand = {"accuracy": [], "accuracy_published": [], "accuracy_best": [], "top1": [], "auc_same_slide": []}
    for seed in (0, 1):
        trained = best(sweep(*embeddings(18, 0.3, seed), np.repeat(list("xyz"), 6)))[0]
        cosines = np.matmul(*[part if k == 0 else part.T for k, part in enumerate(embeddings(30, 1.0 + seed, seed))])
        pair = np.eye(30, dtype=bool)
        for name, threshold in (("accuracy", trained), ("accuracy_published", 0.44)):
            by_hand[name].append(((cosines[pair] >= threshold).mean() + (cosines[~pair] < threshold).mean()) / 2)
        by_hand["accuracy_best"].append(max(((cosines[pair] >= t).mean() + (cosines[~pair] < t).mean()) / 2 for t in THRESHOLDS[::10]))
        by_hand["top1"].append((cosines.argmax(1) == np.arange(30)).mean())
        same = (slides[:, None] == slides[None]) & ~pair
        by_hand["auc_same_slide"].append(roc_auc_score(np.r_[np.ones(30), np.zeros(same.sum())], np.r_[cosines[pair], cosines[same]]))
    for name, values in by_hand.items():
        assert entry[name]["value"] == pytest.approx(np.mean(values), abs=2e-3 if name == "accuracy_best" else 1e-4)
        assert entry[name]["sd"] == pytest.approx(np.std(values, ddof=1), abs=3e-3)
    assert entry["accuracy"]["value"] < entry["accuracy_best"]["value"] < entry["accuracy_training"]["value"] <= 1
    assert entry["accuracy"]["low"] <= entry["accuracy"]["value"] <= entry["accuracy"]["high"] and results["chance"]["top5"] == pytest.approx(5 / 30)
    with open(tmp_path / "out" / "curve.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 201
    at = [float(line["accuracy"]) for line in lines if line["split"] == "test" and line["threshold"] == "0.440000"]
    assert np.mean(at) == pytest.approx(entry["accuracy_published"]["value"], abs=1e-5)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "best on training windows" in text and "flatters" in text and "of 3 slides" in shown.err and "| chance |" in text
    assert (tmp_path / "out" / "encoders.png").stat().st_size > 5000


def test_what_is_warned_of_and_what_is_refused(faked, tmp_path, monkeypatch):
    make_run(tmp_path / "seed0", {"train_slides": ["a", "x"]})
    results = evaluate_encoders([tmp_path / "seed0"], tmp_path / "out")
    assert "was trained on 1 of the 3 test slides (a)" in results["warnings"][0]
    make_run(tmp_path / "seed1", crop=32)
    with pytest.raises(ConfigError, match="different config.stain.crop"):
        evaluate_encoders([tmp_path / "seed0", tmp_path / "seed1"], tmp_path / "out")

    def no_training(config, split="test"):
        if split == "train":
            raise DatasetError("the pairs have moved")
        return Pairs(split, "aaa")

    monkeypatch.setattr(stain_encoders, "open_test", no_training)
    results = evaluate_encoders([tmp_path / "seed0"], tmp_path / "out", max_images=10)
    (entry,) = results["probes"].values()
    assert "accuracy" not in entry and entry["accuracy_published"]["value"] > 0.5 and entry["auc_other_slides"]["value"] is None
    assert results["windows"] == 10 and any("one slide, so that all non-pairs" in text for text in results["warnings"])
    flat = {"groups": 9, "probes": {"net": {"auc": {"value": 0.51}}, "good": {"auc": {"value": 0.9}}}}
    (text,) = red_flags(flat)
    assert "net: pairs and non-pairs have much the same cosines" in text


@pytest.mark.slow
def test_stored_pairs_and_a_checkpoint(tmp_path, capsys):
    """Nothing replaced: fresh encoders tell nothing, and their numbers say so."""
    rng = np.random.default_rng(0)
    for number in range(4):
        for side in ("HE", "IHC"):
            (tmp_path / "raw" / side).mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (6, 6, 3), np.uint8)
            Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "raw" / side / f"s{number}_0.png")
    settings = prepare_defaults()
    settings.pairs.update(dict(test_share=0.5, min_size=32))
    make_pairs(with_patterns(from_folders(tmp_path / "raw"), "^([^_]+)_"), tmp_path / "raw", tmp_path / "pairs", settings, mpp=0.5)
    config = make_run(tmp_path / "run", data=tmp_path / "pairs", crop=32, margin=0, encoder_channels=4, encoder_blocks=1)
    checkpoints = Checkpointer(tmp_path / "run")
    checkpoints.save(5, jax.jit(build(config).init)(jax.random.key(0)).replace(step=np.int32(5)), {})
    checkpoints.close()
    assert cli.main(["evaluate", "--stain-encoders", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["probes"]["run"]
    assert results["windows"] == 2 * 9 and results["groups"] == 2 and entry["steps"] == [5] and entry["parameters"] > 1000
    assert 0.3 < entry["auc"]["value"] < 0.7 and entry["auc_other_slides"]["value"] is not None and 0.4 < entry["accuracy"]["value"] < 0.65
    assert "18 of 32 px in 2 pairs of 2 slides" in capsys.readouterr().err
