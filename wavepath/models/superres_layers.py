"""What the super-resolution networks share: 3x3 convolutions, residual and channel-attention blocks, sub-pixel enlargement, bicubic skips."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.ops.resize import resize_bicubic

SCALES = (2, 4, 8)
SKIPS = ("none", "bicubic")
# U(-1/sqrt(fan in), 1/sqrt(fan in)): what a convolution gets by default in torch, where the published networks were trained.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """A convolution with bias, zeros around the image, as many pixels out as in (divided by `stride`); weights and bias as torch draws them.

    Attributes:
        features: channels that go out.
        size: side of the filter, odd.
        stride: step in px; 2 takes the pixels with even coordinates as centres.
        dtype: compute type.
        param_dtype: parameter type.
    """

    features: int
    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        bound = 1 / math.sqrt(x.shape[-1] * self.size**2)

        def uniform(key: Array, shape: Sequence[int], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("kernel", torch_uniform, (self.size, self.size, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", uniform, (self.features,), self.param_dtype)
        margin = (self.size // 2, self.size // 2)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (self.stride, self.stride), (margin, margin), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias.astype(self.dtype)


def fresh_convolutions(model: nn.Module, key: Array, *inputs: Any, zero: Sequence[str] = ()) -> dict[str, Any]:
    """Parameters of a network of `Conv` layers, distributed as `model.init` draws them, from one draw for all of them.

    XLA compiles each draw of its own: a network with hundreds of convolutions would wait half a minute for its first weights.

    Args:
        model: whose parameters are all kernels and biases of convolutions.
        key: of the draw.
        inputs: arguments of the model's call.
        zero: names of convolutions that start at 0: those behind a skip, so that the network starts as the skip alone.

    Raises:
        ValueError: a parameter of another kind.
    """
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, key, *inputs)["params"])
    if wrong := [path for path in shapes if path[-1] not in ("kernel", "bias")]:
        raise ValueError(f"parameter {'/'.join(wrong[0])} belongs to no convolution; draw it with the model's own init")
    ends = np.cumsum([leaf.size for leaf in shapes.values()]).tolist()
    # Behind the barrier, or each slice would compile, and draw, the whole once more.
    draw = jax.lax.optimization_barrier(jax.random.uniform(key, (ends[-1],), jnp.result_type(*shapes.values()), -1, 1))
    params = {}
    for (path, leaf), end in zip(shapes.items(), ends, strict=True):
        bound = 1 / math.sqrt(math.prod(shapes[*path[:-1], "kernel"].shape[:-1]))
        bound *= path[-2] not in zero
        params[path] = (bound * draw[end - leaf.size : end]).reshape(leaf.shape).astype(leaf.dtype)
    return traverse_util.unflatten_dict(params)


class ResBlock(nn.Module):
    """EDSR's residual block: x + `res_scale` (conv, ReLU, conv), 3x3, no normalisation. As many channels go out as come in."""

    res_scale: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv(x.shape[-1], **types, name="conv1")(x)
        y = Conv(x.shape[-1], **types, name="conv2")(nn.relu(y))
        return x + (y if self.res_scale == 1.0 else self.res_scale * y)


class ChannelAttention(nn.Module):
    """Each channel times a weight in (0, 1) that the image's channel means decide: mean, c / `reduction`, ReLU, c, sigmoid (RCAN)."""

    reduction: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        if self.reduction < 1 or channels % self.reduction:
            raise ConfigError(f"channel attention divides {channels} channels by a reduction of {self.reduction}; choose a divisor")
        types = dict(size=1, dtype=self.dtype, param_dtype=self.param_dtype)
        weights = x.mean(axis=(1, 2), keepdims=True)
        weights = nn.relu(Conv(channels // self.reduction, **types, name="down")(weights))
        return x * nn.sigmoid(Conv(channels, **types, name="up")(weights))


class RCAB(nn.Module):
    """RCAN's block: x + channel attention (conv, ReLU, conv), 3x3."""

    reduction: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv(x.shape[-1], **types, name="conv1")(x)
        y = Conv(x.shape[-1], **types, name="conv2")(nn.relu(y))
        return x + ChannelAttention(self.reduction, **types, name="attention")(y)


class Upsampler(nn.Module):
    """Sub-pixel enlargement by a power of two: for each doubling a 3x3 convolution to four times the channels and a pixel shuffle."""

    scale: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        for number in range(doublings(self.scale)):
            x = pixel_shuffle(Conv(4 * x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, name=f"conv{number + 1}")(x))
        return x


def doublings(scale: int) -> int:
    """How often the side doubles: 1, 2, 3 for 2x, 4x, 8x.

    Raises:
        ConfigError: another scale.
    """
    if scale not in SCALES:
        raise ConfigError(f"config.superres.scale={scale} is not offered; choose one of {', '.join(map(str, SCALES))}")
    return int(scale).bit_length() - 1


def pixel_shuffle(x: Float[Array, "b h w c"], factor: int = 2) -> Float[Array, "b i j d"]:
    """[b, h, w, d f^2] to [b, f h, f w, d], channels ordered as torch's `pixel_shuffle` has them: (d, row, column)."""
    b, h, w, c = x.shape
    depth = c // factor**2
    x = x.reshape(b, h, w, depth, factor, factor).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * factor, w * factor, depth)


def mean_shift(x: Float[Array, "b h w 3"], mean: Sequence[float], sign: int = -1) -> Float[Array, "b h w 3"]:
    """`x` less (sign -1) or plus (sign 1) the mean RGB; an empty mean is none."""
    return x + sign * jnp.asarray(mean, x.dtype) if len(mean) else x


def finish(
    output: Float[Array, "b i j 3"], lr: Float[Array, "b h w 3"], mean: Sequence[float], skip: str
) -> Float[Array, "b i j 3"]:
    """What a network's last convolution gave, as an image: in float32 or wider, with the mean RGB restored or the bicubically enlarged input added.

    Args:
        output: the last convolution's.
        lr: the network's input.
        mean: RGB that was subtracted there.
        skip: `none`: the mean is added; `bicubic`: the enlarged input, and the network learns what that lacks.

    Raises:
        ConfigError: another name of a skip.
    """
    if skip not in SKIPS:
        raise ConfigError(f"config.superres.skip={skip!r} is unknown; choose one of {', '.join(SKIPS)}")
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    if skip == "none":
        return mean_shift(output, mean, 1)
    return output + resize_bicubic(lr, *output.shape[1:3]).astype(output.dtype)
