"""The loop with its hardest tenant: resumed, preempted, diverged, refused. Kills are in test_kill.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hard_task import FakePipeline, HardTask, hard_config, leaves
from PIL import Image

from wavepath.config import load_json
from wavepath.errors import ConfigError, LockedError, TrainingDiverged
from wavepath.training.checkpoint import restore_run, saved_steps
from wavepath.training.loop import StopSignals, train


def go(folder, steps=6, task=HardTask, **fields):
    return train(hard_config(steps, **{"optim__name": "adamw", "optim__warmup": "10%", **fields}), folder, task_factory=task, pipeline=FakePipeline)


def end(folder, step=None):
    return leaves(restore_run(folder, step, task_factory=HardTask)[2])


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with evaluation and panels, its result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go(folder, train__eval_every=3, train__panels_every=4, train__keep=9)


def test_a_run_leaves_what_its_folder_promises(whole):
    folder, result = whole
    assert (result.step, result.status, result.fresh) == (6, "done", True)
    assert saved_steps(folder) == [2, 4, 6]
    assert [record["step"] for record in records(folder) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "lr", "epoch", "seconds"} <= records(folder)[0].keys()
    assert {"images_per_second", "data_wait", "eta_seconds"} <= result.metrics.keys()
    assert [record["step"] for record in records(folder) if "eval_loss" in record] == [3, 6]
    status = json.loads((folder / "status.json").read_text())
    assert status.keys() == {"status", "step", "steps", "seconds", "images_per_second"} and status["status"] == "done"
    assert Image.open(folder / "panels" / "step_000004.png").size[0] > 300 and (folder / "panels" / "step_000006.png").is_file()
    assert load_json(folder / "config.json").optim.warmup == 1  # 10% of 6 steps
    assert json.loads((folder / "constants.json").read_text()) == {}
    assert not (folder / "train.lock").exists()


def test_evaluation_uses_the_state_of_its_own_step(whole, tmp_path):
    folder, _ = whole
    go(tmp_path, 3, train__eval_every=3)
    one, other = ([record["eval_loss"] for record in records(path) if "eval_loss" in record and record["step"] == 3] for path in (folder, tmp_path))
    assert one == other


def test_a_finished_run_says_so_and_trains_no_more(whole, capsys):
    folder, result = whole
    before = (folder / "metrics.jsonl").read_bytes()
    again = go(folder, train__eval_every=3, train__panels_every=4, train__keep=9)
    assert (again.status, again.step, again.fresh) == ("done", 6, False) and "is whole" in capsys.readouterr().err
    assert again.metrics["loss"] == result.metrics["loss"] and (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_cut_in_two_equals_one_that_was_not(whole, tmp_path, capsys):
    assert go(tmp_path, 3, train__keep=9).step == 3
    assert go(tmp_path, 6, train__keep=9).fresh
    assert "train.steps 3 -> 6" in capsys.readouterr().err
    assert_equal(end(whole[0]), end(tmp_path))
    assert_equal(end(whole[0], 4), end(tmp_path, 4))
    losses = [[(record["step"], record["loss"]) for record in records(path) if "loss" in record] for path in (whole[0], tmp_path)]
    assert losses[0] == losses[1]
    assert records(tmp_path)[-1]["seconds"] > records(tmp_path)[2]["seconds"]


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_run_may_move_to_another_backend_and_number_of_devices(tmp_path):
    # SGD: Adam would blow the rounding of a gradient that is zero in theory up to a whole step.
    go(tmp_path / "whole", 6, optim__name="sgd")
    go(tmp_path / "moved", 4, optim__name="sgd")
    start = end(tmp_path / "moved", 4)
    go(tmp_path / "moved", 6, optim__name="sgd", parallel__backend="pmap", parallel__devices=8)
    one, other = end(tmp_path / "whole"), end(tmp_path / "moved")
    parameters = [name for name in one if ".params" in name]
    apart, update = (np.concatenate([(one[name] - run[name]).ravel() for name in parameters]) for run in (other, start))
    assert 0 < np.linalg.norm(apart) < 1e-2 * np.linalg.norm(update)
    assert int(other[".extra['seen']"]) == 96


def test_a_damaged_checkpoint_costs_steps_and_changes_nothing(whole, tmp_path, capsys):
    go(tmp_path, 4)
    largest = max((tmp_path / "checkpoints" / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    go(tmp_path, 6)
    message = capsys.readouterr().err
    assert "checkpoint 4" in message and "going back to step 2" in message
    assert_equal(end(whole[0]), end(tmp_path))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poisoned(HardTask):
        poison = 4

    with pytest.raises(TrainingDiverged, match=r"loss=nan at step 4: .*last good checkpoint is step 2 in"):
        go(tmp_path, task=Poisoned)
    # Step 4 was due to be saved; its own loss forbids it.
    assert saved_steps(tmp_path) == [2]
    assert all(np.isfinite(value).all() for value in end(tmp_path).values())
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "diverged"
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_preempted(whole, tmp_path, number, capsys):
    class Signalled(HardTask):
        def sources(self):
            source = super().sources()
            images = source.images

            def and_signal(ids):
                if FakeCalls.count == 3:
                    os.kill(os.getpid(), number)
                FakeCalls.count += 1
                return images(ids)

            source.images = and_signal
            return source

    class FakeCalls:
        count = 0

    before = signal.getsignal(number)
    result = go(tmp_path, task=Signalled, train__save_every=0)
    assert result.status == "preempted" and 0 < result.step < 6 and saved_steps(tmp_path) == [result.step]
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "preempted"
    assert signal.getsignal(number) is before and "saved; run the same command again" in capsys.readouterr().err
    go(tmp_path, train__save_every=0)
    assert_equal(end(whole[0]), end(tmp_path))


def test_a_signal_between_the_save_and_the_end_of_a_round_loses_no_step(tmp_path, monkeypatch):
    class Late(StopSignals):
        reads = 0

        @property
        def requested(self):
            self.reads += 1
            return self.reads >= 3

        @requested.setter
        def requested(self, value):
            pass

    monkeypatch.setattr("wavepath.training.loop.StopSignals", Late)
    result = go(tmp_path, train__save_every=0)
    assert result.status == "preempted" and saved_steps(tmp_path) == [result.step]


def test_constants_of_a_start_that_saved_nothing_are_measured_again(tmp_path):
    (tmp_path / "constants.json").write_text('{"mean": 1}')
    go(tmp_path, 2)
    assert json.loads((tmp_path / "constants.json").read_text()) == {}


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    code = "import sys; from wavepath.files import folder_lock\n"
    code += "with folder_lock(sys.argv[1], 'train.lock'):\n    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} "):
            go(tmp_path)
        holder.stdin.close()


def test_what_cannot_work_is_refused_before_anything_is_compiled(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"config.lr was 0.05, now 0.5"):
        go(whole[0], lr=0.5)
    with pytest.raises(ConfigError, match=r"is at step 6, past config.train.steps=5"):
        go(whole[0], 5, train__eval_every=3, train__panels_every=4, train__keep=9)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"batch_size=15 is not divisible by 2 devices"):
        go(tmp_path, batch_size=15, parallel__devices=2)
    with pytest.raises(ConfigError, match="window of steps"):
        go(tmp_path, profile="nonsense")
    assert time.monotonic() - start < 2 and not (tmp_path / "given.json").exists()


def test_it_starts_from_the_parameters_of_another_run(whole, tmp_path):
    go(tmp_path, 1, init_from=str(whole[0]), lr=1e-9)
    start, now = end(whole[0]), end(tmp_path)
    names = [name for name in now if name.startswith(".params")]
    assert names and all(np.allclose(now[name], start[name], atol=1e-6) for name in names)
    assert int(now[".step"]) == 1
    known = json.loads((tmp_path / "constants.json").read_text())
    assert known["init_from"] == {"run": str(whole[0]), "train_slides": None}, "this task does not say what it was trained on"


def test_it_saves_by_time_too(tmp_path):
    go(tmp_path, 3, train__save_every=0, train__save_seconds=0.001)
    go(tmp_path / "never", 3, train__save_every=0)
    assert saved_steps(tmp_path)[0] == 1 and saved_steps(tmp_path / "never") == [3]  # compiling alone takes longer than that


def test_examples_that_were_replaced_are_told(tmp_path, capsys):
    class Replacing(FakePipeline):
        @staticmethod
        def batches(source, **given):
            class Batches:
                corrupt_count = 3
                __iter__ = staticmethod(lambda: FakePipeline.batches(source, **given))

            return Batches()

    train(hard_config(2), tmp_path, task_factory=HardTask, pipeline=Replacing)
    assert records(tmp_path)[-1]["replaced"] == 3 and "3 examples could not be read" in capsys.readouterr().err


def test_a_profile_window_leaves_a_trace(tmp_path):
    go(tmp_path, 4, profile="2:3")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_an_error_in_the_input_ends_the_run_and_what_was_saved_stays(tmp_path):
    class Broken(HardTask):
        def sources(self):
            source = super().sources()
            images, calls = source.images, []

            def until(ids):
                calls.append(1)
                if len(calls) > 4:
                    raise ValueError("shard 3 is damaged")
                return images(ids)

            source.images = until
            return source

    with pytest.raises(ValueError, match="shard 3"):
        go(tmp_path, task=Broken)
    assert saved_steps(tmp_path) == [2, 4] and not (tmp_path / "train.lock").exists()


def test_a_finished_run_whose_last_checkpoint_was_cut_is_finished_again(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    largest = max((path for path in (folder / "checkpoints" / "6").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    result = go(folder, train__eval_every=3, train__panels_every=4, train__keep=9)
    assert (result.step, result.status, result.fresh) == (6, "done", True)
    assert_equal(end(folder), end(whole[0]))
