"""The masked autoencoder: a ViT on the visible patches, and a narrow decoder that predicts the masked ones.

Both work in the shuffled order of the mask: visible tokens first, masked tokens behind. Positions go with the tokens, so nothing needs to be
put back in image order, and the masked predictions are a slice.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from wavepath.models.layers import PLAIN, Form, Stack
from wavepath.models.linear import dense, layer_norm
from wavepath.models.vit import Variant, ViT, stack_flops, vit_flops
from wavepath.ops.patches import Masking, repeat_groups
from wavepath.ops.posembed import sincos_2d


class MAE(nn.Module):
    """Encoder and decoder.

    Attributes:
        width, depth, heads: encoder size.
        decoder_width, decoder_depth, decoder_heads: decoder size.
        patch: side of a patch in pixels.
        drop_path: of the encoder.
        attention, scan, remat, dtype, param_dtype: see `ViT`.
        form: of the encoder; the decoder shares its `norm_eps` and `qkv_bias`.
    """

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    patch: int = 16
    channels: int = 3
    drop_path: float = 0.0
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    form: Form = PLAIN

    def setup(self) -> None:
        types = (self.dtype, self.param_dtype)
        form = Form(norm_eps=self.form.norm_eps, qkv_bias=self.form.qkv_bias)
        self.encoder = ViT(
            self.width, self.depth, self.heads, self.patch, drop_path=self.drop_path, attention=self.attention, scan=self.scan,
            remat=self.remat, dtype=self.dtype, param_dtype=self.param_dtype, form=self.form,
        )
        self.decoder_embed = dense(self.decoder_width, *types)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.decoder_width), self.param_dtype)
        self.decoder_blocks = Stack(
            self.decoder_depth, self.decoder_heads, attention=self.attention, scan=self.scan, remat=self.remat, dtype=self.dtype,
            param_dtype=self.param_dtype, form=form,
        )
        self.decoder_norm = layer_norm(*types, eps=form.norm_eps)
        self.decoder_pred = dense(self.patch * self.patch * self.channels, *types)

    def __call__(
        self, images: Float[Array, "b h w c"], masking: Masking, keys: Key[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b m p"], dict[str, Any]]:
        """Predicts the pixels of the masked patches, in the order of `masking.masked`, in float32 or wider.

        Args:
            images: [b, h, w, c], normalised.
            masking: which patches are visible.
            keys: one for each example, for drop path; None switches it off.

        Returns:
            Predictions [b, m, patch*patch*c], and the encoder's named outputs with `latent` [b, 1 + k, d] and `decoded` [b, 1 + n, e] added.
        """
        tokens, out = self.encode(images, masking, keys)
        decoded = self.decode(tokens, masking, (images.shape[1] // self.patch, images.shape[2] // self.patch))
        return self.predict(decoded, masking), {**out, "latent": tokens, "decoded": decoded}

    def encode(
        self, images: Float[Array, "b h w c"], masking: Masking | None = None, keys: Key[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """The encoder on the visible patches, or on all of them; see `ViT`."""
        return self.encoder(images, None if masking is None else masking.visible, keys)

    def decode(self, tokens: Float[Array, "b t d"], masking: Masking, grid: tuple[int, int]) -> Float[Array, "b s e"]:
        """Decoder tokens [b, 1 + n, e]: class token, visible patches, masked patches, in the order of the mask.

        Args:
            tokens: [b, 1 + k, d], the encoder's.
            masking: the mask they were made with.
            grid: patches from top to bottom and from left to right.
        """
        x = self.decoder_embed(tokens.astype(self.dtype))
        b, _, e = x.shape
        hidden = jnp.broadcast_to(self.mask_token.astype(self.dtype), (b, masking.order.shape[1] - masking.keep, e))
        positions = jnp.asarray(sincos_2d(e, *grid))[masking.order].astype(self.dtype)
        patches = jnp.concatenate([x[:, 1:], hidden], axis=1) + repeat_groups(positions, b)
        x, _ = self.decoder_blocks(jnp.concatenate([x[:, :1], patches], axis=1))
        return self.decoder_norm(x)

    def predict(self, decoded: Float[Array, "b s e"], masking: Masking) -> Float[Array, "b m p"]:
        """Pixels of the masked patches from decoder tokens; the visible ones' tokens are not looked at."""
        pixels = self.decoder_pred(decoded[:, 1 + masking.keep :])
        return pixels.astype(jnp.promote_types(pixels.dtype, jnp.float32))


def mae_flops(size: Variant, decoder: Variant, patch: int, patches: int, keep: int, channels: int = 3, form: Form = PLAIN) -> float:
    """Forward floating-point operations for one image, from the shapes: encoder on `keep` patches, decoder on all, head on the masked ones."""
    pixels = patch * patch * channels
    embed = 2.0 * (keep + 1) * size.width * decoder.width
    head = 2.0 * (patches - keep) * decoder.width * pixels
    return vit_flops(keep, size, patch, channels, form) + embed + stack_flops(patches + 1, decoder.width, decoder.depth) + head
