"""A classifier sees its held-out images restored: which images, which rows, which numbers."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from wavepath import cli
from wavepath.config import load_config
from wavepath.evaluation.diagnosis import diagnose
from wavepath.files import write_json
from wavepath.models.resnet import DEPTHS
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder, identity_of


def save(folder, config, constants, identity, state):
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write_configs(config, config, identity)
    run.write_constants(constants)
    checkpoints = Checkpointer(folder)
    checkpoints.save(int(config.train.steps), state, {})
    checkpoints.close()
    write_json(folder / "status.json", {"status": "done", "step": int(config.train.steps), "steps": int(config.train.steps)})


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """Twelve images of four cases, one fold of two; the classifier tells smooth images from rough ones by its first convolution."""
    monkeypatch.setitem(DEPTHS, 4, ((1,), False))
    rng = np.random.default_rng(0)
    for number in range(12):
        rough = number % 2
        pixels = 128 + rng.normal(0, 60, (33, 33, 3)) * rough
        (tmp_path / "images" / "ab"[rough]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / "images" / "ab"[rough] / f"{number // 2 % 3}_{number}.png")
    config = load_config("configs/resnet.py:smoke")
    with config.unlocked():
        config.classify.depth, config.model.image_size, config.train.steps = 4, 32, 2
        config.data.dir, config.data.label_pattern, config.data.case_pattern = str(tmp_path / "images"), "^(.)/", "^(./[0-9])_"
        config.data.order, config.optim.warmup, config.optim.halve_every = "global", "0", "1"
    task = build(config)
    source = task.sources()
    task.constants = task.measure(source)
    state = jax.jit(task.init)(jax.random.key(0))
    params = jax.tree.map(np.zeros_like, state.params["resnet"])
    edge = np.zeros_like(params["conv1"]["kernel"])
    edge[3, 3, :, 0], edge[3, 4, :, 0] = 1, -1  # the difference of neighbours
    params["conv1"]["kernel"], params["bn1"]["scale"] = edge, np.ones_like(params["bn1"]["scale"])
    weights = np.zeros_like(params["fc"]["kernel"])
    weights[0] = -1, 1
    params["fc"] = {"kernel": weights, "bias": np.array([1.0, -1.0], np.float32)}
    save(tmp_path / "classifier", config, task.constants, identity_of(source), state.replace(params={"resnet": params}))
    return tmp_path / "classifier"


@pytest.fixture
def network(tmp_path):
    config = load_config("configs/cwt_net.py:smoke,network=srcnn")
    with config.unlocked():
        config.superres.srcnn.kernels, config.superres.srcnn.channels = (3, 1, 3), (4, 4)
        config.data.order, config.optim.warmup, config.optim.halve_every, config.train.steps = "global", "0", "1", 1
    task = build(config)
    task.constants = {"mean": [0.5, 0.5, 0.5]}
    save(tmp_path / "srcnn", config, task.constants, {}, jax.jit(task.init)(jax.random.key(0)))
    return tmp_path / "srcnn"


@pytest.mark.slow
def test_rough_images_are_lost_with_their_detail(classifier, network, tmp_path):
    results = diagnose(classifier, [network], tmp_path / "out", positive="b", tile=16, overlap=4, bootstraps=20)
    held_out = json.loads((classifier / "constants.json").read_text())["held_out_tiles"]
    rows = results["probes"]
    assert list(rows) == ["original", "bicubic", "srcnn"] and results["classes"] == held_out and results["tiles"] == sum(held_out.values())
    assert rows["original"]["accuracy"]["value"] == 1.0 and rows["original"]["sensitivity"]["value"] == 1.0
    # Noise of single pixels does not survive a reduction by 2.
    assert rows["bicubic"]["sensitivity"]["value"] < 0.5 and rows["bicubic"]["specificity"]["value"] == 1.0
    text = (tmp_path / "out" / "results.md").read_text()
    assert "restored from bicubic reduction by 2" in text and "| srcnn |" in text
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 1 + 3 * results["tiles"]


def test_flags_that_do_not_go_together(tmp_path, capsys):
    for flags, words in (
        (["--superres", "x", "--positive", "a"], "--positive names a class of --classifier"),
        (["--superres", "x", "--probe", "knn"], "--probe belongs to the probes of --features"),
        (["--runs", "x", "--lpips", "y"], "--lpips belongs to --superres"),
        (["--features", "x", "--label-pattern", "(.)", "--tile", "32"], "--tile belongs to --superres"),
        (["--superres", "x"], "no run in x"),
    ):
        assert cli.main(["evaluate", *flags, "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
