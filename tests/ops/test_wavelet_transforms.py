"""Packets, stationary and continuous transforms against PyWavelets, with jaxwt as a second opinion; inverses, gradients, errors."""

import jax
import jax.numpy as jnp
import jaxwt
import numpy as np
import pytest
import pywt

from wavepath.ops import wavelet_transforms as wt
from wavepath.ops.wavelets import WaveletError

HW = (-2, -1)


def image(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).random(shape).astype(dtype)


@pytest.mark.parametrize(("wavelet", "mode", "size"), [("haar", "periodization", (8, 12)), ("db2", "symmetric", (13, 10)), ("haar", "zero", (7, 5))])
def test_packets(wavelet, mode, size):
    x = image(*size)
    tree = pywt.WaveletPacket2D(x, wavelet, mode, 2)
    with jax.enable_x64(True):
        nodes = jax.jit(lambda x: wt.packets2(x, wavelet, mode, 2, HW))(x)
        assert set(nodes) == {node.path for node in tree.get_level(2)}
        for path, node in nodes.items():
            np.testing.assert_allclose(node, tree[path].data, atol=1e-10, err_msg=path)
        back = jax.jit(lambda nodes: wt.ipackets2(nodes, wavelet, mode, HW, shape=size))(nodes)
        np.testing.assert_allclose(back, x, atol=1e-10)


def test_packets_channels_last_and_missing_nodes():
    x = image(2, 8, 8, 3, dtype=np.float32)
    nodes = wt.packets2(x, "db2", level=2)
    assert list(nodes) == [node.path for node in pywt.WaveletPacket2D(x[0, :, :, 0], "db2", maxlevel=2).get_level(2, "natural")]
    for channel in range(3):
        expected = pywt.WaveletPacket2D(x[1, :, :, channel], "db2", "periodization", 2)["vh"].data
        np.testing.assert_allclose(nodes["vh"][1, :, :, channel], expected, atol=1e-5)
    some = {path: nodes[path] for path in ("aa", "vh")}
    rest = {path: node if path in some else jnp.zeros_like(node) for path, node in nodes.items()}
    np.testing.assert_allclose(wt.ipackets2(some, "db2", shape=(8, 8)), wt.ipackets2(rest, "db2", shape=(8, 8)), atol=1e-6)
    # db2 with periodization is orthonormal: the gradient of half the sum of squares is the image.
    grad = jax.grad(lambda x: sum(jnp.sum(node**2) / 2 for node in wt.packets2(x, "db2", level=2).values()))(jnp.asarray(x))
    np.testing.assert_allclose(grad, x, atol=1e-5)


def test_second_opinion_on_packets():
    x = image(16, 16, dtype=np.float32)
    theirs = jaxwt.WaveletPacket2D(jnp.asarray(x)[None], "db2", mode="reflect", max_level=2)
    mine = wt.packets2(x, "db2", "reflect", 2, HW)
    for path in ("aa", "hv", "dd"):
        np.testing.assert_allclose(mine[path], np.asarray(theirs[path])[0], atol=1e-5)


@pytest.mark.parametrize(("wavelet", "level"), [("haar", 2), ("db4", 2), ("bior2.2", 1)])
def test_stationary(wavelet, level):
    x = image(8, 12)
    expected = pywt.swt2(x, wavelet, level, trim_approx=True)
    with jax.enable_x64(True):
        got = jax.jit(lambda x: wt.swt2(x, wavelet, level, HW))(x)
        assert len(got) == level + 1
        np.testing.assert_allclose(got[0], expected[0], atol=1e-10)
        for mine, theirs in zip(got[1:], expected[1:], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-10)
        inverse = jax.jit(lambda bands: wt.iswt2(bands, wavelet, HW))
        np.testing.assert_allclose(inverse(got), x, atol=1e-10)
        # Bands that no image has: the inverse is then a mean of inverses, and must be the same mean.
        other = [image(8, 12, seed=9)] + [tuple(image(8, 12, seed=10 * n + k) for k in range(3)) for n in range(level)]
        np.testing.assert_allclose(inverse(other), pywt.iswt2([other[0], *other[1:]], wavelet), atol=1e-9)


def test_stationary_moves_with_the_image():
    x = image(8, 8, dtype=np.float32)
    moved = wt.swt2(np.roll(x, (3, 5), HW), "db2", 2, HW)
    for band, other in zip(jax.tree.leaves(wt.swt2(x, "db2", 2, HW)), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(np.roll(band, (3, 5), HW), other, atol=1e-5)


def test_stationary_channels_last_types_and_default_level():
    x = image(2, 8, 12, 3, dtype=np.float32)
    bands = wt.swt2(x, "haar")
    assert len(bands) == 3  # 12 = 3 * 2^2
    expected = pywt.swt2(x[1, :, :, 2], "haar", 2, trim_approx=True)
    np.testing.assert_allclose(bands[1].hl[1, :, :, 2], expected[1][1], atol=1e-5)
    half = wt.swt2(jnp.asarray(x, jnp.bfloat16), "haar")
    assert all(b.dtype == jnp.bfloat16 for b in jax.tree.leaves(half)) and wt.iswt2(half, "haar").dtype == jnp.bfloat16
    grad = jax.grad(lambda x: jnp.sum(wt.iswt2(wt.swt2(x, "haar"), "haar") ** 2) / 2)(jnp.asarray(x))
    np.testing.assert_allclose(grad, x, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stationary_along_one_axis(axis):
    x = image(8, 4, 16)
    level = 2
    expected = pywt.swt(x, "db2", level, axis=axis, trim_approx=True)
    with jax.enable_x64(True):
        got = jax.jit(lambda x: wt.swt(x, "db2", level, axis))(x)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-10)
        np.testing.assert_allclose(wt.iswt(got, "db2", axis), x, atol=1e-10)
    if axis == -1:
        single = x.reshape(-1, 16).astype(np.float32)
        for mine, theirs in zip(wt.swt(single, "db2", level), jaxwt.swt(jnp.asarray(single), "db2", level), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("wavelet", ["mexh", "morl", "gaus3", "cmor1.5-1.0"])
def test_continuous(wavelet):
    x, scales = image(2, 50), np.array([1.1, 2, 3.7, 16])
    expected, frequencies = pywt.cwt(x, scales, wavelet, 0.5)
    for x64, tolerance in ((True, 1e-10), (False, 1e-5)):
        with jax.enable_x64(x64):
            got = jax.jit(lambda x: wt.cwt(x, scales, wavelet)[0])(x.astype(np.float64 if x64 else np.float32))
            assert got.shape == (4, 2, 50) and jnp.iscomplexobj(got) == np.iscomplexobj(expected)
            np.testing.assert_allclose(got, expected, atol=tolerance)
    np.testing.assert_allclose(wt.cwt(x.astype(np.float32), scales, wavelet, sampling_period=0.5)[1], frequencies, rtol=1e-12)


def test_continuous_axes_gradient_and_second_opinion():
    x, scales = image(12, 3, dtype=np.float32), np.arange(1, 6)
    got, _ = wt.cwt(x, scales, "mexh", axis=0, precision=10)
    assert got.shape == (5, 12, 3)
    np.testing.assert_allclose(got, pywt.cwt(x, scales, "mexh", axis=0, precision=10)[0], atol=1e-5)
    np.testing.assert_allclose(np.moveaxis(np.asarray(got), 1, -1)[[3]], jaxwt.cwt(jnp.asarray(x.T), scales[[3]], "mexh")[0], atol=1e-4)
    linear = jax.jvp(lambda x: wt.cwt(x, scales, "mexh", axis=0, precision=10)[0], (jnp.asarray(x),), (jnp.asarray(x),))[1]
    np.testing.assert_allclose(linear, got, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: wt.packets2(x, level=0, axes=HW), "level=0"),
        (lambda x: wt.ipackets2({}, axes=HW, shape=(8, 8)), "one level"),
        (lambda x: wt.ipackets2({"a": x, "ah": x}, axes=HW, shape=(8, 8)), "one level"),
        (lambda x: wt.ipackets2({"x": x}, axes=HW, shape=(8, 8)), "letters a, h, v, d"),
        (lambda x: wt.ipackets2({"a": x}, axes=HW, shape=(8, 8)), "4x4"),
        (lambda x: wt.swt2(x[:6], level=2, axes=HW), r"multiple of 2\^level"),
        (lambda x: wt.swt(x[:, :7]), "has no level: sizes must be even"),
        (lambda x: wt.swt(x, axis=2), "axis=2"),
        (lambda x: wt.cwt(x, [1, 2], "db4"), "not a continuous wavelet"),
        (lambda x: wt.cwt(x, [0], "mexh"), "positive"),
        (lambda x: wt.cwt(x, [0.01], "mexh"), "too small"),
    ],
)
def test_errors_name_the_fix(call, message):
    with pytest.raises(WaveletError, match=message):
        call(image(8, 8, dtype=np.float32))


@pytest.mark.parametrize("function", [wt.packets2, wt.swt2, wt.swt, lambda x: wt.cwt(x, [1.0])])
def test_integers_are_refused(function):
    with pytest.raises(TypeError, match="to_float"):
        function(np.ones((4, 8, 8), np.uint8))
