"""CEFF, second stage: H&E to IHC with frozen contrastive encoders; its ablations, pix2pix and pyramid pix2pix (METHODS 3.3 to 3.9).

    wavepath pairs --folders BCI --split-pattern '_(train|test)_' --label-pattern '_([0-3][+]?)$' --out PAIRS
    wavepath train --config=configs/ceff_encoders.py:bci --config.data.dir=PAIRS --workdir=ENCODERS
    wavepath train --config=configs/ceff.py:bci --config.encoders=ENCODERS --config.data.dir=PAIRS --workdir=RUN
    wavepath train --config=configs/ceff.py:mist --config.encoders=ENCODERS --config.data.dir=PAIRS --workdir=RUN
    wavepath train --config=configs/ceff.py:bci,method=pix2pix --config.data.dir=PAIRS --workdir=RUN          # needs no encoders
    wavepath train --config=configs/ceff.py:cpu --config.encoders=ENCODERS --config.data.dir=PAIRS --workdir=RUN    # minutes on two cores, see below
    wavepath train --config=configs/ceff.py:smoke --workdir=RUN                                               # seconds, on phantoms made for it
    wavepath evaluate --stain RUN --data PAIRS --out OUT
    wavepath stain SLIDE --checkpoint RUN --out OUT.tiff

Published setting: crops of 512 px anywhere in pairs of 1024, one a step, mirrored, Adam (0.5, 0.999) at 2e-4 for generator and discriminator alike,
60 epochs and then a straight line to 0 over 40, cross-entropy GAN, L1 of 100 weighted by quadrant. Windows of 1024 px are read, so an epoch takes
one crop of each pair; smaller pairs take a smaller --config.stain.margin. Reported: on BCI PSNR 21.38 and SSIM 0.504 (METHODS 3.6 doubts that the
protocol was whole images), on a set that is not named 15.56.

Normalisation: published is `batch`. With one image a step that normalises each image by itself, and the published tests, which kept the network in
training mode, did so too; the running statistics of a network in use are others. `instance` is this very computation in training and in use, so it
is the default here; --config.stain.norm=batch is the published value. With several images a step (the variant `cpu`) `batch` is the better one: in
use it treats all tiles of a slide alike, where `instance` normalises each by itself. Trained encoders have batch norm.

`method=` takes ceff, or of its ablations one: no-vmfe (plain convolutions for the wavelet ones), no-coa, fixed-l1 (100 everywhere), random-encoders
(frozen noise, which the public code amounts to, METHODS 3.8); or pix2pix (9 residual blocks, L1 of 100), or pyramid (the same, L1 of 25
on each of four scales, batch 2). More are config values: --config.stain.msfpm=False, --config.stain.gan=hinge (lsgan), --config.stain.l1_grid=4.

Pyramid pix2pix was published with batch norm, whole images of 1024 px and 100 epochs at one rate and 100 of decay (METHODS 3.9). `method=pyramid`
has the norm, crop and epochs of the other methods here, so that they compare: nearer to the published one are --config.stain.norm=batch
--config.stain.crop=1024 --config.stain.margin=0 --config.train.epochs=200 --config.optim.hold=50%.

`cpu` has 16 channels and 4 blocks, crops of 64 px and batches of 8. The encoders then see parts of 32 px, so theirs are trained on that size:

    wavepath train --config=configs/ceff_encoders.py:cpu --config.data.dir=PAIRS --config.stain.crop=32 --config.stain.margin=32 \
        --config.train.steps=300 --workdir=ENCODERS

`smoke` runs without a first stage, on random encoders.
"""

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError

METHODS = ("ceff", "no-vmfe", "no-coa", "fixed-l1", "random-encoders", "pix2pix", "pyramid")
TESTS = {"bci": 977, "mist": 1000}  # pairs of the published test sets


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"method": METHODS}, method="ceff", bci=False, mist=False, cpu=False, smoke=False)
    if arg.bci and arg.mist:
        raise ConfigError("choose one of bci and mist")
    config = train_defaults()
    config.task = "stain"
    config.batch_size = 1
    config.stain.crop = config.stain.margin = 512
    config.stain.norm = "instance"
    config.augment.crop_scale = (1.0, 1.0)  # pixels keep their size
    config.augment.vflip = config.augment.rot90 = False
    config.optim.name = "adam"
    config.optim.b1, config.optim.b2 = 0.5, 0.999
    config.optim.weight_decay = 0.0
    config.optim.warmup = "0"
    config.optim.schedule = "linear"
    config.optim.hold = "60%"
    config.train.epochs = 100.0
    config.train.log_every = 100
    config.train.save_every = 2000
    config.train.eval_every = config.train.panels_every = 20_000
    for name in TESTS:
        if getattr(arg, name):
            config.train.eval_examples = TESTS[name]
    if arg.cpu:
        cpu(config)
    if arg.smoke:
        smoke(config)
    choose(config, arg.method)
    config.lr = 2e-4 * 256 / config.batch_size  # the rule lr * batch / 256 makes it 2e-4
    return config


def choose(config, method: str) -> None:
    """The fields of a method or ablation."""
    settings = config.stain
    if method in ("pix2pix", "pyramid"):
        settings.encoder, settings.blocks = "resnet", settings.blocks + 3  # 9
        settings.msfpm = settings.coa = False
        settings.l1 = "fixed" if method == "pix2pix" else "pyramid"
        config.batch_size = max(config.batch_size, 2) if method == "pyramid" else config.batch_size
    elif method == "no-vmfe":
        settings.encoder = "plain"
    elif method == "no-coa":
        settings.coa = False
    elif method == "fixed-l1":
        settings.l1 = "fixed"
    elif method == "random-encoders":
        config.encoders = "random"


def cpu(config) -> None:
    """Networks that two CPU cores train within ten minutes."""
    narrow(config, channels=16, blocks=4, crop=64, margin=64)
    config.batch_size = 8
    config.stain.norm = "batch"  # of eight images
    config.augment.vflip = config.augment.rot90 = True  # little data: tissue has no upright
    config.train.epochs, config.train.steps = 0.0, 1000
    config.train.log_every = 10
    config.train.save_every = 100
    config.train.eval_every = 250
    config.train.eval_examples = 64
    config.train.panels_every = 500


def smoke(config) -> None:
    """Shrinks a run to seconds on two CPU cores, without a first stage."""
    narrow(config, channels=16, blocks=4, crop=64, margin=0)
    config.batch_size = 8
    config.encoders = "random"
    config.stain.norm = "group"
    config.model.image_size = 64
    config.train.epochs, config.train.steps = 0.0, 10
    config.train.log_every = config.train.save_every = 5
    config.train.eval_every = config.train.panels_every = 10
    config.train.eval_examples = 16


def narrow(config, *, channels: int, blocks: int, crop: int, margin: int) -> None:
    """Fewer channels and blocks in every network, and smaller crops."""
    settings = config.stain
    settings.channels = settings.encoder_channels = settings.discriminator_channels = channels
    settings.blocks, settings.encoder_blocks = blocks, 2
    settings.crop, settings.margin = crop, margin
