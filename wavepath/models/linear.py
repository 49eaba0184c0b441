"""Linear layers and layer norms of transformers: flax's, and on a CPU the same with gradients written by hand.

Parameters, their names and their first values are those of flax; results agree to rounding. Which form it is, is chosen by the kind of device
while a network is traced. What each of these saves: docs/benchmarks_models.md. The forms for CPUs have no forward-mode derivative.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.ops.platform import platform

EPS = 1e-6  # of every LayerNorm (METHODS 5.1) but those of some imported encoders
_OVER_INPUTS, _OVER_OUTPUTS, _OVER_ROWS = ((((axis_a,), (axis_b,)), ((), ())) for axis_a, axis_b in ((1, 0), (1, 1), (0, 0)))


def dense(features: int, dtype: Any, param_dtype: Any, name: str | None = None, bias: bool = True) -> nn.Module:
    """A linear layer with Xavier-uniform weights and zero bias (METHODS 5.1), or none."""
    if bias and _by_hand(dtype):
        return _Dense(features, dtype, param_dtype, name=name)
    start = nn.initializers.xavier_uniform()
    return nn.Dense(features, use_bias=bias, kernel_init=start, dtype=dtype, param_dtype=param_dtype, name=name)


def layer_norm(dtype: Any, param_dtype: Any, name: str | None = None, eps: float = EPS) -> nn.Module:
    """LayerNorm with the statistics in float32 or wider, whatever the compute type."""
    if _by_hand(dtype):
        return _LayerNorm(dtype, param_dtype, eps, name=name)
    return nn.LayerNorm(epsilon=eps, dtype=dtype, param_dtype=param_dtype, name=name)


def _by_hand(dtype: Any) -> bool:
    return platform() == "cpu" and jnp.dtype(dtype).itemsize >= 4


class _Dense(nn.Module):
    """`nn.Dense` with the gradient of `linear`; the same parameters."""

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        return linear(x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))


class _LayerNorm(nn.Module):
    """`nn.LayerNorm` with the gradient of `normalise`; the same parameters."""

    dtype: Any
    param_dtype: Any
    eps: float = EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), self.param_dtype)
        return normalise(x.astype(self.dtype), scale.astype(self.dtype), bias.astype(self.dtype), self.eps)


@jax.custom_vjp
def linear(x: Float[Array, "*rows i"], kernel: Float[Array, "i o"], bias: Float[Array, "o"]) -> Float[Array, "*rows o"]:
    """x kernel + bias.

    XLA for CPUs forms the gradient of the kernel as a product of two transposed operands, copies one of them to do so, and evaluates what made
    it once more for every layout that is asked for. Here it is a product over rows, with more columns than rows.
    """
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, _OVER_INPUTS)
    return (rows + bias).reshape(*x.shape[:-1], -1)


def _linear_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel, bias), (x, kernel)


def _linear_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    inputs, outputs = kernel.shape
    # In one shape for all that read it: another shape is another copy.
    g, rows = jax.lax.optimization_barrier(gradient.reshape(-1, outputs)), x.reshape(-1, inputs)
    if inputs <= outputs or len(rows) <= inputs:
        of_kernel = jax.lax.dot_general(rows, g, _OVER_ROWS)
    else:
        # With few rows the optimiser, which then reads a transposed gradient, loses more than the product gains. The barrier keeps XLA from
        # folding the transposition back into the product.
        of_kernel = jax.lax.optimization_barrier(jax.lax.dot_general(g, rows, _OVER_ROWS)).T
    return jax.lax.dot_general(g, kernel, _OVER_OUTPUTS).reshape(x.shape), of_kernel, g.sum(axis=0)


linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: Float[Array, "*rows d"], scale: Float[Array, "d"], bias: Float[Array, "d"], eps: float = EPS) -> Float[Array, "*rows d"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias, mean and variance over the last axis."""
    return _normalise_forward(x, scale, bias, eps)[0]


def _normalise_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    mean = x.mean(axis=-1, keepdims=True)
    # As flax has it: both sums in one pass.
    inverse = jax.lax.rsqrt(jnp.maximum(jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0) + eps)
    return (x - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _normalise_backward(eps: float, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    # The barrier keeps XLA from storing `normal` in the forward pass, in a loop of its own.
    x, mean, inverse, scale = jax.lax.optimization_barrier(saved)
    normal = (x - mean) * inverse
    inner = gradient * scale
    slope, shift = (inner * normal).mean(axis=-1, keepdims=True), inner.mean(axis=-1, keepdims=True)
    leading = tuple(range(x.ndim - 1))
    return (inner - shift - normal * slope) * inverse, (gradient * normal).sum(axis=leading), gradient.sum(axis=leading)


normalise.defvjp(_normalise_forward, _normalise_backward)
