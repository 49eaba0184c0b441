import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.models.linear import dense, layer_norm, linear, normalise
from wavepath.ops.platform import traced_for

WIDE = ((3, 5, 6), 4), ((3, 5, 6), 9), ((2, 2, 6), 4), ((7, 6), 6)  # x, outputs: more rows than inputs or fewer, wider or narrower


def gradients(function, *arrays):
    """Of a weighted sum, by every array, and the value."""
    weight = jax.random.normal(jax.random.key(9), jax.eval_shape(function, *arrays).shape, arrays[0].dtype)
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x) * weight), range(len(arrays))))(*arrays)


def near(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-12 * float(np.abs(other).max()), rtol=1e-12)


@pytest.mark.parametrize(("shape", "outputs"), WIDE)
def test_linear_and_its_gradients_are_those_of_the_definition(shape, outputs):
    with jax.enable_x64(True):
        arrays = [jax.random.normal(jax.random.key(i), size, float) for i, size in enumerate((shape, (shape[-1], outputs), (outputs,)))]
        near(gradients(linear, *arrays), gradients(lambda x, kernel, bias: x @ kernel + bias, *arrays))


def test_normalise_and_its_gradients_are_those_of_the_definition():
    def definition(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias

    with jax.enable_x64(True):
        x, scale, bias = (jax.random.normal(jax.random.key(i), size, float) for i, size in enumerate(((3, 5, 8), (8,), (8,))))
        near(gradients(normalise, 2 * x + 1, scale, bias), gradients(definition, 2 * x + 1, scale, bias))


@pytest.mark.parametrize("make", [lambda **types: dense(4, **types), layer_norm])
def test_layers_keep_flax_parameters_on_every_kind_of_device(make):
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    found = {}
    for kind in ("cpu", "gpu"):
        with traced_for(kind):
            module = make(dtype=jnp.float32, param_dtype=jnp.float32, name="same")
            assert isinstance(module, nn.Dense | nn.LayerNorm) == (kind != "cpu")
            params = module.init(jax.random.key(1), x)
            found[kind] = params, module.apply(params, x)
    for one, other in zip(jax.tree.leaves_with_path(found["cpu"]), jax.tree.leaves_with_path(found["gpu"]), strict=True):
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], atol=2e-6)


@pytest.mark.parametrize("make", [lambda **types: dense(4, **types), layer_norm])
def test_sixteen_bit_layers_are_flax_own(make):
    assert isinstance(make(dtype=jnp.bfloat16, param_dtype=jnp.float32), nn.Dense | nn.LayerNorm)
