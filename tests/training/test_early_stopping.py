"""Early stopping in the loop: when it ends, what it keeps, and that a kill changes neither."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hard_task import FakePipeline, FakeSource, hard_config, leaves

from wavepath.errors import ConfigError
from wavepath.ops import collectives
from wavepath.tasks.base import State, Task
from wavepath.training.checkpoint import best_step, restore_run, saved_steps
from wavepath.training.durations import resolve
from wavepath.training.loop import train

# eval_loss behind each step, from 1. Best: 3 at step 2, then 2.5 at step 4, which three evaluations do not beat; later 1 at step 9.
LOSSES = (5, 3, 4, 2.5, 2.6, 2.5, 2.8, 2.9, 1, 1.5, 1.6, 1.7)


class Scripted(Task):
    """One parameter that moves by the batches; its evaluation reads from the script."""

    networks = ("one",)
    validates = True
    script = LOSSES

    def init(self, rng):
        return State(step=jnp.zeros((), jnp.int32), params={"one": {"w": jnp.zeros(3)}}, opt={"one": {}})

    def train_step(self, state, batch):
        change = collectives.pmean(batch["image"].astype(jnp.float32).mean((0, 1, 2)) / 255)
        params = {"one": {"w": state.params["one"]["w"] + change}}
        return state.replace(step=state.step + 1, params=params), {"loss": (change.sum(), jnp.ones(()))}

    def eval_step(self, state, batch):
        return {"loss": (jnp.asarray(self.script)[state.step - 1], jnp.ones(()))}

    def sources(self):
        return FakeSource()

    def flops(self):
        return 1.0


def go(folder, steps=12, task=Scripted, patience=3, **fields):
    given = {"train__eval_every": 1, "train__patience": patience, "train__keep": 9, **fields}
    return train(hard_config(steps, **given), folder, task_factory=task, pipeline=FakePipeline)


def end(folder, step=None):
    return leaves(restore_run(folder, step, task_factory=Scripted)[2])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """The same run without early stopping, every step saved."""
    folder = tmp_path_factory.mktemp("free")
    go(folder, patience=0, train__save_every=1, train__keep=99)
    return folder


def test_a_run_ends_where_the_loss_falls_no_more_and_keeps_its_best(free, tmp_path, capsys):
    result = go(tmp_path)
    said = capsys.readouterr().err
    assert (result.step, result.status) == (7, "done") and "stopped early at step 7 of 12: 3 evaluations" in said and "best: step 4" in said
    assert status(tmp_path)["best"] == {"step": 4, "eval_loss": 2.5} == json.loads((tmp_path / "best.json").read_text())
    assert status(tmp_path)["stopped_early"] is True and status(tmp_path)["status"] == "done"
    assert best_step(tmp_path) == 4 and saved_steps(tmp_path) == [2, 4, 6, 7]
    capsys.readouterr()
    assert_equal(end(tmp_path), end(free, 4))
    assert "the best step, 4, of 7 (early stopping)" in capsys.readouterr().err
    assert_equal(end(tmp_path, 7), end(free, 7))
    assert not np.array_equal(end(free, 4)[".params['one']['w']"], end(free, 7)[".params['one']['w']"])
    again = go(tmp_path)
    assert (again.step, again.fresh) == (7, False) and "is whole" in capsys.readouterr().err


def test_without_patience_nothing_is_different(free, capsys):
    assert status(free)["step"] == 12 and "best" not in status(free) and not list(free.glob("*best*")) and best_step(free) is None
    assert int(end(free)[".step"]) == 12


@pytest.mark.parametrize("cut", [1, 3, 5, 6])
def test_a_run_that_was_cut_stops_at_the_same_step_with_the_same_best(free, tmp_path, cut):
    assert go(tmp_path, cut).step == cut
    assert go(tmp_path).step == 7
    assert_equal(end(tmp_path), end(free, 4))
    assert status(tmp_path)["best"] == {"step": 4, "eval_loss": 2.5}


def test_a_best_from_behind_the_last_checkpoint_is_found_again(free, tmp_path):
    """Killed after the best was written and before the checkpoint that counts on it."""
    go(tmp_path, 5)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    assert best_step(tmp_path) == 4
    assert go(tmp_path).step == 7
    assert_equal(end(tmp_path), end(free, 4))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints_best").iterdir() if path.name.isdigit()) == [2, 4]


def test_a_run_killed_between_its_last_save_and_its_end_takes_no_step_more(tmp_path):
    go(tmp_path)
    (tmp_path / "status.json").unlink()
    assert go(tmp_path).step == 7 and saved_steps(tmp_path)[-1] == 7 and status(tmp_path)["stopped_early"] is True


def test_a_best_that_was_lost_is_said_and_looked_for_anew(tmp_path, capsys):
    go(tmp_path, 5)
    shutil.rmtree(tmp_path / "checkpoints_best")
    go(tmp_path)
    assert "has no step 4, the best so far" in capsys.readouterr().err and status(tmp_path)["best"] == {"step": 9, "eval_loss": 1}


def test_not_before_its_time(free, tmp_path):
    assert go(tmp_path / "steps", train__patience_after="8").step == 8
    assert go(tmp_path / "percent", train__patience_after="90%").step == 12  # at 11 the best is young again
    assert_equal(end(tmp_path / "percent"), end(free, 9))


def test_more_patience_goes_on_with_a_run_that_had_stopped(free, tmp_path, capsys):
    go(tmp_path)
    assert go(tmp_path, patience=9).step == 12 and "train.patience 3 -> 9" in capsys.readouterr().err
    assert_equal(end(tmp_path), end(free, 9))


def test_a_loss_that_is_no_number_is_no_improvement(tmp_path):
    class Broken(Scripted):
        script = (jnp.nan, 3.0, jnp.nan, jnp.nan, jnp.nan, 1.0)

    assert go(tmp_path, 6, task=Broken).step == 5 and status(tmp_path)["best"]["step"] == 2


def test_what_cannot_be(tmp_path):
    class Tested(Scripted):
        validates = False

    with pytest.raises(ConfigError, match="task 'hard' has no validation part"):
        go(tmp_path, task=Tested)
    with pytest.raises(ConfigError, match="patience=3 counts evaluations, and there are none"):
        go(tmp_path, train__eval_every=0)
    with pytest.raises(ConfigError, match="config.train.patience=-1 must be at least 0"):
        go(tmp_path, patience=-1)


def test_durations_of_early_stopping():
    resolved = resolve(hard_config(100, train__eval_epochs=0.5, train__patience_after="2ep"), n_examples=40)
    assert (resolved.train.eval_every, resolved.train.eval_epochs, resolved.train.patience_after) == (2, 0.0, 5)
    again = resolve(resolved, n_examples=7)
    assert again.train == resolved.train
    assert resolve(hard_config(100), n_examples=40).train.patience_after == 0


@pytest.mark.multidevice
def test_the_best_is_kept_on_several_devices_too(free, tmp_path):
    assert go(tmp_path, parallel__devices=2, parallel__backend="pmap", batch_size=16).step == 7
    np.testing.assert_allclose(end(tmp_path)[".params['one']['w']"], end(free, 4)[".params['one']['w']"], rtol=1e-5)
