"""Small arms that compare what a masked autoencoder is scored by: squared error, structural similarity, co-occurrence at 16, 32 and 256 levels.

    wavepath phantom --out TEXTURES --textures 60 --size 112 --seed 1
    wavepath sweep --config=configs/glcm_experiment.py --grid arg.arm=mse,ssim,paper,glcm16,glcm32,glcm256 --seeds 3 --workdir=SWEEP \
        --config.data.dir=TEXTURES
    wavepath train --config=configs/glcm_experiment.py:arm=glcm32 --config.data.dir=TEXTURES --workdir=RUN
    wavepath train --config=configs/glcm_experiment.py:smoke --workdir=RUN      # seconds, on phantoms made for it

All arms take the same steps from the same seeds: the first half by squared error, the second half by

    mse       L_MSE                        ssim      L_SSIM + 0.1 L_MSE
    paper     L_GLCM + L_SSIM + 0.1 L_MSE, the published loss at 256 levels (METHODS 2.2, 2.3)
    glcm<K>   w L_GLCM + L_SSIM + 0.1 L_MSE at K levels; w = 0.2, 1, 85 for 16, 32, 256, so that flat output costs the same at each
    tissue    the co-occurrence settings of `configs/glcm_mae.py:tissue`

The counts of a 16-px patch spread over the square of the levels, so the published loss falls by a factor of 85 from 32 to 256 levels, and with equal
weights the arms would compare weights (METHODS 2.8).

A ViT/16 of width 96 and depth 4 on tiles of 112 px, 300 steps of 32: about a minute an arm and seed on two CPU cores. Results:
`docs/glcm_experiment.md`.
"""

from glcm_mae import get_config as published
from glcm_mae import tissue
from wise_mae import quickstart
from wise_mae import smoke as small

from wavepath.config import parse_arg

WEIGHTS = {"glcm16": 0.2, "glcm32": 1.0, "glcm256": 85.0}
ARMS = ("mse", "ssim", "paper", *WEIGHTS, "tissue")


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"arm": ARMS}, arm="glcm32", smoke=False)
    config = published()
    if arg.arm == "tissue":
        tissue(config)
    quickstart(config)
    config.model.variant, config.model.image_size = "XT", 112
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = 96, 2, 3
    config.lr = 8e-3  # the rule lr * batch / 256 makes it 1e-3
    config.train.steps = 300
    config.train.log_every = 20
    config.train.eval_every = 300
    config.train.save_every = config.train.panels_every = 300
    # Tissue and textures are seen as they are: a turn would make one class of the phantom textures another.
    config.augment.crop_scale = (1.0, 1.0)
    config.augment.hflip = config.augment.vflip = config.augment.rot90 = False
    second = config.loss.second
    if arg.arm == "mse":
        second.mse, second.ssim, second.glcm = 1.0, 0.0, 0.0
    elif arg.arm == "ssim":
        second.glcm = 0.0
    elif arg.arm in WEIGHTS:
        config.loss.cooccurrence.levels, second.glcm = int(arg.arm.removeprefix("glcm")), WEIGHTS[arg.arm]
    if arg.smoke:
        small(config)
    return config
