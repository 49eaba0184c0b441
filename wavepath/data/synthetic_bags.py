"""Bags made for want of others: random features in which a few tiles of a slide tell its class, as a tumour does."""

import csv
import io
from pathlib import Path

import numpy as np

from wavepath.files import write_text
from wavepath.interop.features import SUFFIX, write_features

FEATURES, LABELS = "features", "labels.csv"
TILE = 256  # px of the tiles that the coordinates stand for


def make_bags(
    out: Path, slides: int = 24, *, classes: int = 2, width: int = 16, tiles: tuple[int, int] = (6, 40), share: float = 0.25, strength: float = 3.0,
    seed: int = 0,
) -> tuple[Path, Path]:  # fmt: skip
    """Writes feature files and their labels; the same arguments give the same bags.

    Every tile has normally distributed features. Of a slide of class c > 0 a share of the tiles (at least two) has `strength` added along the
    direction of the class; those of class 0 have none. The tiles lie on a square grid, the tellings ones side by side.

    Args:
        out: gets `features/<slide_id>.h5` and `labels.csv`.
        slides: how many, classes in turn; two slides of one class after the other are of one case.
        classes: `class_0`, `class_1`, ...
        width: of the features.
        tiles: least and most tiles of a slide.
        share: of telling tiles.
        strength: in standard deviations of the noise.
        seed: of everything.

    Returns:
        The folder of feature files and the table of labels.
    """
    generator = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(generator.normal(size=(width, width)))
    rows = []
    for number in range(slides):
        label = number % classes
        count = int(generator.integers(tiles[0], tiles[1] + 1))
        side = int(np.ceil(np.sqrt(count)))
        features = generator.normal(size=(count, width))
        telling = min(count, max(2, round(share * count))) if label else 0
        first = int(generator.integers(0, count - telling + 1))
        features[first : first + telling] += strength * directions[label]
        places = np.arange(count)
        coords = np.stack([places % side, places // side], axis=1) * TILE
        slide = f"synthetic_{number:03d}"
        attributes = {"name": slide, "patch_size": TILE, "patch_size_level0": TILE, "encoder": "synthetic", "mpp": 0.5, "level0_mpp": 0.5}
        evidence = np.zeros(count, np.float32)
        evidence[first : first + telling] = 1
        write_features(Path(out) / FEATURES / f"{slide}{SUFFIX}", features, coords, attributes, {"evidence": evidence})
        rows.append((f"case_{label}_{number // classes // 2:03d}", slide, f"class_{label}"))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("case_id", "slide_id", "label"), *rows])
    write_text(Path(out) / LABELS, text.getvalue())
    return Path(out) / FEATURES, Path(out) / LABELS
