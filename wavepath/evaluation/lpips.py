"""Weights of LPIPS from the user's own files, and the distance of 8-bit images. Nothing is ever fetched from anywhere."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from wavepath.errors import DatasetError
from wavepath.evaluation.weights import check_weights, read_weights
from wavepath.models.lpips import STACKS, lpips, parameters

NAMES = {"alex": "AlexNet", "vgg": "VGG-16"}
HOW = "features.N.weight and features.N.bias of torchvision's alexnet or vgg16, and lin0.model.1.weight to lin4.model.1.weight of lpips 0.1"
_LEAST = {"alex": 63, "vgg": 16}  # px: below them nothing is left after the last pooling


class Lpips:
    """The distance by one network.

    Attributes:
        network: `alex` or `vgg`, recognised by the first convolution.
        name: `lpips_alex` or `lpips_vgg`.
    """

    def __init__(self, network: str, weights: dict[str, np.ndarray]):
        self.network, self.name = network, f"lpips_{network}"
        self._weights = {name: jnp.asarray(weights[name], jnp.float32) for name in parameters(network)}
        self._distance = jax.jit(lambda weights, a, b: lpips(weights, a, b, network))

    def __call__(self, a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> float:
        """The distance of two images of one shape.

        Raises:
            DatasetError: images too small for the network.
        """
        if min(a.shape[:2]) < _LEAST[self.network]:
            least = f"{NAMES[self.network]} needs images of {_LEAST[self.network]} px"
            raise DatasetError(f"LPIPS by {least}, not {a.shape[1]} x {a.shape[0]}; leave --lpips out")
        pair = (jnp.asarray(x, jnp.float32)[None] / 255 for x in (a, b))
        return float(self._distance(self._weights, *pair)[0])


def read_lpips(paths: Sequence[Path]) -> list[Lpips]:
    """The networks in files of weights (.safetensors or .npz), one network a file.

    Raises:
        DatasetError: no such file, another format, neither network, arrays that are missing or of another shape (named), one network twice.
    """
    found: list[Lpips] = []
    for path in map(Path, paths):
        weights = read_weights(path, f"--lpips takes a .safetensors or .npz file with {HOW}")
        first = weights.get("features.0.weight")
        network = next((name for name in STACKS if first is not None and first.shape == parameters(name)["features.0.weight"]), None)
        if network is None:
            raise DatasetError(f"{path} holds no features.0.weight of AlexNet or VGG-16; LPIPS weights are named {HOW}")
        check_weights(path, weights, parameters(network), f"LPIPS by {NAMES[network]}", HOW)
        if any(one.network == network for one in found):
            raise DatasetError(f"{path} is a second set of LPIPS weights of {NAMES[network]}; give one file for each network")
        found.append(Lpips(network, weights))
    return found
