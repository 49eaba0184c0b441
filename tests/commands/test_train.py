"""`wavepath train`: what reaches the loop, and what the shell gets back."""

import shlex

import pytest

from wavepath import cli
from wavepath.commands import train as command
from wavepath.config import load_config, save_json
from wavepath.errors import EXIT_PREEMPTED, TrainingDiverged
from wavepath.tasks.base import build
from wavepath.training import durations, loop


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


RECIPE = ["stain.crop=32", "stain.margin=32", "train.steps=300"]


@pytest.mark.parametrize(("spec", "overrides", "side", "variant", "flags"), [
    (":cpu", RECIPE, 256, ":cpu", ""),
    (":bci", [], 1024, "", ""),
    (":cpu", [], 256, ":cpu", "crop=128"),
    (":cpu", [], 0, ":cpu", "crop=128"),
    (":cpu", [*RECIPE, "stain.encoder_channels=8", "stain.encoder_norm=group", "stain.encoder_blocks=1"], 100, ":cpu",
     "encoder_channels=8 encoder_blocks=1 encoder_norm=group margin=32"),
    ("", [], 700, "", "margin=184"),
    ("", [], 300, "", "crop=296 margin=0"),
])  # fmt: skip
def test_what_comes_next_fits_the_encoders_and_the_pairs(tmp_path, monkeypatch, spec, overrides, side, variant, flags):
    monkeypatch.setattr(command, "_pair_side", lambda folder: side)
    run = tmp_path / "the run"
    asked = load_config(f"configs/ceff_encoders.py{spec}", overrides)
    resolved = load_config(f"configs/ceff_encoders.py{spec}", [*overrides, "data.dir=my pairs"])  # as the loop found it
    run.mkdir()
    save_json(resolved, run / "config.json")
    _, train, config, *given = shlex.split(command.second_stage(run, asked))
    assert train == "train" and config == f"--config=configs/ceff.py{variant}" and given[-1] == f"--workdir={run}_ceff"
    assert given[:2] == [f"--config.encoders={run}", "--config.data.dir=my pairs"]
    assert given[2:-1] == [f"--config.stain.{flag}" for flag in flags.split()]
    second = load_config(config.removeprefix("--config="), given[:-1])
    build(durations.resolve(second, 100))
    assert not side or second.stain.crop + second.stain.margin <= side


def test_the_size_of_pairs_that_are_not_there_is_not_known(tmp_path):
    assert command._pair_side("") == command._pair_side(str(tmp_path)) == 0
    assert "--config.data.dir=PAIRS" in command.second_stage(tmp_path, load_config("configs/ceff_encoders.py:cpu"))
