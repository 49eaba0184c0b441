"""The contenders of the wavelet benchmark: one level of a 2-D transform, each as its own users call it.

Every contender gets its data in its native layout before the clock starts: wavepath and the copy [n, h, w, c], the others [n, c, h, w].
A library that is not installed is named with the command that brings it.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

DIRECTIONS = ("forward", "inverse", "gradient")
BANDS = 4


class MissingPeer(Exception):
    """A library that is not installed; the message is the command that installs it."""


@dataclass(frozen=True)
class Task:
    """What every contender computes.

    image: float32[n, h, w, c] in [0, 1]; bands: its four bands (ll, lh, hl, hh) [n, h', w', c]; cotangents: four random arrays of their shape.
    """

    wavelet: str
    mode: str
    image: np.ndarray
    bands: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...]

    @staticmethod
    def _planes(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(array, -1, 1))

    @cached_property
    def image_planes(self) -> np.ndarray:
        return self._planes(self.image)

    @cached_property
    def bands_planes(self) -> tuple[np.ndarray, ...]:
        return tuple(map(self._planes, self.bands))

    @cached_property
    def cotangents_planes(self) -> tuple[np.ndarray, ...]:
        return tuple(map(self._planes, self.cotangents))


# call() computes and waits; unpack(result) gives the result's arrays in order, with a channels-last flag set by the peer's `layout`.
Built = tuple[Callable[[], Any], Callable[[Any], list[np.ndarray]]]


@dataclass(frozen=True)
class Peer:
    """A contender. `build(task, direction)` returns `Built`, or None where the library has no such direction."""

    name: str
    layout: str
    install: str
    build: Callable[[Task, str], Built | None]

    def results(self, arrays: list[np.ndarray], keep: tuple[int, ...]) -> list[np.ndarray]:
        """The images `keep` of each array, [k, h, w, c] float32."""
        arrays = [np.asarray(array)[list(keep)] for array in arrays]
        return [np.moveaxis(array, 1, -1) if self.layout == "NCHW" else array for array in arrays]


def _module(name: str, install: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeer(f"{install}  ({error})") from error


def _jax_calls(direction: str, image, bands, cotangents, forward: Callable, inverse: Callable) -> Built:
    """`forward(image) -> four bands`, `inverse(bands) -> image`, compiled; the gradient returns the bands as well, so that none is skipped."""
    import jax

    if direction == "inverse":
        bands = jax.block_until_ready(tuple(jax.numpy.asarray(band) for band in bands))
        compiled = jax.jit(inverse)
        return lambda: jax.block_until_ready(compiled(bands)), lambda result: [result]
    image = jax.block_until_ready(jax.numpy.asarray(image))
    if direction == "forward":
        compiled = jax.jit(forward)
        return lambda: jax.block_until_ready(compiled(image)), list

    @jax.jit
    def both(x, given):
        value, back = jax.vjp(forward, x)
        return value, back(given)[0]

    cotangents = jax.block_until_ready(tuple(jax.numpy.asarray(array) for array in cotangents))
    return lambda: jax.block_until_ready(both(image, cotangents)), lambda result: [*result[0], result[1]]


def _wavepath(task: Task, direction: str) -> Built:
    from wavepath.ops.wavelets import Subbands, dwt2, idwt2

    axes = (-3, -2)
    return _jax_calls(
        direction, task.image, task.bands, task.cotangents,
        lambda x: tuple(dwt2(x, task.wavelet, task.mode, axes)), lambda bands: idwt2(Subbands(*bands), task.wavelet, task.mode, axes),
    )  # fmt: skip


def _copy(task: Task, direction: str) -> Built:
    """x * c, compiled: one read and one write of the image. For forward+gradient two of them, which is the least that must move."""
    import jax

    factor = np.float32(1.0001)
    image = jax.block_until_ready(jax.numpy.asarray(task.image))
    if direction != "gradient":
        compiled = jax.jit(lambda x: x * factor)
        return lambda: jax.block_until_ready(compiled(image)), lambda result: []
    other = jax.block_until_ready(jax.numpy.asarray(task.image[::-1].copy()))
    two = jax.jit(lambda x, y: (x * factor, y * factor))
    return lambda: jax.block_until_ready(two(image, other)), lambda result: []


def _jaxwt(task: Task, direction: str) -> Built:
    jaxwt = _module("jaxwt", "pip install jaxwt")

    def forward(x):
        ll, details = jaxwt.wavedec2(x, task.wavelet, mode=task.mode, level=1)
        return ll, *details

    def inverse(bands):
        return jaxwt.waverec2([bands[0], tuple(bands[1:])], task.wavelet)

    return _jax_calls(direction, task.image_planes, task.bands_planes, task.cotangents_planes, forward, inverse)


def _torch_calls(direction: str, task: Task, forward: Callable, pack: Callable, inverse: Callable) -> Built:
    """`forward(image) -> tensors`, `pack(four bands) -> tensors of that form`, `inverse(tensors) -> image`; unpacked by the caller's `forward`."""
    import torch

    image = torch.from_numpy(task.image_planes)
    if direction == "forward":

        def call():
            with torch.no_grad():
                return forward(image)

        return call, lambda result: result
    if direction == "inverse":
        given = pack([torch.from_numpy(band) for band in task.bands_planes])

        def call():
            with torch.no_grad():
                return inverse(given)

        return call, lambda result: [result]
    cotangents = pack([torch.from_numpy(array) for array in task.cotangents_planes])
    leaf = image.clone().requires_grad_(True)

    def call():
        value = forward(leaf)
        return value, torch.autograd.grad(value, leaf, cotangents)[0]

    return call, lambda result: [*[array.detach() for array in result[0]], result[1]]


def _ptwt(task: Task, direction: str) -> Built:
    _module("torch", "pip install torch==2.13.0")
    ptwt = _module("ptwt", "pip install ptwt")

    def forward(x):
        ll, details = ptwt.wavedec2(x, task.wavelet, mode=task.mode, level=1)
        return [ll, *details]

    def inverse(bands):
        return ptwt.waverec2((bands[0], ptwt.WaveletDetailTuple2d(*bands[1:])), task.wavelet)

    return _torch_calls(direction, task, forward, lambda bands: bands, inverse)


@contextmanager
def _resources():
    """pytorch_wavelets reads its filter tables through `pkg_resources`, which setuptools has dropped (82): a stand-in while it is imported."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources"):
        yield
        return
    from importlib.resources import files

    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_stream = lambda package, path: files(package).joinpath(path).open("rb")
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


def _pytorch_wavelets(task: Task, direction: str) -> Built:
    torch = _module("torch", "pip install torch==2.13.0")
    with _resources():
        library = _module("pytorch_wavelets", "pip install pytorch_wavelets==1.3.0")
    analysis = library.DWTForward(J=1, wave=task.wavelet, mode=task.mode)
    synthesis = library.DWTInverse(wave=task.wavelet, mode=task.mode)

    def forward(x):
        low, high = analysis(x)
        return [low, high[0]]

    def pack(bands):
        return [bands[0].contiguous(), torch.stack(bands[1:], dim=2)]

    call, unpack = _torch_calls(direction, task, forward, pack, lambda bands: synthesis((bands[0], [bands[1]])))
    if direction == "inverse":
        return call, unpack

    def split(result):
        low, high, *rest = unpack(result)
        return [low, *high.unbind(2), *rest]

    return call, split


def _pywavelets(task: Task, direction: str) -> Built | None:
    import pywt

    if direction == "gradient":
        return None
    if direction == "forward":
        image = task.image_planes

        def call():
            ll, details = pywt.dwt2(image, task.wavelet, task.mode, axes=(-2, -1))
            return [ll, *details]

        return call, lambda result: result
    bands = task.bands_planes
    return lambda: pywt.idwt2((bands[0], bands[1:]), task.wavelet, task.mode, axes=(-2, -1)), lambda result: [result]


OURS, FLOOR = "wavepath", "copy"
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(OURS, "NHWC", "pip install wavepath", _wavepath),
        Peer("jaxwt", "NCHW", "pip install jaxwt", _jaxwt),
        Peer("ptwt", "NCHW", "pip install torch==2.13.0 ptwt", _ptwt),
        Peer("pytorch_wavelets", "NCHW", "pip install torch==2.13.0 pytorch_wavelets==1.3.0", _pytorch_wavelets),
        Peer("PyWavelets", "NCHW", "pip install PyWavelets", _pywavelets),
        Peer(FLOOR, "NHWC", "", _copy),
    )
}
