"""The vision transformer: an encoder of image patches.

Sine-cosine positions, a class token, pre-norm blocks, a final norm. Parameter names follow timm's (`patch_embed`, `cls_token`,
`blocks/<i>/{norm1, attn/{qkv, proj}, norm2, mlp/{fc1, fc2}}`, `norm`), so that weights convert by renaming and transposing. What published
encoders have beside (`Form`: register tokens, layer scale, gated MLPs, a learned table of positions) is off unless it is asked for.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from wavepath.errors import ConfigError
from wavepath.models.layers import PLAIN, POSITIONS, Form, Stack
from wavepath.models.linear import dense, layer_norm
from wavepath.ops.patches import gather_patches, patchify, repeat_groups
from wavepath.ops.posembed import resize_table, sincos_2d


class Variant(NamedTuple):
    """Size of an encoder."""

    width: int
    depth: int
    heads: int


VARIANTS = {
    "XT": Variant(96, 4, 3),  # extra tiny: for smoke runs, where compiling twelve blocks costs more than the training
    "Ti": Variant(192, 12, 3),
    "S": Variant(384, 12, 6),
    "B": Variant(768, 12, 12),
    "L": Variant(1024, 24, 16),
    "H": Variant(1280, 32, 16),
}


def variant(name: str) -> Variant:
    """Size by name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in VARIANTS:
        raise ConfigError(f"config.model.variant={name!r} is unknown; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


class ViT(nn.Module):
    """Images to tokens.

    Attributes:
        width, depth, heads: size, see `VARIANTS`.
        patch: side of a patch in pixels.
        drop_path: rate of the last block; see `Block`.
        attention, scan, remat: see `Attention` and `Stack`.
        dtype, param_dtype: compute and parameter types.
        form: what published encoders of one size differ in.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
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
        self, images: Float[Array, "b h w c"], visible: Int32[Array, "g k"] | None = None, keys: Key[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """Encodes all patches, or the `visible` ones.

        Args:
            images: [b, h, w, c], normalised.
            visible: numbers of the patches to encode, for each of g groups of consecutive examples; None: all, in order.
            keys: one for each example, for drop path; None switches it off.

        Returns:
            Tokens [b, 1 + k, d] after the final norm, class token first and register tokens left out, and by name: `cls` [b, d], `mean` [b, d]
            (mean of the patch tokens), `embedded` [b, 1 + r + k, d] (the first block's input, with r register tokens behind the class token),
            `blocks` (each block's output, by number, likewise).
        """
        b, h, w, _ = images.shape
        form = self.form
        patches = patchify(images, self.patch)
        positions = self._positions(h // self.patch, w // self.patch)[None]
        if visible is not None:
            # Pixels are gathered before they are embedded: only visible patches are projected, and no gradient is scattered.
            patches = gather_patches(patches, visible)
            positions = positions[0][visible]
        x = dense(self.width, self.dtype, self.param_dtype, "patch_embed")(patches.astype(self.dtype))
        x = x + repeat_groups(positions, b).astype(self.dtype)
        tokens = [self._tokens("cls_token", 1, b)] + ([self._tokens("reg_token", form.registers, b)] if form.registers else [])
        x = embedded = jnp.concatenate([*tokens, x], axis=1)
        x, blocks = Stack(
            self.depth, self.heads, self.mlp_ratio, self.drop_path, self.attention, self.scan, self.remat, self.dtype, self.param_dtype,
            form, name="blocks",
        )(x, keys)
        if form.registers:
            x = jnp.concatenate([x[:, :1], x[:, 1 + form.registers :]], axis=1)
        if form.final_norm:
            x = layer_norm(self.dtype, self.param_dtype, "norm", form.norm_eps)(x)
        return x, {"cls": x[:, 0], "mean": x[:, 1:].mean(axis=1), "embedded": embedded, "blocks": blocks}

    def _tokens(self, name: str, count: int, batch: int) -> Float[Array, "b r d"]:
        """Learned tokens that stand ahead of the patches of every image."""
        token = self.param(name, nn.initializers.normal(0.02), (1, count, self.width), self.param_dtype)
        return jnp.broadcast_to(token.astype(self.dtype), (batch, count, self.width))

    def _positions(self, rows: int, columns: int) -> Float[Array, "n d"]:
        if self.form.positions not in POSITIONS:
            raise ConfigError(f"config.model.positions={self.form.positions!r} is unknown; choose one of {', '.join(POSITIONS)}")
        if self.form.positions == "sincos":
            return jnp.asarray(sincos_2d(self.width, rows, columns))
        if not self.form.grid and rows != columns:
            raise ConfigError("a learned table of positions is square; give config.model.position_grid, its side in patches")
        side = self.form.grid or rows
        table = self.param("pos_embed", nn.initializers.normal(0.02), (1, side * side, self.width), self.param_dtype)
        return resize_table(table[0], rows, columns)


def stack_flops(tokens: int, width: int, depth: int, mlp_ratio: float = 4.0) -> float:
    """Forward floating-point operations of `depth` blocks on one example: products alone, a multiply and an add counted as two."""
    return 2.0 * depth * ((4 + 2 * mlp_ratio) * tokens * width**2 + 2 * tokens**2 * width)


def vit_flops(tokens: int, size: Variant, patch: int, channels: int = 3, form: Form = PLAIN) -> float:
    """Forward operations of an encoder on `tokens` patches (the class token and register tokens are added here)."""
    blocks = stack_flops(tokens + 1 + form.registers, size.width, size.depth, form.mlp_ratio(size.width))
    return blocks + 2.0 * tokens * patch * patch * channels * size.width
