"""CWT-Net: cross-scale wavelet super-resolution, and its baselines under equal budgets (METHODS 4).

    wavepath pyramids --slides SLIDES --out PYRAMIDS                                              # aligned crops at 40x, 20x, 10x
    wavepath train --config=configs/cwt_net.py:scale=2 --config.data.dir=PYRAMIDS --workdir=RUN   # the published setting
    wavepath train --config=configs/cwt_net.py:scale=2,cpu --config.data.dir=PYRAMIDS --workdir=RUN   # minutes on two CPU cores
    wavepath train --config=configs/cwt_net.py:scale=2,cpu,network=edsr --config.data.dir=PYRAMIDS --workdir=EDSR
    wavepath train --config=configs/cwt_net.py:smoke --workdir=RUN                                # seconds, on phantoms made for it
    wavepath pyramids --images FOLDER --out FTMS                                                  # single images, as FTMS is built, and
    wavepath train --config=configs/cwt_net.py:scale=4 --config.data.dir=FTMS --config.superres.lr_source=pyramid --workdir=RUN
    wavepath evaluate --superres RUN EDSR --data PYRAMIDS --out OUT
    wavepath superres SLIDE --checkpoint RUN --scale 2 --out ENLARGED.tiff

Published setting: 12 blocks of 64 channels, patches of 64 x 64 low-resolution pixels, quarter turns, 0.3 L_SR + 0.7 L_WT with L1 + 0.2 (1 - SSIM)
in each, 100 epochs of 1000 steps. The paper does not name optimiser, rate, batch or how WR is trained; here Adam (0.9, 0.999) at 1e-4, halved
every quarter of the run, batch 16, and each step is in the mode `wr` or `ref` with even odds. The mean RGB is that of the training set;
the paper's is --config.superres.mean=0.7204,0.4298,0.6379. Both modes are evaluated: `eval_psnr` is `wr` (the input alone), `eval_ref_psnr` reads
the level above, which at 2x is the answer.

Low resolution is one bicubic reduction of the finest level (`lr_source=bicubic`), or the pyramid's own level (`lr_source=pyramid`): of slides
their own pixels, of single images the repeated bicubic halving with which FTMS was built.

`network=` takes cwt-net, edsr (baseline: 16 blocks, 64 channels), rcan (10 groups of 20 blocks) or srcnn; all learn with L_SR of the same form, and
plain L1, as EDSR and RCAN were published with, is --config.superres.ssim_weight=0 (SRCNN: and --config.superres.pixel=mse).

The paper's ablations are config values:

    L1 alone, MSE alone          --config.superres.ssim_weight=0, and --config.superres.pixel=mse
    SR or WT loss alone          --config.superres.sr_weight=1 --config.superres.wt_weight=0, or 0 and 1
    weights swapped              --config.superres.sr_weight=0.7 --config.superres.wt_weight=0.3
    SR branch alone              --config.superres.wavelet_branch=False
    no DWT, no WR                --config.superres.dwt=False, --config.superres.wr=False
    number of blocks             --config.superres.blocks=2 (4, 8, 12, 24)
    WR seen in tests alone       --config.superres.wr_share=0

`cpu` is small enough for two cores: 4 blocks of 32 channels, patches of 32 px, the baselines narrowed likewise. The networks start from the
bicubically enlarged input and learn what it lacks (`skip=bicubic`, not in the paper), so that hundreds of steps suffice where the
published size needs 100 000.
"""

from wavepath.config import parse_arg
from wavepath.defaults import train_defaults

NETWORKS = ("cwt-net", "srcnn", "edsr", "rcan")


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"scale": (2, 4, 8), "network": NETWORKS}, scale=2, network="cwt-net", cpu=False, smoke=False)
    config = train_defaults()
    config.task = "superres"
    config.superres.scale = arg.scale
    config.superres.network = arg.network
    config.batch_size = 16
    config.lr = 1.6e-3  # the rule lr * batch / 256 makes it 1e-4
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.warmup = "0"
    config.optim.schedule = "halve"
    config.optim.halve_every = "25%"
    config.augment.crop_scale = (1.0, 1.0)  # pixels keep their size
    config.augment.hflip = config.augment.vflip = False
    config.augment.rot90 = True
    config.train.steps = 100_000
    config.train.log_every = 50
    config.train.save_every = 1000
    config.train.eval_every = 2000
    config.train.panels_every = 10_000
    if arg.cpu:
        cpu(config)
    if arg.smoke:
        smoke(config)
    return config


def cpu(config) -> None:
    """A network that two CPU cores train within ten minutes."""
    narrow(config, channels=32, blocks=4, patch=32, margin=8)
    config.superres.edsr.blocks = 8
    config.superres.rcan.groups, config.superres.rcan.blocks = 2, 6
    config.lr = 8e-3  # 5e-4
    config.train.steps = 1000
    config.train.log_every = 10
    config.train.save_every = 100
    config.train.eval_every = 250
    config.train.eval_examples = 64
    config.train.panels_every = 500


def smoke(config) -> None:
    """Shrinks a run to seconds on two CPU cores, on crops of 256 px."""
    narrow(config, channels=16, blocks=2, patch=16, margin=8)
    config.superres.sr_blocks = config.superres.wavelet_blocks = config.superres.wr_blocks = 1
    config.superres.edsr.blocks = 2
    config.superres.rcan.groups, config.superres.rcan.blocks, config.superres.rcan.reduction = 1, 2, 4
    config.model.image_size = 64
    config.prepare.pyramids.size = 256
    config.lr = 1.6e-2  # 1e-3
    config.train.steps = 20
    config.train.log_every = 5
    config.train.save_every = 10
    config.train.eval_every = 10
    config.train.eval_examples = 16
    config.train.panels_every = 20


def narrow(config, *, channels: int, blocks: int, patch: int, margin: int) -> None:
    """Fewer and smaller blocks in every network, and less for them to learn."""
    settings = config.superres
    settings.channels = settings.edsr.channels = settings.rcan.channels = channels
    settings.blocks, settings.patch, settings.margin = blocks, patch, margin
    settings.skip = "bicubic"
