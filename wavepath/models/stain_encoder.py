"""The contrastive encoder of virtual staining: an image to a feature map at a quarter of its size and an embedding (METHODS 3.2).

Two of them, independent and alike, learn to agree on pairs of one tissue in two stains. The first stage compares embeddings; in the second both are
frozen, the H&E encoder gives the map that the generator attends to, the other judges how far a generated part agrees with the true one.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.models.stain_layers import Conv, Norm, ResnetBlock, ResnetEncoder, normal_kernel, signed

# Widths behind the residual blocks, each at half the size, as multiples of the first.
_DEEP = (4, 4, 8, 16)


class StainEncoder(nn.Module):
    """Stem, two steps down, residual blocks (the feature map), four more steps down, 2 x 2 means, one linear layer.

    18,740,288 parameters as published (channels 64, 6 blocks).

    Attributes:
        channels: width of the stem; the map has 4, the embedding 16 times as many.
        blocks: residual blocks.
        norm: one of `stain_layers.NORMS`; with `batch`, calls with train=False use the running statistics: a frozen encoder is called so.
        remat: recompute each residual block in the backward pass.
        dtype, param_dtype: of computation, of parameters.
    """

    channels: int = 64
    blocks: int = 6
    norm: str = "batch"
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], train: bool = False) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """The embedding [b, 16 channels], not normalised, and `features` [b, h / 4, w / 4, 4 channels], the map behind the last residual block.

        Args:
            images: [b, h, w, 3] in [0, 1], sides divisible by 4; trained at 256 px.
            train: normalise by the batch, and move the running statistics (`batch_stats` is then mutable).

        Raises:
            ConfigError: sides that are not divisible by 4.
        """
        check_sides(*images.shape[1:3])
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = ResnetEncoder(self.channels, self.norm, **types, name="down")(signed(images, self.dtype), train)[-1]
        block = nn.remat(ResnetBlock, static_argnums=(2,)) if self.remat else ResnetBlock
        for number in range(self.blocks):
            x = block(self.norm, **types, name=f"block_{number}")(x, train)
        features = x
        for number, factor in enumerate(_DEEP):
            x = Conv(factor * self.channels, stride=2, bias=False, **types, name=f"deep_conv{number + 1}")(x)
            x = nn.relu(Norm(self.norm, **types, name=f"norm{number + 1}")(x, train))
        # Ordered as torch flattens (channel, row, column).
        pooled = _means(x).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        embedding = nn.Dense(16 * self.channels, kernel_init=normal_kernel, **types, name="fc")(pooled)
        return embedding.astype(jnp.promote_types(embedding.dtype, jnp.float32)), {"features": features}


def _means(x: Float[Array, "b h w c"]) -> Float[Array, "b 2 2 c"]:
    """Means over the four quarters; of an odd side both halves hold the middle (torch's AdaptiveAvgPool2d(2))."""
    for axis in (1, 2):
        size = x.shape[axis]
        halves = [lax.slice_in_dim(x, start, end, axis=axis).mean(axis) for start, end in ((0, -(-size // 2)), (size // 2, size))]
        x = jnp.stack(halves, axis)
    return x


def check_sides(height: int, width: int) -> None:
    """Raises ConfigError unless both are divisible by 4: two steps down and two up have to end where they began."""
    if height % 4 or width % 4:
        raise ConfigError(f"the networks of staining take sides divisible by 4, not {height} x {width}; choose config.stain.crop accordingly")


def encoder_flops(side: int, channels: int = 64, blocks: int = 6, embedding: bool = True) -> float:
    """Floating-point operations (multiply and add) of one forward pass of one image of `side` px: convolutions and the linear layer.

    With embedding=False up to the feature map alone.
    """
    c = channels
    total = side**2 * 49 * 3 * c + (side // 2) ** 2 * 9 * 2 * c**2 + (side // 4) ** 2 * 9 * 8 * c**2
    total += (side // 4) ** 2 * blocks * 2 * 9 * (4 * c) ** 2
    if embedding:
        small, inputs = side // 4, 4 * c
        for factor in _DEEP:
            small = -(-small // 2)
            total += small**2 * 9 * inputs * factor * c
            inputs = factor * c
        total += 4 * inputs * 16 * c
    return 2.0 * total
