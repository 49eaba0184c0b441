"""`wavepath train`: what reaches the loop, and what the shell gets back."""

import pytest

from wavepath import cli
from wavepath.errors import EXIT_PREEMPTED, TrainingDiverged
from wavepath.training import loop


def result(**changed):
    values = dict(step=20, status="done", metrics={"loss": 0.5}, seconds=70.0, images_per_second=12.0, fresh=True) | changed
    return loop.TrainResult(**values)


@pytest.fixture
def calls(monkeypatch):
    made = []

    def train(config, workdir):
        made.append((config, workdir))
        outcome = made.outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    class Calls(list):
        outcome = result()

    made = Calls()
    monkeypatch.setattr(loop, "train", train)
    return made


ARGS = ["train", "--config=configs/wise_mae.py:smoke"]


def test_overrides_reach_the_loop_and_the_summary_says_how_it_went(calls, tmp_path, capsys):
    assert cli.main([*ARGS, f"--workdir={tmp_path}", "--config.train.steps=7", "--config.lr", "1e-3"]) == 0
    (config, workdir), = calls
    assert config.train.steps == 7 and config.lr == 1e-3 and config.batch_size == 16 and config.is_locked and workdir == tmp_path
    said = capsys.readouterr().err
    assert "trained" in said and "1m10s" in said and "0.5" in said and f"wavepath embed --checkpoint {tmp_path}" in said


def test_a_preempted_run_ends_with_the_code_that_launchers_restart_on(calls, tmp_path):
    calls.outcome = result(status="preempted", step=9)
    assert cli.main([*ARGS, f"--workdir={tmp_path}"]) == EXIT_PREEMPTED


def test_a_run_that_is_whole_is_no_failure(calls, tmp_path, capsys):
    calls.outcome = result(fresh=False, metrics={})
    assert cli.main([*ARGS, f"--workdir={tmp_path}"]) == 0
    assert "whole already" in capsys.readouterr().err


def test_divergence_is_one_line(calls, tmp_path, capsys):
    calls.outcome = TrainingDiverged("loss=nan at step 4")
    assert cli.main([*ARGS, f"--workdir={tmp_path}"]) == 1
    assert capsys.readouterr().err == "wavepath: error: loss=nan at step 4\n"


def test_a_typo_is_answered_with_the_nearest_name(calls, tmp_path, capsys):
    assert cli.main([*ARGS, f"--workdir={tmp_path}", "--config.train.stesp=7"]) == 1
    assert "did you mean config.train.steps" in capsys.readouterr().err and not calls
