"""The transformer block and the stack of blocks that encoder and decoder share."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from wavepath.errors import ConfigError
from wavepath.models.attention import Attention
from wavepath.models.linear import dense, layer_norm
from wavepath.ops.platform import platform

REMATS = ("none", "full", "dots")


def drop_path(x: Float[Array, "b n d"], keys: Key[Array, "b"], rate: Float[Array, ""] | float) -> Float[Array, "b n d"]:
    """Leaves a residual branch out for whole examples, each by its own key, and scales the rest so that the mean stays.

    Args:
        x: [b, n, d], the branch.
        keys: one for each example.
        rate: share left out, in [0, 1).
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    stays = jax.vmap(lambda key: jax.random.bernoulli(key, keep))(keys)
    return x * (stays / keep).astype(x.dtype)[:, None, None]


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, x Phi(x).

    On a CPU by `erf` and with its derivative in closed form: a third of the time of `flax.linen.gelu`, whose `erfc` evaluates three branches
    for every value, and keeps them all for the gradient (docs/benchmarks_models.md). Both agree to 2e-6 in float32.
    """
    if platform() == "cpu" and x.dtype.itemsize >= 4:
        return _gelu(x)
    return nn.gelu(x, approximate=False)


def _cumulative(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    return x * _cumulative(x)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    # XLA makes one loop of this and the product with the cotangent: only x is kept for the backward pass. Without the barrier it would keep
    # `erf` too, evaluated in a loop of its own.
    kept = jax.lax.optimization_barrier(x)
    slope = _cumulative(kept) + kept * jnp.exp(-0.5 * kept * kept) / math.sqrt(2.0 * math.pi)
    return _gelu(x), tangent * slope


class Mlp(nn.Module):
    """Linear, GELU (exact), linear; `hidden` channels between."""

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        x = dense(self.hidden, self.dtype, self.param_dtype, "fc1")(x)
        return dense(width, self.dtype, self.param_dtype, "fc2")(gelu(x))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Called as `block(x, layer, keys)`; the returned pair `(x, x)` is what `nn.scan` wants. `layer` is the block's number and sets its share of
    `drop_path`, which rises linearly from 0 in the first block to the full rate in the last; `keys` may be None where nothing is dropped.
    """

    heads: int
    depth: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    attention: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], layer: Int[Array, ""], keys: Key[Array, "b"] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        def residual(branch: Array, number: int) -> Array:
            if keys is None or self.drop_path == 0.0:
                return branch
            rate = self.drop_path * layer / max(self.depth - 1, 1)
            return drop_path(branch, jax.vmap(lambda key: jax.random.fold_in(key, 2 * layer + number))(keys), rate)

        types = (self.dtype, self.param_dtype)
        attention = Attention(self.heads, self.attention, *types, name="attn")
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), *types, name="mlp")
        x = x + residual(attention(layer_norm(*types, name="norm1")(x)), 0)
        x = x + residual(mlp(layer_norm(*types, name="norm2")(x)), 1)
        return x, x


class Stack(nn.Module):
    """`depth` blocks one after the other; parameters under `0`, `1`, ... or, scanned, stacked along a first axis under `scanned`.

    Attributes:
        scan: one compiled block for all layers: a third of the compile time. Without `remat` it stores more than the loop does.
        remat: what the backward pass recomputes: `none`; `dots` (everything but products with weights); `full` (everything but block inputs).
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], keys: Key[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "l b n d"] | tuple[Float[Array, "b n d"], ...]]:
        """Returns the last block's output, and every block's output, indexable by its number."""
        if self.remat not in REMATS:
            raise ConfigError(f"config.model.remat={self.remat!r} is unknown; choose one of {', '.join(REMATS)}")
        block = Block
        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            # Inside a scan the loop itself keeps XLA from undoing the recomputation.
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan)
        settings = dict(
            heads=self.heads, depth=self.depth, mlp_ratio=self.mlp_ratio, drop_path=self.drop_path, attention=self.attention,
            dtype=self.dtype, param_dtype=self.param_dtype,
        )
        layers = jnp.arange(self.depth)
        if self.scan:
            scanned = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast), length=self.depth
            )
            return scanned(**settings, name="scanned")(x, layers, keys)
        outputs = []
        for number in range(self.depth):
            x, _ = block(**settings, name=str(number))(x, layers[number], keys)
            outputs.append(x)
        return x, tuple(outputs)
