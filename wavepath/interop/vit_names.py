"""Vision transformers under the names that others give their arrays; one table for each family, and our parameters under these names.

* `timm`: `blocks.<i>.attn.qkv`, and so UNI, Virchow, H-optimus, and DINO's and DINOv2's own checkpoints;
* `hf`: transformers' ViT (Phikon), DINOv2 and DINOv2 with registers: `encoder.layer.<i>.attention.attention.query`.

The other direction, with all that a file may lack, is `vit_reader`. Linear weights are transposed; the patch embedding's convolution becomes a
linear layer on the patch's pixels in the order (y, x, channel). Source: ANCHORS part 2 (e).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wavepath.errors import DatasetError

_LISTED = 6  # names that an error or a note lists

Names = tuple[str, ...]  # of arrays that are joined along their outputs


@dataclass(frozen=True)
class Part:
    """One module of ours and the names of theirs: each alternative is a name, or names whose arrays are joined."""

    ours: str
    kind: str  # linear, norm, scale
    theirs: tuple[str | Names, ...]


@dataclass(frozen=True)
class Family:
    """Names of one origin. `patch` is a name that every model of the family has; the first alternatives are those written."""

    name: str
    patch: str
    cls: Names
    registers: Names
    positions: Names
    blocks: Names
    norm: str
    parts: tuple[Part, ...]


TIMM = Family(
    name="timm", patch="patch_embed.proj", cls=("cls_token",), registers=("reg_token", "register_tokens"), positions=("pos_embed",),
    blocks=("blocks.",), norm="norm",
    parts=(
        Part("norm1", "norm", ("norm1",)), Part("attn/qkv", "linear", ("attn.qkv",)), Part("attn/proj", "linear", ("attn.proj",)),
        Part("ls1", "scale", ("ls1.gamma", "gamma_1")), Part("norm2", "norm", ("norm2",)),
        Part("mlp/fc1", "linear", ("mlp.fc1", "mlp.w12")), Part("mlp/fc2", "linear", ("mlp.fc2", "mlp.w3")),
        Part("ls2", "scale", ("ls2.gamma", "gamma_2")),
    ),
)  # fmt: skip
HF = Family(
    name="hf", patch="embeddings.patch_embeddings.projection", cls=("embeddings.cls_token",), registers=("embeddings.register_tokens",),
    positions=("embeddings.position_embeddings",), blocks=("encoder.layer.", "layers."), norm="layernorm",
    parts=(
        Part("norm1", "norm", ("layernorm_before", "norm1")),
        Part("attn/qkv", "linear", (
            ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        )),
        Part("attn/proj", "linear", ("attention.output.dense", "attention.o_proj")),
        Part("ls1", "scale", ("layer_scale1.lambda1",)), Part("norm2", "norm", ("layernorm_after", "norm2")),
        Part("mlp/fc1", "linear", ("intermediate.dense", "mlp.fc1", "mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj"))),
        Part("mlp/fc2", "linear", ("output.dense", "mlp.fc2", "mlp.weights_out", "mlp.down_proj")),
        Part("ls2", "scale", ("layer_scale2.lambda1",)),
    ),
)  # fmt: skip
FAMILIES = (TIMM, HF)


def find_family(names: Iterable[str], prefix: str | None = None) -> tuple[Family, str, list[str]]:
    """The family, the prefix of the encoder's names, and notes, by the name of the patch embedding.

    Args:
        prefix: of the encoder where the file has several; None: found.

    Raises:
        DatasetError: no vision transformer, or several.
    """
    found = {
        name.removesuffix(family.patch + ".weight"): family
        for name in names for family in FAMILIES if name.endswith(family.patch + ".weight")
    }  # fmt: skip
    found = {start: family for start, family in found.items() if not start or start.endswith(".")}
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
        if prefix not in found:
            raise DatasetError(f"--prefix {prefix} has no encoder; there are {listed(repr(start) for start in found)}")
        return found[prefix], prefix, []
    if not found:
        raise DatasetError(
            "no vision transformer: no array is called patch_embed.proj.weight (timm, DINOv2) or embeddings.patch_embeddings.projection.weight"
            f" (transformers), but {listed(names)}; give the weights of a ViT"
        )
    best = [start for start in found if re.search(r"(^|\.)(teacher|ema)", start)] or list(found)
    if len(best) > 1:
        raise DatasetError(f"several encoders: {listed(repr(start) for start in best)}; choose one with --prefix")
    notes = [f"of the encoders {listed(repr(start) for start in found)} {best[0]!r} is taken; --prefix names another"] if len(found) > 1 else []
    return found[best[0]], best[0], notes


def params_to_vit(params: Mapping[str, Any], family: Family = TIMM) -> dict[str, np.ndarray]:
    """The inverse of `vit_to_params` (`vit_reader`) without the position table, whose rows depend on who reads it: arrays by the names of a family.

    Args:
        params: of `models.vit.ViT`, blocks scanned or not.
        family: whose names; of joined arrays (queries, keys, values) each its part.

    Returns:
        float32, contiguous.
    """
    params = dict(params)
    kernel = np.asarray(params["patch_embed"]["kernel"], np.float32)
    patch, width = math.isqrt(kernel.shape[0] // 3), kernel.shape[1]
    found = {
        f"{family.patch}.weight": kernel.reshape(patch, patch, 3, width).transpose(3, 2, 0, 1), f"{family.patch}.bias": params["patch_embed"]["bias"],
        family.cls[0]: params["cls_token"],
    }
    if "reg_token" in params:
        found[family.registers[0]] = params["reg_token"]
    if "norm" in params:
        found |= {f"{family.norm}.weight": params["norm"]["scale"], f"{family.norm}.bias": params["norm"]["bias"]}
    blocks = params["blocks"]
    scanned = blocks.get("scanned")
    depth = len(scanned["norm1"]["scale"]) if scanned is not None else len(blocks)
    for number in range(depth):
        for part in family.parts:
            outer, _, inner = part.ours.partition("/")
            layer = (scanned if scanned is not None else blocks[str(number)]).get(outer)
            if layer is None:
                continue
            layer = layer[inner] if inner else layer
            layer = {name: np.asarray(leaf)[number] if scanned is not None else np.asarray(leaf) for name, leaf in layer.items()}
            names = part.theirs[0] if isinstance(part.theirs[0], tuple) else (part.theirs[0],)
            start = [f"{family.blocks[0]}{number}.{name}" for name in names]
            if part.kind == "scale":
                found[start[0]] = layer["scale"]
            elif part.kind == "norm":
                found |= {f"{start[0]}.weight": layer["scale"], f"{start[0]}.bias": layer["bias"]}
            else:
                found |= {f"{name}.weight": piece for name, piece in zip(start, np.split(layer["kernel"].T, len(start)), strict=True)}
                if "bias" in layer:
                    found |= {f"{name}.bias": piece for name, piece in zip(start, np.split(layer["bias"], len(start)), strict=True)}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def listed(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
