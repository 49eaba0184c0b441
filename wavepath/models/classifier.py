"""An image classifier: a vision transformer, its tokens pooled, a norm and a linear head."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from wavepath.errors import ConfigError
from wavepath.models.layers import PLAIN, Form
from wavepath.models.linear import layer_norm
from wavepath.models.vit import ViT

POOLS = ("mean", "cls")


class Classifier(nn.Module):
    """Encoder and head.

    Attributes:
        width, depth, heads, patch, drop_path, attention, scan, remat, dtype, param_dtype, form: see `ViT`.
        classes: outputs.
        pool: `mean`: the mean of the last block's patch tokens, then a LayerNorm of its own (the encoder's final norm is not used); `cls`: the
            class token behind the encoder's final norm.

    Source: METHODS 2.5 (global pooling of MAE's fine-tuning: `fc_norm`, head from a normal of deviation 2e-5).
    """

    width: int
    depth: int
    heads: int
    classes: int
    patch: int = 16
    pool: str = "mean"
    drop_path: float = 0.0
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    form: Form = PLAIN

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], keys: Key[Array, "b"] | None = None
    ) -> tuple[Float[Array, "b k"], dict[str, Any]]:
        """Logits [b, classes] in float32 or wider, and by name the encoder's outputs with `pooled` [b, d] added: what the head sees.

        Args:
            images: [b, h, w, c], normalised.
            keys: one for each example, for drop path; None switches it off.
        """
        if self.pool not in POOLS:
            raise ConfigError(f"config.finetune.pool={self.pool!r} is unknown; choose one of {', '.join(POOLS)}")
        types = (self.dtype, self.param_dtype)
        _, out = ViT(
            self.width, self.depth, self.heads, self.patch, drop_path=self.drop_path, attention=self.attention, scan=self.scan,
            remat=self.remat, dtype=self.dtype, param_dtype=self.param_dtype, form=self.form, name="encoder",
        )(images, None, keys)
        if self.pool == "mean":
            pooled = layer_norm(*types, name="fc_norm", eps=self.form.norm_eps)(out["blocks"][-1][:, 1 + self.form.registers :].mean(axis=1))
        else:
            pooled = out["cls"]
        head = nn.Dense(self.classes, kernel_init=nn.initializers.truncated_normal(2e-5), dtype=self.dtype, param_dtype=self.param_dtype, name="head")
        logits = head(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), {**out, "pooled": pooled}
