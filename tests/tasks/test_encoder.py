"""An encoder by itself, and what other tasks take of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wavepath.errors import CheckpointError, ConfigError
from wavepath.tasks.base import build
from wavepath.tasks.encoder import arranged, encoder_form, encoder_size, take_encoder
from wavepath.tasks.optim import layer_scales


@pytest.fixture
def foreign(config):
    """An encoder with everything that imported ones may have."""
    config.task = "encoder"
    config.model.mlp, config.model.mlp_hidden, config.model.layer_scale = "swiglu", 24, 0.1
    config.model.register_tokens, config.model.positions, config.model.position_grid = 2, "learned", 3
    config.model.norm_eps = 1e-5
    return config


def start(task, seed=0):
    """A State of random numbers, without compiling the task's own start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), jax.eval_shape(task.init, jax.random.key(0)))


def test_features_have_no_registers_and_padding_changes_nothing(foreign, batch):
    task = build(foreign)
    state = start(task)
    assert state.opt == {} and set(state.params["encoder"]) == {"encoder"}
    found = jax.jit(lambda state, batch: task.predict(state, batch))(state, batch)
    assert set(found) == {"cls", "mean"} and found["cls"].shape == (16, 16) and found["cls"].dtype == jnp.float32
    images = task.normalise(batch["image"].astype(jnp.float32) / 255)
    tokens, _ = jax.jit(task.model.apply)({"params": state.params["encoder"]["encoder"]}, images)
    np.testing.assert_allclose(found["mean"], tokens[:, 1:].mean(axis=1), atol=1e-5)
    assert set(task.predict(state, {"image": batch["image"][:1]}, ["mean"])) == {"mean"}
    with pytest.raises(ValueError, match="unknown outputs"):
        task.predict(state, batch, ["logits"])


def test_it_is_not_trained(foreign, batch):
    task = build(foreign)
    for call in (task.sources, lambda: task.train_step(None, batch), lambda: task.eval_step(None, batch)):
        with pytest.raises(ConfigError, match="no objective to train it; .*--config.init_from=RUN"):
            call()


@pytest.mark.parametrize("scan", [False, True])
def test_pretraining_starts_from_it_with_a_fresh_decoder(foreign, scan):
    encoder = start(build(foreign), seed=3).params
    foreign.task, foreign.model.scan, foreign.ema = "mae", scan, 0.5
    task = build(foreign)
    fresh = start(task)
    state = task.load(fresh, encoder)
    assert set(state.params) == {"mae"}
    got, want = state.params["mae"], encoder["encoder"]["encoder"]
    assert ("scanned" in got["encoder"]["blocks"]) == scan
    np.testing.assert_array_equal(arranged(got["encoder"]["blocks"], False)["1"]["ls2"]["scale"], want["blocks"]["1"]["ls2"]["scale"])
    np.testing.assert_array_equal(arranged(got["encoder"]["blocks"], False)["1"]["mlp"]["fc1"]["kernel"], want["blocks"]["1"]["mlp"]["fc1"]["kernel"])
    np.testing.assert_array_equal(state.ema["mae"]["encoder"]["pos_embed"], want["pos_embed"])
    np.testing.assert_array_equal(got["decoder_embed"]["kernel"], fresh.params["mae"]["decoder_embed"]["kernel"])


@pytest.mark.slow
def test_pretraining_moves_everything_that_the_encoder_has(foreign, batch):
    foreign.task = "mae"
    task = build(foreign)
    state = jax.jit(task.init)(jax.random.key(0))
    moved, metrics = jax.jit(task.train_step)(state, batch)
    assert np.isfinite(metrics["loss"][0])
    still = [
        jax.tree_util.keystr(path) for (path, one), other in
        zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(moved.params), strict=True) if np.array_equal(one, other)
    ]  # fmt: skip
    assert not still


def test_fine_tuning_starts_from_it_and_its_tokens_have_the_lowest_rate(foreign):
    encoder = start(build(foreign), seed=3).params
    foreign.task, foreign.model.scan = "finetune", True
    task = build(foreign)
    task.constants = {"classes": ["a", "b"]}
    state = task.load(start(task), encoder)
    np.testing.assert_array_equal(
        state.params["classifier"]["encoder"]["blocks"]["scanned"]["ls1"]["scale"][1], encoder["encoder"]["encoder"]["blocks"]["1"]["ls1"]["scale"]
    )
    scales = traverse_util.flatten_dict(layer_scales(state.params["classifier"], 2, 0.5), sep="/")
    assert {scales[f"encoder/{name}"] for name in ("cls_token", "reg_token", "pos_embed")} == {0.5**3}


def test_another_form_is_named_with_the_fields_that_make_it(foreign):
    params = start(build(foreign)).params
    foreign.task, foreign.model.layer_scale = "mae", 0.0
    task = build(foreign)
    with pytest.raises(CheckpointError, match="left over: blocks/0/ls1/scale, .*give the model's fields"):
        task.load(start(task), params)
    with pytest.raises(CheckpointError, match="none of them has an encoder"):
        take_encoder(params["encoder"]["encoder"], {"g": {}})


def test_arranged_is_its_own_inverse():
    blocks = {str(number): {"norm1": {"scale": np.full(3, float(number))}} for number in range(11)}
    stacked = arranged(blocks, True)
    np.testing.assert_array_equal(stacked["scanned"]["norm1"]["scale"][:, 0], np.arange(11))
    back = arranged(stacked, False)
    assert list(back) == list(blocks) and back["10"]["norm1"]["scale"][0] == 10
    assert arranged(blocks, False) == blocks


def test_sizes_of_ones_own_and_what_does_not_fit(config):
    model = config.model
    model.variant, model.width, model.depth, model.heads = "custom", 24, 5, 3
    assert tuple(encoder_size(model)) == (24, 5, 3)
    model.heads = 5
    with pytest.raises(ConfigError, match="heads=5 make no encoder; give all three"):
        encoder_size(model)
    model.heads, model.width = 3, 18
    with pytest.raises(ConfigError, match="multiple of 4 for config.model.positions=sincos"):
        encoder_size(model)
    model.variant = "B"
    with pytest.raises(ConfigError, match="config.model.width=18 is of config.model.variant=custom, not 'B'"):
        encoder_size(model)
    model.mlp = "relu"
    with pytest.raises(ConfigError, match="config.model.mlp='relu' is unknown"):
        encoder_form(model)
    model.mlp, model.register_tokens = "gelu", -1
    with pytest.raises(ConfigError, match="config.model.register_tokens=-1 must not be negative"):
        encoder_form(model)
    model.register_tokens = 0
    assert encoder_form(model).grid == 4
