"""Embedding: runs that have no features are refused before anything is built or read."""

import pytest

from wavepath.cli import main
from wavepath.config import load_config, save_json


@pytest.mark.parametrize(("name", "task"), [("cwt_net:smoke", "superres"), ("resnet:smoke", "classify")])
def test_a_run_without_features_is_one_line(name, task, tmp_path, capsys):
    run, tiles = tmp_path / "run", tmp_path / "tiles"
    tiles.mkdir()
    run.mkdir()
    save_json(load_config(name), run / "config.json")
    assert main(["embed", f"--checkpoint={run}", f"--data={tiles}", f"--out={tmp_path / 'out'}"]) == 1
    told = capsys.readouterr().err
    assert f"is a run of task '{task}', which has no features; give a pretraining or fine-tuning run" in told and "Traceback" not in told
