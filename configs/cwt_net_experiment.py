"""Small arms that take CWT-Net apart at 2x, and EDSR beside it: wavelet branch, transform and reconstruction on and off.

    wavepath pyramids --images IMAGES --out PYRAMIDS --test-share 0.34
    wavepath sweep --config=configs/cwt_net_experiment.py --grid arg.arm=cwt-net,no-branch,no-dwt,no-wr,edsr,edsr-time --seeds 3 \
        --workdir=SWEEP --config.data.dir=PYRAMIDS
    wavepath evaluate --superres SWEEP --data PYRAMIDS --out SWEEP/evaluation
    wavepath train --config=configs/cwt_net_experiment.py:smoke --workdir=RUN      # seconds, on phantoms made for it

All arms are the variant `cpu` of `configs/cwt_net.py` (4 blocks of 32 channels, patches of 32 px, a bicubic skip), 200 steps of 8 patches from the
same seeds, at a rate of 1e-3 that is halved every quarter:

    cwt-net      the whole network
    no-branch    the SR branch alone: residual blocks, no wavelet branch and no transformer
    no-dwt       the wavelet branch sees the level above itself, not its diagonal detail
    no-wr        without a reference the branch sees the enlarged input instead of a reconstruction
    edsr         8 residual blocks of 32 channels, as many steps
    edsr-time    the same for as long as `cwt-net` takes: four times the steps

Results: `docs/superres_experiment.md`.
"""

from cwt_net import get_config as published
from cwt_net import smoke as small

from wavepath.config import parse_arg

ABLATIONS = {"no-branch": "wavelet_branch", "no-dwt": "dwt", "no-wr": "wr"}
ARMS = ("cwt-net", *ABLATIONS, "edsr", "edsr-time")
STEPS = 200
EDSR_STEPS = 4  # of EDSR in the time of one of CWT-Net: 4.1 by processor time, median of 7


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"arm": ARMS}, arm="cwt-net", smoke=False)
    config = published("cpu,network=" + ("edsr" if arg.arm.startswith("edsr") else "cwt-net"))
    if arg.arm in ABLATIONS:
        config.superres[ABLATIONS[arg.arm]] = False
    config.batch_size = 8
    config.lr = 3.2e-2  # the rule lr * batch / 256 makes it 1e-3
    config.train.steps = STEPS * EDSR_STEPS if arg.arm == "edsr-time" else STEPS
    config.train.eval_every = 50
    config.train.panels_every = STEPS
    if arg.smoke:
        small(config)
    return config
