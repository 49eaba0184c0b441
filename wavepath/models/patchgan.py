"""The discriminator of conditional image translation: for each 70 x 70 px patch of a pair, does it look real?

Source: METHODS 3.4; Isola et al., CVPR 2017.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.models.stain_layers import Conv, Norm, signed


class PatchGAN(nn.Module):
    """4x4 convolutions: `layers` of stride 2, one of stride 1, one to a logit; LeakyReLU(0.2) between, norms on all but the first and the last.

    2,768,705 parameters as published (channels 64, 3 layers); each logit then sees 70 x 70 px.

    Attributes:
        channels: of the first layer; they double with each, up to eightfold.
        layers: of stride 2.
        norm: one of `stain_layers.NORMS`.
        dtype, param_dtype: of computation, of parameters.
    """

    channels: int = 64
    layers: int = 3
    norm: str = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, source: Float[Array, "b h w 3"], target: Float[Array, "b h w 3"], train: bool = False
    ) -> tuple[Float[Array, "b i j"], dict[str, Array]]:
        """Logits [b, h / 8 - 2, w / 8 - 2] in float32 or wider, and the map behind each layer, `layer_1` first.

        Args:
            source: the H&E image, [b, h, w, 3] in [0, 1].
            target: the IHC image to be judged, true or made, likewise.
            train: normalise by the batch, and move the running statistics (`batch_stats` is then mutable).

        Raises:
            ConfigError: images too small to give a logit.
        """
        smallest = 3 * 2**self.layers
        if self.layers < 1 or min(source.shape[1:3]) < smallest:
            raise ConfigError(
                f"a discriminator of {self.layers} layers wants at least one layer and images of {smallest} px, not {source.shape[1]} x"
                f" {source.shape[2]}; choose config.stain.discriminator_layers or the crop accordingly"
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x, maps = signed(jnp.concatenate([source, target], axis=-1), self.dtype), {}
        for number, (width, stride) in enumerate(_plan(self.channels, self.layers), 1):
            x = Conv(width, 4, stride, bias=number == 1, **types, name=f"conv{number}")(x)
            x = Norm(self.norm, **types, name=f"norm{number}")(x, train) if number > 1 else x
            x = maps[f"layer_{number}"] = nn.leaky_relu(x, 0.2)
        logits = Conv(1, 4, **types, name="head")(x)[..., 0]
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), maps


def _plan(channels: int, layers: int) -> list[tuple[int, int]]:
    """(channels, stride) of each layer but the last."""
    return [(channels * min(2**number, 8), 2 if number < layers else 1) for number in range(layers + 1)]


def patchgan_flops(side: int, channels: int = 64, layers: int = 3) -> float:
    """Floating-point operations (multiply and add) of one forward pass of one pair of `side` px."""
    total, inputs = 0, 6
    for width, stride in [*_plan(channels, layers), (1, 1)]:
        side = side // 2 if stride == 2 else side - 1
        total += side**2 * 16 * inputs * width
        inputs = width
    return 2.0 * total
