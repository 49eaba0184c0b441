"""LPIPS: the distance of two images in the features of a classification network.

    [0, 1] -> [-1, 1] -> shift and scale -> AlexNet or VGG-16 -> five layers, each position of unit length -> squared differences
           -> non-negative weight of each channel -> mean over positions -> sum over layers

Plain functions of a dictionary of arrays: the networks are only ever read. Source: Zhang et al., CVPR 2018 (arXiv 1801.03924), version 0.1 of the
published weights.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Normalisation of the method, of values in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Conv(NamedTuple):
    """One convolution of a feature stack, with a ReLU behind it; `index` is its place in torchvision's `features`."""

    index: int
    inputs: int
    outputs: int
    size: int
    stride: int
    padding: int
    tap: bool  # whether LPIPS looks at what comes out of the ReLU


class Pool(NamedTuple):
    """A maximum over `size` x `size` pixels at every second."""

    size: int


STACKS: dict[str, tuple[Conv | Pool, ...]] = {
    "alex": (
        Conv(0, 3, 64, 11, 4, 2, True), Pool(3), Conv(3, 64, 192, 5, 1, 2, True), Pool(3), Conv(6, 192, 384, 3, 1, 1, True),
        Conv(8, 384, 256, 3, 1, 1, True), Conv(10, 256, 256, 3, 1, 1, True),
    ),
    "vgg": (
        Conv(0, 3, 64, 3, 1, 1, False), Conv(2, 64, 64, 3, 1, 1, True), Pool(2),
        Conv(5, 64, 128, 3, 1, 1, False), Conv(7, 128, 128, 3, 1, 1, True), Pool(2),
        Conv(10, 128, 256, 3, 1, 1, False), Conv(12, 256, 256, 3, 1, 1, False), Conv(14, 256, 256, 3, 1, 1, True), Pool(2),
        Conv(17, 256, 512, 3, 1, 1, False), Conv(19, 512, 512, 3, 1, 1, False), Conv(21, 512, 512, 3, 1, 1, True), Pool(2),
        Conv(24, 512, 512, 3, 1, 1, False), Conv(26, 512, 512, 3, 1, 1, False), Conv(28, 512, 512, 3, 1, 1, True),
    ),
}  # fmt: skip


def parameters(network: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array that `lpips` reads, as torchvision (`features.N.weight` [out, in, h, w], `.bias`) and lpips name them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv in STACKS[network]:
        if isinstance(conv, Conv):
            shapes[f"features.{conv.index}.weight"] = (conv.outputs, conv.inputs, conv.size, conv.size)
            shapes[f"features.{conv.index}.bias"] = (conv.outputs,)
    tapped = [conv.outputs for conv in STACKS[network] if isinstance(conv, Conv) and conv.tap]
    return shapes | {f"lin{k}.model.1.weight": (1, outputs, 1, 1) for k, outputs in enumerate(tapped)}


def lpips(
    weights: Mapping[str, Float[Array, "..."]], a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"], network: str
) -> Float[Array, "b"]:
    """The distance of each pair; 0 for equal images.

    Args:
        weights: as `parameters(network)` names and shapes them.
        a, b: [b, h, w, 3] in [0, 1], at least 63 px (alex) or 16 px (vgg) on a side.
        network: `alex` or `vgg`.
    """
    total = jnp.zeros(a.shape[0], a.dtype)
    for k, (x, y) in enumerate(zip(_taps(weights, a, network), _taps(weights, b, network), strict=True)):
        channels = weights[f"lin{k}.model.1.weight"][0, :, 0, 0]
        total += (jnp.square(_unit(x) - _unit(y)) * channels).sum(axis=-1).mean(axis=(1, 2))
    return total


def _taps(weights: Mapping[str, Array], x: Float[Array, "b h w 3"], network: str) -> list[Float[Array, "b i j c"]]:
    x = (2 * x - 1 - np.asarray(SHIFT, np.float32)) / np.asarray(SCALE, np.float32)
    found = []
    for layer in STACKS[network]:
        if isinstance(layer, Pool):
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, layer.size, layer.size, 1), (1, 2, 2, 1), "VALID")
            continue
        kernel = weights[f"features.{layer.index}.weight"].transpose(2, 3, 1, 0)
        edge = (layer.padding, layer.padding)
        x = jax.lax.conv_general_dilated(
            x, kernel, (layer.stride, layer.stride), (edge, edge), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST
        )
        x = jax.nn.relu(x + weights[f"features.{layer.index}.bias"])
        if layer.tap:
            found.append(x)
    return found


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return x / (jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)) + 1e-10)
