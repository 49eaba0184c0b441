"""Slides from the features of their tiles: ABMIL, CLAM, TransMIL and pooling, with case-level folds and early stopping (METHODS 5.3 to 5.6).

    wavepath train --config=configs/mil.py:network=clam_sb --config.data.bags=FEATURES --config.data.labels=labels.csv --workdir=RUN
    wavepath train --config=configs/mil.py:smoke --workdir=RUN       # seconds, on synthetic bags made in RUN

FEATURES is a folder of `wavepath embed`, TRIDENT or CLAM; labels.csv has case_id,slide_id,label. `--config.data.fold=0` to 4 are the folds (by case,
stratified; a tenth of the other cases validates), `--config.data.splits=camelyon16` the official test set, `--config.data.splits=FOLDER` CLAM's
splits_<fold>.csv. Several networks, all folds and seeds, and one table of scores:

    wavepath evaluate --bags FEATURES --labels labels.csv --network abmil clam_sb mean --folds 5 --seeds 3 --out OUT

Networks: abmil (gated), abmil_plain, clam_sb, clam_mb, transmil, mean, max.

Published settings: one slide a step, at most 200 epochs, stopped after 20 epochs without a lower validation loss, not before epoch 50. CLAM: Adam at
2e-4, L2 1e-5, dropout 0.25, bag loss 0.7 and instance loss 0.3 over 8 + 8 tiles. ABMIL: Adam at 5e-4, L2 1e-4 (of the official toy problem; the rate
common for slides is 1e-3 with 32 bags a step). TransMIL: 2e-4, L2 1e-5, patience 10; its Lookahead-RAdam is Adam here. Mean and
max, a linear layer, have no published rate: 1e-2, since at 2e-4 they are not converged after 200 epochs (docs/weak_supervision.md).

The rate is said for 256
examples a step, config.lr * batch / 256: config.lr is 256 times the published rate of one slide a step, and larger batches get a rate in proportion.
A last batch may straddle two epochs; batch sizes above 1 pad bags to the longest of the batch.

Expected: `smoke` ends with eval_loss and eval_accuracy of the validation slides. Of WISE-MAE the published figures (frozen ViT-B, CLAM-SB) are in
METHODS 1.6.
"""

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults

NETWORKS = ("abmil", "abmil_plain", "clam_sb", "clam_mb", "transmil", "mean", "max")


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"network": NETWORKS}, network="abmil", smoke=False)
    config = train_defaults()
    config.task = "mil"
    config.mil.network = arg.network
    config.model.dtype = "float32"  # a bag's products are small, and its softmax is over thousands of tiles
    config.batch_size = 1
    config.optim.name = "adam"
    config.optim.b2 = 0.999
    config.optim.schedule = "constant"
    config.optim.warmup = "0"
    abmil = arg.network in ("abmil", "abmil_plain")
    pooled = arg.network in ("mean", "max")
    config.lr = (5e-4 if abmil else 1e-2 if pooled else 2e-4) * 256
    config.optim.weight_decay = 1e-4 if abmil else 1e-5
    config.train.epochs = 200.0
    config.train.eval_epochs = 1.0
    config.train.eval_examples = 0  # all of the validation part
    config.train.patience = 10 if arg.network == "transmil" else 20
    config.train.patience_after = "0" if arg.network == "transmil" else "50ep"
    config.train.panels_every = 0
    config.train.log_every = 50
    config.train.save_every = 2000
    config.train.keep = 1
    config.writers.tensorboard = False
    config.parallel.devices = 1  # a step of one slide does not divide
    if arg.smoke:
        smoke(config)
    return config


def smoke(config) -> None:
    """Shrinks a run to seconds on two CPU cores."""
    config.batch_size = 8  # divides over eight devices
    config.lr = 0.32  # the rule lr * batch / 256 makes it 1e-2
    config.model.image_size = 32  # no image is read
    config.mil.embed = 16 if config.mil.network not in ("mean", "max") else 0
    config.mil.hidden = 16
    config.mil.heads = 2
    config.mil.head_width = 8
    config.mil.landmarks = 8
    config.mil.buckets = (48,)  # one shape, one compilation
    config.mil.validation = 0.2
    config.data.folds = 3
    config.train.epochs = 0.0
    config.train.steps = 40
    config.train.eval_epochs = 0.0
    config.train.eval_every = 10
    config.train.patience = 3
    config.train.patience_after = "0"
    config.train.log_every = 10
    config.train.save_every = 20
