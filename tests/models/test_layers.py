import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.layers import Stack, drop_path, gelu
from wavepath.ops.platform import traced_for

X = jax.random.normal(jax.random.key(0), (4, 7, 16))


def stack(**kwargs):
    return Stack(depth=3, heads=2, **kwargs)


def scanned(params):
    """Parameters of a loop in the layout of a scan."""
    return {"scanned": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[str(i)] for i in range(3)))}


def run(module, params, keys=None):
    def loss(params):
        out, every = module.apply({"params": params}, X, keys)
        return jnp.sum(jnp.sin(out)), (out, every)

    (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return *out, grad


@pytest.fixture(scope="module")
def loop():
    params = jax.jit(stack().init)(jax.random.key(1), X)["params"]
    # Away from the initial zeros, so that biases matter.
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    return params, run(stack(), params)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan", [False, True])
def test_scan_and_remat_equal_the_loop(loop, scan, remat):
    params, (want, want_every, want_grad) = loop
    if scan:
        params, want_grad = scanned(params), scanned(want_grad)
    out, every, grad = run(stack(scan=scan, remat=remat), params)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for number in range(3):
        np.testing.assert_allclose(every[number], want_every[number], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grad, want_grad)


def test_drop_path_draws_alike_in_scan_and_loop(loop):
    params, (undropped, *_) = loop
    keys = jax.random.split(jax.random.key(5), 4)
    want, *_ = run(stack(drop_path=0.5), params, keys)
    got, *_ = run(stack(drop_path=0.5, scan=True, remat="full"), scanned(params), keys)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert float(jnp.abs(want - undropped).max()) > 1e-3
    off, *_ = run(stack(drop_path=0.5), params, None)
    np.testing.assert_allclose(off, undropped, atol=1e-6)


def test_drop_path_is_by_example_and_keeps_the_mean():
    x, keys = jnp.ones((4000, 2, 3)), jax.random.split(jax.random.key(0), 4000)
    out = np.asarray(drop_path(x, keys, 0.25))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(out.mean(), 1.0, atol=5 * np.sqrt(1 / 3 / 4000))
    np.testing.assert_array_equal(drop_path(x[:7], keys[3:10], 0.25), out[3:10])


def test_the_first_block_is_never_dropped_and_the_rate_rises(loop):
    params, _ = loop
    x = jnp.broadcast_to(X[:1], (400, 7, 16))
    _, every = jax.jit(stack(drop_path=0.6).apply)({"params": params}, x, jax.random.split(jax.random.key(1), 400))
    varies = [float(jnp.std(block, axis=0).max()) for block in every]
    assert varies[0] < 1e-5 and varies[1] > 0.01
    skipped = [float(jnp.mean(jnp.all(every[i] == every[i - 1], axis=(1, 2)))) for i in (1, 2)]  # both branches left out
    np.testing.assert_allclose(skipped, [0.3**2, 0.6**2], atol=0.08)


@pytest.mark.parametrize(("wide", "tolerance"), [(False, 2e-6), (True, 1e-12)])
def test_gelu_is_the_exact_one_with_its_derivatives(wide, tolerance):
    def derivatives(f):
        def both(x, weight):
            value, pull = jax.vjp(f, x)
            return value, pull(weight)[0], jax.jvp(f, (x,), (weight,))[1]

        return jax.jit(both)

    with jax.enable_x64(wide):
        x = np.linspace(-12, 12, 4001)
        arrays = [jnp.asarray(a, float) for a in (x, np.cos(x))]
        for one, other in zip(derivatives(gelu)(*arrays), derivatives(functools.partial(nn.gelu, approximate=False))(*arrays), strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)


def test_gelu_on_other_platforms_is_flax():
    with traced_for("tpu"):
        assert "erfc" in str(jax.make_jaxpr(gelu)(jnp.ones(3)))
    assert "erfc" not in str(jax.make_jaxpr(gelu)(jnp.ones(3)))


def test_unknown_remat_names_the_choices():
    with pytest.raises(ConfigError, match="none, full, dots"):
        stack(remat="some").init(jax.random.key(0), X)
