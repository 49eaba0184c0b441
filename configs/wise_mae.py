"""WISE-MAE: masked-autoencoder pretraining on wavelet-screened tiles (METHODS 1 and 5.1).

    wavepath prepare --slides SLIDES --out TILES
    wavepath train --config=configs/wise_mae.py --config.data.dir=TILES --workdir=RUN
    wavepath train --config=configs/wise_mae.py:variant=S,contrast --config.data.dir=TILES --workdir=RUN
    wavepath train --config=configs/wise_mae.py:smoke --workdir=RUN       # seconds, on phantoms made for it
    wavepath train --config=configs/wise_mae.py:quickstart --config.data.dir=TILES --workdir=RUN   # minutes on two CPU cores

Published setting: ViT-B/16, mask ratio 0.75, 40x tiles of 224 px, MAE recipe (AdamW 0.9/0.95, base rate 1.5e-4, weight decay 0.05,
cosine after 40 of 400 epochs of warm-up). `contrast` adds the "+ Contrast" variant as InfoNCE between two masked views, weight 0.1.
Decoder width and depth follow the model size: an 8x512 decoder costs a small encoder more than masking saves.
"""

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults

DECODERS = {"Ti": (128, 2, 4), "S": (256, 4, 8), "B": (512, 8, 16), "L": (512, 8, 16), "H": (512, 8, 16)}


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"variant": tuple(DECODERS)}, variant="B", contrast=False, quickstart=False, smoke=False)
    config = train_defaults()
    config.model.variant = arg.variant
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = DECODERS[arg.variant]
    config.model.patch = 14 if arg.variant == "H" else 16
    config.batch_size = 1024
    config.train.epochs = 400.0
    config.optim.warmup = "40ep"
    if arg.contrast:
        config.loss.contrast_weight = 0.1
    if arg.quickstart:
        quickstart(config)
    if arg.smoke:
        smoke(config)
    return config


def quickstart(config) -> None:
    """A small network on full 224-px tiles: about two GFLOP a tile and step, a few minutes on two CPU cores."""
    config.model.variant = "Ti"
    config.model.patch = 16
    config.model.dtype = "float32"  # bfloat16 is slower than float32 on CPUs under XLA
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = DECODERS["Ti"]
    config.batch_size = 32
    config.lr = 4e-3  # the rule lr * batch / 256 makes it 5e-4
    config.optim.warmup = "10%"
    config.train.epochs = 0.0
    config.train.steps = 300
    config.train.log_every = 10
    config.train.save_every = 100
    config.train.panels_every = 100


def smoke(config) -> None:
    """Shrinks a run to seconds on two CPU cores: 64-px tiles, patch 16, a narrow and shallow network of the same make."""
    config.model.variant = "XT"
    config.model.patch = 16
    config.model.image_size = 64
    config.model.dtype = "float32"
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = 64, 1, 2
    config.batch_size = 16
    config.lr = 8e-3  # the rule lr * batch / 256 makes it 5e-4
    config.optim.warmup = "10%"
    config.train.epochs = 0.0
    config.train.steps = 20
    config.train.log_every = 5
    config.train.save_every = 10
    config.train.panels_every = 20
    config.prepare.screen.region_um = 112.0
    config.prepare.screen.min_region_um = 112.0
    config.prepare.tiles.size = 64
    config.prepare.select.top = 0.5
