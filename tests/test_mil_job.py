"""Slides from features to a trained run through the command line, with nothing given and with everything."""

import json

import numpy as np
import pytest

from wavepath.cli import main
from wavepath.data.bag_batches import eval_batches
from wavepath.data.synthetic_bags import make_bags
from wavepath.training.checkpoint import best_step, restore_run, saved_steps

QUICK = ["--config.parallel.devices=1", "--config.train.log_every=20"]


def said(capsys):
    return capsys.readouterr().err


def test_the_smoke_run_is_cut_and_gone_on_with(tmp_path, capsys):
    """In one piece or in two: the same best, on slides that are on one side alone."""
    argv = ["train", "--config=configs/mil.py:smoke", *QUICK]
    assert main([*argv, "--workdir", str(tmp_path / "whole")]) == 0
    assert "48 synthetic bags" in (text := said(capsys)) and "24 to train on, 8 to validate, 16 to test" in text and "best: step" in text
    assert main([*argv, "--workdir", str(tmp_path / "cut"), "--config.train.steps=20"]) == 0
    assert main([*argv, "--workdir", str(tmp_path / "cut"), "--config.train.steps=40"]) == 0
    constants = json.loads((tmp_path / "whole" / "constants.json").read_text())
    parts = [set(constants["split"][name]) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [24, 8, 16] and len(set.union(*parts)) == 48
    assert best_step(tmp_path / "whole") == best_step(tmp_path / "cut") and saved_steps(tmp_path / "cut")[-1] == 40
    ends = [restore_run(tmp_path / name) for name in ("whole", "cut")]
    for one, other in zip(*[state.params["mil"]["head"].values() for _, _, state in ends], strict=True):
        np.testing.assert_array_equal(one, other)
    _, task, state = ends[0]
    test = task.sources().test
    assert test.slides == constants["split"]["test"]
    (batch,) = eval_batches(test, len(test))
    assert float(task.eval_step(state, batch)["loss"][1]) == 16


@pytest.mark.slow
def test_other_slides_labels_or_settings_are_not_gone_on_with(tmp_path, capsys):
    features, labels = make_bags(tmp_path / "bags", 24, width=8)
    argv = ["train", "--config=configs/mil.py:smoke,network=mean", *QUICK, f"--config.data.bags={features}", f"--config.data.labels={labels}",
            "--config.train.steps=10", f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    assert main(argv) == 0
    capsys.readouterr()
    longer = [*argv, "--config.train.steps=20"]
    text = labels.read_text()
    labels.write_text(text.replace(",class_1", ",other"))  # the same split under another name
    assert main(longer) == 1 and "not those that the run began with (classes" in said(capsys)
    labels.write_text(text.replace("case_0_000,synthetic_000,class_0", "case_0_000,synthetic_000,class_1"))  # another split
    assert main(longer) == 1 and "was trained on other data" in said(capsys)
    labels.write_text(text)
    assert main([*longer, "--config.mil.network=max"]) == 1 and "config.mil.network was 'mean', now 'max'" in said(capsys)
    assert main([*longer, "--config.mil.validation=0"]) == 1 and "config.mil.validation" in said(capsys)
    moved = tmp_path / "moved"
    features.rename(moved)
    assert main([*longer, f"--config.data.bags={moved}"]) == 0
    (moved / "synthetic_003.h5").unlink()
    capsys.readouterr()
    assert main([*argv, "--config.train.steps=30", f"--config.data.bags={moved}"]) == 1
    assert "1 of 24 slides" in (text := said(capsys)) and text.strip().count("\n") <= 1 and "config.data.missing=skip" in text


@pytest.mark.slow
@pytest.mark.parametrize("network", ["clam_mb", "transmil"])
def test_the_smoke_run_of_other_networks(network, tmp_path, capsys):
    assert main(["train", f"--config=configs/mil.py:smoke,network={network}", *QUICK, "--workdir", str(tmp_path)]) == 0
    assert "best: step" in said(capsys)
