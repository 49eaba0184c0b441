"""What the networks of virtual staining share: convolutions with a choice of border and start, norms, residual blocks, grids of image parts.

Images enter and leave the networks in [0, 1]; they work in [-1, 1] within, as published. Every kernel starts at N(0, 0.02), every scale of a norm at
N(1, 0.02), every bias at 0 (METHODS 3.2, 3.4).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Shaped

from wavepath.errors import ConfigError
from wavepath.models.resnet import BatchNorm
from wavepath.ops.platform import platform

NORMS = ("batch", "instance", "group")
BORDERS = ("zeros", "reflect")
SPREAD = 0.02
_GROUPS = 32
_LAYOUT = ("NHWC", "HWIO", "NHWC")
normal_kernel = nn.initializers.normal(SPREAD)


class Conv(nn.Module):
    """A convolution that keeps the size (divided by `stride`), or, with a filter of even side, gives one pixel less.

    Attributes:
        features: channels that go out.
        size: side of the filter; (size - 1) // 2 pixels are laid around the image.
        stride: step in px; with 2 and an odd filter the pixels with even coordinates are centres.
        border: `zeros` or `reflect`: what lies around the image.
        bias: whether each channel has one; superfluous ahead of a norm.
        dtype, param_dtype: of computation, of parameters.
    """

    features: int
    size: int = 3
    stride: int = 1
    border: str = "zeros"
    bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        if self.border not in BORDERS:
            raise ValueError(f"border={self.border!r} is unknown; choose one of {', '.join(BORDERS)}")
        kernel = self.param("kernel", normal_kernel, (self.size, self.size, x.shape[-1], self.features), self.param_dtype)
        margin = ((self.size - 1) // 2,) * 2
        if self.border == "reflect":
            if margin[0] >= min(x.shape[1:3]):
                raise ConfigError(f"a map of {x.shape[1]} x {x.shape[2]} is too small to be reflected by {margin[0]}; use a larger config.stain.crop")
            x, margin = jnp.pad(x, ((0, 0), margin, margin, (0, 0)), mode="reflect"), (0, 0)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (self.stride, self.stride), (margin, margin), dimension_numbers=_LAYOUT
        )
        return y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype) if self.bias else y


class Deconv(nn.Module):
    """A transposed 3x3 convolution of stride 2 to exactly twice the size, without bias: torch's with padding 1 and output_padding 1.

    out[2i] = k_1 x[i] and out[2i + 1] = k_2 x[i] + k_0 x[i + 1] on each axis, zeros beyond the end. `kernel` [3, 3, c, d] is torch's weight with its
    axes moved.

    Attributes:
        features: channels that go out.
        impl: `phases`: four small convolutions for even and odd rows and columns, interleaved; `dilated`: XLA's own; `auto`: phases on a CPU, where
            the gradient of XLA's takes thirty times as long (128 x 128 x 128 to 64: 0.4 against 11 s), its own elsewhere.
    """

    features: int
    impl: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        if self.impl not in ("auto", "phases", "dilated"):
            raise ValueError(f"impl={self.impl!r} is unknown; choose one of auto, phases, dilated")
        kernel = self.param("kernel", normal_kernel, (3, 3, x.shape[-1], self.features), self.param_dtype).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.impl == "dilated" or (self.impl == "auto" and platform() != "cpu"):
            return jax.lax.conv_general_dilated(
                x, kernel[::-1, ::-1], (1, 1), ((1, 2), (1, 2)), lhs_dilation=(2, 2), dimension_numbers=_LAYOUT
            )

        def phase(row: int, column: int) -> Array:
            rows, columns = (slice(2, None, -2) if odd else slice(1, 2) for odd in (row, column))
            return jax.lax.conv_general_dilated(x, kernel[rows, columns], (1, 1), ((0, row), (0, column)), dimension_numbers=_LAYOUT)

        b, h, w, _ = x.shape
        rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
        return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, self.features)


class Norm(nn.Module):
    """One of three normalisations, each with a scale and a bias a channel: the choice changes no parameter.

    Attributes:
        kind: `batch`: by the batch while training (all shards), by running statistics otherwise, as published. With one image a step these differ,
            since a step then normalises by the image alone. `instance`: by the image, always; `group`: by the image in groups of channels (32, or as
            many as divide them): both the same in training and use, and independent of the batch (METHODS 3.8).
    """

    kind: str = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.kind == "batch":
            return BatchNorm(**types, name="norm")(x, train)
        if self.kind not in NORMS:
            raise ConfigError(f"config.stain.norm={self.kind!r} is unknown; choose one of {', '.join(NORMS)}")
        if self.kind == "instance" and x.shape[1] * x.shape[2] == 1:
            raise ConfigError("instance normalisation of a map of 1 x 1 leaves nothing; use config.stain.norm=group or batch, or a larger crop")
        groups = x.shape[-1] if self.kind == "instance" else math.gcd(_GROUPS, x.shape[-1])
        return nn.GroupNorm(num_groups=groups, epsilon=1e-5, use_fast_variance=False, **types, name="norm")(x)


class ResnetBlock(nn.Module):
    """pix2pix's residual block: x + (conv, norm, ReLU, conv, norm), 3x3 without bias, the image reflected at its border."""

    norm: str = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = x
        for number in (1, 2):
            y = Conv(x.shape[-1], border="reflect", bias=False, **types, name=f"conv{number}")(y)
            y = Norm(self.norm, **types, name=f"norm{number}")(y, train)
            y = nn.relu(y) if number == 1 else y
        return x + y


class ResnetEncoder(nn.Module):
    """pix2pix's way down: 7x7 convolution to c channels (reflected), two of 3x3 and stride 2 to 2c and 4c; norm and ReLU behind each."""

    channels: int = 64
    norm: str = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], train: bool
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b i j d"], Float[Array, "b k l e"]]:
        """The maps at full, half and quarter size."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        maps = []
        for number in range(3):
            settings = dict(size=3, stride=2) if number else dict(size=7, border="reflect")
            x = Conv(self.channels * 2**number, bias=False, **settings, **types, name=f"conv{number + 1}")(x)
            x = nn.relu(Norm(self.norm, **types, name=f"norm{number + 1}")(x, train))
            maps.append(x)
        return maps[0], maps[1], maps[2]


def signed(images: Float[Array, "b h w c"], dtype: Any = jnp.float32) -> Float[Array, "b h w c"]:
    """[0, 1] to [-1, 1], in which the networks work."""
    return (2 * images - 1).astype(dtype)


def split_grid(x: Shaped[Array, "b h w c"], grid: int = 2) -> Shaped[Array, "n i j c"]:
    """The `grid` x `grid` parts of each image, [b grid^2, h / grid, w / grid, c]: an image's parts follow each other, row by row.

    Raises:
        ConfigError: the sides are not divisible by `grid`.
    """
    b, h, w, c = x.shape
    if grid < 1 or h % grid or w % grid:
        raise ConfigError(f"{h} x {w} px do not divide into {grid} x {grid} equal parts; choose config.stain.grid or the crop accordingly")
    x = x.reshape(b, grid, h // grid, grid, w // grid, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b * grid**2, h // grid, w // grid, c)


def stitch_grid(parts: Shaped[Array, "n i j c"], grid: int = 2) -> Shaped[Array, "b h w c"]:
    """The inverse of `split_grid`."""
    n, i, j, c = parts.shape
    x = parts.reshape(n // grid**2, grid, grid, i, j, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, grid * i, grid * j, c)


def quadrant_features(
    encode: Callable[[Array], Array], images: Float[Array, "b h w 3"], grid: int = 2
) -> Float[Array, "b i j c"]:
    """Feature maps of the images' parts, each encoded by itself, laid side by side again.

    Args:
        encode: images [n, h / grid, w / grid, 3] to maps [n, i / grid, j / grid, c]; a frozen encoder with running statistics, so that parts do not
            mix.
        images: [b, h, w, 3] in [0, 1].
        grid: parts on a side; 2 are the published quadrants, at a crop of 512 px of the size that the encoders were trained with. 4 keep it at 1024.

    Source: METHODS 3.3 (CoA).
    """
    return stitch_grid(encode(split_grid(images, grid)), grid)


def fresh_parameters(model: nn.Module, key: Array, *inputs: Any) -> dict[str, Any]:
    """The collections of a network of this family as it starts: parameters N(0, 0.02), and (batch norm) running statistics 0 and 1.

    One draw for all of them: XLA compiles each draw of its own, which for a hundred convolutions takes minutes. The filters of WTConv, which start
    otherwise by themselves, are drawn alike, as published; its scales start at 1 (image) and 0.1 (wavelets).

    Args:
        model: whose call takes `inputs` and `train`.
        key: of the draw.
        inputs: arguments of the model's call, or their shapes; only shapes count.
    """
    shapes = jax.eval_shape(lambda key, *x: model.init(key, *x, train=False), key, *inputs)
    flat = traverse_util.flatten_dict(shapes["params"])
    ends = np.cumsum([leaf.size for leaf in flat.values()]).tolist()
    # Behind the barrier, or each slice would compile, and draw, the whole once more.
    draw = jax.lax.optimization_barrier(SPREAD * jax.random.normal(key, (ends[-1],), jnp.result_type(*flat.values())))
    params = {}
    for (path, leaf), end in zip(flat.items(), ends, strict=True):
        name, of_norm = path[-1], path[-2] == "norm"
        if name == "bias":
            value = jnp.zeros(leaf.shape)
        elif name.startswith("wavelet_scale"):
            value = jnp.full(leaf.shape, 0.1)
        elif name == "scale" and not of_norm:
            value = jnp.ones(leaf.shape)
        else:
            value = draw[end - leaf.size : end].reshape(leaf.shape) + (1 if name == "scale" else 0)
        params[path] = value.astype(leaf.dtype)
    made = {"params": traverse_util.unflatten_dict(params)}
    if "batch_stats" in shapes:
        stats = traverse_util.flatten_dict(shapes["batch_stats"])
        stats = {path: jnp.full(leaf.shape, path[-1] == "var", leaf.dtype) for path, leaf in stats.items()}
        made["batch_stats"] = traverse_util.unflatten_dict(stats)
    return made
