"""Layers of virtual staining: borders, the transposed convolution, norms, grids of parts, the first parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wavepath.errors import ConfigError
from wavepath.models.stain_layers import Conv, Deconv, Norm, fresh_parameters, quadrant_features, signed, split_grid, stitch_grid
from wavepath.models.staining import StainGenerator


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize(("size", "stride", "border"), [(3, 1, "reflect"), (7, 1, "reflect"), (3, 2, "reflect"), (3, 2, "zeros"), (4, 2, "zeros")])
def test_convolution_is_torchs(size, stride, border):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    x, margin = draw(2, 8, 6, 3), (size - 1) // 2
    params = {"kernel": draw(size, size, 3, 4, seed=1), "bias": draw(4, seed=2)}
    there = torch.nn.Conv2d(3, 4, size, stride, margin, padding_mode=border)
    there.weight.data, there.bias.data = torch.tensor(np.asarray(params["kernel"])).permute(3, 2, 0, 1), torch.tensor(np.asarray(params["bias"]))
    want = there(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(Conv(4, size, stride, border).apply({"params": params}, x), want, atol=2e-5)


def test_a_map_too_small_to_be_reflected():
    with pytest.raises(ConfigError, match="larger config.stain.crop"):
        Conv(2, 7, border="reflect").init(jax.random.key(0), draw(1, 3, 9, 2))


def test_transposed_convolution_is_torchs_in_both_forms():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    x, kernel, weights = draw(2, 3, 4, 5), draw(3, 3, 5, 2, seed=1), draw(2, 6, 8, 2, seed=2)
    there = [torch.tensor(np.asarray(a), requires_grad=True) for a in (x, kernel)]
    want = torch.nn.functional.conv_transpose2d(
        there[0].permute(0, 3, 1, 2), there[1].permute(2, 3, 0, 1), stride=2, padding=1, output_padding=1
    ).permute(0, 2, 3, 1)
    (want * torch.tensor(np.asarray(weights))).sum().backward()
    for impl in ("phases", "dilated"):
        got, pull = jax.vjp(lambda x, k, impl=impl: Deconv(2, impl).apply({"params": {"kernel": k}}, x), x, kernel)
        np.testing.assert_allclose(got, want.detach(), atol=1e-5)
        for ours, theirs in zip(pull(weights), there, strict=True):
            np.testing.assert_allclose(ours, theirs.grad, atol=2e-5)


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_norms_agree_on_what_they_normalise(kind):
    # Two images, 64 channels: 32 groups of two.
    x = 3 * draw(2, 4, 5, 64) + jnp.arange(64)
    layer = Norm(kind)
    variables = layer.init(jax.random.key(0), x, False)
    assert {path[-1]: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"]).items()} == {"scale": (64,), "bias": (64,)}
    y, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
    axes, parts = {"batch": ((0, 1, 2), y), "instance": ((1, 2), y), "group": ((1, 2, 4), y.reshape(2, 4, 5, 32, 2))}[kind]
    np.testing.assert_allclose(parts.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(parts.var(axes), 1, atol=1e-4)
    if kind != "batch":
        # An image's result is its own, and that of training.
        np.testing.assert_allclose(layer.apply(variables, x[:1], False), y[:1], atol=1e-6)


def test_errors_of_norms_name_the_fix():
    with pytest.raises(ConfigError, match="choose one of batch, instance, group"):
        Norm("layer").init(jax.random.key(0), draw(1, 2, 2, 4), False)
    with pytest.raises(ConfigError, match="norm=group or batch"):
        Norm("instance").init(jax.random.key(0), draw(1, 1, 1, 4), False)


def test_parts_of_images():
    x = jnp.arange(2 * 8 * 12 * 3, dtype=jnp.float32).reshape(2, 8, 12, 3)
    parts = split_grid(x)
    assert parts.shape == (8, 4, 6, 3)
    np.testing.assert_array_equal(parts[5], x[1, :4, 6:])
    np.testing.assert_array_equal(stitch_grid(split_grid(x, 4), 4), x)
    assert signed(jnp.asarray([[[[0.0, 0.5, 1.0]]]])).tolist() == [[[[-1.0, 0.0, 1.0]]]]
    with pytest.raises(ConfigError, match="config.stain.grid"):
        split_grid(x, 5)


def test_parts_are_encoded_by_themselves():
    x, layer = draw(1, 16, 16, 3), Conv(4, stride=2)
    params = layer.init(jax.random.key(0), x)

    def encode(images):
        return layer.apply(params, images)

    got = quadrant_features(encode, x)
    assert got.shape == (1, 8, 8, 4)
    np.testing.assert_allclose(got[:, 4:, :4], encode(x[:, 8:, :8]), atol=1e-6)
    assert float(jnp.abs(got - encode(x)).max()) > 1e-3  # at the seam zeros lie where the neighbour would be


def test_first_parameters_are_as_published():
    model = StainGenerator(channels=8, blocks=4)
    x, features = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((1, 4, 4, 32), jnp.float32)
    made = fresh_parameters(model, jax.random.key(0), x, features)
    shapes = jax.eval_shape(lambda key, *x: model.init(key, *x), jax.random.key(0), x, features)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    flat = traverse_util.flatten_dict(made["params"], sep="/")
    kernels = np.concatenate([np.ravel(leaf) for name, leaf in flat.items() if "kernel" in name])
    scales = np.concatenate([leaf for name, leaf in flat.items() if name.endswith("norm/scale")])
    assert abs(kernels.std() - 0.02) < 2e-4 and abs(kernels.mean()) < 2e-4
    assert abs(scales.mean() - 1) < 5e-3 and 0.01 < scales.std() < 0.03
    assert not any(leaf.any() for name, leaf in flat.items() if name.endswith("bias"))
    np.testing.assert_array_equal(flat["encoder/wavelet/scale"], 1)
    np.testing.assert_array_equal(flat["encoder/wavelet/wavelet_scale_3"], np.float32(0.1))
    assert not np.array_equal(flat["block_0/conv1/kernel"], flat["block_1/conv1/kernel"])
    stats = traverse_util.flatten_dict(made["batch_stats"], sep="/")
    assert all(np.unique(leaf) == (1 if name.endswith("var") else 0) for name, leaf in stats.items())
