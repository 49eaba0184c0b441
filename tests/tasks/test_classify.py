"""The classifier with batch normalisation: what couples the batch in training and what does not in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.resnet import DEPTHS
from wavepath.tasks import metrics
from wavepath.tasks.base import build
from wavepath.training.parallel import Parallel


@pytest.fixture
def classify(config, monkeypatch):
    monkeypatch.setitem(DEPTHS, 4, ((1,), False))
    config.task, config.classify.depth = "classify", 4
    config.model.image_size = config.prepare.tiles.size = 32
    config.augment.crop_scale, config.augment.rot90 = (1.0, 1.0), False
    config.finetune.rand_ops, config.finetune.erasing, config.finetune.label_smoothing = 0, 0.0, 0.0
    config.lr, config.train.steps = 1.0, 30
    return config


@pytest.fixture
def labelled(batch):
    label = jnp.arange(16, dtype=jnp.int32) % 3
    coarse = np.random.default_rng(0).integers(0, 100, (16, 8, 8, 3)) + 70 * np.asarray(label)[:, None, None, None]
    return {**batch, "image": jnp.asarray(coarse.repeat(4, 1).repeat(4, 2), jnp.uint8), "label": label}


def make(config):
    task = build(config)
    task.constants = {"classes": ["a", "b", "c"]}
    return task


def test_training_learns_and_evaluation_does_not_look_at_the_batch(classify, labelled):
    task = make(classify)
    state = jax.jit(task.init)(jax.random.key(0))
    assert set(state.stats) == {"resnet"} == set(state.params)
    step = jax.jit(task.train_step)
    before = state.stats["resnet"]["bn1"]["mean"]
    for index in range(30):
        state, sums = step(state, labelled)
        if not index:
            first = metrics.compute(sums)
            assert float(jnp.abs(state.stats["resnet"]["bn1"]["mean"] - before).max()) > 0
    assert first.keys() == {"loss", "accuracy", "grad_norm", "lr"}
    end = metrics.compute(jax.jit(task.eval_step)(state, labelled))
    assert end["accuracy"] == 1 and end["loss"] < 0.5 * first["loss"]
    predict = jax.jit(lambda state, batch: task.predict(state, batch, ["probability", "mean"]))
    whole = predict(state, labelled)
    part = predict(state, {name: value[5:7] for name, value in labelled.items()})
    np.testing.assert_allclose(whole["probability"][5:7], part["probability"], atol=1e-5)
    assert whole["mean"].shape == (16, 64)
    # Larger images: the mean of their windows, what is left over cut at the border.
    wide = jnp.concatenate([labelled["image"][:2], labelled["image"][1:3]], axis=2)
    wide = jnp.pad(wide, ((0, 0), (0, 0), (3, 4), (0, 0)))
    both = predict(state, {"image": wide})
    np.testing.assert_allclose(both["probability"], (whole["probability"][:2] + whole["probability"][1:3]) / 2, atol=1e-5)
    with pytest.raises(ConfigError, match="at most 20"):
        predict(state, {"image": wide[:, :20]})


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_step_on_eight_devices_is_that_on_one(classify, labelled):
    """Gradients of batch-normalised networks are ill-conditioned in float32: losses and running statistics are compared."""
    found = []
    for backend, devices in (("jit", 1), ("pmap", 8)):
        parallel = Parallel(backend, jax.devices("cpu")[:devices])
        task = make(classify)
        state, sums = parallel.train_step(task)(parallel.init(task, 0), parallel.put({name: np.asarray(x) for name, x in labelled.items()}))
        found.append((metrics.compute(sums)["loss"], state.stats))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found[0][1], found[1][1])


@pytest.mark.parametrize("field, value, words", [
    ("classify.depth", 20, "depth=20 is unknown"), ("model.image_size", 16, "too small"), ("ema", 0.9, "must be 0"),
    ("optim.accumulate", 2, "would change"),
])
def test_settings_that_do_not_fit(classify, field, value, words):
    classify.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=words):
        build(classify)
