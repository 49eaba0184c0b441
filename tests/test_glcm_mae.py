"""GLCM-MAE through the command line: two phases, measured ranges kept with the run, pictures, and a model to load."""

import json
from pathlib import Path

import numpy as np
import pytest

from wavepath import cli
from wavepath.data.phantom_textures import make_textures
from wavepath.training.checkpoint import restore_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glcm")
    make_textures(folder / "textures", 4, seed=0, size=32, progress=False)
    arguments = [
        "train", "--config=configs/glcm_mae.py:smoke", f"--workdir={folder / 'run'}", f"--config.data.dir={folder / 'textures'}",
        "--config.model.image_size=32", "--config.batch_size=8", "--config.train.steps=4", "--config.train.log_every=1",
        "--config.train.eval_every=2", "--config.loss.cooccurrence.levels=32", "--config.parallel.devices=1",
    ]
    assert cli.main(arguments) == 0
    return folder / "run"


def test_phases_and_ranges(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if "loss" in line}
    assert ["glcm" in trained[step] for step in (1, 2, 3, 4)] == [False, False, True, True]
    for step in (3, 4):
        parts = trained[step]
        np.testing.assert_allclose(parts["loss"], 0.1 * parts["mse"] + parts["one_minus_ssim"] + parts["glcm"], rtol=1e-5)
    assert any("eval_glcm" in line for line in lines if line["step"] == 4)
    low, high = json.loads((run / "constants.json").read_text())["value_range"]
    assert -2.2 < low < high < 2.7


def test_the_run_can_be_loaded_and_shown(run: Path):
    config, task, state = restore_run(run)
    assert config.loss.second.start == 2 and int(state.step) == 4 and task.constants["value_range"]
    assert (run / "panels" / "step_000004.png").is_file()
