"""Virtual staining: two optimisers in one step, encoders that stay what the first stage made them, settings that are refused."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath.config import load_config
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.ops.random import example_keys
from wavepath.tasks import metrics
from wavepath.tasks.base import State, build
from wavepath.tasks.stain import _audible
from wavepath.tasks.stain_losses import discriminator_gan, generator_gan
from wavepath.training import durations

# pix2pix's way down and one block compile in seconds; both encoders are in use all the same.
SMALL = dict(
    crop=32, margin=8, channels=4, blocks=1, encoder="resnet", msfpm=False, encoder_channels=4, encoder_blocks=1, discriminator_channels=4,
    discriminator_layers=1,
)


def settings(**fields):
    config = train_defaults()
    config.task, config.batch_size, config.lr, config.train.steps, config.encoders = "stain", 8, 0.32, 10, "random"
    config.optim.name, config.optim.warmup, config.optim.schedule = "sgd", "0", "constant"
    config.stain.update(SMALL)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def make(**fields):
    return build(settings(**fields))


def batch_of(task, seed=0):
    rng, spec = np.random.default_rng(seed), task.batch_spec()
    b = task.config.batch_size
    pixels = {name: rng.integers(0, 256, spec[name].shape, np.uint8) for name in ("he", "ihc")}
    ids = {"example_id": np.arange(b, dtype=np.int32) * 5, "epoch": np.ones(b, np.int32), "position": np.arange(b, dtype=np.uint32)}
    return {name: jnp.asarray(value) for name, value in {**pixels, **ids}.items()}


def filled(tree, seed=0):
    """Arrays for shapes, without a compilation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape).astype(leaf.dtype), tree)


def abstract(task):
    return jax.eval_shape(task.init, jax.random.key(0))


def first_stage(state, **fields):
    """A run of the first stage as it is restored: config, task, State. Its encoders have the form of those in `state`."""
    config = settings(**{"task": "stain_encoders", **fields})
    frozen = filled(state.extra["encoders"], 7)
    both = {name: frozen.get(name, frozen.get("he")) for name in ("he", "ihc")}
    state = State(
        step=np.int32(5), params={name: tree["params"] for name, tree in both.items()}, opt={},
        stats={name: tree.get("batch_stats", {}) for name, tree in both.items()},
    )
    return config, SimpleNamespace(constants={"train_slides": ["a", "b"]}), state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# What there is -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """A task that takes a run's encoders, and a State of it."""
    task = make(encoders="RUN")
    return SimpleNamespace(task=task, state=filled(abstract(task)))


def test_encoders_are_in_the_state_only_where_they_are_used(fresh):
    for fields, names in (({}, ("he", "ihc")), (dict(coa=False), ("ihc",)), (dict(l1="fixed"), ("he",)), (dict(l1="pyramid", coa=False), ())):
        task = make(**{f"stain__{name}": value for name, value in fields.items()})
        assert task.encoders == names and task.frozen == (("encoders",) if names else ())
    assert make(encoders="", stain__coa=False, stain__l1="pyramid").encoders == (), "nothing is asked for that nothing uses"
    state = fresh.state
    assert set(state.params) == set(state.opt) == {"generator", "discriminator"} and state.ema == {}
    assert {name: set(tree) for name, tree in state.extra["encoders"].items()} == dict.fromkeys(("he", "ihc"), {"params", "batch_stats"})
    other = abstract(make(stain__norm="group", stain__l1="fixed", stain__coa=False, ema=0.9))
    assert other.extra == {} and other.stats == {"generator": {}, "discriminator": {}} and set(other.ema) == {"generator"}


def test_random_encoders_are_as_loud_as_trained_ones():
    kernel = 0.02 * np.random.default_rng(0).normal(size=(3, 3, 16, 64)).astype(np.float32)
    fresh = {"params": {"conv": {"kernel": jnp.asarray(kernel)}, "norm": {"scale": jnp.ones(3)}}, "batch_stats": {"norm": {"var": jnp.ones(3)}}}
    louder = _audible(fresh)
    assert float(louder["params"]["conv"]["kernel"].std()) == pytest.approx(np.sqrt(2 / 144), rel=0.02)
    same(louder | {"params": {**louder["params"], "conv": fresh["params"]["conv"]}}, fresh)


def test_pictures_of_h_and_e_alone_in_any_size(fresh):
    he = jax.ShapeDtypeStruct((1, 24, 40, 3), jnp.uint8)
    shapes = jax.eval_shape(fresh.task.predict, fresh.state, {"he": he})
    assert {name: value.shape for name, value in shapes.items()} == {"input": (1, 24, 40, 3), "output": (1, 24, 40, 3)}
    assert set(jax.eval_shape(lambda *x: fresh.task.predict(*x, ["input", "target"]), fresh.state, {"he": he, "ihc": he})) == {"input", "target"}
    with pytest.raises(ValueError, match="unknown outputs"):
        fresh.task.predict(None, {"he": he}, ["target"])


def test_operations_count_what_is_used():
    sizes = dict(encoder="vmfe", msfpm=True, blocks=6, crop=512, margin=0, channels=64, encoder_channels=64, encoder_blocks=6,
                 discriminator_channels=64, discriminator_layers=3)
    published = {f"stain__{name}": value for name, value in sizes.items()}
    whole, no_coa, fixed = (make(**published, **fields).flops() for fields in ({}, dict(stain__coa=False), dict(stain__l1="fixed")))
    assert whole > no_coa > 0 and whole > fixed and 1e12 < whole < 1e13


def test_a_virtual_stain_says_so():
    assert "virtual" in make().caption and "random" in make().caption
    assert "random" not in make(encoders="RUN").caption and "random" not in make(stain__coa=False, stain__l1="fixed").caption


@pytest.mark.parametrize(("spec", "encoder", "blocks", "l1", "batch", "used"), [
    ("ceff:bci", "vmfe", 6, "adaptive", 1, "he ihc"),
    ("ceff:method=no-vmfe", "plain", 6, "adaptive", 1, "he ihc"),
    ("ceff:method=no-coa", "vmfe", 6, "adaptive", 1, "ihc"),
    ("ceff:method=fixed-l1", "vmfe", 6, "fixed", 1, "he"),
    ("ceff:method=random-encoders", "vmfe", 6, "adaptive", 1, "he ihc"),
    ("ceff:method=pix2pix", "resnet", 9, "fixed", 1, ""),
    ("ceff:mist,method=pyramid", "resnet", 9, "pyramid", 2, ""),
    ("ceff_experiment:arm=full,encoders=RUN/seed{seed}", "vmfe", 4, "adaptive", 8, "he ihc"),
    ("ceff_experiment:arm=random-encoders,encoders=RUN/seed{seed}", "vmfe", 4, "adaptive", 8, "he ihc"),
])
def test_configs_of_methods(spec, encoder, blocks, l1, batch, used):
    config = load_config(spec)
    noise = "random" in spec
    assert config.encoders == ("random" if noise else "RUN/seed{seed}" if "RUN" in spec else "")
    with config.unlocked():
        config.encoders = config.encoders or "RUN"
    task = build(durations.resolve(config, 100))
    assert (task.settings.encoder, task.settings.blocks, task.settings.l1, task.config.batch_size) == (encoder, blocks, l1, batch)
    assert task.encoders == tuple(used.split()) and bool(task.others()) == bool(used and not noise)
    steps = task.config.train.steps
    assert float(task.rate(0)) == pytest.approx(2e-4) == float(task.rate(int(0.6 * steps) - 1)) and float(task.rate(steps - 1)) < 1e-5


# The encoders of the first stage -------------------------------------------------------------------------------------------------------------


def test_which_run_the_encoders_come_from():
    assert make(encoders="RUN").others() == {"encoders": "RUN"}
    assert make().others() == make(encoders="RUN", stain__coa=False, stain__l1="fixed").others() == {}


def test_parameters_and_statistics_are_taken_over(fresh):
    state, given = fresh.state, first_stage(fresh.state)
    got, constants = fresh.task.adopt(state, {"encoders": given})
    for name in ("he", "ihc"):
        same(got.extra["encoders"][name], {"params": given[2].params[name], "batch_stats": given[2].stats[name]})
    same(got.params, state.params)
    assert constants == {"encoders": {"train_slides": ["a", "b"]}} and fresh.task.adopt(state, {}) == (state, {})
    averaged = jax.tree.map(lambda leaf: leaf + 1, given[2].params)
    got, _ = fresh.task.adopt(state, {"encoders": (*given[:2], given[2].replace(ema=averaged))})
    same(got.extra["encoders"]["ihc"]["params"], averaged["ihc"])
    _, constants = fresh.task.adopt(state, {"encoders": (given[0], SimpleNamespace(constants={}), given[2])})
    assert constants == {"encoders": {}}, "unknown slides are not no slides"


def test_encoders_of_crops_of_another_size_are_warned_of(fresh, capsys):
    for fields, crop, said in (
        ({}, 16, ""), (dict(stain__grid=4, stain__margin=0), 32, "crops of 32 px and are shown parts of 8 px .config.stain.crop / grid. and 16 px"),
        (dict(stain__l1_grid=1), 16, "parts of 32 px .config.stain.crop / l1_grid., .* --config.stain.crop=32"), (dict(stain__l1="fixed"), 16, ""),
        (dict(stain__l1_grid=1, stain__l1="fixed"), 64, "trained on crops of 64 px and are shown parts of 16 px .* --config.stain.crop=16"),
    ):
        task = make(encoders="RUN", **fields)
        task.adopt(fresh.state, {"encoders": first_stage(fresh.state, stain__crop=crop)})
        seen = " ".join("".join(capsys.readouterr()).split())
        assert re.search(said, seen) if said else not seen, seen


@pytest.mark.parametrize("task", ["stain", "stain_encoders"])
def test_fields_that_training_on_pairs_would_not_follow_are_refused(task):
    for fields, message in (
        (dict(augment__stain_jitter=0.1), "augment.stain_jitter=0.1: .* set config.augment.stain_jitter=0"),
        (dict(augment__crop_scale=(0.5, 1.0)), r"crop_scale=\(0.5, 1.0\): .* set config.augment.crop_scale=\(1.0, 1.0\)"),
        (dict(data__fold=1), "config.data.fold=1: pairs are divided .* `wavepath pairs --csv`"),
        (dict(data__fold=1, encoders="RUN/fold{fold}"), "stained"),  # what comes next: there are no pairs here
        ({}, "stained"),
    ):
        built = make(**{"task": task, "augment__crop_scale": (1.0, 1.0), "data__dir": "nowhere", **fields})
        with pytest.raises((ConfigError, DatasetError), match=message):
            built.sources()


def test_configs_of_both_stages_can_be_trained():
    for spec in ("ceff_encoders:cpu", "ceff:cpu,method=pix2pix"):
        build(durations.resolve(load_config(spec), 100))._check_training()
    with pytest.raises(ConfigError, match="one of bci and mist"):
        load_config("configs/ceff.py:bci,mist")


def test_slides_that_only_the_encoders_saw_are_named(capsys):
    task = make(encoders="RUN")
    for mine, said in ((["a", "b", "c"], False), (["a"], True)):
        task.constants = {"train_slides": mine}
        task._warn_of_slides(["a", "b"])
        assert ("trained on 1 slides that this run leaves out (first: b)" in "".join(capsys.readouterr())) == said


@pytest.mark.parametrize(("fields", "message"), [
    (dict(task="stain"), "run of task 'stain'; give one of configs/ceff_encoders.py"),
    (dict(stain__encoder_channels=8, stain__encoder_norm="group"), "give --config.stain.encoder_channels=8 --config.stain.encoder_norm=group"),
    (dict(stain__encoder_blocks=2), "--config.stain.encoder_blocks=2"),
])
def test_encoders_of_another_form_are_refused_with_what_to_give(fresh, fields, message):
    with pytest.raises(ConfigError, match=message):
        fresh.task.adopt(fresh.state, {"encoders": first_stage(fresh.state, **fields)})


# Settings ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "message"), [
    (dict(encoders=""), "configs/ceff_encoders.py and give --config.encoders=RUN, or --config.encoders=random as a control"),
    (dict(optim__accumulate=2), "config.optim.accumulate=2 would change .* config.stain.remat=True"),
    (dict(stain__crop=36), "config.stain.crop=36 is not a multiple of 4 times config.stain.grid=2"),
    (dict(stain__crop=40, stain__l1_grid=4), "crop=40 is not a multiple of 4 times config.stain.l1_grid=4"),
    (dict(stain__crop=34, stain__coa=False, stain__l1="fixed"), "crop=34 is not a multiple of 4"),
    (dict(stain__margin=4), "crop \\+ margin, 36 px, is not a multiple of 8"),
    (dict(stain__margin=-8), "margin=-8"),
    (dict(stain__crop=16, stain__discriminator_layers=3), "crop=16 is too small; give at least 24 px"),
    (dict(stain__l1="pyramid", stain__octaves=6), "no 6 octaves"),
    (dict(stain__gan="wgan"), "gan='wgan'"),
    (dict(stain__l1="l2"), "l1='l2'"),
    (dict(stain__encoder="unet"), "encoder='unet'"),
    (dict(stain__norm="layer"), "stain.norm='layer'"),
    (dict(stain__encoder_norm="layer"), "encoder_norm='layer'"),
    (dict(stain__attention="sparse"), "attention='sparse'"),
    (dict(stain__dtype="int8"), "dtype='int8'"),
    (dict(stain__grid=0), "grid=0 must be at least 1"),
    (dict(stain__l1_weight=-1.0), "not be negative"),
    (dict(stain__msfpm=True), "blocks=1: MSFPM"),
    (dict(ema=0.9), "config.ema needs config.stain.norm=instance or group"),
    (dict(ema=1.0), "config.ema=1.0"),
])
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


# Steps ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_is_two_plain_gradients_one_behind_the_other():
    """Against the method written down plainly: the discriminator's step, then the whole of the generator's loss under the moved discriminator."""
    with jax.enable_x64(True):
        task = make(stain__dtype="float64", stain__gan="lsgan", stain__gan_weight=20.0)
        batch, start = batch_of(task), jax.jit(task.init)(jax.random.key(0))
        g, d = (start.params[name] for name in task.networks)
        he, ihc = task.views(batch, example_keys(0, batch["example_id"], batch["epoch"])).values()

        def run(model, params, name, *inputs):
            return model.apply({"params": params, "batch_stats": start.stats[name]}, *inputs, train=True, mutable=["batch_stats"])[0][0]

        def make_image(params):
            return run(task.generator, params, "generator", he, task.features(start, he))

        def judge(params, image):
            return run(task.discriminator, params, "discriminator", he, image)

        def d_loss(params):
            return discriminator_gan(judge(params, ihc), judge(params, jax.lax.stop_gradient(make_image(g))), "lsgan").loss.mean()

        def g_loss(params, moved):
            image = make_image(params)
            return 20 * generator_gan(judge(moved, image), "lsgan").mean() + task.compare(start, image, ihc).loss.mean()

        rate, gradient = task.rate(0), jax.jit(jax.value_and_grad(g_loss))
        moved = jax.tree.map(lambda p, x: p - rate * x, d, jax.jit(jax.grad(d_loss))(d))
        value, by = gradient(g, moved)
        pleased, stale = (jax.tree.map(lambda p, x: p - rate * x, g, each) for each in (by, gradient(g, d)[1]))
        state, found = jax.jit(task.train_step)(start, batch)
        found = metrics.compute(found)
    for want, got in ((moved, state.params["discriminator"]), (pleased, state.params["generator"])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), want, got)
    gap = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(jax.tree.leaves(pleased), jax.tree.leaves(stale), strict=True))
    assert gap > 1e-8, "which discriminator is asked makes a difference, or the above says nothing"
    assert found["loss"] == pytest.approx(float(value)) and found["grad_norm"] == pytest.approx(float(optax.global_norm(by)))
    assert found.keys() == {"loss", "g_gan", "l1", "l1_weight", "similarity", "d_loss", "d_real", "d_fake", "grad_norm", "d_grad_norm", "lr"}
    assert found["l1_weight"] == pytest.approx(50 + 50 * found["similarity"])


@pytest.mark.slow
def test_encoders_do_not_move_and_everything_else_does():
    task = make(encoders="RUN", optim__name="adamw", lr=0.064, stain__encoder="vmfe", stain__msfpm=True, stain__blocks=4)
    given = first_stage(abstract(task))
    # As an encoder has them: kernels of both signs, variances around 1.
    state = given[2].replace(params=jax.tree.map(lambda leaf: 0.2 * (leaf - 0.5), given[2].params))
    start, _ = task.adopt(jax.jit(task.init)(jax.random.key(0)), {"encoders": (*given[:2], state)})
    start = jax.device_get(start)
    step, batch = jax.jit(task.train_step), batch_of(task)
    now, losses = start, []
    for _ in range(8):
        now, found = step(now, batch)
        losses.append(metrics.compute(found)["loss"])
    for name in ("he", "ihc"):
        same(now.extra["encoders"][name], {"params": state.params[name], "batch_stats": state.stats[name]})
    for kind in ("params", "stats"):
        before, after = (traverse_util.flatten_dict(getattr(one, kind), sep="/") for one in (start, now))
        still = {name for name in before if np.array_equal(before[name], after[name])}
        assert not still, kind
    assert losses[-1] < losses[0]

    out = jax.device_get(jax.jit(task.predict)(now, batch))
    rows = {"mask": jnp.asarray([1, 1, 1, 0, 0, 0, 0, 0], jnp.float32)}
    middle = {name: batch[name][:, 4:36, 4:36] for name in ("he", "ihc")}
    score = jax.jit(task.eval_step)
    scores, again = score(now, {**middle, **rows}), score(now, {**batch, **rows})
    assert scores.keys() == {"l1", "psnr", "ssim", "copy_psnr"} and all(float(count) == 3 for _, count in scores.values())
    assert metrics.compute(scores) == pytest.approx(metrics.compute(again)), "central crops"
    assert out["output"].shape == (8, 40, 40, 3) and out["output"].min() >= 0 and out["output"].max() <= 1
    made = np.rint(np.asarray(jax.jit(task.predict)(now, middle)["output"], np.float64) * 255) / 255
    he, ihc = (np.asarray(middle[name], np.float64) / 255 for name in ("he", "ihc"))
    options = dict(data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    want = {
        "l1": [2 * np.abs(made[row] - ihc[row]).mean() for row in range(3)],
        "psnr": [peak_signal_noise_ratio(ihc[row], made[row], data_range=1) for row in range(3)],
        "ssim": [structural_similarity(ihc[row], made[row], **options) for row in range(3)],
        "copy_psnr": [peak_signal_noise_ratio(ihc[row], he[row], data_range=1) for row in range(3)],
    }
    assert metrics.compute(scores) == pytest.approx({name: np.mean(values) for name, values in want.items()}, abs=1e-3)


@pytest.mark.slow
def test_a_run_keeps_the_encoders_of_the_run_before_it(tmp_path):
    """Both stages through the loop, on phantom pairs: what the second one saves is what the first one saved, to the bit."""
    from wavepath.training.checkpoint import restore_run
    from wavepath.training.loop import train

    common = dict(stain__crop=32, stain__margin=0, augment__crop_scale=(1.0, 1.0))
    common |= dict(train__eval_every=0, train__panels_every=0, train__save_every=100, writers__tensorboard=False)
    first = settings(task="stain_encoders", encoders="", train__steps=2, **common)
    train(first, tmp_path / "seed0")
    pairs = str(tmp_path / "seed0" / "phantom" / "pairs")
    second = settings(encoders=str(tmp_path / "seed{seed}"), data__dir=pairs, train__steps=3, **common)
    train(second, tmp_path / "run")
    (_, _, learnt), (_, task, state) = restore_run(tmp_path / "seed0"), restore_run(tmp_path / "run")
    for name in ("he", "ihc"):
        same(state.extra["encoders"][name], {"params": learnt.params[name], "batch_stats": learnt.stats[name]})
    remembered = task.constants["encoders"]
    assert remembered["step"] == 2 and remembered["train_slides"] == task.constants["train_slides"]
    assert not np.array_equal(learnt.stats["he"]["norm1"]["norm"]["mean"], 0), "the first stage moved its statistics"
