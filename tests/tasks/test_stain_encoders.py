"""Encoders of stained pairs: one place on both sides, two networks that share nothing, no padding among the negatives, one step on any devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from wavepath.config import load_config
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.models.stain_encoder import encoder_flops
from wavepath.ops.random import example_keys
from wavepath.ops.similarity import info_nce
from wavepath.tasks import metrics
from wavepath.tasks.base import TASKS, build
from wavepath.tasks.stain_encoders import _among, least_side
from wavepath.training import parallel


def settings(**fields):
    """Encoders of one block and four channels."""
    config = train_defaults()
    config.task, config.batch_size, config.lr, config.train.steps = "stain_encoders", 8, 0.1, 10
    config.optim.name, config.optim.warmup, config.optim.schedule = "sgd", "0", "constant"
    config.stain.update(dict(crop=32, margin=8, encoder_channels=4, encoder_blocks=1))
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def batch_of(task, seed=0):
    """Pairs whose immunostain is the H&E with its channels exchanged and darkened: places can be recognised."""
    rng, (b, side) = np.random.default_rng(seed), task.batch_spec()["he"].shape[:2]
    he = rng.integers(0, 256, (b, side // 4, side // 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    ids = {"example_id": np.arange(b, dtype=np.int32) * 5, "epoch": np.ones(b, np.int32), "position": np.arange(b, dtype=np.uint32)}
    return {name: jnp.asarray(value) for name, value in {"he": he, "ihc": he[..., ::-1] // 2, **ids}.items()}


@pytest.fixture(scope="module")
def small():
    """A task, the shapes of its state, a batch."""
    task = build(settings())
    return SimpleNamespace(task=task, state=jax.eval_shape(task.init, jax.random.key(0)), batch=batch_of(task))


# The data ---------------------------------------------------------------------------------------------------------------------------------


def test_both_sides_show_one_place_which_belongs_to_the_example(small):
    task, batch = small.task, small.batch
    assert {name: spec.shape for name, spec in task.batch_spec().items() if spec.ndim == 4} == dict.fromkeys(("he", "ihc"), (8, 40, 40, 3))
    views = jax.jit(task.views)
    keys = example_keys(0, batch["example_id"], batch["epoch"])
    seen = views(batch, keys)
    he, ihc = (np.rint(np.asarray(seen[name]) * 255).astype(int) for name in ("he", "ihc"))
    assert he.shape == ihc.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(ihc, he[..., ::-1] // 2)
    assert not np.array_equal(he, np.asarray(batch["he"])[:, 4:36, 4:36])
    turned = views({name: np.asarray(value)[::-1] for name, value in batch.items()}, keys[::-1])
    np.testing.assert_array_equal(np.asarray(turned["he"])[::-1], seen["he"])
    np.testing.assert_array_equal(np.rint(np.asarray(views(batch)["he"]) * 255), np.asarray(batch["he"])[:, 4:36, 4:36])


def test_a_batch_larger_than_the_set_is_refused(small):
    source = SimpleNamespace(name="pairs", slides=["b", "a"], spans=[SimpleNamespace(mpp=0.5, start=0, stop=8)], __len__=None)
    kind = type("Source", (), {"__len__": lambda self: self.count, **{name: value for name, value in vars(source).items() if name != "__len__"}})
    full, short = kind(), kind()
    full.count, short.count = 8, 7
    assert small.task.measure(full) == {"train_slides": ["a", "b"], "mpp": 0.5}
    with pytest.raises(DatasetError, match="7 training windows, fewer than config.batch_size=8"):
        small.task.measure(short)


# The networks -----------------------------------------------------------------------------------------------------------------------------


def test_two_networks_of_the_published_size_that_start_apart(small):
    shapes = jax.eval_shape(build(settings(stain__crop=256, stain__encoder_channels=64, stain__encoder_blocks=6)).init, jax.random.key(0))
    assert {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.params.items()} == {"he": 18_740_288, "ihc": 18_740_288}
    params, stats = small.state.params, small.state.stats
    assert params.keys() == stats.keys() == small.state.opt.keys() == {"he", "ihc"}
    group = jax.eval_shape(build(settings(stain__crop=64, stain__encoder_norm="group")).init, jax.random.key(0))
    assert group.stats == {"he": {}, "ihc": {}} and jax.tree.structure(group.params) == jax.tree.structure(params)
    assert small.task.flops() == 6 * encoder_flops(32, 4, 1)


def test_outputs_are_what_the_batch_allows(small):
    out = jax.eval_shape(small.task.predict, small.state, {name: small.batch[name] for name in ("he", "ihc")})
    assert {name: value.shape for name, value in out.items()} == {
        "he": (8, 64), "ihc": (8, 64), "cosine": (8,), "input": (8, 40, 40, 3), "target": (8, 40, 40, 3),
    }
    assert list(jax.eval_shape(small.task.predict, small.state, {"ihc": jnp.zeros((1, 36, 20, 3), jnp.uint8)})) == ["ihc", "target"]
    with pytest.raises(ValueError, match=r"unknown outputs \['cosine'\]; of this batch there are \['he', 'input'\]"):
        small.task.predict(small.state, {"he": small.batch["he"]}, ["cosine"])
    with pytest.raises(ConfigError, match="divisible by 4"):
        small.task.predict(small.state, {"he": jnp.zeros((1, 30, 32, 3), jnp.uint8)})


# Evaluation -------------------------------------------------------------------------------------------------------------------------------


def test_padding_is_nobodys_negative():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 6, 3)).astype(np.float32)
    query, key = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, key))
    among, reference = (jax.jit(function, static_argnums=(number,)) for function, number in ((_among, 3), (info_nce, 2)))
    one, many = np.ones(4, np.float32), np.ones(6, np.float32)
    padded = np.concatenate([query[:4], query[:2]]), np.concatenate([key[:4], query[:2]]), np.concatenate([one, [0, 0]]).astype(np.float32)
    for (loss, hit, others, count), rows in ((among(query, key, many, 0.5), 6), (among(*padded, 0.5), 4)):
        want = reference(query[:rows], key[:rows], 0.5)
        np.testing.assert_allclose(loss[:rows], want[0], rtol=1e-5)
        np.testing.assert_array_equal(hit[:rows], want[1])
        cosines = query[:rows] @ key[:rows].T
        np.testing.assert_allclose(others[:rows], cosines.sum(axis=1) - np.diag(cosines), rtol=1e-4, atol=1e-6)
        assert float(count) == rows


@pytest.mark.slow
def test_evaluation_of_a_batch_that_is_not_full(small):
    task, batch = build(settings(stain__crop=32, stain__encoder_channels=8, stain__encoder_norm="group")), small.batch
    state = jax.jit(task.init)(jax.random.key(0))
    kernels = [state.params[name]["down"]["conv1"]["kernel"] for name in ("he", "ihc")]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01 and all(0.01 < kernel.std() < 0.03 for kernel in kernels)
    evaluate = jax.jit(task.eval_step)
    mask = jnp.asarray([1.0] * 5 + [0] * 3)
    full = {name: value[:5] for name, value in batch.items()}
    part, whole = (metrics.compute(evaluate(state, given)) for given in ({**batch, "mask": mask}, full))
    assert part.keys() == {"loss", "accuracy", "chance", "cosine", "cosine_others"}
    assert part["chance"] == pytest.approx(0.2)
    for name, value in whole.items():
        assert part[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    out = jax.jit(task.predict)(state, {name: full[name][:, 4:36, 4:36] for name in ("he", "ihc")})
    cosines = np.asarray(out["he"] @ out["ihc"].T)
    np.testing.assert_allclose(np.linalg.norm(out["he"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(out["cosine"], np.diag(cosines), rtol=1e-4, atol=1e-6)
    logits = cosines / 0.07
    assert whole["loss"] == pytest.approx(np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)), rel=1e-4)
    assert whole["cosine_others"] == pytest.approx((cosines.sum() - np.trace(cosines)) / 20, rel=1e-4, abs=1e-6)


# Training ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "steps"), [("batch", 150), ("group", 30)])
def test_pairs_are_found_after_a_few_steps(norm, steps):
    """Without augmentation evaluation sees what training saw; with batch norm once the running statistics have forgotten where they began."""
    adam = dict(optim__name="adam", optim__b1=0.5, optim__b2=0.999, optim__weight_decay=1e-4, lr=0.032)
    fixed = dict(augment__hflip=False, augment__vflip=False, augment__rot90=False, stain__margin=0)
    task = build(settings(**adam, **fixed, stain__encoder_norm=norm, stain__encoder_channels=8))
    state, batch = jax.jit(task.init)(jax.random.key(0)), batch_of(task)
    step, evaluate = jax.jit(task.train_step), jax.jit(task.eval_step)
    before = metrics.compute(evaluate(state, batch))
    for _ in range(steps):
        state, found = step(state, batch)
    assert found.keys() == {"loss", "accuracy", "cosine", "grad_norm", "lr"}
    assert int(state.step) == steps and bool(state.stats["he"]) == (norm == "batch")
    after, found = metrics.compute(evaluate(state, batch)), metrics.compute(found)
    assert found["accuracy"] > 0.8, found
    assert after["loss"] < before["loss"] - 0.5 and after["cosine"] > after["cosine_others"] + 0.2, (before, after)


@pytest.mark.slow
@pytest.mark.multidevice
def test_backends_and_devices_give_the_same_scores_to_a_batch_that_is_not_full():
    """Negatives of all shards, padding not among them, in float64 to rounding. Their steps are in training/test_same_steps.py."""
    with jax.enable_x64(True):
        task = build(settings(stain__dtype="float64", stain__symmetric=True))
        batch, scores = {name: np.asarray(value) for name, value in batch_of(task).items()}, []
        start = jax.tree.map(np.array, jax.device_get(jax.jit(task.init)(jax.random.key(0))))
        for backend, count, fields in (
            ("jit", 1, {}), ("pmap", 4, {}), ("shard_map", 4, {}), ("jit", 4, {"fsdp": 4, "fsdp_min_size": 8}),
        ):
            devices = parallel.make(ConfigDict({"backend": backend, "devices": count, **fields}))
            found = devices.eval_step(task)(devices.place(start), devices.put({**batch, "mask": np.r_[np.ones(5), np.zeros(3)]}))
            scores.append(metrics.compute(found))
    assert scores[0]["chance"] == pytest.approx(0.2) and scores[0]["loss"] > 0.1
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-7, abs=1e-12)


# Config -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "message"), [
    (dict(optim__accumulate=2), "loss of task 'stain_encoders', whose negatives .* config.stain.remat=True"),
    (dict(stain__crop=30), "divisible by 4"),
    (dict(stain__crop=8), "at least 16 px"),
    (dict(stain__margin=-1), "margin not negative"),
    (dict(stain__encoder_norm="layer"), "encoder_norm='layer' is unknown; choose one of batch, instance, group"),
    (dict(stain__encoder_norm="instance"), "encoder_norm=instance leaves nothing of a crop of 32 px"),
    (dict(stain__encoder_norm="group"), "encoder_norm=group leaves nothing of a crop of 32 px"),
    (dict(stain__encoder_blocks=0), "encoder_blocks must be at least 1"),
    (dict(stain__temperature=0.0), "temperature=0.0 must be above 0"),
    (dict(stain__dtype="int8"), "dtype='int8' is unknown"),
    (dict(batch_size=1), "a pair alone has no negatives"),
    (dict(ema=0.9), "config.ema must be 0"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(settings(**fields))


def test_the_smallest_images_that_leave_something():
    for norm, channels, side in (("batch", 4, 16), ("instance", 64, 68), ("group", 4, 36), ("group", 8, 20), ("group", 64, 16), ("group", 2, 68)):
        one = settings(stain__encoder_norm=norm, stain__encoder_channels=channels).stain
        assert least_side(one) == side, (norm, channels)
        build(settings(stain__encoder_norm=norm, stain__encoder_channels=channels, stain__crop=side))
        if side > 16:
            with pytest.raises(ConfigError, match="leaves nothing"):
                build(settings(stain__encoder_norm=norm, stain__encoder_channels=channels, stain__crop=side - 4))


def test_the_published_setting():
    assert "stain_encoders" in TASKS
    for name, test_pairs in (("bci", 977), ("mist", 1000)):
        config = load_config(f"configs/ceff_encoders.py:{name}").copy_and_resolve_references()
        assert (config.stain.crop, config.stain.margin, config.batch_size, config.train.epochs) == (256, 768, 64, 300)
        assert config.train.eval_examples == test_pairs and (config.augment.hflip, config.augment.vflip, config.augment.rot90) == (True, False, False)
        config.train.steps, config.train.epochs, config.optim.hold = 300, 0.0, "200"
        rate = build(config).rate
        np.testing.assert_allclose([rate(0), rate(200), rate(250), rate(300)], [2e-4, 2e-4, 1e-4, 0], rtol=1e-5)
    with pytest.raises(ConfigError, match="one of bci and mist"):
        load_config("configs/ceff_encoders.py:bci,mist")
