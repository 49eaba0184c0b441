"""Fine-tuning: layer-wise rates, smoothing, what is loaded from a pretrained run, and what the held-out part may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wavepath.config import load_config
from wavepath.errors import CheckpointError, ConfigError
from wavepath.models.classifier import Classifier
from wavepath.tasks import metrics
from wavepath.tasks.base import build
from wavepath.tasks.finetune import smoothed_cross_entropy
from wavepath.tasks.mae import MaskedAutoencoding
from wavepath.tasks.optim import layer_scales

CLASSES = ["a", "b", "c"]


@pytest.fixture
def tuning(config):
    """Plain settings: no augmentation, one rate, so that single parts can be switched on."""
    config.task = "finetune"
    config.augment.crop_scale, config.augment.hflip, config.augment.vflip, config.augment.rot90 = (1.0, 1.0), False, False, False
    config.finetune.rand_ops, config.finetune.erasing, config.finetune.layer_decay = 0, 0.0, 1.0
    return config


def make(config):
    task = build(config)
    task.constants = {"classes": CLASSES}
    return task


@pytest.fixture
def labelled(batch):
    return {**batch, "label": jnp.arange(16, dtype=jnp.int32) % 3}


def start(task, seed=0):
    return jax.jit(task.init)(jax.random.key(seed))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


# The rate of each parameter ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.75, 0.65])
def test_layer_decay_of_every_parameter(decay):
    model = Classifier(16, 3, 2, classes=2, patch=4)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    layer = {"encoder/cls_token": 0, "encoder/patch_embed": 0, "encoder/blocks/0": 1, "encoder/blocks/1": 2, "encoder/blocks/2": 3}
    seen = set()
    for name, scale in flat(layer_scales(params, 3, decay)).items():
        number = next((value for start, value in layer.items() if name.startswith(start)), 4)
        seen.add(number)
        assert scale == pytest.approx(decay ** (4 - number)), name
    assert seen == {0, 1, 2, 3, 4}
    assert flat(layer_scales(params, 3, decay))["head/kernel"] == flat(layer_scales(params, 3, decay))["fc_norm/scale"] == 1


def test_scanned_blocks_have_the_rates_of_the_others():
    model = Classifier(16, 3, 2, classes=2, patch=4, scan=True)
    scanned = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    for name, scale in flat(layer_scales(scanned, 3, 0.5)).items():
        if "scanned" in name:
            np.testing.assert_allclose(np.ravel(scale), [0.125, 0.25, 0.5])
            assert np.ndim(scale) == flat(scanned)[name].ndim


@pytest.mark.slow
def test_a_step_moves_each_layer_by_its_own_rate(tuning, labelled):
    """SGD without decay: the update under layer decay is the plain one times the layer's factor."""
    tuning.finetune.layer_decay = 0.5
    decaying = make(tuning)
    tuning.finetune.layer_decay = 1.0
    plain = make(tuning)
    state = start(plain)
    state.params["classifier"]["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 3))
    before = flat(state.params["classifier"])
    one, _ = jax.jit(plain.train_step)(state, labelled)
    other, _ = jax.jit(decaying.train_step)(state.replace(opt={"classifier": decaying.tx.init(state.params["classifier"])}), labelled)
    scales = flat(layer_scales(state.params["classifier"], 2, 0.5))
    one, other = flat(one.params["classifier"]), flat(other.params["classifier"])
    moved = 0
    for name in before:
        np.testing.assert_allclose(other[name] - before[name], (one[name] - before[name]) * scales[name], atol=1e-6, err_msg=name)
        moved += bool(np.abs(one[name] - before[name]).max() > 1e-4)
    assert moved > len(before) / 2


def test_weight_decay_leaves_out_biases_norms_and_the_class_token(tuning):
    tuning.optim.name, tuning.optim.weight_decay, tuning.optim.warmup = "adamw", 0.5, "0"
    task = make(tuning)
    params = start(task).params["classifier"]
    updates, _ = jax.jit(lambda params: task.tx.update(jax.tree.map(jnp.zeros_like, params), task.tx.init(params), params))(params)
    decays = {name for name, update in flat(updates).items() if np.abs(update).max() > 0}
    assert decays == {name for name in flat(params) if name.endswith("kernel")}


# The loss ---------------------------------------------------------------------------------------------------------------------------------


def test_label_smoothing_in_closed_form():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)), np.array([0, 1, 2, 3, 1])
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.full((5, 4), 0.1 / 4)
    target[np.arange(5), labels] += 0.9
    found = smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(found, -(target * logs).sum(1), rtol=1e-6)
    np.testing.assert_allclose(smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.0), -logs[np.arange(5), labels], rtol=1e-6)


def test_a_fresh_model_knows_nothing_and_training_learns(tuning, labelled):
    labelled["image"] = jnp.broadcast_to((labelled["label"] * 100).astype(jnp.uint8)[:, None, None, None], labelled["image"].shape)
    tuning.lr, tuning.train.steps = 2.0, 40
    task = make(tuning)
    state = start(task)
    step = jax.jit(task.train_step)
    state, first = step(state, labelled)
    assert metrics.compute(first)["loss"] == pytest.approx(np.log(3), abs=1e-3)
    for _ in range(40):
        state, last = step(state, labelled)
    end = metrics.compute(jax.jit(task.eval_step)(state, labelled))
    assert metrics.compute(last).keys() == {"loss", "accuracy", "grad_norm", "lr"} and end["accuracy"] == 1 and end["loss"] < 0.5
    out = jax.jit(lambda state, batch: task.predict(state, batch, ["probability", "mean"]))(state, labelled)
    assert out.keys() == {"probability", "mean"} and out["mean"].shape == (16, 16)
    np.testing.assert_allclose(out["probability"].sum(1), 1, rtol=1e-5)
    assert (out["probability"].argmax(1) == labelled["label"]).all()


def test_padding_counts_nothing_in_an_evaluation(tuning, labelled):
    task = make(tuning)
    state = start(task)
    state.params["classifier"]["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 3))
    evaluate = jax.jit(task.eval_step)
    labelled["mask"] = (jnp.arange(16) < 10).astype(jnp.float32)
    padded = dict(labelled, label=labelled["label"].at[10:].set(0), image=labelled["image"].at[10:].set(255))
    one, other = evaluate(state, labelled), evaluate(state, padded)
    assert float(one["loss"][1]) == float(one["accuracy"][1]) == 10
    assert metrics.compute(one) == pytest.approx(metrics.compute(other), rel=1e-5)
    assert metrics.compute(one) != pytest.approx(metrics.compute(evaluate(state, dict(labelled, mask=jnp.ones(16)))), rel=1e-5)


@pytest.mark.slow
@pytest.mark.multidevice
def test_eight_devices_take_the_same_step_as_one(tuning, labelled):
    from wavepath.training.parallel import Parallel

    tuning.model.drop_path, tuning.finetune.layer_decay = 0.4, 0.75
    ends = []
    for devices in (Parallel("jit", jax.devices()[:1]), Parallel("pmap", jax.devices()[:8])):
        task = make(tuning)
        state = devices.init(task, 0)
        state, found = devices.train_step(task)(state, devices.put({name: np.asarray(value) for name, value in labelled.items()}))
        ends.append((jax.device_get(state.params), metrics.compute(found)))
    (one, values), (eight, again) = ends
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)
    assert again == pytest.approx(values, rel=1e-4)


def test_views_are_of_the_example_and_its_epoch(tuning, labelled):
    from wavepath.ops.random import example_keys

    tuning.finetune.rand_ops, tuning.finetune.erasing, tuning.finetune.rand_probability = 2, 1.0, 1.0
    task = make(tuning)
    keys = example_keys(0, labelled["example_id"], labelled["epoch"])
    views = jax.jit(task.views)
    many = views(labelled["image"], keys)
    np.testing.assert_allclose(views(labelled["image"][::-1], keys[::-1])[::-1], many, atol=1e-5)
    other = views(labelled["image"], example_keys(0, labelled["example_id"], labelled["epoch"] + 1))
    assert (np.abs(many - other).max((1, 2, 3)) > 1e-3).all() and np.isfinite(many).all()


# What is loaded -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(config):
    task = MaskedAutoencoding(config)
    return jax.device_get(start(task, 7).params)


def test_the_encoder_is_loaded_to_the_bit_and_the_rest_stays_fresh(pretrained, tuning, capsys):
    tuning.ema = 0.9
    task = make(tuning)
    fresh = start(task)
    state = task.load(fresh, pretrained)
    for name, value in flat(pretrained["mae"]["encoder"]).items():
        np.testing.assert_array_equal(flat(state.params["classifier"]["encoder"])[name], value)
        np.testing.assert_array_equal(flat(state.ema["classifier"]["encoder"])[name], value)
    for name in ("head", "fc_norm"):
        jax.tree.map(np.testing.assert_array_equal, state.params["classifier"][name], fresh.params["classifier"][name])
    assert "encoder of 'mae'" in (said := capsys.readouterr().err) and "fresh: fc_norm, head" in said


def test_another_size_or_no_encoder_is_refused_by_name(pretrained, tuning):
    tuning.model.patch = 8
    task = make(tuning)
    with pytest.raises(CheckpointError, match="patch_embed/kernel"):
        task.load(start(task), pretrained)
    with pytest.raises(CheckpointError, match="none of them has an encoder"):
        task.load(start(task), {"generator": {"conv": np.zeros(3)}})


def test_a_fine_tuned_run_may_start_another(tuning):
    task = make(tuning)
    first = start(task, 3).params
    state = task.load(start(task), first)
    jax.tree.map(np.testing.assert_array_equal, state.params["classifier"]["encoder"], first["classifier"]["encoder"])


# Settings -----------------------------------------------------------------------------------------------------------------------------------


def test_the_number_of_classes_comes_from_the_labels_or_the_config(tuning):
    task = build(tuning)
    with pytest.raises(ConfigError, match="config.finetune.classes"):
        jax.eval_shape(task.init, jax.random.key(0))
    tuning.finetune.classes = 5
    assert jax.eval_shape(build(tuning).init, jax.random.key(0)).params["classifier"]["head"]["bias"].shape == (5,)
    with pytest.raises(ConfigError, match="the labels name 3"):
        jax.eval_shape(make(tuning).init, jax.random.key(0))


@pytest.mark.parametrize(
    "field, value", [("layer_decay", 0.0), ("layer_decay", 1.5), ("label_smoothing", 1.0), ("erasing", 2.0), ("rand_magnitude", 11.0), ("classes", 1)]
)
def test_impossible_settings_are_refused_by_name(tuning, field, value):
    tuning.finetune[field] = value
    with pytest.raises(ConfigError, match=f"config.finetune.{field}"):
        build(tuning)


def test_the_size_of_a_pretrained_network_is_taken_and_another_is_refused(tmp_path):
    for name in ("fold0", "seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(load_config("configs/wise_mae.py:variant=S").to_json())
    for init in ("fold0", "fold{fold}", "seed{seed}"):
        given = load_config(f"configs/finetune.py:init={tmp_path / init}")
        assert given.model.variant == "S" and given.init_from == str(tmp_path / init), "the pattern stays, so that all folds have one config"
        assert load_config(f"configs/finetune.py:init={tmp_path / init},variant=S").model.variant == "S"
        with pytest.raises(ConfigError, match="variant=L, but .*0 is a S"):
            load_config(f"configs/finetune.py:init={tmp_path / init},variant=L")
    assert load_config("configs/finetune.py").model.variant == "B" and load_config("configs/finetune.py:variant=H").model.patch == 14
