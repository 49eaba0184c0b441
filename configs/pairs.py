"""H&E and immunostain of one place to a dataset for virtual staining: the defaults of `wavepath pairs` (METHODS 3.5).

    wavepath pairs --folders ROOT --out PAIRS                        # ROOT/HE and ROOT/IHC, images of equal names
    wavepath pairs --folders MIST --group-pattern '^([^_]+)_' --mpp 0.4661 --out PAIRS
    wavepath pairs --folders BCI --label-pattern '_([0-3][+]?)$' --split-pattern '_(train|test)_' --out PAIRS
    wavepath pairs --ab FOLDER --out PAIRS                           # both sides in one image, H&E to the left
    wavepath pairs --folders ROOT --out PAIRS --config=configs/pairs.py:smoke

BCI has 3896 pairs to train and 977 to test, with the HER2 score in the name (00001_train_3+.png); MIST names slide and place
(15M2102762_15_26.jpg). `smoke` takes images from 32 px on.
"""

from wavepath.config import parse_arg
from wavepath.defaults import prepare_defaults


def get_config(arg: str = ""):
    arg = parse_arg(arg, smoke=False)
    config = prepare_defaults()
    if arg.smoke:
        config.pairs.min_size = 32
    return config
