"""An encoder as a StableHLO program: images to features on CPU, NVIDIA GPU and TPU, with JAX and without the code that made it.

The program is traced once, in the forms that suit every kind of device, and takes the weights as its first argument: they lie beside it, since a
serialised program cannot be larger than 2 GB. The size of the batch is left open.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from wavepath.errors import DatasetError
from wavepath.files import atomic_path, read_json, write_json
from wavepath.ops.platform import traced_for
from wavepath.tasks.base import State, build
from wavepath.tasks.encoder import ENCODER, NETWORK

PROGRAM, WEIGHTS, ABOUT = "encoder.stablehlo", "weights.safetensors", "encoder.json"
PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("cls", "mean")
# The forms that are traced for this kind hold for all: those for CPUs and for NVIDIA's library do not.
_TRACED_FOR = "tpu"


def write_stablehlo(config: Any, network: str, params: Mapping[str, Any], folder: Path) -> None:
    """Writes `encoder.stablehlo`, `weights.safetensors` and `encoder.json` into an existing folder.

    Args:
        config: of the run. network: the name of its parameters in a State.
        params: of that network, a tree for each block; a decoder is left out.
    """
    from jax import export
    from safetensors.numpy import save_file

    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.attention, config.model.scan = "auto", False
        if "decoder_pred" in params or config.task == ENCODER:
            # The features of a pretraining run are those of its encoder by itself; the decoder stays out.
            config.task, network, params = ENCODER, NETWORK, {ENCODER: params[ENCODER]}
    task = build(config)
    side = int(config.model.image_size)
    flat = {name: np.ascontiguousarray(value) for name, value in traverse_util.flatten_dict(dict(params), sep="/").items()}

    def encode(weights: dict[str, Array], images: Array) -> dict[str, Array]:
        tree = traverse_util.unflatten_dict(weights, sep="/")
        state = State(step=jnp.zeros((), jnp.int32), params={network: tree}, opt={})
        # One image at a time: the shapes that the network sees are then known, whatever the batch.
        return jax.vmap(lambda image: {name: value[0] for name, value in task.predict(state, {"image": image[None]}, OUTPUTS).items()})(images)

    (batch,) = export.symbolic_shape("b")
    weights = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in flat.items()}
    with traced_for(_TRACED_FOR):
        exported = export.export(jax.jit(encode), platforms=PLATFORMS)(weights, jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8))
    (folder / PROGRAM).write_bytes(exported.serialize())
    with atomic_path(folder / WEIGHTS) as temporary:  # which also makes it readable as other files are
        save_file(flat, temporary)
    width = exported.out_avals[0].shape[-1]
    write_json(folder / ABOUT, {
        "program": PROGRAM, "weights": WEIGHTS, "platforms": list(PLATFORMS), "jax_version": jax.__version__,
        "calling_convention_version": exported.calling_convention_version, "compute_dtype": str(config.model.dtype),
        "input": {
            "dtype": "uint8", "shape": ["b", side, side, 3], "channels": "RGB, 0 to 255; b is any number of images",
            "normalised_inside": {"mean": list(config.model.mean), "std": list(config.model.std)},
        },
        "outputs": {"cls": {"dtype": "float32", "shape": ["b", width], "meaning": "class token"},
                    "mean": {"dtype": "float32", "shape": ["b", width], "meaning": "mean of the patch tokens"}},
        "call": "jax.jit(jax.export.deserialize(program_bytes).call)(safetensors.numpy.load_file(weights), images)",
    })  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A reloaded encoder: `program(images)`.

    Attributes:
        about: what `encoder.json` says.
        side: of the images that it takes, in px.
    """

    about: Mapping[str, Any]
    side: int
    _call: Callable[..., Any]
    _weights: Mapping[str, Any]

    def __call__(self, images: UInt8[np.ndarray, "b s s 3"]) -> dict[str, Float[Array, "b d"]]:
        """Features `cls` and `mean`, float32 [b, d], of uint8 images [b, side, side, 3] in RGB.

        Raises:
            DatasetError: images of another type or size.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (self.side, self.side, 3) or not len(images):
            raise DatasetError(f"the program takes uint8 images [b, {self.side}, {self.side}, 3], not {images.dtype} {tuple(images.shape)}")
        return self._call(self._weights, images)


def load_stablehlo(path: Path) -> Program:
    """Loads a folder of `wavepath export --format stablehlo`, or the program in it.

    Raises:
        DatasetError: files that are missing or damaged, or a program that this JAX is too old for.
    """
    from jax import export
    from safetensors.numpy import load_file

    path = Path(path)
    folder = path if path.is_dir() else path.parent
    missing = [name for name in (PROGRAM, WEIGHTS, ABOUT) if not (folder / name).is_file()]
    if missing:
        raise DatasetError(f"{folder} has no {', '.join(missing)}; write it with `wavepath export CKPT --format stablehlo --out {folder}`")
    about = read_json(folder / ABOUT)
    try:
        exported = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
        weights = jax.device_put(load_file(folder / WEIGHTS))
    except Exception as error:  # JAX and safetensors have many types for a damaged file
        reason = (str(error).splitlines() or [""])[0][:120]
        raise DatasetError(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}); export it again, or update JAX ({about['jax_version']} wrote it)"
        ) from None
    return Program(about, int(about["input"]["shape"][1]), jax.jit(exported.call), weights)
