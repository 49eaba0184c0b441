"""Weights of others to a run folder: a vision transformer or a masked autoencoder that was trained elsewhere.

SOURCE is a file (.safetensors, .npz, torch's .pth .pt .bin) or a folder as timm and transformers write it. Known are timm's ViTs (UNI, UNI2-h,
Virchow, H-optimus), DINOv2's own checkpoints, transformers' ViT (Phikon), DINOv2 with or without registers, ViTMAE, and facebookresearch's MAE.
Torch files are read without running anything in them. Every array is used, or named as left out, or an error.
"""

import argparse
from pathlib import Path

EPILOG = """writes a run folder with a checkpoint of step 0, config.json and import.json (files with SHA-256, what was left out or assumed).
`wavepath embed` and `wavepath export` take it as --checkpoint, training as --config.init_from. An encoder alone gives a run of task `encoder`,
an autoencoder with its decoder one of task `mae`.

examples:
  wavepath import uni/ --out uni_run --mpp 0.5
  wavepath import mae_pretrain_vit_base_full.pth --out mae_run
  wavepath import teacher_checkpoint.pth --out dino_run --key teacher --heads 16 --image-size 224
  wavepath embed --checkpoint uni_run --data tiles --out features"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file of weights, or a folder of timm or transformers")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to write; must not exist or be empty")
    parser.add_argument("--encoder-only", action="store_true", help="leave the decoder of an autoencoder out")
    parser.add_argument("--image-size", type=int, default=0, metavar="PX", help="side that tiles are resized to (default: as the files say)")
    parser.add_argument("--mean", type=_three, default=(), metavar="R,G,B", help="of pixels in 0..1 (default: as the files say, else ImageNet's)")
    parser.add_argument("--std", type=_three, default=(), metavar="R,G,B", help="likewise")
    parser.add_argument("--mpp", type=float, default=0.0, metavar="UM", help="um per pixel of the tiles that `embed --slides` reads (default: 0.25)")
    parser.add_argument("--heads", type=int, default=0, help="attention heads, where no config.json says (default: by the width)")
    parser.add_argument("--decoder-heads", type=int, default=0, help="likewise of an autoencoder's decoder")
    parser.add_argument("--key", default="", help="where in a torch checkpoint the model is, as in teacher.backbone (default: found)")
    parser.add_argument("--prefix", help="what the encoder's names begin with, where there are several (default: found)")


def _three(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, as in 0.485,0.456,0.406")
    return values


def run(args: argparse.Namespace) -> int:
    from wavepath.console import say, summary
    from wavepath.errors import EXIT_OK, ConfigError
    from wavepath.training.import_run import import_weights

    for name in ("image_size", "mpp", "heads", "decoder_heads"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be a number from 0 on")
    result = import_weights(
        args.source, args.out, encoder_only=args.encoder_only, heads=args.heads, decoder_heads=args.decoder_heads, image_size=args.image_size,
        mean=args.mean, std=args.std, mpp=args.mpp, key=args.key, prefix=args.prefix,
    )
    for note in result.notes:
        say(f"note: {note}")
    if result.left_out:
        say(f"left out: {', '.join(result.left_out[:6])}" + (f" and {len(result.left_out) - 6} more" if len(result.left_out) > 6 else ""))
    model = result.config.model
    summary(
        "imported",
        [
            ("task", result.config.task), ("encoder", f"{model.variant}, patch {model.patch}, images of {model.image_size} px"),
            ("parameters", f"{result.parameters / 1e6:.4g} M"), ("folder", args.out),
            ("to train", " ".join([f"--config.init_from={args.out}", *result.flags])),
        ],
    )  # fmt: skip
    return EXIT_OK
