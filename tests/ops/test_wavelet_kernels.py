"""The hand-written transposes: the adjoint identity at every border, every program transformation, and computations spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from wavepath.ops import wavelet_kernels as kernels
from wavepath.ops import wavelets as wv

HW = (-2, -1)


def image(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).random(shape).astype(dtype)


def pulled_back(function, x, seed=0):
    """(function(x), random cotangents, their pull-back)."""
    out, pull = jax.vjp(function, x)
    weights = jax.tree.map(lambda a: jnp.asarray(image(*a.shape, seed=seed + a.size)), out)
    return out, weights, pull(weights)[0]


def check_adjoint(wavelet, mode, size):
    with jax.enable_x64(True):
        x = jnp.asarray(image(*size))

        @jax.jit
        def both(x):
            bands, weights, pulled = pulled_back(lambda x: tuple(wv.dwt2(x, wavelet, mode, HW)), x)
            image_, image_weights, bands_pulled = pulled_back(lambda b: wv.idwt2(b, wavelet, mode, HW), weights, 7)
            forward = sum(jnp.vdot(b, w) for b, w in zip(bands, weights, strict=True)), jnp.vdot(x, pulled)
            return forward, (jnp.vdot(image_, image_weights), sum(jnp.vdot(a, b) for a, b in zip(weights, bands_pulled, strict=True)))

        for inner, other in both(x):
            np.testing.assert_allclose(other, inner, rtol=1e-11)


def extended_matrix(wavelet, mode, size):
    """One axis of the transform as a matrix, from PyWavelets applied to unit vectors."""
    low, high = zip(*(pywt.dwt(unit, wavelet, mode) for unit in np.eye(size)), strict=True)
    return np.concatenate([np.array(low).T, np.array(high).T])


# One size larger than the filter in which both parities occur, one smaller, where the border goes round the image several times.
@pytest.mark.parametrize("mode", wv.MODES)
def test_adjoint_identity(mode):
    check_adjoint("db3", mode, (9, 12))


@pytest.mark.parametrize("mode", wv.MODES)
@pytest.mark.parametrize("wavelet", ["haar", "bior2.2", "db8"])
@pytest.mark.slow
def test_adjoint_identity_at_every_parity(wavelet, mode):
    for size in ((8, 9), (9, 8), (15, 17), (30, 31), (3, 5), (2, 2)):
        check_adjoint(wavelet, mode, size)


@pytest.mark.parametrize("mode", wv.MODES)
def test_transpose_of_an_axis_equals_the_matrix(mode):
    # By hand from 8 on; before, db4's border of 6 and 7 samples goes round the image.
    for size in (5, 7, 8, 9):
        matrix = extended_matrix("db4", mode, size)
        half = len(matrix) // 2
        with jax.enable_x64(True):
            weights = jnp.asarray(image(2 * half))
            got = kernels._analyse_transposed(weights[:half], weights[half:], wv.filter_bank("db4"), mode, 0, size)
        np.testing.assert_allclose(got, matrix.T @ np.asarray(weights), atol=1e-12)


def test_derivatives_of_second_order():
    with jax.enable_x64(True):
        x = jnp.asarray(image(3, 5))

        def loss(x):
            return sum(jnp.sum(jnp.sin(b)) for b in wv.dwt2(x, "db2", "reflect", HW))

        check_grads(loss, (x,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_linear_transpose_and_hessian():
    with jax.enable_x64(True):
        x = jnp.asarray(image(4, 4))

        def forward(x):
            return tuple(wv.dwt2(x, "haar", axes=HW))

        transposed = jax.linear_transpose(forward, x)
        np.testing.assert_allclose(transposed(forward(x))[0], x, atol=1e-12)  # orthonormal: the transpose is the inverse
        # sum of squares of an orthonormal transform: the Hessian is twice the identity
        hessian = jax.hessian(lambda v: sum(jnp.sum(b**2) for b in forward(v.reshape(4, 4))))(x.reshape(-1))
        np.testing.assert_allclose(hessian, 2 * np.eye(16), atol=1e-12)


def test_gradient_of_a_single_band_and_of_one_band_of_the_inverse():
    with jax.enable_x64(True):
        x = jnp.asarray(image(6, 6))
        grad = jax.grad(lambda x: wv.dwt2(x, "db2", "zero", HW).hl.sum())(x)
        matrix = extended_matrix("db2", "zero", 6)
        low, high = np.split(matrix, 2)
        np.testing.assert_allclose(grad, np.outer(low.sum(0), high.sum(0)), atol=1e-12)
        bands = wv.dwt2(x, "db2", "zero", HW)
        one = jax.grad(lambda ll: jnp.sum(wv.idwt2((ll, *bands[1:]), "db2", "zero", HW) ** 2))(bands.ll)
        every = jax.grad(lambda b: jnp.sum(wv.idwt2(b, "db2", "zero", HW) ** 2))(bands)
        np.testing.assert_allclose(one, every.ll, atol=1e-12)
        missing = jax.grad(lambda ll: jnp.sum(wv.idwt2((ll, None, None, None), "db2", "zero", HW)))(bands.ll)
        np.testing.assert_allclose(missing, jax.grad(lambda b: jnp.sum(wv.idwt2(b, "db2", "zero", HW)))(bands).ll, atol=1e-12)


@pytest.mark.parametrize("in_axis", [0, 1, 2, 3])
def test_vmap_over_any_axis(in_axis):
    x = image(2, 6, 7, 3, dtype=np.float32)
    stacked = np.stack([x, 2 * x, x - 1], in_axis)

    def roundtrip(x):
        bands = wv.dwt2(x, "db2", "symmetric", (1, 2))
        return bands, jax.grad(lambda x: sum(jnp.sum(jnp.sin(b)) for b in wv.dwt2(x, "db2", "symmetric", (1, 2))))(x)

    got = jax.jit(jax.vmap(roundtrip, in_axes=in_axis))(stacked)
    for k in range(3):
        for mine, one in zip(jax.tree.leaves(got), jax.tree.leaves(roundtrip(np.take(stacked, k, in_axis))), strict=True):
            np.testing.assert_allclose(mine[k], one, atol=1e-6)


def test_vmap_of_the_inverse_over_some_bands():
    bands = [image(3, 4, 5, seed=k, dtype=np.float32) for k in range(4)]
    got = jax.vmap(lambda ll, hl: wv.idwt2((ll, bands[1][0], hl, None), "haar", axes=HW), in_axes=(0, 1))(bands[0], np.moveaxis(bands[2], 0, 1))
    for k in range(3):
        np.testing.assert_allclose(got[k], wv.idwt2((bands[0][k], bands[1][0], bands[2][k], None), "haar", axes=HW), atol=1e-6)


def test_inside_checkpoint_and_scan():
    x = jnp.asarray(image(6, 8, dtype=np.float32))

    def step(x, _):
        return wv.idwt2([jnp.tanh(b) for b in wv.dwt2(x, "haar", axes=HW)], "haar", axes=HW), None

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(step), x, None, length=2)[0].sum()

    plain = jax.grad(lambda x: step(step(x, None)[0], None)[0].sum())(x)
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), plain, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_keep_the_type(dtype):
    x = jnp.asarray(image(7, 8)).astype(dtype)
    grad = jax.grad(lambda x: wv.dwt2(x, "db2", "symmetric", HW).lh.astype(jnp.float32).sum())(x)
    assert grad.dtype == dtype and np.isfinite(np.asarray(grad, np.float32)).all()


def gradient(x):
    return jax.grad(lambda x: sum(jnp.sum(jnp.square(b) * (k + 1)) for k, b in enumerate(wv.dwt2(x, "db2", "symmetric"))))(x)


@pytest.mark.multidevice
def test_gradient_of_a_batch_spread_over_devices():
    x = image(8, 7, 8, 1, dtype=np.float32)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    compiled = jax.jit(gradient).lower(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))).compile()
    got = compiled(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(got.sharding.device_set) == 8 and not got.sharding.is_fully_replicated
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(got, gradient(x), atol=1e-6)


@pytest.mark.multidevice
@pytest.mark.parametrize("check", [False, True])
def test_gradient_under_shard_map_and_pmap(check):
    x = image(8, 7, 8, 1, dtype=np.float32)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spec = PartitionSpec("data")
    got = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check))(x)
    np.testing.assert_allclose(got, gradient(x), atol=1e-6)
    if not check:
        np.testing.assert_allclose(jax.pmap(gradient)(x[:, None])[:, 0], gradient(x), atol=1e-6)
