"""Slides (or single images) to pyramids of aligned crops, for super-resolution: the defaults of `wavepath pyramids` (METHODS 4.7).

    wavepath pyramids --slides SLIDES --out PYRAMIDS                              # 1024, 512, 256 px at 40x, 20x, 10x, over the tissue
    wavepath pyramids --slides SLIDES --coords tumor_valid.txt --out PYRAMIDS --config.pyramids.mpp=0    # the published places, own pixels
    wavepath pyramids --slides SLIDES --count 1200 --out PYRAMIDS                 # so many of all slides together, an even share of each
    wavepath pyramids --images FOLDER --out PYRAMIDS                              # single images, lower levels by bicubic halving
    wavepath pyramids --slides SLIDES --out PYRAMIDS --config=configs/pyramids.py:smoke

Images of FTMS, which have one magnification each, are paired with their own halvings: `--images`, and in training
--config.superres.lr_source=pyramid, which takes the low resolution from these levels (repeated bicubic halving) in place of one reduction of the
finest.

The published set has 1200 places of CAMELYON slides, 1000 to train and 200 to test; its slides have 0.243 um per pixel, so that at the default
`pyramids.mpp` of 0.25 they would be resampled: with 0 every slide gives its own pixels. `smoke` takes crops of 256 px, so that slides
of 1024 px are enough.
"""

from wavepath.config import parse_arg
from wavepath.defaults import prepare_defaults


def get_config(arg: str = ""):
    arg = parse_arg(arg, smoke=False)
    config = prepare_defaults()
    if arg.smoke:
        config.pyramids.size = 256
    return config
