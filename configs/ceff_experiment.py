"""Small arms that take CEFF apart, and pix2pix beside it: wavelet convolutions, cross-attention, adaptive L1, trained encoders on and off.

    wavepath phantom --pairs 40 --size 256 --out STAINED
    wavepath pairs --folders STAINED --group-pattern '^([^_]+)_' --mpp 0.5 --test-share 0.3 --out PAIRS
    wavepath sweep --config=configs/ceff_encoders.py:cpu --seeds 3 --workdir=ENCODERS --config.data.dir=PAIRS \
        --config.stain.crop=32 --config.stain.margin=32 --config.train.steps=300
    wavepath sweep --config='configs/ceff_experiment.py:encoders=ENCODERS/base/seed{seed}' --seeds 3 --workdir=SWEEP --config.data.dir=PAIRS \
        --grid arg.arm=full,no-vmfe,no-coa,fixed-l1,random-encoders,pix2pix
    wavepath evaluate --stain SWEEP --data PAIRS --out SWEEP/evaluation
    wavepath train --config=configs/ceff_experiment.py:smoke --workdir=RUN      # seconds, on phantoms made for it

All arms are the variant `cpu` of `configs/ceff.py` (16 channels, 4 blocks, crops of 64 px, batch norm), 200 steps of 8 crops from the same
seeds at the published rate and with the same discriminator:

    full              VMFE, MSFPM, CoA, adaptive L1, encoders of the first stage
    no-vmfe           plain convolutions in place of the wavelet ones (more parameters)
    no-coa            nothing of the H&E encoder is looked at
    fixed-l1          a weight of 100 for every part
    random-encoders   frozen encoders of noise, whatever `encoders` says
    pix2pix           7 residual blocks behind pix2pix's way down, L1 of 100; as many steps (their time: docs/benchmarks_stain.md)

`encoders=` goes into the argument and not into --config.encoders, which would give the trained ones to the arm `random-encoders` as well.
"""

from ceff import get_config as published
from ceff import smoke as small

from wavepath.config import parse_arg

ARMS = {"full": "ceff", **{name: name for name in ("no-vmfe", "no-coa", "fixed-l1", "random-encoders", "pix2pix")}}
STEPS = 200


def get_config(arg: str = ""):
    arg = parse_arg(arg, choices={"arm": ARMS}, arm="full", encoders="", smoke=False)
    config = published(f"cpu,method={ARMS[arg.arm]}")
    config.encoders = config.encoders or arg.encoders
    config.train.steps = STEPS
    config.train.eval_every = 100
    config.train.panels_every = STEPS
    if arg.smoke:
        small(config)
    return config
