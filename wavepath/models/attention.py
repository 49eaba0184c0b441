"""Multi-head self-attention: one module, and the form of the product chosen by backend.

All forms compute softmax(q k^T / sqrt(d)) v and agree to rounding (1e-5 in float32, values and gradients):

* `xla`: `jax.nn.dot_product_attention`, which XLA compiles well for TPU and GPU;
* `cudnn`: the fused kernel on NVIDIA GPUs (16-bit types, head width a multiple of 8 up to 128);
* `cpu`: heads ahead of tokens, keys transposed in memory, division after the product with the values, and a gradient written by hand, which
  hands the packed projection one array where differentiation adds three padded ones. No forward-mode derivative. What each of these saves:
  docs/benchmarks_models.md.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.models.linear import dense
from wavepath.ops.platform import platform

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "cpu")
_CUDNN_MIN_TOKENS = 128  # below, the fused kernel has nothing to save: the scores fit in cache


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values, heads of equal width.

    Attributes:
        heads: number of heads; divides the token width.
        implementation: one of `IMPLEMENTATIONS`.
        dtype: compute type.
        param_dtype: parameter type.
        bias: whether the fused projection has one; the projection behind always does.
    """

    heads: int
    implementation: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        if d % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide a width of {d}; choose a divisor")
        types = (self.dtype, self.param_dtype)
        qkv = dense(3 * d, *types, name="qkv", bias=self.bias)(x).reshape(b, n, 3, self.heads, d // self.heads)
        out = attend(qkv, self.implementation)
        return dense(d, *types, name="proj")(out.reshape(b, n, d))


def attend(qkv: Float[Array, "b n 3 h d"], implementation: str = "auto") -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head; the softmax is taken in float32 or wider.

    Args:
        qkv: [b, n, 3, h, d], queries, keys and values of n tokens as one projection makes them.
        implementation: one of `IMPLEMENTATIONS`.

    Raises:
        ConfigError: an unknown implementation, or `cudnn` where it cannot run.
    """
    chosen = choose(implementation, platform(), qkv.shape[1], qkv.shape[4], qkv.dtype)
    if chosen == "cpu":
        return _heads_first(qkv)
    return jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation=chosen)


def choose(implementation: str, platform: str, tokens: int, head_width: int, dtype: Any) -> str:
    """The form that `auto` stands for on a platform; any other name is checked and returned.

    Raises:
        ConfigError: an unknown name, or `cudnn` where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"config.model.attention={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    fits = platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= 128
    if implementation == "cudnn" and not fits:
        raise ConfigError(
            f"config.model.attention=cudnn needs an NVIDIA GPU, a 16-bit config.model.dtype and a head width that is a multiple of 8 up to 128"
            f" (here {platform}, {jnp.dtype(dtype).name}, {head_width}); use config.model.attention=auto"
        )
    if implementation != "auto":
        return implementation
    if platform == "cpu":
        return "cpu"
    return "cudnn" if fits and tokens >= _CUDNN_MIN_TOKENS else "xla"


@jax.custom_vjp
def _heads_first(qkv: Float[Array, "b n 3 h d"]) -> Float[Array, "b n h d"]:
    return _forward(qkv)[0]


def _forward(qkv: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = qkv.astype(jnp.promote_types(qkv.dtype, jnp.float32))
    q = wide[:, :, 0].transpose(0, 2, 1, 3) * qkv.shape[4] ** -0.5
    k = wide[:, :, 1].transpose(0, 2, 3, 1)
    v = wide[:, :, 2].transpose(0, 2, 1, 3)
    # The barrier makes the transposed copies real; folded into the products they would bring the slow layouts back.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    scores = q @ k
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    # Dividing the output costs a pass over [n, d] where dividing the weights costs one over [n, n].
    inverse = 1.0 / weights.sum(axis=-1, keepdims=True)
    out = (weights @ v) * inverse
    return out.transpose(0, 2, 1, 3).astype(qkv.dtype), (q, k, v, out, weights, inverse)


def _backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array]:
    q, k, v, out, weights, inverse = saved
    g = jax.lax.optimization_barrier(gradient.astype(out.dtype).transpose(0, 2, 1, 3)) * inverse  # of the weights before division
    shift = jnp.sum(g * out, axis=-1, keepdims=True)
    of_scores = weights * (_product(g, v, 3, 3) - shift)
    of_q = _product(of_scores, k, 3, 3) * q.shape[3] ** -0.5
    of_k, of_v = _over_rows(of_scores, q), _over_rows(weights, g)
    packed = jnp.stack([x.transpose(0, 2, 1, 3) for x in (of_q, of_k, of_v)], axis=2).astype(gradient.dtype)
    # Without the barrier it is packed once for each of the products and sums that read it.
    return (jax.lax.optimization_barrier(packed),)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Head by head, over one axis of each."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0, 1), (0, 1))))


def _over_rows(a: Float[Array, "b h m n"], b: Float[Array, "b h m d"]) -> Float[Array, "b h n d"]:
    """Head by head a^T b. As in `linear`, a product over rows wants more columns than rows; the barrier keeps the order of its operands."""
    if a.shape[3] <= b.shape[3]:
        return _product(a, b, 2, 2)
    return jax.lax.optimization_barrier(_product(b, a, 2, 2)).swapaxes(2, 3)


_heads_first.defvjp(_forward, _backward)
