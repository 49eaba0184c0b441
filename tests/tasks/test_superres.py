"""Super-resolution: what each mode may read, places that stay aligned, the loss in closed form, the scores of scikit-image."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError
from wavepath.ops.random import example_keys
from wavepath.tasks import metrics
from wavepath.tasks.base import build

SSIM = dict(data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def settings(**fields):
    """A network of one block, patches that the window of SSIM just fits into."""
    config = train_defaults()
    config.task, config.batch_size, config.lr, config.train.steps = "superres", 8, 0.1, 10
    config.optim.name, config.optim.warmup, config.optim.schedule = "sgd", "0", "constant"
    config.augment.hflip = config.augment.vflip = False
    given = dict(blocks=1, channels=8, sr_blocks=1, wavelet_blocks=1, wr_blocks=1, reduction=4, patch=12, margin=4)
    config.superres.update(given)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def make(**fields):
    task = build(settings(**fields))
    task.constants = {"mean": [0.7, 0.4, 0.6]}
    return task


def batch_of(task, seed=0):
    """Windows in which each low-resolution pixel is a block of equal pixels above it: what is cut from one place shows it."""
    rng, (b, side) = np.random.default_rng(seed), task.batch_spec()["lr"].shape[:2]
    lr = rng.integers(0, 256, (b, side, side, 3), np.uint8)
    pixels = {name: lr.repeat(factor, 1).repeat(factor, 2) for name, factor in (("hr", task.scale), ("next", 2)) if name in task.batch_spec()}
    ids = {"example_id": np.arange(b, dtype=np.int32) * 5, "epoch": np.ones(b, np.int32), "position": np.arange(b, dtype=np.uint32)}
    return {name: jnp.asarray(value) for name, value in {"lr": lr, **pixels, **ids}.items()}


@pytest.fixture(scope="module")
def four():
    """A task at 4x with a state and a batch: three images of three sizes."""
    task = make(superres__scale=4)
    batch = batch_of(task)
    middle = batch | {name: batch[name][:, 2 * k : 14 * k, 2 * k : 14 * k] for name, k in (("lr", 1), ("next", 2), ("hr", 4))}
    predict = jax.jit(task.predict, static_argnames=("names", "mode"))
    return SimpleNamespace(task=task, state=jax.jit(task.init)(jax.random.key(0)), batch=batch, middle=middle, predict=predict)


# The data ---------------------------------------------------------------------------------------------------------------------------------


def test_views_of_all_sizes_show_one_place_and_belong_to_the_example(four):
    task, batch = four.task, four.batch
    keys = example_keys(0, batch["example_id"], batch["epoch"])
    views = jax.jit(task.views)
    lr, hr, reference = views(batch, keys)
    assert lr.shape == (8, 12, 12, 3) and hr.shape == (8, 48, 48, 3) and reference.shape == (8, 24, 24, 3)
    np.testing.assert_array_equal(hr, lr.repeat(4, 1).repeat(4, 2))
    np.testing.assert_array_equal(reference, lr.repeat(2, 1).repeat(2, 2))
    turned = {name: value[::-1] for name, value in batch.items()}
    np.testing.assert_array_equal(views(turned, keys[::-1])[0][::-1], lr)
    found = set()
    for image, view in zip(np.asarray(batch["lr"]), np.rint(np.asarray(lr) * 255), strict=True):
        where = [
            (top, left, turns) for top in range(5) for left in range(5) for turns in range(4)
            if np.array_equal(np.rot90(image[top : top + 12, left : left + 12], turns), view)
        ]
        assert len(where) == 1, "each view is one place of its own window, turned"
        found |= set(where)
    assert len(found) > 4 and len({turns for *_, turns in found}) >= 3
    for view, name in zip(jax.jit(task.views)(batch), ("lr", "hr", "next"), strict=True):
        np.testing.assert_array_equal(np.rint(view * 255), four.middle[name])


def test_the_batch_has_the_level_above_only_where_it_is_another_image():
    assert {name: spec.shape[1] for name, spec in make(superres__scale=8).batch_spec().items() if spec.ndim == 4} == {"lr": 16, "hr": 128, "next": 32}
    assert "next" not in make().batch_spec()


# What each mode may read ------------------------------------------------------------------------------------------------------------------


def test_wr_reads_the_low_resolution_alone(four):
    """Bit for bit, whatever lies in the other columns; and `ref` does read the level above, or the first half of this says nothing."""
    task, state, batch, predict = four.task, four.state, four.middle, four.predict
    rng = np.random.default_rng(1)
    noise = {name: rng.integers(0, 256, batch[name].shape, np.uint8) for name in ("hr", "next")}
    out = predict(state, batch)
    assert out.keys() == {"input", "bicubic", "output", "target"} and out["output"].min() >= 0 and out["output"].max() <= 1
    np.testing.assert_array_equal(predict(state, {**batch, **noise})["output"], out["output"])
    np.testing.assert_array_equal(predict(state, {"lr": batch["lr"]})["output"], out["output"])
    one, other = (predict(state, given, names=("output",), mode="ref")["output"] for given in (batch, {**batch, "next": noise["next"]}))
    assert np.abs(one - other).max() > 1e-4
    with pytest.raises(ConfigError, match="which this batch does not have"):
        task.predict(state, {"lr": batch["lr"]}, ["output"], mode="ref")
    shapes = jax.eval_shape(task.predict, state, {"lr": jnp.zeros((1, 9, 20, 3), jnp.uint8)})
    assert {name: value.shape for name, value in shapes.items()} == {"input": (1, 9, 20, 3), "bicubic": (1, 36, 80, 3), "output": (1, 36, 80, 3)}


def test_a_poisoned_reference_reaches_the_output_only_when_the_coin_says_ref(four):
    task, lr, poison = four.task, four.batch["lr"][:2, :12, :12] / 255.0, jnp.full((2, 24, 24, 3), jnp.nan)
    apply = jax.jit(lambda step: task._apply(four.state.params["superres"], lr, *task._reading(poison, step))[0])
    finite = {step: bool(jnp.isfinite(apply(step)).all()) for step in range(8)}
    assert finite == {step: not task._reading(poison, step)[1] for step in range(8)} and set(finite.values()) == {True, False}
    assert make(superres__wr_share=1.0)._reading(poison, 0) == (None, False)
    assert make(superres__wr_share=0.0)._reading(poison, 0)[1] is True
    shares = jax.vmap(lambda step: make(superres__wr_share=0.2)._reading(poison, step)[1])(jnp.arange(2000)).mean()
    assert shares == pytest.approx(0.8, abs=0.03)


# The loss ---------------------------------------------------------------------------------------------------------------------------------


def test_the_loss_in_closed_form():
    rng = np.random.default_rng(0)
    sr, hr = rng.random((2, 2, 24, 24, 3), dtype=np.float32)
    wavelet = rng.uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    target = (hr[:, ::2, ::2] - hr[:, ::2, 1::2] - hr[:, 1::2, ::2] + hr[:, 1::2, 1::2]) / 2

    def unlike(x, y, power, weight, half=False):
        rescaled = [(z + 1) / 2 if half else z for z in (x, y)]
        alike = [structural_similarity(*pair, **SSIM) for pair in zip(*rescaled, strict=True)]
        return (np.abs(x - y) ** power).mean(axis=(1, 2, 3)) + weight * (1 - np.array(alike))

    for fields, power, weight in (({}, 1, 0.2), (dict(pixel="mse", ssim_weight=0.0, sr_weight=0.7, wt_weight=0.3), 2, 0.0)):
        task = make(**{f"superres__{name}": value for name, value in fields.items()})
        each, terms = jax.jit(task.error)(sr, {"wavelet": wavelet}, hr, hr)
        a, b = unlike(sr, hr, power, weight), unlike(wavelet, target, power, weight, half=True)
        np.testing.assert_allclose(terms["sr_loss"], a, rtol=1e-5)
        np.testing.assert_allclose(terms["wt_loss"], b, rtol=1e-5)
        np.testing.assert_allclose(each, 0.7 * a + 0.3 * b if fields else 0.3 * a + 0.7 * b, rtol=1e-5)
    alone, none = jax.jit(task.error)(sr, {}, hr, None)
    np.testing.assert_allclose(alone, a, rtol=1e-5)
    assert none == {}


@pytest.mark.slow
def test_training_moves_what_it_should():
    task = make(superres__wr_share=1.0)
    batch = batch_of(task)
    start = jax.jit(task.init)(jax.random.key(0))
    step = jax.jit(task.train_step)
    state, first = step(start, batch)
    for _ in range(10):
        state, last = step(state, batch)
    first, last = metrics.compute(first), metrics.compute(last)
    assert last.keys() == {"loss", "sr_loss", "wt_loss", "grad_norm", "lr"} and last["loss"] < 0.98 * first["loss"]
    before, after = (traverse_util.flatten_dict(one.params["superres"], sep="/") for one in (start, state))
    # The detail of an image does not change with its mean colour, which is all that WR's last bias decides.
    assert {name for name in before if np.array_equal(before[name], after[name])} == {"wr/tail/bias"}


# Evaluation -------------------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_image_on_8_bits_and_padding_counts_nothing(four):
    task, state = four.task, four.state
    batch = {**four.middle, "mask": jnp.asarray([1, 1, 1, 0, 0, 0, 0, 0], jnp.float32)}
    found = jax.jit(task.eval_step)(state, batch)
    scores = ("psnr", "ssim")
    assert found.keys() == {"loss", "sr_loss", "wt_loss", *(prefix + score for prefix in ("", "ref_", "bicubic_") for score in scores)}
    assert all(float(count) == 3 for _, count in found.values())
    out = four.predict(state, four.middle)
    for prefix, name in (("", "output"), ("bicubic_", "bicubic")):
        pairs = list(zip(np.asarray(batch["hr"], np.float64) / 255, np.rint(np.asarray(out[name], np.float64) * 255) / 255, strict=True))
        for score, function, options in (("psnr", peak_signal_noise_ratio, dict(data_range=1)), ("ssim", structural_similarity, SSIM)):
            want = np.mean([function(*pair, **options) for pair in pairs[:3]])
            assert float(found[prefix + score][0]) / 3 == pytest.approx(want, abs=1e-3), prefix + score


def test_a_baseline_has_one_mode_and_blank_patches_no_infinite_score():
    task = make(lr=10.0, superres__network="srcnn", superres__srcnn=ConfigDict(dict(kernels=(3, 3), channels=(4,))))
    state = jax.jit(task.init)(jax.random.key(0))
    batch = {name: jnp.full_like(value, 255) if value.ndim == 4 else value for name, value in batch_of(task).items()}
    found = metrics.compute(jax.jit(task.eval_step)(state, batch))
    assert found.keys() == {"loss", "psnr", "ssim", "bicubic_psnr", "bicubic_ssim"} and found["bicubic_psnr"] == 100
    step, batch, losses = jax.jit(task.train_step), batch_of(task), []
    for _ in range(8):
        state, reported = step(state, batch)
        losses.append(metrics.compute(reported)["loss"])
    assert reported.keys() == {"loss", "grad_norm", "lr"} and losses[-1] < 0.97 * losses[0] and task.flops() > 0


# Settings ---------------------------------------------------------------------------------------------------------------------------------


def test_the_mean_is_measured_or_given():
    task = build(settings())
    with pytest.raises(ConfigError, match="config.superres.mean"):
        task.model  # noqa: B018
    given = build(settings(superres__mean=(0.7204, 0.4298, 0.6379)))
    assert given.measure(None) == {"mean": [0.7204, 0.4298, 0.6379]} and given.model.mean == (0.7204, 0.4298, 0.6379)
    for mpps, want in (((0.25, 0.251), {"mpp": 0.5}), ((0.25, 0.5), {}), ((0.25, None), {}), ((None,), {})):  # of the high resolution
        source = SimpleNamespace(spans=[SimpleNamespace(start=0, stop=1, mpp=mpp) for mpp in mpps])
        assert {name: value for name, value in given.measure(source).items() if name == "mpp"} == want


@pytest.mark.parametrize(("fields", "message"), [
    (dict(patch=10), "superres.patch=10 is too small for the 11x11 window"),
    (dict(network="edsr", patch=5), "superres.patch=5"),
    (dict(network="edsr", mode="ref"), "mode=ref needs network=cwt-net"),
    (dict(network="gan"), "superres.network='gan'"),
    (dict(scale=3), "superres.scale=3"),
    (dict(pixel="l2"), "superres.pixel='l2'"),
    (dict(mode="both"), "superres.mode='both'"),
    (dict(wr_share=1.5), "superres.wr_share=1.5"),
    (dict(sr_weight=0.0, wt_weight=0.0), "nothing to learn"),
    (dict(mean=(0.5, 0.5)), "superres.mean has 2 values"),
    (dict(dtype="int8"), "superres.dtype='int8'"),
    (dict(blocks=-1), "config.superres.blocks=-1 must be at least 1"),
    (dict(blocks=0), "config.superres.blocks=0"),
    (dict(attention_chunk=-1), "config.superres.attention_chunk=-1 must be at least 0"),
    (dict(reduction=3), "config.superres.channels=8 is not a multiple of config.superres.reduction=3"),
    (dict(network="edsr", edsr__blocks=0), "config.superres.edsr.blocks=0"),
    (dict(network="rcan", rcan__groups=-2), "config.superres.rcan.groups=-2"),
    (dict(network="rcan", rcan__reduction=0), "config.superres.rcan.reduction=0"),
    (dict(network="rcan", rcan__reduction=5), "config.superres.rcan.channels=64 is not a multiple of config.superres.rcan.reduction=5"),
])
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(settings(**{f"superres__{name}": value for name, value in fields.items()}))


@pytest.mark.slow
def test_micro_batches_take_the_same_steps_in_float64():
    """Coins and places too: three steps, of which the coin makes some `ref` and some `wr`. Backends are in training/test_same_steps.py."""
    from wavepath.training import parallel

    ends = []
    with jax.enable_x64(True):
        for parts in (1, 2):
            task = make(superres__dtype="float64", superres__scale=4, lr=1.0, optim__accumulate=parts)
            devices = parallel.make(ConfigDict({"backend": "jit", "devices": 1}))
            state = devices.init(task, 0)
            start = jax.tree.map(np.array, jax.device_get(state.params))
            step = devices.train_step(task)
            for number in range(3):
                state, found = step(state, devices.put({name: np.asarray(value) for name, value in batch_of(task, number).items()}))
            moved = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), start)
            ends.append((np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)]), metrics.compute(found)))
        assert len({bool(make()._reading(jnp.zeros(()), number)[1]) for number in range(3)}) == 2
    (one, values), (other, again) = ends
    assert np.linalg.norm(other - one) < 1e-9 * np.linalg.norm(one) and again == pytest.approx(values, rel=1e-9)
