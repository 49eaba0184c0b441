"""The encoder among the arrays of a file, under whatever names `vit_names` knows: parameters of `models.vit.ViT`, and all that was found out.

Two things are folded, and change no output: rows of the position table that belong to the class token or to registers are added to these tokens
(that is all a network does with them), and a table that is the sine-cosine one is not stored. Every array is used, known to be no part of an
encoder, or an error.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from wavepath.errors import DatasetError
from wavepath.interop.vit_names import HF, TIMM, Family, find_family, listed
from wavepath.interop.weight_files import number_in
from wavepath.ops.posembed import sincos_2d

# Widths whose heads are not 64 wide: ViT-H, g and G of the ViT papers.
HEADS = {1280: 16, 1408: 16, 1664: 16}
# Known parts of a model that no encoder needs: classifiers, pooling, what masked images are filled with.
HEADS_OF_MODELS = re.compile(
    r"(heads?|head_drop|fc_norm|pre_logits|classifier|cls_classifier|pooler|attn_pool|lm_head|decoder(_\w+)?|projector|dino_head|ibot_head)(\.|$)"
    r"|(embeddings\.)?mask_token$"
)
EXACT, ROUNDED = 1e-4, 1e-2  # how far a table of sines may be off: kept in 32 bits, and in 16


@dataclass(frozen=True)
class Encoder:
    """Parameters of `models.vit.ViT` (a tree of float32 arrays), and what was found out about them.

    Attributes:
        fields: of `config.model`: `width`, `depth`, `heads`, `patch` and those that differ from the defaults' form.
        grid: side of the position table in patches.
        left_out: names in the file that are no part of the encoder.
        notes: what was assumed.
    """

    params: dict[str, Any]
    fields: dict[str, Any]
    grid: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def vit_to_params(
    tensors: Mapping[str, np.ndarray], *, heads: int = 0, config: Mapping[str, Any] | None = None, prefix: str | None = None
) -> Encoder:
    """The encoder among some arrays.

    Args:
        tensors: by name, as the file has them.
        heads: 0: by `config`, else 64 channels each (80 of ViT-H).
        config: config.json of timm or transformers, or nothing.
        prefix: see `find_family`.

    Raises:
        DatasetError: no or several encoders, arrays that are missing, of another shape, not finite, or left over and unknown: all are named.
    """
    config = config or {}
    family, prefix, notes = find_family(tensors, prefix)
    inside = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    left_out = sorted(name for name in tensors if not name.startswith(prefix))
    # DINOv2's training cuts its blocks into chunks (blocks.<chunk>.<i>.), numbered through.
    inside = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): array for name, array in inside.items()}
    reader = _Reader(family, inside)
    params, fields = reader.read(config)
    check_activation(config, gated=fields.get("mlp") == "swiglu")
    left_out += sorted(prefix + name for name in inside if name not in reader.used and HEADS_OF_MODELS.match(name))
    unknown = [name for name in inside if name not in reader.used and not HEADS_OF_MODELS.match(name)]
    problems = [
        f"{title}: {listed(prefix + name for name in items)}"
        for title, items in (("missing", reader.missing), ("left over and unknown", unknown), ("of another shape", reader.wrong)) if items
    ]
    if problems:
        raise DatasetError(
            f"the arrays are not those of a vision transformer with pre-norm blocks, a class token and square patches ({'; '.join(problems)}); such a"
            " model cannot be imported"
        )
    notes += reader.notes
    known = _first(config, "num_attention_heads", ("model_args", "num_heads"), "num_heads")
    width = fields["width"]
    if not heads and not known:
        known = HEADS.get(width) or max(width // 64, 1)
        notes.append(f"{known} heads assumed, since no config.json says how many; --heads gives another number")
    heads = heads or int(number_in({"num_heads": known}, "num_heads", 1))
    if width % heads:
        raise DatasetError(f"{heads} heads do not divide a width of {width}; give --heads")
    if "fc_norm.weight" in inside:
        notes.append("the file's norm behind the mean of tokens (fc_norm) is left out: features are those ahead of it")
    return Encoder(params, {**fields, "heads": heads}, reader.grid, tuple(left_out), tuple(notes))


class _Reader:
    """Takes arrays one after the other, and remembers which were used, missing or of a wrong shape."""

    def __init__(self, family: Family, tensors: Mapping[str, np.ndarray]):
        self.family, self.tensors = family, tensors
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.grid = 0

    def read(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, and the fields of `config.model` that they imply."""
        family = self.family
        kernel = self.take(family.patch + ".weight")
        if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
            raise DatasetError(f"{family.patch}.weight is {kernel.shape}, not (width, 3, patch, patch): only square patches of RGB can be imported")
        width, _, patch, _ = kernel.shape
        tree: dict[str, Any] = {
            "patch_embed": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, width), "bias": self.take(family.patch + ".bias", (width,))}
        }
        tree["cls_token"] = self.take(family.cls[0], (1, 1, width))
        registers = next((self.take(name) for name in family.registers if name in self.tensors), None)
        if registers is not None and registers.size:
            tree["reg_token"] = registers.reshape(1, -1, width)
        start, depth = self._blocks()
        fields: dict[str, Any] = {"width": width, "depth": depth, "patch": patch, "norm_eps": 1e-6}
        if registers is not None:
            fields["register_tokens"] = tree["reg_token"].shape[1]
        blocks = tree["blocks"] = {str(number): self._block(f"{start}{number}.", width) for number in range(depth)}
        if depth and not self.missing and not self.wrong:
            fields |= self._form(blocks)
        # transformers' ViT has an eps of its own, and says it in config.json; its DINOv2 and timm have this one.
        usual = 1e-12 if f"{start}0.layernorm_before.weight" in self.tensors else 1e-6
        fields["norm_eps"] = float(number_in(config, "layer_norm_eps", usual))
        if f"{family.norm}.weight" in self.tensors:
            tree["norm"] = self._norm(family.norm, width)
        elif not self.missing:
            fields["final_norm"] = False
            self.notes.append("no norm behind the blocks in the file: features are the last block's output")
        self._positions(tree, fields, config)
        return tree, fields

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """One array as float32; zeros where it is missing or of another shape, which is remembered."""
        self.used.add(name)
        array = self.tensors.get(name)
        if array is None:
            self.missing.append(name)
        elif shape is not None and array.shape != shape:
            self.wrong.append(f"{name} {array.shape} instead of {shape}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            raise DatasetError(f"{name} is of {array.dtype}, not of floating-point numbers; quantised weights cannot be imported")
        else:
            array = np.asarray(array, np.float32)
            if not np.isfinite(array).all():
                raise DatasetError(f"{name} holds values that are not finite; take another copy of the weights")
            return array
        return np.zeros(shape or (0,), np.float32)

    def _blocks(self) -> tuple[str, int]:
        """What the names of the blocks begin with, and how many there are, counted without a gap."""
        for start in self.family.blocks:
            numbers = {int(name.removeprefix(start).partition(".")[0]) for name in self.tensors if re.match(re.escape(start) + r"\d{1,3}\.", name)}
            if numbers:
                return start, max(numbers) + 1
        self.missing.append(f"{self.family.blocks[0]}0")
        return self.family.blocks[0], 0

    def _block(self, start: str, width: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for part in self.family.parts:
            if part.kind == "scale":
                name = next((start + name for name in part.theirs if start + name in self.tensors), "")
                if name:
                    tree[part.ours] = {"scale": self.take(name, (width,))}
                continue
            joined = [(names,) if isinstance(names, str) else names for names in part.theirs]
            names = next((names for names in joined if f"{start}{names[0]}.weight" in self.tensors), joined[0])
            if part.kind == "norm":
                tree[part.ours] = self._norm(start + names[0], width)
                continue
            outer, _, inner = part.ours.partition("/")
            tree.setdefault(outer, {})[inner] = self._linear([start + name for name in names])
        return tree

    def _norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {"scale": self.take(name + ".weight", (width,)), "bias": self.take(name + ".bias", (width,))}

    def _linear(self, names: list[str]) -> dict[str, np.ndarray]:
        """A linear layer of the arrays joined along their outputs; without a bias where the file has none."""
        weights = [self.take(name + ".weight") for name in names]
        if any(weight.ndim != 2 for weight in weights):
            self.wrong += [f"{name}.weight {weight.shape}" for name, weight in zip(names, weights, strict=True) if weight.ndim != 2 and weight.size]
            return {"kernel": np.zeros((0, 0), np.float32)}
        layer = {"kernel": np.concatenate(weights).T}
        if any(name + ".bias" in self.tensors for name in names):
            layer["bias"] = np.concatenate(
                [self.take(name + ".bias", weight.shape[:1]) for name, weight in zip(names, weights, strict=True)]
            )
        return layer

    def _form(self, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """Kind and width of the MLP, bias and layer scale, which all blocks share, and the shapes that follow."""
        first = blocks["0"]
        width = len(first["norm1"]["scale"])
        hidden, outputs = first["mlp"]["fc2"]["kernel"].shape[0], first["mlp"]["fc1"]["kernel"].shape[1]
        gated = outputs == 2 * hidden
        bias, scaled = "bias" in first["attn"]["qkv"], "ls1" in first
        if gated:
            self.notes.append("the MLP is taken for SwiGLU (SiLU gate first), since its first layer is twice as wide as its second reads")
        want = {
            "attn/qkv": (width, 3 * width), "attn/proj": (width, width), "mlp/fc1": (width, hidden * (2 if gated else 1)), "mlp/fc2": (hidden, width),
        }  # fmt: skip
        for number, block in blocks.items():
            for path, shape in want.items():
                outer, _, inner = path.partition("/")
                layer = block[outer][inner]
                if layer["kernel"].shape != shape or ("bias" in layer) != (bias if path == "attn/qkv" else True):
                    self.wrong.append(f"block {number} {path} {layer['kernel'].shape} instead of {shape}, or its bias")
            if ("ls1" in block, "ls2" in block) != (scaled, scaled):
                self.missing.append(f"block {number} layer scale")
        fields: dict[str, Any] = {"mlp_hidden": 0 if hidden == 4 * width else hidden, "qkv_bias": bias}
        return fields | ({"mlp": "swiglu"} if gated else {}) | ({"layer_scale": 1e-5} if scaled else {})

    def _positions(self, tree: dict[str, Any], fields: dict[str, Any], config: Mapping[str, Any]) -> None:
        """Folds the rows of the class token and of registers into these, and keeps the table where it is not the sine-cosine one."""
        name, width = self.family.positions[0], tree["cls_token"].shape[-1]
        table = self.take(name)
        tolerance = EXACT if getattr(self.tensors.get(name), "itemsize", 4) >= 4 else ROUNDED
        if name in self.missing:
            return
        if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != width:
            self.wrong.append(f"{name} {table.shape} instead of (1, positions, {width})")
            return
        table, registers = table[0], tree["reg_token"].shape[1] if "reg_token" in tree else 0
        ahead = self._rows_ahead(len(table), registers, fields["patch"], config)
        if ahead is None:
            self.wrong.append(f"{name} {table.shape[0]} rows, which are not those of a square grid")
            return
        self.grid = math.isqrt(len(table) - ahead)
        if ahead:
            tree["cls_token"] = tree["cls_token"] + table[:1]
        if ahead > 1:
            tree["reg_token"] = tree["reg_token"] + table[1:ahead]
        table = table[ahead:]
        if width % 4 == 0 and np.abs(table - sincos_2d(width, self.grid, self.grid)).max() <= tolerance:
            self.notes.append("positions are the fixed sine-cosine ones")
            return
        tree["pos_embed"] = table[None]
        fields |= {"positions": "learned", "position_grid": self.grid}

    def _rows_ahead(self, rows: int, registers: int, patch: int, config: Mapping[str, Any]) -> int | None:
        """Rows of the table ahead of the patches': none, the class token's, or the registers' as well (timm); None where no number fits."""
        choices = [1] if self.family is HF or "register_tokens" in self.used else [1 + registers, 0]
        arguments = config.get("model_args", {})
        if self.family is TIMM and registers and isinstance(arguments, Mapping) and "no_embed_class" in arguments:
            choices = [0] if arguments["no_embed_class"] else [1 + registers]
        fits = [ahead for ahead in choices if rows > ahead and math.isqrt(rows - ahead) ** 2 == rows - ahead]
        return fits[0] if fits else None


def check_activation(config: Mapping[str, Any], gated: bool) -> None:
    """Raises: DatasetError: config.json names an activation that is not the exact GELU, or of a gated MLP the SiLU.

    timm's is a name or the path of a class (`torch.nn.SiLU`). transformers' DINOv2 with a gated MLP says `gelu` and computes SiLU.
    """
    name = _first(config, "hidden_act", ("model_args", "act_layer"))
    plain = str(name).strip("<>'").rpartition(".")[2].lower()
    if name and plain not in (("gelu", "silu", "swiglu") if gated else ("gelu",)):
        raise DatasetError(f"config.json asks for the activation {name!r}; only exact GELU and SwiGLU can be imported")


def _first(config: Mapping[str, Any], *paths: str | tuple[str, str]) -> Any:
    for path in paths:
        value: Any = config
        for name in (path,) if isinstance(path, str) else path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value:
            return value
    return None
