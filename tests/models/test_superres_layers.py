"""Layers of super-resolution do what torch's do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.models.superres_layers import RCAB, Conv, Upsampler, pixel_shuffle


def test_convolution_and_pixel_shuffle_are_torchs():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    there = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    for stride, size in [(1, 3), (2, 3), (1, 9)]:
        layer = Conv(8, size, stride)
        params = layer.init(jax.random.key(1), x)
        kernel, bias = (torch.tensor(np.asarray(params["params"][name])) for name in ("kernel", "bias"))
        assert float(jnp.abs(params["params"]["bias"]).max()) <= 1 / (3 * size**2) ** 0.5
        expected = torch.nn.functional.conv2d(there, kernel.permute(3, 2, 0, 1), bias, stride=stride, padding=size // 2)
        np.testing.assert_allclose(layer.apply(params, x), expected.permute(0, 2, 3, 1), atol=1e-5)
    shuffled = torch.pixel_shuffle(expected, 2).permute(0, 2, 3, 1)
    np.testing.assert_allclose(pixel_shuffle(jnp.asarray(expected.permute(0, 2, 3, 1).numpy())), shuffled, atol=1e-6)


@pytest.mark.slow
def test_channel_attention_weighs_whole_channels():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
    block = RCAB(reduction=4)
    params = block.init(jax.random.key(1), x)
    y, state = block.apply(params, x, capture_intermediates=True)
    inner = state["intermediates"]
    weights = (y - x) / inner["conv2"]["__call__"][0]
    np.testing.assert_allclose(weights, np.broadcast_to(weights[:, :1, :1], weights.shape), rtol=1e-3)
    assert 0 < float(weights.min()) and float(weights.max()) < 1


def test_enlargement_by_doublings():
    x = jnp.zeros((1, 3, 4, 8))
    model = Upsampler(8)
    params = model.init(jax.random.key(0), x)
    assert model.apply(params, x).shape == (1, 24, 32, 8) and set(params["params"]) == {"conv1", "conv2", "conv3"}
