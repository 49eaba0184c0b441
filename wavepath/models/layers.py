"""The transformer block and the stack of blocks that encoder and decoder share."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from wavepath.errors import ConfigError
from wavepath.models.attention import Attention
from wavepath.models.linear import EPS, dense, layer_norm
from wavepath.ops.platform import platform

REMATS = ("none", "full", "dots")
MLPS = ("gelu", "swiglu")
POSITIONS = ("sincos", "learned")


@dataclass(frozen=True)
class Form:
    """What published encoders of one size differ in; the defaults are those of MAE (METHODS 5.1). Blocks use the first five fields.

    Attributes:
        mlp: `gelu`: linear, GELU, linear; `swiglu`: the first makes two halves (a, b), the second reads silu(a) b.
        hidden: channels that the second linear layer reads; 0: by `mlp_ratio`.
        norm_eps: of every LayerNorm.
        qkv_bias: whether queries, keys and values have a bias.
        layer_scale: above 0 each branch is multiplied by a learned factor for each channel, which begins with this value.
        registers: learned tokens between the class token and the patches; they belong to no patch and are not returned.
        positions: `sincos`: fixed sine-cosine positions of the patches; `learned`: a table, resized bicubically for images of another size.
        grid: side of the table in patches; 0: that of the images which initialise it.
        final_norm: whether there is one behind the blocks.
    """

    mlp: str = "gelu"
    hidden: int = 0
    norm_eps: float = EPS
    qkv_bias: bool = True
    layer_scale: float = 0.0
    registers: int = 0
    positions: str = "sincos"
    grid: int = 0
    final_norm: bool = True

    def mlp_ratio(self, width: int, ratio: float = 4.0) -> float:
        """Hidden channels over `width` of an MLP of two linear layers that costs what this one does."""
        hidden = self.hidden or int(ratio * width)
        return hidden * (1.5 if self.mlp == "swiglu" else 1.0) / width


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


PLAIN = Form()


class Mlp(nn.Module):
    """Linear, GELU (exact), linear; `hidden` channels between. Of kind `swiglu` (Shazeer 2020): linear to two halves (a, b), silu(a) b, linear."""

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kind: str = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        if self.kind not in MLPS:
            raise ConfigError(f"config.model.mlp={self.kind!r} is unknown; choose one of {', '.join(MLPS)}")
        gated = self.kind == "swiglu"
        x = dense(self.hidden * (2 if gated else 1), self.dtype, self.param_dtype, "fc1")(x)
        if gated:
            gate, x = jnp.split(x, 2, axis=-1)
            x = nn.silu(gate) * x
        else:
            x = gelu(x)
        return dense(width, self.dtype, self.param_dtype, "fc2")(x)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron 2021), which begins with `start`."""

    start: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x * self.param("scale", nn.initializers.constant(self.start), (x.shape[-1],), self.param_dtype).astype(self.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), each branch scaled where `form` says so.

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
    form: Form = PLAIN

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], layer: Int[Array, ""], keys: Key[Array, "b"] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        types, form = (self.dtype, self.param_dtype), self.form

        def residual(branch: Array, number: int) -> Array:
            if form.layer_scale > 0:
                branch = LayerScale(form.layer_scale, *types, name=f"ls{number + 1}")(branch)
            if keys is None or self.drop_path == 0.0:
                return branch
            rate = self.drop_path * layer / max(self.depth - 1, 1)
            return drop_path(branch, jax.vmap(lambda key: jax.random.fold_in(key, 2 * layer + number))(keys), rate)

        attention = Attention(self.heads, self.attention, *types, form.qkv_bias, name="attn")
        mlp = Mlp(form.hidden or int(self.mlp_ratio * x.shape[-1]), *types, form.mlp, name="mlp")
        x = x + residual(attention(layer_norm(*types, name="norm1", eps=form.norm_eps)(x)), 0)
        x = x + residual(mlp(layer_norm(*types, name="norm2", eps=form.norm_eps)(x)), 1)
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
    form: Form = PLAIN

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
            dtype=self.dtype, param_dtype=self.param_dtype, form=self.form,
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
