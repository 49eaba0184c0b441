"""InceptionV3 as the Frechet inception distance uses it: an image to 2048 features.

    [0, 1] -> 299 x 299 px -> [-1, 1] -> stem -> 3 blocks at 35 x 35 -> 5 at 17 x 17 -> 3 at 8 x 8 -> mean over positions

Plain functions of a dictionary of arrays: the network is only ever read. Arrays are named as in torchvision's `inception_v3` and in the state dict of
pytorch_fid's `fid_inception_v3`; the classifier and the auxiliary head are left alone. As in pytorch_fid, and other than in torchvision, means over
3 x 3 pixels leave out what lies beyond the border, and the last block takes maxima instead of means.

Source: Szegedy et al., CVPR 2016 (arXiv 1512.00567); Heusel et al., NeurIPS 2017 (arXiv 1706.08500); METHODS 3.6.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wavepath.ops.resize import resample

FEATURES = 2048
SIDE = 299  # px that images are resized to
LEAST = 75  # px: below them nothing is left behind the last reduction
_EPSILON = 1e-3  # of batch normalisation


class Conv(NamedTuple):
    """A convolution without bias, batch normalisation by running statistics, ReLU."""

    inputs: int
    outputs: int
    size: tuple[int, int] = (1, 1)  # height, width
    stride: int = 1
    same: bool = True  # padded so that the size stays; else not padded


def _a(width: int, pool: int) -> dict[str, Conv]:
    return {
        "branch1x1": Conv(width, 64), "branch5x5_1": Conv(width, 48), "branch5x5_2": Conv(48, 64, (5, 5)),
        "branch3x3dbl_1": Conv(width, 64), "branch3x3dbl_2": Conv(64, 96, (3, 3)), "branch3x3dbl_3": Conv(96, 96, (3, 3)),
        "branch_pool": Conv(width, pool),
    }  # fmt: skip


def _c(width: int) -> dict[str, Conv]:
    row, column = (1, 7), (7, 1)
    return {
        "branch1x1": Conv(768, 192), "branch7x7_1": Conv(768, width), "branch7x7_2": Conv(width, width, row), "branch7x7_3": Conv(width, 192, column),
        "branch7x7dbl_1": Conv(768, width), "branch7x7dbl_2": Conv(width, width, column), "branch7x7dbl_3": Conv(width, width, row),
        "branch7x7dbl_4": Conv(width, width, column), "branch7x7dbl_5": Conv(width, 192, row), "branch_pool": Conv(768, 192),
    }  # fmt: skip


def _e(width: int) -> dict[str, Conv]:
    row, column = (1, 3), (3, 1)
    return {
        "branch1x1": Conv(width, 320), "branch3x3_1": Conv(width, 384), "branch3x3_2a": Conv(384, 384, row), "branch3x3_2b": Conv(384, 384, column),
        "branch3x3dbl_1": Conv(width, 448), "branch3x3dbl_2": Conv(448, 384, (3, 3)), "branch3x3dbl_3a": Conv(384, 384, row),
        "branch3x3dbl_3b": Conv(384, 384, column), "branch_pool": Conv(width, 192),
    }  # fmt: skip


_STEM = {
    "Conv2d_1a_3x3": Conv(3, 32, (3, 3), 2, False), "Conv2d_2a_3x3": Conv(32, 32, (3, 3), same=False), "Conv2d_2b_3x3": Conv(32, 64, (3, 3)),
    "Conv2d_3b_1x1": Conv(64, 80), "Conv2d_4a_3x3": Conv(80, 192, (3, 3), same=False),
}  # fmt: skip
_BLOCKS = {
    "Mixed_5b": _a(192, 32), "Mixed_5c": _a(256, 64), "Mixed_5d": _a(288, 64),
    "Mixed_6a": {
        "branch3x3": Conv(288, 384, (3, 3), 2, False), "branch3x3dbl_1": Conv(288, 64), "branch3x3dbl_2": Conv(64, 96, (3, 3)),
        "branch3x3dbl_3": Conv(96, 96, (3, 3), 2, False),
    },
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": {
        "branch3x3_1": Conv(768, 192), "branch3x3_2": Conv(192, 320, (3, 3), 2, False), "branch7x7x3_1": Conv(768, 192),
        "branch7x7x3_2": Conv(192, 192, (1, 7)), "branch7x7x3_3": Conv(192, 192, (7, 1)), "branch7x7x3_4": Conv(192, 192, (3, 3), 2, False),
    },
    "Mixed_7b": _e(1280), "Mixed_7c": _e(2048),
}  # fmt: skip
CONVS = _STEM | {f"{block}.{name}": conv for block, branches in _BLOCKS.items() for name, conv in branches.items()}


def parameters() -> dict[str, tuple[int, ...]]:
    """Name and shape of every array that `inception` reads: kernels [out, in, h, w] and the four vectors of each batch normalisation."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, conv in CONVS.items():
        shapes[f"{name}.conv.weight"] = (conv.outputs, conv.inputs, *conv.size)
        shapes |= {f"{name}.bn.{part}": (conv.outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def inception(weights: Mapping[str, Float[Array, "..."]], images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    """Features of images of any size, as pytorch_fid takes them.

    Args:
        weights: as `parameters` names and shapes them.
        images: [b, h, w, 3] in [0, 1].
    """
    return trunk(weights, resized(images))


def resized(images: Float[Array, "b h w 3"], side: int = SIDE) -> Float[Array, "b side side 3"]:
    """[0, 1] to squares in [-1, 1], bilinear without antialiasing (torch's `interpolate`, corners not aligned): a reduction drops pixels."""
    height, width = images.shape[1:3]
    return 2 * resample(images, _linear_matrix(height, side), _linear_matrix(width, side)) - 1


def _linear_matrix(source: int, target: int) -> np.ndarray:
    """The weights of one axis, float64[target, source]; pixel centres lie at i + 1/2, and places beyond the outer ones take their value."""
    place = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(source)[None]), 0)


def trunk(weights: Mapping[str, Float[Array, "..."]], x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    """Features of images as they are.

    Args:
        x: [b, h, w, 3] in [-1, 1], at least 75 px a side.
    """

    def conv(name: str, x: Array) -> Array:
        return _conv(weights, name, x)

    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = conv(name, x)
    x = _maximum(x)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = conv(name, x)
    x = _maximum(x)
    for block, branches in _BLOCKS.items():
        x = _block(lambda name, x, block=block: conv(f"{block}.{name}", x), branches, x, last=block == "Mixed_7c")
    return x.mean(axis=(1, 2))


def _block(conv, branches: Mapping[str, Conv], x: Float[Array, "b h w c"], last: bool) -> Float[Array, "b i j d"]:
    """Branches that are chains of convolutions side by side, in the order of the table, and the pooled one at the end."""
    chains: dict[str, list[str]] = {}
    for name in branches:
        chains.setdefault(name.split("_")[0], []).append(name)
    reduces = "branch_pool" not in branches
    chains.pop("branch", None)
    parts = []
    for chain in chains.values():
        y = x
        for name in chain:
            if name.endswith("a"):  # the last two of a chain, both on what came before
                y = jnp.concatenate([conv(name, y), conv(name[:-1] + "b", y)], axis=-1)
            elif not name.endswith("b"):
                y = conv(name, y)
        parts.append(y)
    if reduces:
        return jnp.concatenate([*parts, _maximum(x)], axis=-1)
    pooled = _maximum(x, stride=1, edge=1) if last else _mean(x)
    return jnp.concatenate([*parts, conv("branch_pool", pooled)], axis=-1)


def _conv(weights: Mapping[str, Array], name: str, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    conv = CONVS[name]
    gain, bias, mean, variance = (weights[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
    gain = gain * jax.lax.rsqrt(variance + _EPSILON)
    kernel = weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * gain
    edges = [(size // 2, size // 2) if conv.same else (0, 0) for size in conv.size]
    x = jax.lax.conv_general_dilated(
        x, kernel, (conv.stride, conv.stride), edges, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST
    )
    return jax.nn.relu(x + (bias - mean * gain))


def _maximum(x: Float[Array, "b h w c"], stride: int = 2, edge: int = 0) -> Float[Array, "b i j c"]:
    """Over 3 x 3 pixels."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), ((0, 0), (edge, edge), (edge, edge), (0, 0)))


def _mean(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Over 3 x 3 pixels, of those that there are."""

    def total(values: Array) -> Array:
        return jax.lax.reduce_window(values, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
