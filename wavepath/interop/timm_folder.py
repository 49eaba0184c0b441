"""An encoder as timm's own folder: model.safetensors and config.json, which `timm.create_model("local-dir:OUT", pretrained=True)` loads.

The architecture is timm's of the nearest size, and every number of the encoder is given beside it (`model_args`), so that none depends on what
timm's name stands for. Source: ANCHORS part 2 (e), `Weights`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wavepath.console import warn
from wavepath.files import atomic_path, write_json
from wavepath.interop.vit_names import TIMM, params_to_vit
from wavepath.ops.posembed import resize_table, sincos_2d

ARCHITECTURES = {
    192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224", 1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}  # fmt: skip
GATED = "vit_giant_patch14_dinov2"  # the one whose MLP is SwiGLU, which config.json cannot ask for
EPS = 1e-6  # of timm's vision transformers, likewise
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_timm_folder(params: Mapping[str, Any], settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes both files into an existing folder.

    The position table is written for `image_size`: a learned one is resized to it, the fixed one is written out, with a row of zeros for the class
    token. An encoder with registers gets a table without such rows (timm's `no_embed_class`).

    Args:
        params: of `models.vit.ViT`, blocks scanned or not.
        settings: width, depth, heads, patch, image_size, mean, std; and, where they differ from the defaults of `config.model`, mlp, mlp_hidden,
            norm_eps, qkv_bias, layer_scale, register_tokens, positions, final_norm.

    Returns:
        What config.json says.
    """
    from safetensors.numpy import save_file

    width, patch, side = (int(settings[name]) for name in ("width", "patch", "image_size"))
    registers, gated = int(settings.get("register_tokens", 0)), settings.get("mlp", "gelu") == "swiglu"
    tensors = params_to_vit(params, TIMM)
    tensors["pos_embed"] = _positions(params, width, side // patch, registers)
    eps = float(settings.get("norm_eps", EPS))
    if eps != EPS:
        warn(f"the encoder's norms have an eps of {eps:g}, and timm's folder cannot ask for another than {EPS:g}: features differ in the last digits")
    hidden = (int(settings.get("mlp_hidden", 0)) or 4 * width) * (2 if gated else 1)
    scaled = float(settings.get("layer_scale", 0.0))
    arguments = {
        "img_size": side, "patch_size": patch, "embed_dim": width, "depth": int(settings["depth"]), "num_heads": int(settings["heads"]),
        # timm rounds the product down: half a channel more is on the safe side of rounding.
        "mlp_ratio": hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width,
        "qkv_bias": bool(settings.get("qkv_bias", True)), "init_values": scaled if scaled > 0 else None, "class_token": True,
        "reg_tokens": registers, "no_embed_class": registers > 0, "global_pool": "token", "final_norm": bool(settings.get("final_norm", True)),
    }  # fmt: skip
    config = {
        "architecture": GATED if gated else ARCHITECTURES.get(width, ARCHITECTURES[768]), "num_classes": 0, "num_features": width,
        "global_pool": "token", "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, side, side], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": [float(value) for value in settings["mean"]], "std": [float(value) for value in settings["std"]], "num_classes": 0,
            "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    out = Path(out)
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(out / CONFIG, config)
    return config


def _positions(params: Mapping[str, Any], width: int, grid: int, registers: int) -> np.ndarray:
    """float32 [1, n, d] or, with the class token's row of zeros, [1, 1 + n, d]."""
    learned = params.get("pos_embed")
    if learned is None:
        table = sincos_2d(width, grid, grid)
    else:
        table = np.asarray(resize_table(jnp.asarray(learned[0], jnp.float32), grid, grid), np.float32)
    return np.ascontiguousarray(np.concatenate([np.zeros((0 if registers else 1, width), np.float32), table])[None])
