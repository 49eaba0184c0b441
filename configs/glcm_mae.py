"""GLCM-MAE: masked-autoencoder pretraining that compares textures by their co-occurrence matrices (METHODS 2).

    wavepath train --config=configs/glcm_mae.py --config.data.dir=IMAGES --workdir=RUN            # the paper's setting
    wavepath train --config=configs/glcm_mae.py:tissue,variant=S --config.data.dir=TILES --workdir=RUN   # for H&E tiles
    wavepath train --config=configs/glcm_mae.py:smoke --workdir=RUN                               # seconds, on phantoms made for it

Published setting: ViT-B/16, mask ratio 0.75, 400 epochs; the first half learns by squared error alone, the second by
`L_GLCM + L_SSIM + 0.1 L_MSE` on masked patches: 256 levels, right and lower neighbour, membership by sigmoids of width 1/30 level,
re-weighted counts, squared distance; values between the least and greatest of the training set, which one pass measures before the first
step. Images are seen whole and unturned. What differs: the paper starts from published MAE weights, here from noise, and its second phase has
a batch of 32 (256 here) with optimiser and schedule going on. Two phases of different batch are two runs, the second with
`--config.init_from=FIRST --config.loss.second.start=0`, which starts optimiser and schedule anew.

`tissue` is this project's setting for H&E: 32 levels of haematoxylin (0.1 % of the values cut off at each end), triangular membership, four
offsets, L1 distance of normalised matrices, flips and turns. Fewer levels and L1 give a gradient that tells a near copy from unrelated
texture, which the sparse 256-level matrices of a 16-px patch do not (METHODS 2.8). `docs/glcm_experiment.md` has what the terms were worth on
small runs.
"""

from wise_mae import DECODERS
from wise_mae import smoke as small

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"variant": tuple(DECODERS)}, variant="B", tissue=False, smoke=False)
    config = train_defaults()
    config.model.variant = arg.variant
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = DECODERS[arg.variant]
    config.model.patch = 14 if arg.variant == "H" else 16
    config.loss.norm_pix = False
    config.loss.second.start = "50%"
    config.loss.cooccurrence.sharpness = 30.0
    config.augment.crop_scale = (1.0, 1.0)
    config.augment.hflip = config.augment.vflip = config.augment.rot90 = False
    config.train.epochs = 400.0
    config.optim.warmup = "40ep"
    if arg.tissue:
        tissue(config)
    if arg.smoke:
        small(config)
        config.train.eval_every = 10
    return config


def tissue(config) -> None:
    """H&E: a gradient that is alive everywhere, in the stain that carries nuclei; tissue has no upright."""
    glcm = config.loss.cooccurrence
    glcm.levels, glcm.channel, glcm.clip_percentile = 32, "hematoxylin", 0.1
    glcm.membership, glcm.sharpness = "triangular", 0.0
    glcm.offsets = ((0, 1), (1, 0), (1, 1), (1, -1))
    glcm.distance, glcm.normalize, glcm.reweight = "l1", True, False
    config.augment.crop_scale = (0.2, 1.0)
    config.augment.hflip = config.augment.vflip = config.augment.rot90 = True
