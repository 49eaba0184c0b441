"""The depthwise convolution in both forms: equal values and gradients, at odd and even filters, under the transformations models use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from wavepath.ops.depthwise import depthwise_conv


def arrays(shape=(2, 6, 5, 3), size=(3, 3), dtype=np.float64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=shape).astype(dtype)), jnp.asarray(rng.normal(size=(*size, 1, shape[-1])).astype(dtype))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 2), (5, 7)])
def test_both_forms_are_equal(size):
    with jax.enable_x64(True):
        x, kernel = arrays((9, 6, 5, 2), size)

        @jax.jit
        def both(x, kernel):
            out = []
            for impl in ("conv", "shift"):
                y, pull = jax.vjp(lambda x, k, impl=impl: depthwise_conv(x, k, impl), x, kernel)
                out.append((y, *pull(jnp.cos(y))))
            return out

        for mine, theirs in zip(*both(x, kernel), strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_against_the_definition():
    x, kernel = arrays(dtype=np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 6, j : j + 5] * kernel[i, j, 0] for i in range(3) for j in range(3))
    np.testing.assert_allclose(depthwise_conv(x, kernel, "shift"), expected, atol=1e-5)


def test_reverse_mode_twice_and_vmap():
    with jax.enable_x64(True):
        x, kernel = arrays((1, 4, 3, 2))
        check_grads(lambda x, k: depthwise_conv(x, k, "shift"), (x, kernel), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)

        def penalty(impl, x):
            return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(depthwise_conv(x, kernel, impl))))(x) ** 2)

        np.testing.assert_allclose(jax.grad(lambda x: penalty("shift", x))(x), jax.grad(lambda x: penalty("conv", x))(x), atol=1e-10)
        stacked = jnp.stack([x, 2 * x])
        got = jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(depthwise_conv(x, kernel, "shift") ** 2))(x))(stacked)
        np.testing.assert_allclose(got[1], 2 * got[0], atol=1e-10)


def test_types_and_names():
    x, kernel = arrays(dtype=np.float32)
    half = depthwise_conv(jnp.asarray(x, jnp.bfloat16), kernel, "shift")
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), depthwise_conv(x, kernel, "conv"), atol=0.1)
    with pytest.raises(ValueError, match="shift"):
        depthwise_conv(x, kernel, "fft")
