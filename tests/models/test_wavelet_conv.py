"""WTConv: the identities of METHODS 7.5, a torch formulation written from the equations, odd sizes, counts of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.wavelet_conv import WTConv
from wavepath.ops.depthwise import depthwise_conv


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def randomised(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape).astype(np.float32)), params)


@pytest.mark.parametrize("wavelet", ["haar", pytest.param("db2", marks=pytest.mark.slow)])
def test_without_the_cascade_it_is_a_depthwise_convolution(wavelet):
    x, model = images(2, 8, 8, 3), WTConv(kernel=3, levels=2, wavelet=wavelet)
    params = randomised(model.init(jax.random.key(0), x)["params"])
    params["scale"] = jnp.ones(3)
    for level in (1, 2):
        params[f"wavelet_scale_{level}"] = jnp.zeros(12)
    expected = depthwise_conv(x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 6, 2), (1, 7, 9, 2)])
@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_with_identity_filters_the_cascade_returns_the_image(shape, levels):
    x, model = images(*shape), WTConv(kernel=3, levels=levels)
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    for level in range(1, levels + 1):
        params[f"wavelet_kernel_{level}"] = params[f"wavelet_kernel_{level}"].at[1, 1].set(1)
        # Each low band comes twice on the way up (its own and the cascade's): keep the details, and the low band of the last level alone.
        scale = jnp.ones(8) if level == levels else jnp.ones(8).at[:2].set(0)
        params[f"wavelet_scale_{level}"] = scale
    np.testing.assert_allclose(model.apply({"params": params}, x), x, atol=1e-6)


def test_counts_shapes_and_initial_values():
    x = images(1, 8, 8, 64)
    params = jax.eval_shape(WTConv(64, kernel=7, levels=3).init, jax.random.key(0), x)["params"]
    count = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
    assert count == 49 * 64 + 64 + 64 + 3 * (49 * 256 + 256)
    values = WTConv(kernel=5, levels=1).init(jax.random.key(0), images(1, 4, 4, 32))["params"]
    assert values["wavelet_kernel_1"].shape == (5, 5, 1, 128) and values["kernel"].shape == (5, 5, 1, 32)
    np.testing.assert_array_equal(values["wavelet_scale_1"], np.full(128, 0.1, np.float32))
    np.testing.assert_array_equal(values["scale"], np.ones(32))
    assert 0.95 / 5 < np.abs(values["kernel"]).max() <= 1 / 5 and not np.asarray(values["bias"]).any()
    assert "bias" not in WTConv(use_bias=False).init(jax.random.key(0), images(1, 4, 4, 2))["params"]


def torch_wtconv(torch, params, x, levels):
    """The equations with torch's own convolutions: strided with fixed filters down, transposed with the same filters up."""
    low, high = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
    filters = torch.stack([torch.outer(low, low), torch.outer(high, low), torch.outer(low, high), torch.outer(high, high)])
    convolve, channels = torch.nn.functional.conv2d, x.shape[1]
    filters = filters[:, None].repeat(channels, 1, 1, 1)

    def depthwise(x, kernel):
        weight = kernel.permute(3, 2, 0, 1)
        return convolve(x, weight, padding="same", groups=weight.shape[0])

    def by_band(t):
        """From channel-major [c 4] to the module's [4 c]."""
        return t.unflatten(1, (channels, 4)).transpose(1, 2).flatten(1, 2)

    coarse, stack = x, []
    for level in range(1, levels + 1):
        size = coarse.shape[2:]
        padded = torch.nn.functional.pad(coarse, (0, size[1] % 2, 0, size[0] % 2))
        bands = by_band(convolve(padded, filters, stride=2, groups=channels))
        y = depthwise(bands, params[f"wavelet_kernel_{level}"]) * params[f"wavelet_scale_{level}"][:, None, None]
        stack.append((y, size))
        coarse = bands[:, :channels]
    z = 0
    for y, size in reversed(stack):
        y = torch.cat([y[:, :channels] + z, y[:, channels:]], 1)
        y = y.unflatten(1, (4, channels)).transpose(1, 2).flatten(1, 2)
        z = torch.nn.functional.conv_transpose2d(y, filters, stride=2, groups=channels)[..., : size[0], : size[1]]
    base = depthwise(x, params["kernel"]) + params["bias"][:, None, None]
    return base * params["scale"][:, None, None] + z


@pytest.mark.parametrize("impl", ["conv", "shift"])
def test_against_torch_values_and_gradients(impl):
    torch = pytest.importorskip("torch")
    x, model = images(2, 10, 7, 3), WTConv(kernel=3, levels=2, impl=impl)
    params = randomised(model.init(jax.random.key(0), x)["params"])
    theirs = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in params.items()}
    image = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy(), requires_grad=True)
    expected = torch_wtconv(torch, theirs, image, 2)
    weights = images(2, 10, 7, 3, seed=5)
    (expected * torch.tensor(np.asarray(weights).transpose(0, 3, 1, 2).copy())).sum().backward()
    got, pull = jax.vjp(jax.jit(lambda p, x: model.apply({"params": p}, x)), params, x)
    np.testing.assert_allclose(got, expected.detach().numpy().transpose(0, 2, 3, 1), atol=2e-5)
    by_params, by_image = pull(weights)
    np.testing.assert_allclose(by_image, image.grad.numpy().transpose(0, 2, 3, 1), atol=5e-5)
    for name, gradient in by_params.items():
        np.testing.assert_allclose(gradient, theirs[name].grad.numpy(), atol=2e-4, err_msg=name)


def test_types():
    x = images(1, 5, 4, 2)
    model = WTConv(levels=2, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), x)["params"]
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert model.apply({"params": params}, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"), [({"features": 4}, "2 channels"), ({"levels": -1}, "levels >= 0"), ({"kernel": 0}, "kernel >= 1")]
)
def test_errors_name_the_fix(settings, message):
    with pytest.raises(ConfigError, match=message):
        WTConv(**settings).init(jax.random.key(0), images(1, 4, 4, 2))
