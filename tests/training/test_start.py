"""What a run takes from another, and that frozen networks stay what they were."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hard_task import FakePipeline, HardTask, hard_config

from wavepath.config import filled
from wavepath.defaults import train_defaults
from wavepath.errors import CheckpointError
from wavepath.files import write_json
from wavepath.training import start
from wavepath.training.checkpoint import restore_run
from wavepath.training.loop import train
from wavepath.training.parallel import Parallel
from wavepath.training.start import check_frozen


class Teacher(HardTask):
    """Learns with another run's generator beside it; `drift` is what its own steps do to that, which is nothing in a sound task."""

    frozen = ("teacher",)
    drift = 0.0
    keeps = False  # what it was made with, instead of taking the other run's
    run = ""

    def init(self, rng):
        state = super().init(rng)
        return state.replace(extra={**state.extra, "teacher": jax.tree.map(jnp.zeros_like, state.params["g"])})

    def others(self):
        return {"teacher": self.run}

    def adopt(self, state, others):
        _, _, learnt = others["teacher"]
        if self.keeps:
            return state, {}
        return state.replace(extra={**state.extra, "teacher": learnt.params["g"]}), {"teacher": {"networks": "g"}}

    def train_step(self, state, batch):
        after, metrics = super().train_step(state.replace(extra={"seen": state.extra["seen"]}), batch)
        moved = jax.tree.map(lambda x: x + self.drift, state.extra["teacher"])
        return after.replace(extra={**after.extra, "teacher": moved}), metrics


def factory(config):
    return {"hard": HardTask, "teacher": Teacher}[config.task](config)


def go(folder, task, steps):
    return train(hard_config(steps, task=task), folder, task_factory=factory, pipeline=FakePipeline)


def test_the_run_to_start_from_may_depend_on_fold_and_seed():
    config = train_defaults()
    config.data.fold, config.seed = 2, 7
    assert filled("pre/fold{fold}/seed{seed}", config) == "pre/fold2/seed7" and filled("pre", config) == "pre"


@pytest.mark.slow
def test_frozen_networks_are_the_other_runs_and_stay_so(tmp_path, monkeypatch):
    go(tmp_path / "first", "hard", 2)
    monkeypatch.setattr(Teacher, "run", str(tmp_path / "first"))
    go(tmp_path / "second", "teacher", 2)
    known = json.loads((tmp_path / "second" / "constants.json").read_text())
    assert known["teacher"] == {"networks": "g", "run": str(tmp_path / "first"), "step": 2}

    # The first run is not needed any more.
    monkeypatch.setattr(Teacher, "run", str(tmp_path / "gone"))
    go(tmp_path / "second", "teacher", 4)
    _, task, state = restore_run(tmp_path / "second", task_factory=factory)
    _, _, learnt = restore_run(tmp_path / "first", task_factory=factory)
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, state.extra["teacher"], learnt.params["g"])
    check_frozen(task, state)
    with pytest.raises(CheckpointError, match=r"5 of 6 frozen arrays|6 of 6 frozen arrays"):
        check_frozen(task, state.replace(extra=jax.tree.map(lambda x: x + 1, state.extra)))

    # A task that leaves in place what was drawn is found out at once.
    monkeypatch.setattr(Teacher, "run", str(tmp_path / "first"))
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "keeps", True)
        with pytest.raises(CheckpointError, match="frozen arrays of task 'teacher' are not those of teacher"):
            go(tmp_path / "other", "teacher", 2)

    # A step that moves them is found out before anything of it is saved.
    monkeypatch.setattr(Teacher, "drift", 1e-6)
    with pytest.raises(CheckpointError, match="not what they were at the start"):
        go(tmp_path / "third", "teacher", 2)
    assert not list((tmp_path / "third" / "checkpoints").glob("[0-9]*"))


def test_slides_of_the_run_that_one_starts_from_are_remembered(tmp_path):
    config = hard_config(2, task="hard", init_from=str(tmp_path / "pre{fold}"))
    config.data.fold = 3
    for known, slides in (({"train_slides": ["a"], "init_from": {"run": "older", "train_slides": ["b"]}}, ["a", "b"]), ({}, None)):
        write_json(tmp_path / "pre3" / "constants.json", known)
        assert start.inherited(config.init_from, config) == {"init_from": {"run": str(tmp_path / "pre3"), "train_slides": slides}}
    assert start.inherited(str(tmp_path / "imported"), config)["init_from"]["train_slides"] is None


@pytest.mark.multidevice
def test_another_runs_state_is_divided_as_ones_own(tmp_path, monkeypatch):
    """A network that no device can hold whole is not put on one on its way into a run."""
    go(tmp_path / "first", "hard", 2)
    seen = []

    def restore(*given, **named):
        found = restore_run(*given, **named)
        seen.extend(jax.tree.leaves(found[2]))
        return found

    monkeypatch.setattr(start, "restore_run", restore)
    config = hard_config(2, task="hard", init_from=str(tmp_path / "first"))
    task, devices = HardTask(config), Parallel("jit", jax.devices(), fsdp=8, min_size=8)
    state = start.start_from(config.init_from, config, factory, task, devices.init(task, 1), devices)
    assert sum(leaf.addressable_shards[0].data.nbytes for leaf in seen) < sum(leaf.nbytes for leaf in seen) / 4
    learnt = restore_run(tmp_path / "first", task_factory=factory)[2]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(learnt.params))
    assert all(
        leaf.sharding.is_equivalent_to(placed, leaf.ndim)
        for leaf, placed in zip(jax.tree.leaves(state), jax.tree.leaves(devices.state_shardings(state)), strict=True)
    )
