"""Fine-tuning on labelled tiles, cross-validated by patient (METHODS 2.5).

    wavepath train --config=configs/finetune.py:init=RUN --config.data.dir=TILES --config.data.labels=labels.csv --workdir=FINETUNED
    wavepath train --config=configs/finetune.py:smoke --workdir=RUN     # seconds, on phantoms and their regions

All folds, and their pooled out-of-fold scores with intervals over patients:

    wavepath sweep --config=configs/finetune.py:init=RUN --config.data.dir=IMAGES --config.data.label_pattern='^([^/]+)/' \\
      --config.data.case_pattern='^([^/]+/[0-9]+)_' --grid config.data.fold=0,1,2,3,4 --workdir=FOLDS
    wavepath evaluate --runs FOLDS --positive LABEL --out FOLDS/evaluation

`init=RUN` takes model size and patch from that pretraining run and starts from its encoder; without it training starts from noise. Pretraining on
images that are tested here leaks them into the encoder: where both use one set, pretrain once for each fold, without that fold's cases, and name
the runs by a pattern: `init=PRE/fold{fold}` (`{seed}` likewise) stands for config.data.fold of each run, and the folds stay one arm of
`wavepath evaluate`.
`quickstart` is for a hundred tiles on two CPU cores (a fold in under a minute): 112-px views, a small network.

Published setting: ViT-B/16, mean pooling with its own norm, 100 epochs with 5 of warm-up, base rate 1e-3, layer decay 0.75 (0.65 is the usual
other choice for ViT-B: --config.finetune.layer_decay=0.65), weight decay 0.05, drop path 0.1, label smoothing 0.1, RandAugment of two
operations at magnitude 9, erasing 0.25, no mixup or cutmix. The flips and quarter turns of tissue are added: it has no upright. The paper's
batch was 128 on each of 4 GPUs; here it is 128 in all, and --config.batch_size=512 is the paper's (the rate follows the batch).
The run's last checkpoint is what is scored; no epoch is chosen by the fold that is tested.

Expected: `smoke` ends with eval_loss and eval_accuracy of the held-out phantom slide. `quickstart` on 130 lung tiles of 13 slides (LUAD against LUSC,
five folds, one seed): accuracy 0.977 [0.95, 1.00] from noise, 0.908 [0.80, 0.99] from an encoder of 300 steps on other slides. Such a set says
little about encoders: mean and deviation of its three colours alone give 0.946 (logistic probe), so its classes differ in stain.
"""

from pathlib import Path

from wise_mae import smoke as small

from wavepath.config import load_json, parse_arg
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError

SHARED = ("variant", "patch", "mean", "std", "scan")  # what an encoder brings with it


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"variant": ("Ti", "S", "B", "L", "H")}, variant="", init="", quickstart=False, smoke=False)
    config = train_defaults()
    config.task = "finetune"
    config.model.variant = arg.variant or "B"
    config.model.patch = 14 if arg.variant == "H" else 16
    config.model.drop_path = 0.1
    config.batch_size = 128
    config.lr = 1e-3
    config.optim.b2 = 0.999
    config.optim.min_lr = 1e-6
    config.optim.warmup = "5%"  # 5 of 100 epochs
    config.train.epochs = 100.0
    config.train.eval_every = 100
    config.train.eval_examples = 0  # all of the held-out fold
    config.train.panels_every = 0
    config.augment.crop_scale = (0.08, 1.0)
    if arg.quickstart:
        quickstart(config)
    if arg.smoke:
        smoke(config)
    if arg.init:
        config.init_from = arg.init
        pretrained = Path(arg.init.replace("{fold}", "0").replace("{seed}", "0")) / "config.json"
        if pretrained.is_file():  # else the run says so when it starts
            model = load_json(pretrained).model
            if arg.variant and arg.variant != model.variant:
                raise ConfigError(f"variant={arg.variant}, but {pretrained.parent} is a {model.variant}; leave variant out, or give another init")
            for name in SHARED:
                config.model[name] = model[name]
    return config


def quickstart(config) -> None:
    """A small network on half-size views, for a hundred tiles on two CPU cores."""
    config.model.variant = "Ti"
    config.model.patch = 16
    config.model.image_size = 112
    config.model.dtype = "float32"  # bfloat16 is slower than float32 on CPUs under XLA
    config.model.drop_path = 0.0  # a short run of a small network needs none, and it costs 10 s of compilation
    config.batch_size = 16
    config.lr = 8e-3  # the rule lr * batch / 256 makes it 5e-4
    config.augment.crop_scale = (0.3, 1.0)
    config.train.epochs = 0.0
    config.train.steps = 40
    config.train.log_every = 10
    config.train.save_every = 40
    config.train.eval_every = 40
    config.writers.tensorboard = False


def smoke(config) -> None:
    """Shrinks a run to seconds on two CPU cores; the two phantom slides are two folds."""
    small(config)
    config.model.drop_path = 0.0
    config.data.folds = 2
    config.train.eval_every = 10
    config.train.panels_every = 0
    config.optim.warmup = "5%"
