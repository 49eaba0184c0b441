"""A trained encoder for other programs: a folder that timm or transformers load, plain arrays, or a StableHLO program.

CKPT is a run folder of `wavepath train` (pretraining or fine-tuning) or of `wavepath import`. Averaged parameters are taken where the run keeps
them, as `wavepath embed` does. OUT is written whole or not at all, with a README.md that says how to load it and the SHA-256 of every file.
"""

import argparse
from pathlib import Path

EPILOG = """formats
  timm        model.safetensors, config.json: timm.create_model("local-dir:OUT", pretrained=True); the encoder
  hf-vitmae   model.safetensors, config.json, preprocessor_config.json: transformers' ViTMAEForPreTraining.from_pretrained(OUT) with the
              decoder, ViTMAEModel.from_pretrained(OUT, mask_ratio=0.0) for features. Without a decoder (--encoder-only, or a run that has none)
              the folder is that of a ViTMAEModel. No register tokens, layer scale or gated MLP: use timm for these
  npz         weights.npz: every parameter by its path in wavepath, encoder/blocks/0/attn/qkv/kernel; no pickle
  stablehlo   encoder.stablehlo, weights.safetensors, encoder.json: uint8 images [b, side, side, 3] to cls and mean [b, d], any b, on CPU,
              NVIDIA GPU and TPU; wavepath.inference.stablehlo.load_stablehlo(OUT), or jax.export without wavepath
A fine-tuned run gives its encoder without the head; its class token and mean of patches by --format stablehlo as `wavepath embed` has them.

examples:
  wavepath export RUN --format timm --out encoder_timm
  wavepath export RUN --format hf-vitmae --out encoder_hf
  wavepath export RUN --format stablehlo --out encoder_program --step 20000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="run folder of `wavepath train` or `wavepath import`")
    parser.add_argument("--format", required=True, choices=["timm", "hf-vitmae", "npz", "stablehlo"], help="see below")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--step", type=int, help="a particular checkpoint of the run (default: the newest whole one)")
    parser.add_argument("--encoder-only", action="store_true", help="leave the decoder of a pretraining run out (hf-vitmae, npz)")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import EXIT_OK
    from wavepath.inference.export import export

    result = export(args.checkpoint, args.out, args.format, step=args.step, encoder_only=args.encoder_only)
    rows = [("format", result.format), ("content", result.content), ("step", result.step), ("size", f"{result.nbytes / 1e6:.3g} MB")]
    summary("exported", [*rows, ("folder", result.folder), ("how to load it", result.folder / "README.md")])
    return EXIT_OK
