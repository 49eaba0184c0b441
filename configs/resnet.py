"""A ResNet that tells tiles apart, to ask what super-resolution is worth for a diagnosis (METHODS 4.8).

    wavepath train --config=configs/resnet.py --config.data.dir=IMAGES --config.data.label_pattern='^([^/]+)/' \\
      --config.data.case_pattern='^([^/]+/[0-9]+)_' --workdir=CLASSIFIER
    wavepath train --config=configs/resnet.py:smoke --workdir=RUN     # seconds, on phantoms and their regions

It is trained on images as they are, without one fold of the cases. Then

    wavepath evaluate --superres SR_RUN ... --classifier CLASSIFIER --out OUT

makes low resolution of the held-out images, restores it by bicubic enlargement and by each run, and classifies what came out beside the images
themselves.

Published setting: ResNet-50 on 128-px tiles; start, optimiser, rate and length are not stated. Here: from noise, AdamW at 1e-3 for 256 examples,
weight decay 0.05, half a cosine over 100 epochs, batch 64, flips and quarter turns. It sees windows of `size=128` px of the tiles, which are never
resized: random ones in training, all of them side by side in evaluation. `depth=18` is the smaller network; `cpu` is for a hundred tiles on two CPU
cores (depth 18, 64 px, minutes).

Expected (paper, MLCamSR at 2x): accuracy 0.918 on the originals, 0.795 on bicubic enlargement, 0.881 on CWT-Net's. `smoke` ends with eval_loss and
eval_accuracy of the held-out phantom slide.
"""

from wise_mae import smoke as small

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"depth": (18, 34, 50, 101)}, depth=50, size=128, cpu=False, smoke=False)
    config = train_defaults()
    config.task = "classify"
    config.classify.depth = arg.depth
    config.model.image_size = arg.size
    config.batch_size = 64
    config.lr = 1e-3
    config.optim.b2 = 0.999
    config.train.epochs = 100.0
    config.train.eval_every = 100
    config.train.eval_examples = 0  # all of the held-out fold
    config.train.panels_every = 0
    config.finetune.label_smoothing = 0.0
    config.finetune.rand_ops = 0
    config.finetune.erasing = 0.0
    if arg.cpu:
        config.classify.depth = 18
        config.model.image_size = 64
        config.model.dtype = "float32"  # bfloat16 is slower than float32 on CPUs under XLA
        config.batch_size = 32
        config.lr = 8e-3  # the rule lr * batch / 256 makes it 1e-3
        config.train.epochs = 0.0
        config.train.steps = 150
        config.train.eval_every = 50
        config.train.save_every = 150
        config.writers.tensorboard = False
    if arg.smoke:
        small(config)
        config.classify.depth = 18
        config.data.folds = 2
        config.train.eval_every = 10
        config.train.panels_every = 0
    return config
