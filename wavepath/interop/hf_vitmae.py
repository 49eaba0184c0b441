"""ViTMAE of Hugging Face transformers, both ways: its names, its config.json and preprocessor_config.json, a folder that `from_pretrained` loads.

Written are the names of the released checkpoints (`vit.encoder.layer.3.attention.attention.query.weight`), which every version of transformers
loads; read are these and the names that version 5 gives its modules. Source: transformers' ViTMAE, docs of the formats in ANCHORS part 2 (e).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.errors import ConfigError
from wavepath.files import atomic_path, write_json
from wavepath.interop.mae_names import params_to_mae, stripped
from wavepath.interop.vit_names import HF, TIMM
from wavepath.interop.weight_files import number_in

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
MODEL_TYPE = "vit_mae"
_TOP = {
    "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm", "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.decoder_embed", "decoder_pos_embed": "decoder.decoder_pos_embed", "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}  # fmt: skip
# Prefixes of blocks; the first is that of the released files. transformers 5 writes the last of the decoder's.
_STACKS = {
    "blocks": tuple(f"vit.{start}" for start in HF.blocks),
    "decoder_blocks": ("decoder.decoder_layers.", "decoder.decoder_encoder.layer."),
}  # fmt: skip
# timm's name of a block's part, which is facebookresearch's too, to transformers' names of it, three for queries, keys and values.
_BLOCK = {mine.theirs[0]: theirs.theirs for mine in TIMM.parts for theirs in HF.parts if mine.ours == theirs.ours and mine.kind != "scale"}


def is_vitmae(names: Iterable[str]) -> bool:
    """Whether these are the names of a ViTMAE with its decoder."""
    return {"decoder.mask_token", "decoder.decoder_pred.weight", "vit.embeddings.cls_token"} <= {stripped(name) for name in names}


def to_mae(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under facebookresearch's names, for `mae_names.mae_to_params`; names that are no ViTMAE's stay as they are."""
    renamed: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        name = stripped(name)
        found = _theirs_to_mae(name)
        if found is None:
            renamed[name] = value
        elif isinstance(found, str):
            renamed[found] = value
        else:
            parts.setdefault(found[0], {})[found[1]] = value
    for name, three in parts.items():
        # Where one is missing or of another width the whole is left out, and named as missing.
        if len(three) == 3 and len({value.shape for value in three.values()}) == 1:
            renamed[name] = np.concatenate([three[number] for number in range(3)])
    return renamed


def from_mae(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the released checkpoints' names: `to_mae` backwards."""
    renamed: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        stack, _, rest = name.partition(".")
        if stack not in _STACKS:
            base, kind = (name, "") if name in _TOP else name.rsplit(".", 1)
            renamed[_TOP[base] + (f".{kind}" if kind else "")] = value
            continue
        number, _, rest = rest.partition(".")
        base, kind = rest.rsplit(".", 1)
        theirs = _BLOCK[base][0]
        parts = (theirs,) if isinstance(theirs, str) else theirs
        pieces = zip(parts, np.split(value, len(parts)), strict=True)
        renamed |= {f"{_STACKS[stack][0]}{number}.{part}.{kind}": piece for part, piece in pieces}
    return renamed


def _theirs_to_mae(name: str) -> str | tuple[str, int] | None:
    """A name of the released files as facebookresearch's; of a query, key or value that of the three, and which it is."""
    for mine, theirs in _TOP.items():
        if name == theirs or name in (f"{theirs}.weight", f"{theirs}.bias"):
            return mine + name.removeprefix(theirs)
    for stack, starts in _STACKS.items():
        start = next((start for start in starts if name.startswith(start)), None)
        if start and (match := re.fullmatch(r"(\d+)\.(.+)\.(weight|bias)", name.removeprefix(start))):
            number, part, kind = match.groups()
            for mine, alternatives in _BLOCK.items():
                for names in alternatives:
                    if part == names:
                        return f"{stack}.{number}.{mine}.{kind}"
                    if not isinstance(names, str) and len(names) == 3 and part in names:
                        return f"{stack}.{number}.{mine}.{kind}", names.index(part)
    return None


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ViTMAE's config.json says beside the tensors: `heads`, `decoder_heads`, `model` (fields of `config.model`), `norm_pix`."""
    return {
        "heads": number_in(config, "num_attention_heads", 12), "decoder_heads": number_in(config, "decoder_num_attention_heads", 16),
        "model": {"norm_eps": float(number_in(config, "layer_norm_eps", 1e-12)), "mask_ratio": float(number_in(config, "mask_ratio", 0.75))},
        "norm_pix": bool(config.get("norm_pix_loss", False)),
    }  # fmt: skip


def write_vitmae(params: Mapping[str, Any], settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes config.json, preprocessor_config.json and model.safetensors into an existing folder.

    `ViTMAEModel.from_pretrained(out)` loads them, and `ViTMAEForPreTraining` too where there is a decoder. Without one the folder is that of a
    `ViTMAEModel`.

    Args:
        params: of task `mae`, or `{"encoder": ...}` alone; blocks as a tree for each.
        settings: width, depth, heads, patch, image_size, mlp_hidden, norm_eps, qkv_bias, mask_ratio, norm_pix, mean, std; with a decoder
            decoder_width, decoder_depth, decoder_heads.

    Returns:
        The config that was written.

    Raises:
        ConfigError: an encoder that has what a ViTMAE has not (named).
    """
    from safetensors.numpy import save_file

    foreign = _foreign(params["encoder"])
    if foreign:
        raise ConfigError(f"a ViTMAE of transformers has no {' and no '.join(foreign)}, which this encoder has; export it with --format timm")
    decoder = "decoder_pred" in params
    tensors = from_mae(params_to_mae(params, settings["image_size"] // settings["patch"]))
    if not decoder:
        tensors = {name.removeprefix("vit."): value for name, value in tensors.items()}
    width, decoder_width = int(settings["width"]), int(settings["decoder_width"])
    config = {
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"], "model_type": MODEL_TYPE, "hidden_size": width,
        "num_hidden_layers": int(settings["depth"]), "num_attention_heads": int(settings["heads"]),
        "intermediate_size": int(settings["mlp_hidden"]) or 4 * width, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": float(settings["norm_eps"]),
        "image_size": int(settings["image_size"]), "patch_size": int(settings["patch"]), "num_channels": 3, "qkv_bias": bool(settings["qkv_bias"]),
        "mask_ratio": float(settings["mask_ratio"]), "norm_pix_loss": bool(settings["norm_pix"]), "torch_dtype": "float32",
    }  # fmt: skip
    if decoder:
        config |= {
            "decoder_hidden_size": decoder_width, "decoder_num_hidden_layers": int(settings["decoder_depth"]),
            "decoder_num_attention_heads": int(settings["decoder_heads"]), "decoder_intermediate_size": 4 * decoder_width,
        }  # fmt: skip
    out = Path(out)
    with atomic_path(out / WEIGHTS) as temporary:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, temporary, metadata={"format": "pt"})
    write_json(out / CONFIG, config)
    write_json(out / PREPROCESSOR, _preprocessor(settings))
    return config


def _preprocessor(settings: Mapping[str, Any]) -> dict[str, Any]:
    side = int(settings["image_size"])
    return {
        "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
        "image_mean": [float(value) for value in settings["mean"]], "image_std": [float(value) for value in settings["std"]],
        "resample": 2, "size": {"height": side, "width": side},
    }  # fmt: skip


def _foreign(encoder: Mapping[str, Any]) -> list[str]:
    block = encoder["blocks"]["0"]
    fc1, fc2 = block["mlp"]["fc1"]["kernel"], block["mlp"]["fc2"]["kernel"]
    found = {
        "register tokens": "reg_token" in encoder, "layer scale": bool({"ls1", "ls2"} & set(block)),
        "gated MLP": np.shape(fc1)[1] != np.shape(fc2)[0], "encoder without a final norm": "norm" not in encoder,
    }  # fmt: skip
    return [name for name, there in found.items() if there]
