"""Attention over a map: the chunked form is the dense one in values and gradients, and its memory does not grow with the square of the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops.cross_attention import chunk_of, cross_attention


def draw(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def maps(dtype=np.float32):
    return draw(2, 5, 4, 6, dtype=dtype), draw(2, 3, 7, 6, seed=1, dtype=dtype), draw(2, 3, 7, 5, seed=2, dtype=dtype)


def test_a_place_that_fits_one_key_alone_takes_its_value():
    key = jnp.eye(6).reshape(1, 2, 3, 6)
    value = draw(1, 2, 3, 4)
    # Logits of 200 / sqrt(6) and 0: the softmax is the choice of one.
    got = cross_attention(200 * key[:, ::-1], key, value)
    np.testing.assert_allclose(got, value[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(cross_attention(0 * key, key, value)[0, 1, 2], value.mean((0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_chunks_equal_the_dense_form(chunk):
    inputs, weights = maps(), draw(2, 5, 4, 5, seed=3)

    def run(impl):
        return jax.jit(jax.vjp, static_argnums=0)(lambda *x: cross_attention(*x, chunk=chunk, impl=impl), *inputs)

    (want, pull), (got, own_pull) = run("dense"), run("chunked")
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(own_pull(weights), pull(weights), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_types():
    inputs = [x.astype(jnp.bfloat16) for x in maps()]
    want = cross_attention(*(x.astype(jnp.float32) for x in inputs), impl="dense")
    for impl in ("dense", "chunked"):
        got = cross_attention(*inputs, chunk=6, impl=impl)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03)


def test_sums_of_gradients_over_chunks_are_wide():
    query, key, value = (x.astype(jnp.bfloat16) for x in (draw(1, 64, 8, 4), draw(1, 2, 2, 4, seed=1), draw(1, 2, 2, 4, seed=2)))

    def by_value(x, impl, chunk):
        return jax.grad(lambda v: cross_attention(query, key, v, impl=impl, chunk=chunk).astype(jnp.float32).sum())(x).astype(jnp.float32)

    # 512 chunks of one: in bfloat16 a sum of 128 stops at 1s that are below its last bit.
    np.testing.assert_allclose(by_value(value, "chunked", 1), by_value(value, "dense", 0), rtol=0.02)


def test_chunk_is_chosen_by_memory_and_spread_evenly():
    assert chunk_of(16_384, 16_384) == 256 and chunk_of(65_536, 65_536) == 64
    assert chunk_of(100, 64) == 100 and chunk_of(100, 64, 60) == 50 and chunk_of(3, 10**9) == 1


@pytest.mark.parametrize(("settings", "message"), [({"impl": "flash"}, "unknown"), ({"chunk": -1}, "0 \\(chosen\\)")])
def test_errors_name_the_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        cross_attention(*maps(), **settings)


def gradient_bytes(side, impl, width=256):
    """Temporary memory of value and gradient, by the compiler and without running."""
    shape = jax.ShapeDtypeStruct((1, side // 4, side // 4, width), jnp.float32)
    step = jax.value_and_grad(lambda *x: jnp.tanh(cross_attention(*x, impl=impl)).sum(), argnums=(0, 1, 2))
    return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("side", [512, 1024])
def test_memory_at_published_crops(side):
    # All scores of a 512 px crop take 1 GiB, of a 1024 px crop 16.
    limit = {512: 200e6, 1024: 700e6}[side]
    assert gradient_bytes(side, "chunked") < limit
    if side == 512:
        assert gradient_bytes(side, "dense") > 2e9
