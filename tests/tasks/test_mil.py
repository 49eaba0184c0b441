"""The task `mil`: one answer for a bag whatever its padding and order, the loss in closed form, and learning for every network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wavepath.config import load_config
from wavepath.data.bag_batches import batches, bucket, eval_batches
from wavepath.data.bags import feature_bags
from wavepath.data.synthetic_bags import make_bags
from wavepath.errors import ConfigError
from wavepath.models.mil import instance_loss
from wavepath.tasks import metrics
from wavepath.tasks.base import build
from wavepath.tasks.mil import NETWORKS, class_weights

WIDTH, CLASSES = 6, 3


def setting(name="abmil", **fields):
    config = load_config(f"mil:smoke,network={name}")
    config.batch_size, config.lr, config.mil.buckets = 4, 0.64, ()
    small = dict(embed=0 if name in ("mean", "max") else 8, hidden=8, heads=2, head_width=4, landmarks=4, inst_tiles=3)
    config.mil.update(small | fields)
    return config


def make(network="abmil", dtype="float32", **fields):
    config = setting(network, **fields)
    config.model.dtype = dtype
    task = build(config)
    task.constants = {"classes": [f"c{index}" for index in range(CLASSES)], "width": WIDTH, "longest": 11}
    return task


@pytest.fixture
def batch():
    """Four bags of 5, 8, 1 and 11 tiles, padded to 12."""
    generator = np.random.default_rng(0)
    tiles = np.arange(12) < np.array([5, 8, 1, 11])[:, None]
    features = np.where(tiles[..., None], generator.normal(size=(4, 12, WIDTH)), 0).astype(np.float32)
    return {
        "features": features, "tiles": tiles, "label": np.array([0, 1, 2, 1], np.int32), "example_id": np.array([3, 0, 7, 1], np.int32),
        "epoch": np.array([0, 0, 1, 0], np.int32), "position": np.arange(4, dtype=np.uint32),
        "weight": np.array([0.5, 2.0, 1.5, 2.0], np.float32),
    }  # fmt: skip


def start(task, seed=0):
    """A state without the compilation of an initialisation."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(task.init, jax.random.key(0)).params["mil"]
    params = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes)
    return task.fresh(params).replace(extra={"dropout": jnp.uint32(7)})


def close(one, other, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), one, other)


# One answer for a bag ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["abmil", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clam_mb", "transmil"))])
def test_padding_changes_neither_answers_nor_the_step_with_dropout(network, batch):
    """NaN in the padding, a larger bucket: the same loss, gradients and attention, dropout's draws included."""
    task = make(network, dropout=0.4)
    state = start(task)
    features = np.pad(batch["features"], ((0, 0), (0, 7), (0, 0)), constant_values=np.nan)
    wide = dict(batch, features=features, tiles=np.pad(batch["tiles"], ((0, 0), (0, 7))))
    both = jax.jit(jax.value_and_grad(lambda params, batch: task.loss(params, batch, 7)[0]))
    one, gradient = both(state.params["mil"], batch)
    other, again = both(state.params["mil"], wide)
    assert float(one) == pytest.approx(float(other), rel=1e-5) and float(one) > 0
    close(gradient, again)
    predict = jax.jit(task.predict)
    found, padded = predict(state, batch), predict(state, wide)
    assert not np.asarray(padded["attention"][:, 12:]).any()
    close(found["probability"], padded["probability"])
    close(found["attention"], padded["attention"][:, :12])


def test_dropout_is_of_the_bag_and_the_epoch_alone(batch):
    task = make("abmil", dropout=0.5)
    params = start(task).params["mil"]

    loss = jax.jit(lambda batch, seed: task.loss(params, batch, seed)[0])
    rows = np.eye(4, dtype=np.float32)  # a weight of 1 for one bag is that bag's loss
    alone = np.array([loss(dict(batch, weight=row), 7) for row in rows])
    back = {name: value[::-1] for name, value in batch.items()}
    np.testing.assert_allclose([loss(dict(back, weight=row), 7) for row in rows][::-1], alone, rtol=1e-5)
    np.testing.assert_array_equal([loss(dict(batch, weight=row, position=batch["position"] + 5), 7) for row in rows], alone)
    for other in ([loss(dict(batch, weight=row, epoch=batch["epoch"] + 1), 7) for row in rows], [loss(dict(batch, weight=row), 8) for row in rows]):
        assert (np.abs(other - alone) > 1e-5).sum() >= 3


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "transmil"])
def test_the_order_of_tiles_does_not_matter(network, batch):
    task = make(network)
    state, order = start(task), np.random.default_rng(1).permutation(12)
    turned = dict(batch, features=batch["features"][:, order], tiles=batch["tiles"][:, order])
    predict = jax.jit(task.predict)
    found, other = predict(state, batch), predict(state, turned)
    close(found["probability"], other["probability"])
    close(found["attention"][:, order], other["attention"])
    np.testing.assert_allclose(found["attention"].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found["probability"].sum(1), 1, rtol=1e-5)
    assert (found["attention"] >= 0).all() and not np.asarray(found["attention"])[~batch["tiles"]].any()


def test_attention_of_several_branches(batch):
    task = make("clam_mb")
    state = start(task)
    found = jax.jit(task.predict)(state, batch)
    assert found["class_attention"].shape == (4, CLASSES, 12)
    chosen = np.asarray(found["logits"]).argmax(1)
    np.testing.assert_array_equal(found["attention"], np.asarray(found["class_attention"])[np.arange(4), chosen])
    assert jax.eval_shape(lambda: task.predict(state, batch, ["attention"])).keys() == {"attention"}
    plain = make("abmil")
    assert jax.eval_shape(lambda: plain.predict(start(plain), batch, ["class_attention", "logits"])).keys() == {"logits"}
    with pytest.raises(ValueError, match="cls"):
        task.predict(state, batch, ["cls"])


# The loss -----------------------------------------------------------------------------------------------------------------------------------------


def test_class_weights_in_closed_form():
    assert class_weights([30, 10], "balanced") == [40 / 60, 2.0] and class_weights([30, 10], "none") == [1.0, 1.0]
    counts = [7, 20, 3]
    assert sum(count * weight for count, weight in zip(counts, class_weights(counts, "balanced"), strict=True)) == pytest.approx(sum(counts))


@pytest.mark.parametrize("network", ["abmil", "clam_sb"])
def test_the_loss_is_the_weighted_sum_of_its_parts(network, batch):
    task = make(network, dropout=0.0, bag_weight=0.6, inst_weight=0.4, subtyping=True)
    params = start(task).params["mil"]
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    out = jax.jit(task.model.apply)({"params": params}, batch["features"], batch["tiles"])
    logs = np.asarray(jax.nn.log_softmax(out["logits"]))
    bag = -np.array([0.5, 2.0, 1.5, 2.0]) * logs[np.arange(4), batch["label"]]
    value, found = jax.jit(task.loss)(params, batch)
    found = metrics.compute(found)
    if network == "abmil":
        assert found.keys() == {"loss", "accuracy"} and float(value) == pytest.approx(bag.mean(), rel=1e-5)
    else:
        tiles = instance_loss(out["instance_logits"], batch["label"], out["attention"], batch["tiles"], top=3, subtyping=True)
        assert float(value) == pytest.approx(float((0.6 * bag + 0.4 * tiles).mean()), rel=1e-5) == pytest.approx(found["loss"], rel=1e-5)
        assert found["bag_loss"] == pytest.approx(bag.mean(), rel=1e-5) and found["instance_loss"] == pytest.approx(float(tiles.mean()), rel=1e-5)
    evaluated = metrics.compute(jax.jit(task.eval_step)(start(task), batch))
    assert evaluated["loss"] == pytest.approx(bag.mean(), rel=1e-5), "the bag's alone: what early stopping goes by"
    assert found["accuracy"] == np.mean(logs.argmax(1) == np.asarray(batch["label"]))


def test_rows_that_fill_up_an_evaluation_count_nothing(batch):
    task = make("clam_sb")
    state, evaluate = start(task), jax.jit(task.eval_step)
    masked = dict(batch, mask=np.array([1, 1, 1, 0], np.float32))
    part = evaluate(state, masked)
    features = np.concatenate([batch["features"][:3], 9 * batch["features"][3:]])
    other = evaluate(state, dict(masked, label=np.array([0, 1, 2, 0], np.int32), features=features))
    assert float(part["loss"][1]) == 3 and metrics.compute(part) == pytest.approx(metrics.compute(other), rel=1e-5)


@pytest.mark.parametrize("network", ["abmil", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clam_mb", "transmil"))])
def test_gradients_by_finite_differences(network, batch):
    with jax.enable_x64(True):
        task = make(network, dtype="float64", dropout=0.3)
        params = start(task).params["mil"]
        given = {name: jnp.asarray(value, jnp.float64) if name == "features" else jnp.asarray(value) for name, value in batch.items()}
        loss = jax.jit(jax.value_and_grad(lambda params: task.loss(params, given)[0]))
        _, gradient = loss(params)
        generator, step = np.random.default_rng(5), 1e-6
        direction = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), params)
        ahead, behind = (loss(jax.tree.map(lambda p, d: p + sign * step * d, params, direction))[0] for sign in (1, -1))  # noqa: B023
        along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        assert float((ahead - behind) / (2 * step)) == pytest.approx(float(along), rel=1e-6) and abs(float(along)) > 1e-3


# Steps ------------------------------------------------------------------------------------------------------------------------------------------


def test_weight_decay_is_l2_in_adam(batch):
    """One step of Adam from zero moments is a step of the rate along the sign of gradient plus decay times parameter."""
    config = setting("mean")
    config.optim.weight_decay, config.lr, config.batch_size = 0.5, 0.64, 4
    task = build(config)
    task.constants = make("mean").constants
    state = start(task)
    state.params["mil"]["head"]["bias"] = jnp.full(CLASSES, 100.0)  # so that the decay decides
    before = jax.device_get(state.params["mil"])
    gradient = jax.jit(jax.grad(lambda params: task.loss(params, batch)[0]))(before)
    after, _ = jax.jit(task.train_step)(state, batch)
    moved = jax.tree.map(lambda p, g: p - 0.01 * np.sign(g + 0.5 * p), before, gradient)
    close(after.params["mil"], moved, atol=1e-5)


@pytest.mark.slow
@pytest.mark.multidevice
def test_eight_devices_take_the_same_step_as_one(batch):
    from wavepath.training.parallel import Parallel

    double = {name: np.concatenate([value, value]) for name, value in batch.items()}
    double["example_id"] = np.arange(8, dtype=np.int32)
    ends = []
    for devices in (Parallel("jit", jax.devices()[:1]), Parallel("pmap", jax.devices()[:8])):
        config = setting("abmil", dropout=0.4)
        config.batch_size, config.optim.name = 8, "sgd"
        task = build(config)
        task.constants = make().constants
        state, found = devices.train_step(task)(devices.place(start(task)), devices.put(double))
        ends.append((jax.device_get(state.params), metrics.compute(found)))
    for params, values in ends[1:]:
        close(params, ends[0][0], atol=1e-6)
        assert values == pytest.approx(ends[0][1], rel=1e-4)


def test_a_run_compiles_one_step_for_each_bucket(tmp_path):
    features, labels = make_bags(tmp_path, 12, width=WIDTH, tiles=(3, 45))
    source = feature_bags(features, labels=labels)
    config = setting("mean")
    config.batch_size = 2
    task = build(config)
    task.constants = {"classes": ["a", "b"], "width": WIDTH}
    step, state = jax.jit(task.train_step), start(task)
    sizes = set()
    for _, batch in zip(range(30), batches(source, batch_size=2, seed=0), strict=False):
        state, _ = step(state, batch)
        sizes.add(batch["features"].shape[1])
    possible = {bucket(int(length)) for length in source.lengths}
    # Another seed and other class weights are no other program, so folds share what was compiled.
    step(state.replace(extra={"dropout": jnp.uint32(99)}), dict(batch, weight=np.array([3, 0.1], np.float32)))
    assert step._cache_size() == len(sizes) <= len(possible) < len(set(source.lengths.tolist()))


# Settings -----------------------------------------------------------------------------------------------------------------------------------------


def test_shapes_are_known_from_the_constants_or_the_config():
    task = make("clam_sb")
    spec = task.batch_spec()
    assert spec["features"].shape == (4, 16, WIDTH) and spec["tiles"].shape == (4, 16) and task.flops() > 0
    bare = build(setting("transmil", classes=2, features=32, max_tiles=1000))
    assert bare.batch_spec()["features"].shape == (4, 1024, 32) and jax.eval_shape(bare.init, jax.random.key(0)).params["mil"]
    assert bare.flops() > build(setting("mean", classes=2, features=32, max_tiles=1000)).flops() > 0
    with pytest.raises(ConfigError, match="config.mil.classes"):
        jax.eval_shape(build(setting(features=4)).init, jax.random.key(0))
    with pytest.raises(ConfigError, match="config.mil.features"):
        jax.eval_shape(build(setting(classes=2)).init, jax.random.key(0))
    with pytest.raises(ConfigError, match="config.mil.max_tiles"):
        build(setting(classes=2, features=4)).batch_spec()
    with pytest.raises(ConfigError, match="config.mil.classes=2, but the data have 3"):
        jax.eval_shape(make(classes=2).init, jax.random.key(0))


@pytest.mark.parametrize(("network", "fields", "message"), [
    ("abmil", {"network": "dsmil"}, "network='dsmil' is unknown; choose one of abmil, abmil_plain"),
    ("abmil", {"class_weights": "inverse"}, "class_weights='inverse'"),
    ("clam_sb", {"embed": -1}, "clam_sb needs its first layer"),
    ("clam_sb", {"inst_tiles": 0}, "inst_tiles=0"),
    ("clam_sb", {"inst_weight": -0.3}, "must not be negative"),
    ("abmil", {"dropout": 1.0}, "dropout=1.0 must be below 1"),
    ("abmil", {"classes": 1}, "at least 2"),
    ("abmil", {"max_tiles": -1}, "max_tiles=-1"),
])  # fmt: skip
def test_settings_that_cannot_be(network, fields, message):
    with pytest.raises(ConfigError, match=message):
        build(setting(network, **fields))


def test_other_labels_or_another_split_are_not_gone_on_with(tmp_path):
    features, labels = make_bags(tmp_path, 24, width=WIDTH)
    config = setting()
    config.data.bags, config.data.labels = str(features), str(labels)
    task = build(config)
    source = task.sources()
    task.constants = task.measure(source)
    assert task.constants["split"]["validation"] == source.held_out.slides and task.constants["split"]["test"] == source.test.slides
    assert task.constants["train_slides"] == sorted([*source.slides, *source.held_out.slides])
    assert task.constants["class_weights"] == class_weights(list(source.counts().values()), "balanced")
    assert task.held_out(source) is source.held_out
    config.data.fold = 1
    other = build(config)
    other.constants = task.constants
    with pytest.raises(ConfigError, match="not those that the run began with .*split"):
        other.held_out(other.sources())
    config.mil.validation = 0.0
    bare = build(config)
    source = bare.sources()
    with pytest.raises(ConfigError, match=r"patience=3 needs a validation part, and fold 1 of 3 has none"):
        bare.held_out(source)
    config.train.patience = 0
    assert build(config).held_out(source) is source.test


# Learning -----------------------------------------------------------------------------------------------------------------------------------------


def learnt(network, folder, steps):
    """AUC on bags that were not trained on."""
    from sklearn.metrics import roc_auc_score

    features, labels = make_bags(folder, 100, width=WIDTH, tiles=(10, 40), strength=4.0)
    whole = feature_bags(features, labels=labels)
    train, test = whole.part(range(60)), whole.part(range(60, 100))
    config = setting(network, embed=32, hidden=16, buckets=(40,), dropout=-1.0)
    config.batch_size, config.lr, config.train.steps = 10, 0.01 * 25.6, steps
    task = build(config)
    task.constants = {"classes": ["a", "b"], "width": WIDTH}
    state, step = jax.jit(task.init)(jax.random.key(0)), jax.jit(task.train_step)
    for _, batch in zip(range(steps), batches(train, batch_size=10, seed=0), strict=False):
        state, _ = step(state, batch)
    predict = jax.jit(lambda state, batch: task.predict(state, batch, ["probability"])["probability"][:, 1])
    scores = np.concatenate([predict(state, batch) for batch in eval_batches(test, 10)])
    return roc_auc_score(test.labels, scores)


def test_abmil_learns_to_tell_slides_by_few_tiles(tmp_path):
    assert learnt("abmil", tmp_path, 80) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "abmil"])
def test_every_network_learns(network, tmp_path):
    assert learnt(network, tmp_path, 60 if network == "transmil" else 150) > 0.95


def test_the_rate_is_that_of_one_slide_a_step():
    config = load_config("mil:network=clam_sb")
    config.train.steps, config.train.epochs, config.train.eval_epochs = 100, 0.0, 0.0
    task = build(config)
    assert float(task.rate(0)) == float(task.rate(99)) == pytest.approx(2e-4) and config.optim.weight_decay == 1e-5
    assert isinstance(task.tx, optax.GradientTransformation)
