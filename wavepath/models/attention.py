"""Multi-head self-attention: one module, and the form of the product chosen by backend.

All forms compute softmax(q k^T / sqrt(d)) v and agree to rounding (1e-5 in float32, values and gradients):

* `xla`: `jax.nn.dot_product_attention`, which XLA compiles well for TPU and GPU;
* `cudnn`: the fused kernel on NVIDIA GPUs (16-bit types, head width a multiple of 8 up to 128);
* `cpu`: heads ahead of tokens, keys transposed in memory, division after the product with the values. XLA's CPU batched product is fast in
  this layout alone: 0.65 to 0.87 of the time of `xla` for the gradient (docs/benchmarks_models.md).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.ops.platform import platform

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "cpu")
_CUDNN_MIN_TOKENS = 128  # below, the fused kernel has nothing to save: the scores fit in cache


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values, biased, heads of equal width.

    Attributes:
        heads: number of heads; divides the token width.
        implementation: one of `IMPLEMENTATIONS`.
        dtype: compute type.
        param_dtype: parameter type.
    """

    heads: int
    implementation: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        if d % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide a width of {d}; choose a divisor")
        linear = functools.partial(
            nn.Dense, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, param_dtype=self.param_dtype
        )
        qkv = linear(3 * d, name="qkv")(x).reshape(b, n, 3, self.heads, d // self.heads)
        out = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], self.implementation)
        return linear(d, name="proj")(out.reshape(b, n, d))


def attend(
    query: Float[Array, "b n h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"], implementation: str = "auto"
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head; the softmax is taken in float32 or wider.

    Raises:
        ConfigError: an unknown implementation, or `cudnn` where it cannot run.
    """
    chosen = choose(implementation, platform(), key.shape[1], key.shape[3], query.dtype)
    if chosen == "cpu":
        return _heads_first(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation=chosen)


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


def _heads_first(
    query: Float[Array, "b n h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    q = query.astype(wide).transpose(0, 2, 1, 3) * query.shape[3] ** -0.5
    k = key.astype(wide).transpose(0, 2, 3, 1)
    v = value.astype(wide).transpose(0, 2, 1, 3)
    # The barrier makes the transposed copies real; folded into the products they would bring the slow layouts back.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    scores = q @ k
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Dividing the output costs a pass over [n, d] where dividing the weights costs one over [n, m].
    out = (weights @ v) / weights.sum(axis=-1, keepdims=True)
    return out.transpose(0, 2, 1, 3).astype(query.dtype)
