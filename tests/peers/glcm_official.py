"""Runs the official GLCM-MAE torch code on random patches and records what its loss and gradient are.

    python tests/peers/glcm_official.py <checkout of ChetanMadan/GLCM-MAE> [--out tests/ops/glcm_official.json]

Its licence (CC-BY-NC-4.0) forbids copying it here, so this script imports it from a checkout and keeps numbers alone. Needs torch; packages
which its module imports, and which the co-occurrence methods do not use, are replaced by empty ones. The matrices come from its own
`calc_glcm_out_tar`; their re-weighting and distance are METHODS 2.2. Computed in float64 where its code allows and in float32 as it is
run; the record holds float32's loss and float64's gradient, and how far the two are apart.
"""

import argparse
import json
import sys
import types
from pathlib import Path

import numpy as np

LEVELS, SHARPNESS, SIZE = 256, 30, 16
CASES = [
    {"seed": 0, "kind": "unrelated", "patches": 6, "value_range": [-2.2, 2.6]},
    {"seed": 1, "kind": "unrelated", "patches": 6, "value_range": [0.0, 1.0]},
    {"seed": 2, "kind": "near", "noise": 0.05, "patches": 6, "value_range": [-2.2, 2.6]},
]


class _Anything(types.ModuleType):
    """A module in which every name exists and may be called or subclassed."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *a, **k: None, "cuda": lambda self: self})


def official(checkout: Path):
    """Its model's module, with what is not installed replaced."""
    for name in ("cv2", "timm", "timm.models", "timm.models.vision_transformer", "piqa", "piqa.utils", "piqa.utils.functional", "einops"):
        if name == "einops":
            __import__("einops")
        else:
            sys.modules.setdefault(name, _Anything(name))
    sys.path.insert(0, str(checkout))
    import models_mae_all_gbcu

    return models_mae_all_gbcu


def run(code, prediction: np.ndarray, target: np.ndarray, value_range: list[float], double: bool) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each patch, and the gradient of their sum."""
    import torch

    model = code.MaskedAutoencoderViT.__new__(code.MaskedAutoencoderViT)
    torch.nn.Module.__init__(model)
    model.min_val, model.max_val = value_range
    model.bin_num, model.L = LEVELS, SHARPNESS
    model.interval_length = (model.max_val - model.min_val) / LEVELS
    dtype = torch.float64 if double else torch.float32
    prediction = torch.tensor(prediction, dtype=dtype)[None].requires_grad_(True)
    p, q = model.calc_glcm_out_tar(prediction, torch.tensor(target, dtype=dtype)[None])[::-1]

    def reweighted(counts):
        return counts - counts.square() / counts.sum((-2, -1), keepdim=True)

    losses = (reweighted(p) - reweighted(q)).square().mean((-3, -2, -1))[0]
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    return losses.detach().numpy().astype(np.float64), gradient[0].numpy().astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "ops" / "glcm_official.json")
    args = parser.parse_args()
    code = official(args.checkout)
    cases = []
    for case in CASES:
        rng = np.random.default_rng(case["seed"])
        lo, hi = case["value_range"]
        prediction, target = (rng.uniform(lo, hi, (case["patches"], SIZE, SIZE)).astype(np.float32) for _ in range(2))
        if case["kind"] == "near":
            prediction = np.clip(target + np.float32(case["noise"]) * (prediction - target), lo, hi).astype(np.float32)
        loss, slope32 = run(code, prediction, target, case["value_range"], double=False)
        exact, slope = run(code, prediction, target, case["value_range"], double=True)
        stride = 97
        cases.append(
            case
            | {
                "loss": loss.tolist(),
                "gradient_norm": np.sqrt(np.square(slope).sum((1, 2))).tolist(),
                "stride": stride,
                "gradient": slope.reshape(-1)[::stride].tolist(),
                "float32_loss_error": float(np.abs(loss / exact - 1).max()),
                "float32_gradient_error": float(np.abs(slope32 - slope).max() / np.abs(slope).max()),
            }
        )
        print({k: cases[-1][k] for k in ("kind", "loss", "float32_loss_error", "float32_gradient_error")})
    settings = {"levels": LEVELS, "sharpness": SHARPNESS, "offsets": [[0, 1], [1, 0]], "size": SIZE}
    args.out.write_text(
        json.dumps({"source": "ChetanMadan/GLCM-MAE 60dfd68 models_mae_all_gbcu.py", "settings": settings, "cases": cases}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
