"""Slides to tiles with the WISE-MAE screening: the defaults of `wavepath prepare`.

    wavepath prepare --slides SLIDES --out TILES
    wavepath prepare --slides SLIDES --out TILES --config=configs/prepare.py:smoke --config.select.top=0.3

`smoke` shrinks regions and tiles so that slides of 1024 px are enough.
"""

from wavepath.config import parse_arg
from wavepath.defaults import prepare_defaults


def get_config(arg: str = ""):
    arg = parse_arg(arg, smoke=False)
    config = prepare_defaults()
    if arg.smoke:
        config.screen.region_um = 112.0
        config.screen.min_region_um = 112.0
        config.tiles.size = 64
        config.select.top = 0.5
    return config
