import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError
from wavepath.tasks.optim import decayed, ema_update, make_optimizer, schedule, whole_steps


def settings(**changes):
    optim = train_defaults().optim
    optim.warmup = "0"
    optim.update(changes)
    return optim


def test_schedule_warms_up_from_the_first_step_and_falls_by_half_a_cosine():
    rate = schedule(2.0, 110, 10, 0.5)
    np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(60), 0.5 + 1.5 / 2, rtol=1e-6)
    np.testing.assert_allclose(rate(110), 0.5, rtol=1e-6)
    values = [float(rate(step)) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_schedule_halves_every_so_many_steps_or_stays():
    rate = schedule(1.0, 100, 4, 0.05, kind="halve", halve_every=7)
    got = np.asarray([rate(step) for step in range(100)])
    np.testing.assert_allclose(got[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(got[4:], np.maximum(0.5 ** (np.arange(4, 100) // 7), 0.05), rtol=1e-6)
    np.testing.assert_allclose(schedule(3.0, 100, 0, kind="constant")(50), 3.0)
    _, made = make_optimizer(settings(schedule="halve", halve_every="10"), 1.0, 40, 256)
    np.testing.assert_allclose([made(9), made(10), made(39)], [1, 0.5, 0.125])
    with pytest.raises(ConfigError, match="choose one of cosine, halve, linear, constant"):
        schedule(1.0, 10, 0, kind="step")
    with pytest.raises(ConfigError, match="halve_every='25%' depends"):
        make_optimizer(settings(schedule="halve"), 1.0, 40, 256)


def test_schedule_holds_the_peak_and_then_falls_in_a_straight_line():
    rate = schedule(2.0, 30, 2, 0.5, kind="linear", hold=20)
    got = np.asarray([rate(step) for step in range(31)])
    np.testing.assert_allclose(got[:2], [1.0, 2.0])
    np.testing.assert_allclose(got[2:21], 2.0)
    np.testing.assert_allclose(got[20:], np.linspace(2.0, 0.5, 11), rtol=1e-6)
    np.testing.assert_allclose([schedule(2.0, 30, 10, kind="linear", hold=0)(step) for step in (9, 10, 20)], [2, 2, 1])  # behind the warm-up
    np.testing.assert_allclose([schedule(2.0, 30, 0, kind="linear", hold=hold)(29) for hold in (29, 30, 99)], 2)
    _, made = make_optimizer(settings(schedule="linear", hold="30"), 1.0, 40, 256)
    np.testing.assert_allclose([made(30), made(35), made(40)], [1, 0.5, 0])
    with pytest.raises(ConfigError, match="hold='50%' depends"):
        make_optimizer(settings(schedule="linear"), 1.0, 40, 256)


@pytest.mark.parametrize("value, want", [(5, 5), ("12", 12), ("0", 0)])
def test_warmup_in_steps(value, want):
    assert whole_steps(value, "warmup") == want


@pytest.mark.parametrize("value", ["5%", "40ep", "-3", "1.5"])
def test_unresolved_warmup_is_an_error(value):
    with pytest.raises(ConfigError, match="steps"):
        whole_steps(value, "warmup")


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="20 steps and the run has 10"):
        make_optimizer(settings(warmup="20"), 1.0, 10, 256)
    with pytest.raises(ConfigError, match="train.steps"):
        make_optimizer(settings(), 1.0, 0, 256)
    with pytest.raises(ConfigError, match="choose one of adamw, adam, sgd"):
        make_optimizer(settings(name="lion"), 1.0, 10, 256)


def test_rate_scales_with_the_batch_and_sgd_is_plain():
    tx, rate = make_optimizer(settings(name="sgd"), 0.1, 10, 512)
    np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)
    params, grads = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.full((2, 2), 3.0)}
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.6, rtol=1e-6)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"], -3 * rate(1), rtol=1e-6)


def test_adamw_is_the_recipe_with_decoupled_decay():
    tx, rate = make_optimizer(settings(weight_decay=0.05), 1.0, 10, 256)
    w, m, v, state = 2.0, 0.0, 0.0, None
    params = {"kernel": jnp.full((1, 1), w)}
    state = tx.init(params)
    for step, g in enumerate([0.3, -0.2, 0.7]):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        w -= float(rate(step)) * (direction + 0.05 * w)
        updates, state = tx.update({"kernel": jnp.full((1, 1), g)}, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


def test_adam_decays_every_parameter_within_the_gradient_as_torch_does():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=2).astype(np.float32)}
    changes = dict(name="adam", b1=0.5, b2=0.999, weight_decay=0.3, schedule="linear", hold="2")
    tx, rate = make_optimizer(settings(**changes), 0.05, 5, 256)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = torch.optim.Adam(theirs.values(), lr=1.0, betas=(0.5, 0.999), weight_decay=0.3)
    for step in range(5):
        grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()}
        for name, grad in grads.items():
            theirs[name].grad = torch.tensor(grad)
        optimizer.param_groups[0]["lr"] = float(rate(step))
        optimizer.step()
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, value in theirs.items():
        np.testing.assert_allclose(params[name], value.detach().numpy(), rtol=1e-5, atol=1e-6)
        assert np.abs(params[name] - start[name]).min() > 1e-3


def test_decay_leaves_out_biases_and_norms_also_of_scanned_blocks():
    block = {"attn": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    params = {"0": block, "scanned": jax.tree.map(lambda x: jnp.stack([x, x]), block), "mask_token": jnp.ones((1, 1, 3))}
    mask = decayed(params)
    want = {"attn": {"kernel": True, "bias": False}, "norm": {"scale": False, "bias": False}}
    assert mask == {"0": want, "scanned": want, "mask_token": True}
    tx, _ = make_optimizer(settings(weight_decay=0.5), 0.1, 10, 256)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert float(jnp.abs(updates["scanned"]["norm"]["bias"]).max()) == 0 and float(updates["scanned"]["attn"]["kernel"].max()) < 0


def test_clipping_bounds_the_global_norm():
    tx, _ = make_optimizer(settings(name="sgd", clip_norm=1.0), 1.0, 10, 256)
    params = {"a": jnp.zeros((3,)), "b": jnp.zeros((4,))}
    updates, _ = tx.update({"a": jnp.full((3,), 10.0), "b": jnp.full((4,), -10.0)}, tx.init(params), params)
    norm = np.sqrt(sum(float(jnp.sum(u**2)) for u in updates.values()))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


def test_ema_moves_towards_the_parameters():
    out = ema_update({"w": jnp.asarray(1.0)}, {"w": jnp.asarray(3.0)}, 0.9)
    np.testing.assert_allclose(out["w"], 1.2, rtol=1e-6)
