"""A run that was stopped goes on with other devices: the same examples in the same order, and the losses of the run that was not."""

import json
import shutil

import jax
import numpy as np
import pytest
from hard_task import FakePipeline, HardTask, hard_config, leaves

from wavepath.training.checkpoint import restore_run, saved_steps
from wavepath.training.loop import train

STOP, STEPS = 3, 7
DIVIDED = dict(parallel__backend="jit", parallel__fsdp=0, parallel__fsdp_min_size=8)
ON = {
    "fsdp on 8": dict(parallel__devices=8, **DIVIDED), "fsdp on 4": dict(parallel__devices=4, **DIVIDED),
    "fsdp in 2 groups of 4": dict(parallel__devices=8, **DIVIDED | dict(parallel__fsdp=4)),
    "pmap on 8": dict(parallel__devices=8, parallel__backend="pmap"), "pmap on 4": dict(parallel__devices=4, parallel__backend="pmap"),
    "shard_map on 2": dict(parallel__devices=2, parallel__backend="shard_map"), "jit on 1": dict(parallel__devices=1),
}


def go(folder, steps, topology):
    config = hard_config(steps, optim__name="adamw", train__save_every=STOP, train__keep=9, **ON[topology])
    return train(config, folder, task_factory=HardTask, pipeline=FakePipeline)


def written(folder):
    """Of every step the loss, and what tells which examples stood where in its batch."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return {name: np.array([record[name] for record in records]) for name in ("loss", "d_loss", "nce", "grad_norm", "order")}


def end(folder):
    return leaves(restore_run(folder, task_factory=HardTask)[2])


@pytest.fixture(scope="module")
def exact(quick_compile):
    """Sums in another order differ in the last bits of a float, which Adam can blow up: in float64 they are the only difference left."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, exact):
    """By topology: (an uninterrupted run, one that was stopped)."""
    made = {}

    def get(topology):
        if topology not in made:
            folder = tmp_path_factory.mktemp("elastic")
            go(folder / "whole", STEPS, topology)
            go(folder / "stopped", STOP, topology)
            made[topology] = folder / "whole", folder / "stopped"
        return made[topology]

    return get


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize(("before", "after"), [
    ("fsdp on 8", "fsdp on 4"), ("fsdp on 8", "fsdp in 2 groups of 4"), ("fsdp on 8", "pmap on 4"), ("fsdp on 8", "jit on 1"),
    ("pmap on 8", "pmap on 4"), ("pmap on 8", "fsdp on 4"), ("pmap on 8", "shard_map on 2"),
])  # fmt: skip
def test_another_topology_goes_on_with_the_same_losses(runs, tmp_path, before, after, capsys):
    whole, stopped = runs(before)
    assert saved_steps(stopped) == [STOP]
    moved = shutil.copytree(stopped, tmp_path / "moved")
    go(moved, STEPS, after)
    said = capsys.readouterr().err
    assert f"at step {STOP} of {STEPS}" in said and "parallel." in said
    want, got = written(whole), written(moved)
    np.testing.assert_array_equal(got.pop("order"), want.pop("order"))
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-7, err_msg=name)
        assert len(set(values)) == STEPS
    one, other = end(whole), end(moved)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-6, atol=1e-7, err_msg=name)  # beside steps of 0.05


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("topology", ["fsdp on 8", "pmap on 8"])
def test_the_same_topology_goes_on_bit_by_bit(runs, tmp_path, topology):
    whole, stopped = runs(topology)
    moved = shutil.copytree(stopped, tmp_path / "moved")
    go(moved, STEPS, topology)
    for one, other in ((written(whole), written(moved)), (end(whole), end(moved))):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
