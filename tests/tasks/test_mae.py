import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.vit import VARIANTS, Variant
from wavepath.ops import collectives
from wavepath.ops.patches import patchify
from wavepath.ops.random import example_keys
from wavepath.tasks import metrics
from wavepath.tasks.base import build

STATES = {}  # compiling `init` takes longer than anything else here, and few settings change what it gives


def start(config):
    task = build(config)
    kind = (VARIANTS["test"], config.model.dtype, config.model.decoder_width, config.optim.name, config.ema > 0)
    if kind not in STATES:
        STATES[kind] = jax.jit(task.init)(jax.random.key(0))
    return task, jax.tree.map(jnp.copy, STATES[kind])


def step(config, batch, devices=1):
    """One step on one device, or under pmap as training/parallel runs it; returns (update, metrics)."""
    task, state = start(config)
    if devices == 1:
        after, sums = jax.jit(task.train_step)(state, batch)
    else:

        def body(state, batch):
            with collectives.axis("data"):
                after, sums = task.train_step(state, batch)
                return after, metrics.reduce(sums)

        split = {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}
        run = jax.pmap(body, axis_name="data", in_axes=(None, 0), out_axes=(None, None), devices=jax.devices("cpu")[:devices])
        after, sums = run(state, split)
    update = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after.params, state.params)
    return np.concatenate([x.ravel() for x in jax.tree.leaves(update)]), metrics.compute(sums)


def difference(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(one)


def test_train_step_moves_counts_and_reports(config, batch):
    config.ema = 0.75
    task, state = start(config)
    after, sums = jax.jit(task.train_step)(state, batch)
    values = metrics.compute(sums)
    assert set(values) == {"loss", "grad_norm", "lr"} and int(after.step) == 1
    assert 0.5 < values["loss"] < 2.0 and values["grad_norm"] > 0
    np.testing.assert_allclose(values["lr"], 0.1 * 16 / 256, rtol=1e-6)
    jax.tree.map(
        lambda a, old, new: np.testing.assert_allclose(a, 0.75 * old + 0.25 * new, atol=1e-6), after.ema, state.params, after.params
    )
    spec = task.batch_spec()
    assert {k: (v.shape, v.dtype) for k, v in spec.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}


def test_the_loss_does_not_depend_on_predictions_at_visible_patches(config, batch):
    task, state = start(config)
    images, masking = task._fixed(batch)
    params = {"params": state.params["mae"]}
    _, out = jax.jit(task.model.apply)(params, images, masking)

    def loss(decoded):
        return task.error(task.model.apply(params, decoded, masking, method="predict"), images, masking)[0].mean()

    grad = np.asarray(jax.jit(jax.grad(loss))(out["decoded"]))
    np.testing.assert_array_equal(grad[:, : 1 + masking.keep], 0)
    assert (np.abs(grad[:, 1 + masking.keep :]).max(axis=2) > 0).all()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_loss_is_the_mean_over_masked_patches(config, batch, norm_pix):
    config.loss.norm_pix = norm_pix
    task, _ = start(config)
    images, masking = task._fixed(batch)
    prediction = np.asarray(jax.random.normal(jax.random.key(3), (16, 12, 48)))
    target = np.asarray(patchify(images, 4), np.float64)
    if norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    want = np.zeros(16)
    for example in range(16):
        hidden = np.asarray(masking.order)[example, 4:]
        want[example] = ((prediction[example] - target[example, hidden]) ** 2).mean()
    np.testing.assert_allclose(task.error(jnp.asarray(prediction), images, masking)[0], want, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [0, 2])
def test_accumulated_steps_equal_whole_ones(config, batch, groups):
    config.model.mask_groups = groups
    whole, values = step(config, batch)
    config.optim.accumulate = 4
    accumulated, again = step(config, batch)
    assert difference(whole, accumulated) < 1e-5
    np.testing.assert_allclose(values["loss"], again["loss"], rtol=1e-6)


CASES = {
    "all": dict(groups=4, drop_path=0.4, accumulate=2),  # groups of four examples on devices of two, worked through one by one
    "contrast": dict(contrast=0.5),
    "plain": dict(),
    "groups": dict(groups=8),
    "straddling groups": dict(groups=4),
    "accumulate": dict(accumulate=2),
    "drop path": dict(drop_path=0.4),
}


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("case", list(CASES))
def test_eight_devices_take_the_same_step_as_one(config, batch, case):
    case = CASES[case]
    config.model.mask_groups, config.model.drop_path = case.get("groups", 0), case.get("drop_path", 0.0)
    config.loss.contrast_weight, config.optim.accumulate = case.get("contrast", 0.0), case.get("accumulate", 1)
    one, values = step(config, batch)
    eight, again = step(config, batch, devices=8)
    assert difference(one, eight) < (1e-2 if case.get("contrast") else 1e-5)
    for name, value in values.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("contrast", [0.5, 0.0])
def test_in_float64_eight_devices_agree_to_rounding(config, batch, contrast):
    config.loss.contrast_weight = contrast
    config.model.dtype = "float64"
    with jax.enable_x64(True):
        one, _ = step(config, batch)
        eight, _ = step(config, batch, devices=8)
    assert one.dtype == np.float64 and difference(one, eight) < 1e-9


def test_views_and_masks_belong_to_the_example_not_to_its_place(config, batch):
    config.model.drop_path = 0.3
    task, state = start(config)
    params = state.params["mae"]

    @jax.jit
    def losses(part):
        keys = example_keys(config.seed, part["example_id"], part["epoch"])
        images, masking = task._view(part, keys, "")
        prediction, _ = task.model.apply({"params": params}, images, masking, keys)
        return task.error(prediction, images, masking)[0]

    def each(rows):
        """Loss of every single example, computed in a batch of these rows."""
        return losses({name: x[rows] for name, x in batch.items()})

    whole = np.asarray(each(np.arange(16)))
    rows = np.asarray([7, 2, 11, 3])
    np.testing.assert_allclose(each(rows), whole[rows], rtol=1e-5)
    batch["epoch"] = batch["epoch"] + 1
    assert np.abs(np.asarray(each(np.arange(16))) - whole).max() > 1e-3


@pytest.mark.slow
def test_group_masks_are_shared_within_a_group_and_differ_between_groups(config, batch):
    config.model.mask_groups = 4
    task = build(config)
    keys = example_keys(0, batch["example_id"], batch["epoch"])
    _, masking = task._view(batch, keys, "")
    assert masking.order.shape == (4, 16) and len(np.unique(masking.order, axis=0)) == 4
    # A shard that holds half a group draws the group's mask.
    half = {name: x[2:4] for name, x in batch.items()}
    _, part = task._view(half, keys[2:4], "")
    np.testing.assert_array_equal(part.order[0], masking.order[0])
    _, second = task._view(batch, keys, "_second")
    assert (np.asarray(second.order) != np.asarray(masking.order)).any()


def test_contrast_adds_its_weight_times_infonce(config, batch):
    plain_update, plain = step(config, batch)
    config.loss.contrast_weight = 0.1
    update, values = step(config, batch)
    np.testing.assert_allclose(values["reconstruction"], plain["loss"], rtol=1e-5)
    np.testing.assert_allclose(values["loss"], values["reconstruction"] + 0.1 * values["contrast"], rtol=1e-5)
    assert 0 <= values["contrast_accuracy"] <= 1 and 0 < values["contrast"] < 5
    assert difference(plain_update, update) > 1e-3


def test_eval_is_deterministic_and_padding_counts_nothing(config, batch):
    task, state = start(config)
    run = jax.jit(task.eval_step)
    whole = metrics.compute(run(state, {**batch, "mask": np.ones(16, np.float32)}))
    again = metrics.compute(run(state, {**batch, "epoch": batch["epoch"] + 5, "mask": np.ones(16, np.float32)}))
    assert whole == again
    parts = []
    for rows in (np.arange(10), np.arange(10, 16)):
        padded = {name: jnp.concatenate([x[rows], x[: 16 - len(rows)]]) for name, x in batch.items()}
        parts.append(run(state, {**padded, "mask": (np.arange(16) < len(rows)).astype(np.float32)}))
    np.testing.assert_allclose(metrics.compute(metrics.merge(parts))["loss"], whole["loss"], rtol=1e-5)


def test_predictions_and_pictures(config, batch):
    task, state = start(config)
    out = jax.jit(task.predict)(state, batch)
    assert {name: value.shape for name, value in out.items()} == {
        "cls": (16, 16), "mean": (16, 16), "input": (16, 16, 16, 3), "masked": (16, 16, 16, 3), "reconstruction": (16, 16, 16, 3),
    }
    np.testing.assert_allclose(out["input"], np.asarray(batch["image"]) / 255, atol=1e-5)
    patches = {name: np.asarray(patchify(out[name], 4)) for name in ("input", "masked", "reconstruction")}
    hidden = np.isclose(patches["masked"], 0.5, atol=1e-5).all(-1)
    np.testing.assert_array_equal(hidden.sum(1), 12)
    for name in ("masked", "reconstruction"):
        np.testing.assert_allclose(patches[name][~hidden], patches["input"][~hidden], atol=1e-5)
    assert np.abs(patches["reconstruction"] - patches["input"])[hidden].max() > 0.01
    assert 0 <= min(float(v.min()) for k, v in out.items() if v.ndim == 4) and "mean and deviation" in task.caption


def test_predict_limits_itself_to_what_is_asked_and_needs_images_alone(config, batch):
    task, state = start(config)
    only = jax.jit(lambda s, b: task.predict(s, b, ("mean",)))
    out = only(state, {"image": batch["image"]})
    assert list(out) == ["mean"]
    products = [
        jax.jit(lambda s, b, names=names: task.predict(s, b, names)).lower(state, batch).as_text().count("dot_general")
        for names in (("mean",), ("reconstruction",), None)
    ]
    assert products[0] < products[1] < products[2] == products[0] + products[1]
    with pytest.raises(ValueError, match="logits"):
        task.predict(state, batch, ("logits",))


def test_evaluation_uses_averaged_parameters_where_kept(config, batch):
    config.ema = 0.5
    task, state = start(config)
    moved = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    run = jax.jit(lambda s, b: task.predict(s, b, ("cls",)))
    np.testing.assert_array_equal(run(moved, batch)["cls"], run(state, batch)["cls"])


def test_flops_count_the_second_view(config):
    plain = build(config).flops()
    config.loss.contrast_weight = 0.1
    assert 1.1 * plain < build(config).flops() < 2 * plain


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("patch", 5, "patch=5"), ("decoder_heads", 3, "decoder_heads=3"), ("mask_ratio", 1.0, "mask_ratio"), ("mask_ratio", 0.0, "visible"),
        ("mask_groups", 3, "mask_groups=3"), ("dtype", "int8", "dtype"), ("variant", "Q", "variant"), ("drop_path", 1.0, "drop_path"),
    ],
)
def test_settings_that_do_not_fit_are_named(config, field, value, text):
    config.model[field] = value
    with pytest.raises(ConfigError, match=text):
        build(config)


@pytest.mark.slow
def test_one_repeated_batch_overfits_to_near_zero(config, batch, monkeypatch):
    """The same four tiles with the same masks and no augmentation: the masked patches can be learned by heart."""
    monkeypatch.setitem(VARIANTS, "test", Variant(64, 3, 4))
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = 64, 2, 4
    config.optim.update(dict(name="adamw", warmup="20", weight_decay=0.0, b2=0.95))
    config.augment.update(dict(crop_scale=(1.0, 1.0), hflip=False, vflip=False, rot90=False))
    config.batch_size, config.lr, config.train.steps, config.loss.norm_pix = 4, 0.2, 400, False
    task, state = start(config)
    run = jax.jit(task.train_step, donate_argnums=0)
    few = {name: x[:4] for name, x in batch.items()}
    losses = []
    for _ in range(400):
        state, sums = run(state, few)
        losses.append(sums["loss"])
    losses = [float(total / count) for total, count in jax.device_get(losses)]
    assert losses[0] > 0.5 and losses[-1] < 0.005 * losses[0]
