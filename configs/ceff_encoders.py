"""First stage of virtual staining: encoders of H&E and of the immunostain that agree on pairs of one tissue (METHODS 3.2).

    wavepath pairs --folders BCI --label-pattern '_([0-3][+]?)$' --split-pattern '_(train|test)_' --out PAIRS
    wavepath train --config=configs/ceff_encoders.py:bci --config.data.dir=PAIRS --workdir=ENCODERS      # the published setting, on one GPU
    wavepath pairs --folders MIST --group-pattern '^([^_]+)_' --mpp 0.4661 --out PAIRS
    wavepath train --config=configs/ceff_encoders.py:mist --config.data.dir=PAIRS --workdir=ENCODERS
    wavepath train --config=configs/ceff_encoders.py:cpu --config.data.dir=PAIRS --config.stain.crop=32 --config.stain.margin=32 \
        --config.train.steps=300 --workdir=ENCODERS                                                      # for ceff.py:cpu, minutes on two CPU cores
    wavepath train --config=configs/ceff_encoders.py:smoke --workdir=ENCODERS                            # seconds, on phantom pairs made for it
    wavepath evaluate --stain-encoders ENCODERS --data PAIRS --out OUT                                   # pairs and non-pairs over thresholds
    wavepath train --config=configs/ceff.py:bci --config.data.dir=PAIRS --config.encoders=ENCODERS --workdir=RUN    # the second stage

Published setting: two encoders of 18.7 M parameters, InfoNCE of the H&E image against the immunostains of a batch of 64 (temperature 0.07, one
direction: --config.stain.symmetric=True for both), crops of 256 px, horizontal flips, Adam (0.5, 0.999) at 2e-4 with a weight decay of 1e-4 in the
gradient, 300 epochs, the rate falling to 0 over the last third. Expected: pairs told from non-pairs with an accuracy of 92.4 % at a cosine of 0.44.

Images of both datasets have 1024 px, and a window is here the whole image (a margin of 768): an epoch is one random crop of each pair, as
published, and no two rows of a batch, which are each other's negatives, are of one image. Of smaller images lower --config.stain.margin; windows then
lie every `crop` px, and an epoch is one crop of each window. Tissue has no upright: --config.augment.vflip=True and rot90=True add what is not in
the paper.

    bci     HER2; 3896 pairs to train and 977 to test, 61 steps an epoch, 18 300 in all; split and score are in the file names (00001_train_3+.png)
    mist    0.4661 um/px; a run for each stain: HER2 4642 and 1000 (64 slides), Ki67 4361 and 1000, ER 4153 and 1000, PR 4139 and 1000 (56 each);
            files name slide and place (15M2102762_15_26.jpg). For the published split, which the names do not show, give `wavepath pairs --csv` a
            table with the column `split`; otherwise slides are drawn.

`cpu` has encoders of 16 channels and 2 blocks, crops of 64 px of windows of 80, and batches of 16, with flips and turns. After 200 steps on 40
phantom pairs of 256 px, two minutes of processor time, the partner is found among 16 held-out crops nine times out of ten. The running
statistics of batch normalisation take about 100 steps to forget where they began; what is evaluated before is worse than the encoders are.

The second stage shows the encoders parts of its crops (256 px of 512 as published), and they must be trained on that size: trained on 64 px they
find the partner of 32-px parts in a fifth of the cases, trained on 32 px in three quarters (chance: 1 in 16; measured with a margin of 8, batches of
32, a rate of 4e-4 and 400 steps). For the variant `cpu` of ceff.py, with parts of 32 px, it is the command above, as ceff_experiment.py has it.
"""

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError

TEST_PAIRS = {"bci": 977, "mist": 1000}


def get_config(arg: str = ""):
    arg = parse_arg(arg, bci=False, mist=False, cpu=False, smoke=False)
    if arg.bci and arg.mist:
        raise ConfigError("choose one of bci and mist")
    config = train_defaults()
    config.task = "stain_encoders"
    config.stain.crop, config.stain.margin = 256, 768
    config.batch_size = 64
    config.lr = 8e-4  # the rule lr * batch / 256 makes it 2e-4
    config.data.order = "global"  # windows of the same few pairs in a batch would be easy, or false, negatives
    config.optim.name = "adam"
    config.optim.b1, config.optim.b2 = 0.5, 0.999
    config.optim.weight_decay = 1e-4
    config.optim.warmup = "0"
    config.optim.schedule, config.optim.hold = "linear", "66.7%"
    config.augment.crop_scale = (1.0, 1.0)  # pixels keep their size
    config.augment.vflip = config.augment.rot90 = False
    config.train.epochs = 300.0
    config.train.log_every = 50
    config.train.save_every = 500
    config.train.eval_every = 500
    config.train.eval_examples = TEST_PAIRS["mist" if arg.mist else "bci"]
    config.train.panels_every = 0  # there is nothing to see
    if arg.cpu:
        cpu(config)
    if arg.smoke:
        smoke(config)
    return config


def cpu(config) -> None:
    """Encoders that two CPU cores train within three minutes."""
    narrow(config, margin=16)
    config.lr = 6.4e-3  # 4e-4
    config.augment.vflip = config.augment.rot90 = True  # few pairs
    config.train.epochs, config.train.steps = 0.0, 200
    config.train.log_every = 10
    config.train.save_every = 100
    config.train.eval_every = 50
    config.train.eval_examples = 64


def smoke(config) -> None:
    """Shrinks a run to seconds on two CPU cores."""
    narrow(config, margin=16)
    config.model.image_size = 64
    config.train.epochs, config.train.steps = 0.0, 10
    config.train.log_every = config.train.save_every = config.train.eval_every = 5
    config.train.eval_examples = 16


def narrow(config, *, margin: int) -> None:
    """Small encoders of small crops."""
    config.stain.encoder_channels, config.stain.encoder_blocks = 16, 2
    config.stain.crop, config.stain.margin = 64, margin
    config.batch_size = 16
