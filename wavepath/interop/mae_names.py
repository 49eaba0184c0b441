"""Masked autoencoders of others, name by name: facebookresearch's (`blocks.3.attn.qkv.weight`, `decoder_blocks.0.norm1.bias`) and ours.

The released checkpoints hold `{"model": tensors}`, with the decoder or without; an encoder alone has timm's names and is not told from one here.
Both orders of a patch's values are (y, x, channel). Source: METHODS 5.1; the names and shapes of ANCHORS part 2 (e).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from wavepath.errors import DatasetError
from wavepath.interop.vit_names import TIMM
from wavepath.ops.posembed import resize_table, sincos_2d

PREFIXES = ("module.", "model.")  # what wrappers put ahead of every name
_WEIGHTS = {"linear": "kernel", "norm": "scale"}
_BLOCK = {
    f"{part.theirs[0]}.{kind}": f"{part.ours}/{'bias' if kind == 'bias' else _WEIGHTS[part.kind]}"
    for part in TIMM.parts if part.kind in _WEIGHTS for kind in ("weight", "bias")
}  # fmt: skip
_ENCODER = {
    "cls_token": "encoder/cls_token", "patch_embed.proj.weight": "encoder/patch_embed/kernel", "patch_embed.proj.bias": "encoder/patch_embed/bias",
    "norm.weight": "encoder/norm/scale", "norm.bias": "encoder/norm/bias",
}  # fmt: skip
_DECODER = {
    "mask_token": "mask_token", "decoder_embed.weight": "decoder_embed/kernel", "decoder_embed.bias": "decoder_embed/bias",
    "decoder_norm.weight": "decoder_norm/scale", "decoder_norm.bias": "decoder_norm/bias", "decoder_pred.weight": "decoder_pred/kernel",
    "decoder_pred.bias": "decoder_pred/bias",
}  # fmt: skip
POSITIONS, DECODER_POSITIONS = "pos_embed", "decoder_pos_embed"
_EXACT, _ROUNDED = 1e-4, 1e-2  # how far a table of sines may be off: kept in 32 bits, and in 16
_NAMED = 4  # names that an error lists


@dataclass(frozen=True)
class Autoencoder:
    """A masked autoencoder as wavepath has it.

    Attributes:
        params: the parameters of the network `mae`, float32, blocks as a tree for each.
        model: the fields of `config.model` that the tensors decide.
        guessed: those of them that the tensors do not show, in words.
        left: names of tensors that were not used.
    """

    params: dict[str, Any]
    model: dict[str, Any]
    guessed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def is_mae(names: Iterable[str]) -> bool:
    """Whether these are the names of an autoencoder with its decoder, facebookresearch's."""
    names = {stripped(name) for name in names}
    return {"mask_token", "decoder_embed.weight", "decoder_pred.weight", "cls_token"} <= names


def stripped(name: str) -> str:
    """A name without what wrappers put ahead of it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def mae_to_params(tensors: Mapping[str, np.ndarray], heads: int = 0, decoder_heads: int = 0) -> Autoencoder:
    """Tensors under facebookresearch's names to the parameters of task `mae`.

    Args:
        tensors: by name; any prefix of `PREFIXES` is taken off.
        heads, decoder_heads: as a config file or the user says; 0: as the published models have, one for every 64 channels of the encoder
            (80 of ViT-H) and 32 of the decoder.

    Raises:
        DatasetError: tensors that are missing, of another shape (named), not finite; positions of the decoder that are not the fixed ones.
    """
    tensors = {stripped(name): value for name, value in tensors.items()}
    if not is_mae(tensors):
        raise DatasetError("the tensors are not those of a masked autoencoder with its decoder; an encoder alone is imported by its own names")
    model, guessed = _sizes(tensors, heads, decoder_heads)
    want = _shapes(model)
    wrong = [f"{name} is missing" for name in want if name not in tensors]
    shapes = {name: np.shape(value) for name, value in tensors.items()}
    wrong += [f"{name} is {shapes[name]} instead of {shape}" for name, shape in want.items() if shapes.get(name, shape) != shape]
    wrong = wrong or [f"{name} is not finite" for name in want if not np.isfinite(_float(tensors[name])).all()]
    if wrong:
        rest = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise DatasetError(f"the tensors do not make a masked autoencoder: {'; '.join(wrong[:_NAMED])}{rest}; save the whole state_dict again")
    table = _table(model["depth"], model["decoder_depth"], model["qkv_bias"])
    flat = {path: _ours(name, _float(tensors[name])) for name, path in table.items()}
    _take_positions(tensors, model, flat)
    left = sorted(tensors.keys() - want.keys())
    return Autoencoder(traverse_util.unflatten_dict(flat, sep="/"), model, guessed, left)


def params_to_mae(params: Mapping[str, Any], grid: int) -> dict[str, np.ndarray]:
    """The parameters of task `mae`, or of an encoder alone (`{"encoder": ...}`), under facebookresearch's names, tables of positions included.

    Args:
        params: blocks as a tree for each, not scanned; an encoder without register tokens, layer scale and gated MLP.
        grid: side of the images in patches; a learned table of another side is resized, as the encoder does.
    """
    flat = {path: np.asarray(value, np.float32) for path, value in traverse_util.flatten_dict(params, sep="/").items()}
    encoder = params["encoder"]
    depth, decoder = len(encoder["blocks"]), "decoder_pred" in params
    names = _table(depth, len(params["decoder_blocks"]) if decoder else 0, "encoder/blocks/0/attn/qkv/bias" in flat)
    positions = flat.pop("encoder/pos_embed", None)
    side = math.isqrt(flat["encoder/patch_embed/kernel"].shape[0] // 3)
    tensors = {name: _theirs(name, flat[path], side) for name, path in names.items() if decoder or name not in _DECODER}
    width = tensors["cls_token"].shape[-1]
    table = sincos_2d(width, grid, grid) if positions is None else resize_table(jnp.asarray(positions[0]), grid, grid)
    tensors[POSITIONS] = _with_class(np.asarray(table))
    if decoder:
        tensors[DECODER_POSITIONS] = _with_class(sincos_2d(tensors["mask_token"].shape[-1], grid, grid))
    return tensors


def _with_class(positions: np.ndarray) -> np.ndarray:
    """[n, d] with the class token's own row, which is nought: [1, 1 + n, d]."""
    return np.concatenate([np.zeros((1, positions.shape[1]), np.float32), positions])[None]


def _table(depth: int, decoder_depth: int, qkv_bias: bool = True) -> dict[str, str]:
    """Their name to our path, of every parameter but the tables of positions."""
    table = _ENCODER | _DECODER
    for theirs, ours, count in (("blocks", "encoder/blocks", depth), ("decoder_blocks", "decoder_blocks", decoder_depth)):
        table |= {f"{theirs}.{number}.{name}": f"{ours}/{number}/{path}" for number in range(count) for name, path in _BLOCK.items()}
    return {name: path for name, path in table.items() if qkv_bias or not name.endswith("attn.qkv.bias")}


def _ours(name: str, value: np.ndarray) -> np.ndarray:
    if name == "patch_embed.proj.weight":  # [d, c, y, x] to [(y, x, c), d]
        return np.ascontiguousarray(value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0]))
    return np.ascontiguousarray(value.T) if value.ndim == 2 else value


def _theirs(name: str, value: np.ndarray, patch: int) -> np.ndarray:
    if name == "patch_embed.proj.weight":
        return np.ascontiguousarray(value.reshape(patch, patch, -1, value.shape[1]).transpose(3, 2, 0, 1))
    return np.ascontiguousarray(value.T) if value.ndim == 2 else value


def _float(value: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(value).astype(np.float32)
    except (TypeError, ValueError):
        raise DatasetError(f"a tensor of {np.asarray(value).dtype} is none of a masked autoencoder's") from None


def _sizes(tensors: Mapping[str, np.ndarray], heads: int, decoder_heads: int) -> tuple[dict[str, Any], list[str]]:
    """The fields of `config.model` that the shapes show, and in words what they do not.

    Raises:
        DatasetError: tensors without which no size is known, or heads that do not divide a width.
    """
    for name, axes in (("patch_embed.proj.weight", 4), (POSITIONS, 3), ("blocks.0.mlp.fc1.weight", 2), ("mask_token", 3)):
        if name not in tensors or tensors[name].ndim != axes:
            raise DatasetError(f"the tensors have no {name} of {axes} axes, so they are no masked autoencoder; save the whole state_dict again")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    decoder_width = tensors["mask_token"].shape[-1]
    grid = math.isqrt(max(tensors[POSITIONS].shape[1] - 1, 0))
    if channels != 3 or not grid or width < 1 or decoder_width < 1:
        raise DatasetError(f"the encoder takes {channels} channels on a grid of {grid} patches a side; masked autoencoders here take colour images")
    guessed = []
    if not heads:
        heads = max(width // (80 if width == 1280 else 64), 1)
        guessed.append(f"{heads} heads for a width of {width}")
    if not decoder_heads:
        decoder_heads = max(decoder_width // 32, 1)
        guessed.append(f"{decoder_heads} heads for a decoder width of {decoder_width}")
    if width % heads or decoder_width % decoder_heads:
        raise DatasetError(f"{heads} and {decoder_heads} heads do not divide the widths {width} and {decoder_width}; give the numbers of heads")
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    return {
        "variant": "custom", "width": width, "depth": _depth(tensors, "blocks."), "heads": heads, "patch": patch, "image_size": grid * patch,
        "decoder_width": decoder_width, "decoder_depth": _depth(tensors, "decoder_blocks."), "decoder_heads": decoder_heads,
        "mlp_hidden": 0 if hidden == 4 * width else hidden, "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }, guessed  # fmt: skip


def _depth(tensors: Mapping[str, Any], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    return max((int(number) for number in numbers if number.isdigit() and len(number) < 4), default=-1) + 1


def _shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d, e, p = model["width"], model["decoder_width"], model["patch"]
    patches = (model["image_size"] // p) ** 2
    pixels = p * p * 3
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "patch_embed.proj.weight": (d, 3, p, p), "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,),
        "mask_token": (1, 1, e), "decoder_embed.weight": (e, d), "decoder_embed.bias": (e,), "decoder_norm.weight": (e,), "decoder_norm.bias": (e,),
        "decoder_pred.weight": (pixels, e), "decoder_pred.bias": (pixels,), POSITIONS: (1, 1 + patches, d),
        DECODER_POSITIONS: (1, 1 + patches, e),
    }  # fmt: skip
    for name in _table(model["depth"], model["decoder_depth"], model["qkv_bias"]):
        if name in shapes:
            continue
        of_decoder = name.startswith("decoder")
        width = e if of_decoder else d
        hidden = 4 * width if of_decoder else model["mlp_hidden"] or 4 * width
        rows = {"qkv": 3 * width, "fc1": hidden}.get(name.split(".")[-2], width)
        shapes[name] = (rows,) if name.endswith("bias") or "norm" in name else (rows, hidden if ".fc2." in name else width)
    return shapes


def _take_positions(tensors: Mapping[str, np.ndarray], model: dict[str, Any], flat: dict[str, np.ndarray]) -> None:
    """Fixed positions stay fixed; other ones of the encoder become a learned table, the class token's row a part of the class token."""
    grid = model["image_size"] // model["patch"]
    if _differ(tensors[DECODER_POSITIONS], model["decoder_width"], grid):
        raise DatasetError(
            "the decoder's positions are not the fixed sines and cosines of masked autoencoders; import the encoder alone (--encoder-only)"
        )
    model["positions"] = "sincos"
    if _differ(tensors[POSITIONS], model["width"], grid):
        table = _float(tensors[POSITIONS])
        model |= {"positions": "learned", "position_grid": grid}
        flat["encoder/pos_embed"] = table[:, 1:]
        flat["encoder/cls_token"] = flat["encoder/cls_token"] + table[:, :1]


def _differ(table: np.ndarray, width: int, grid: int) -> bool:
    if width % 4:
        return True
    tolerance = _EXACT if table.dtype.itemsize >= 4 else _ROUNDED
    return bool(np.abs(_float(table) - _with_class(sincos_2d(width, grid, grid))).max() > tolerance)
