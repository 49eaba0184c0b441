from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import CheckpointError, ConfigError, DatasetError
from wavepath.tasks.base import State, build, kept_out


def test_unknown_task_names_the_choices(config):
    config.task = "masked"
    with pytest.raises(ConfigError, match="mae"):
        build(config)


def test_init_is_pure_and_starts_at_step_0(config):
    config.ema = 0.9
    task = build(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    state = jax.jit(task.init)(jax.random.key(0))
    assert isinstance(state, State) and int(state.step) == 0
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert set(state.params) == set(state.opt) == set(state.ema) == set(task.networks) and state.stats == {} == state.extra
    again = jax.jit(task.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_load_takes_parameters_and_restarts_averages(config):
    config.ema = 0.9
    task = build(config)
    state = jax.jit(task.init)(jax.random.key(0))
    given = jax.tree.map(lambda x: np.asarray(x) + 1, state.params)
    loaded = task.load(state, {**given, "other": {}})
    jax.tree.map(np.testing.assert_array_equal, loaded.params, given)
    jax.tree.map(np.testing.assert_array_equal, loaded.ema, given)
    jax.tree.map(np.testing.assert_array_equal, loaded.opt, state.opt)


def test_load_names_what_does_not_fit(config):
    task = build(config)
    state = jax.jit(task.init)(jax.random.key(0))
    tree = dict(state.params["mae"])
    with pytest.raises(CheckpointError, match=r"missing: mask_token"):
        task.load(state, {"mae": {k: v for k, v in tree.items() if k != "mask_token"}})
    with pytest.raises(CheckpointError, match=r"left over: head/kernel"):
        task.load(state, {"mae": {**tree, "head": {"kernel": jnp.zeros(3)}}})
    with pytest.raises(CheckpointError, match=r"mask_token \(1, 1, 9\) instead of \(1, 1, 8\)"):
        task.load(state, {"mae": {**tree, "mask_token": jnp.zeros((1, 1, 9))}})
    with pytest.raises(CheckpointError, match="hold generator"):
        task.load(state, {"generator": {}})


def test_accumulation_of_a_coupled_loss_names_the_alternative(config):
    config.optim.accumulate = 2
    build(config)
    config.loss.contrast_weight = 0.1
    with pytest.raises(ConfigError, match="remat=full"):
        build(config)
    config.loss.contrast_weight = 0.0
    config.optim.accumulate = 3
    with pytest.raises(ConfigError, match="does not divide config.batch_size=16"):
        build(config)


def test_an_empty_test_part_is_an_error_only_where_it_is_needed():
    class Held(list):
        name = "PAIRS"

    source, needed = object(), SimpleNamespace(train=SimpleNamespace(eval_every=0, panels_every=5))
    assert kept_out(needed, Held([1]), source, "pair", "see pairs.csv") == [1]
    with pytest.raises(DatasetError, match="PAIRS has no test pair as large as a window; see pairs.csv, or train without"):
        kept_out(needed, Held(), source, "pair", "see pairs.csv")
    needed.train.panels_every = 0
    assert kept_out(needed, Held(), source, "pair", "see pairs.csv") is source
