"""Cosines of pairs and of non-pairs, and how well a threshold tells them apart (METHODS 3.2).

Of n pairs there are n (n - 1) non-pairs; their cosines are counted in narrow bins and not kept. A pair is recognised where its cosine reaches a
threshold, a non-pair where it does not; the accuracy is the mean of both shares, so that guessing gives 0.5 whatever n is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from wavepath.errors import DatasetError

BINS = 20_000  # of the cosines from -1 to 1; thresholds lie at their lower edges
_BLOCK = 512  # rows of cosines at once
THRESHOLDS = np.linspace(-1, 1, BINS + 1)


@dataclass
class Sweep:
    """The cosines of one run over one set of windows. Counts are by bin, see `BINS`."""

    pairs: np.ndarray
    same_slide: np.ndarray  # non-pairs of one slide
    other_slides: np.ndarray
    rank: np.ndarray  # [n]: how many other immunostains are at least as near
    cosine: np.ndarray  # [n], of the pairs
    right: dict[float, np.ndarray] = field(default_factory=dict)  # [n] by threshold: the window's share in the accuracy

    @property
    def others(self) -> np.ndarray:
        return self.same_slide + self.other_slides


def sweep(he: Float32[np.ndarray, "n d"], ihc: Float32[np.ndarray, "n d"], slides: np.ndarray, thresholds: Sequence[float] = ()) -> Sweep:
    """The cosines of all H&E windows with all immunostains; memory for `_BLOCK` rows of them.

    Args:
        he, ihc: unit embeddings, pairs in one row.
        slides: [n].
        thresholds: at which each window's share in the accuracy is kept.

    Raises:
        DatasetError: embeddings that are not finite.
    """
    if not (np.isfinite(he).all() and np.isfinite(ihc).all()):
        raise DatasetError("the encoders give embeddings that are not finite; their checkpoint is of no use")
    count, member = len(he), np.unique(slides, return_inverse=True)[1]
    bins = {name: np.zeros(BINS + 1, np.int64) for name in ("pairs", "same", "other")}
    cosine, rank, right = np.zeros(count), np.zeros(count, np.int64), {t: np.zeros(count) for t in thresholds}
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        found = np.clip(he[rows] @ ihc.T, -1, 1)
        own, same = found[np.arange(len(rows)), rows], member[rows][:, None] == member[None]
        other = np.ones(found.shape, bool)
        other[np.arange(len(rows)), rows] = False
        cosine[rows] = own
        # Ties count against the pair, or encoders that make all images one would find each.
        rank[rows] = ((found >= own[:, None]) & other).sum(1)
        for threshold, share in right.items():
            share[rows] = ((own >= threshold) + ((found < threshold) & other).sum(1) / (count - 1)) / 2
        place = np.floor((found.astype(np.float64) + 1) * (BINS / 2) + 1e-6).astype(np.int64)
        for name, chosen in (("pairs", ~other), ("same", same & other), ("other", ~same)):
            bins[name] += np.bincount(place[chosen], minlength=BINS + 1)
    return Sweep(bins["pairs"], bins["same"], bins["other"], rank, cosine, right)


def rates(pairs: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of pairs and of non-pairs that are recognised, at each threshold; nan where there are none."""
    with np.errstate(invalid="ignore"):
        return np.cumsum(pairs[::-1])[::-1] / pairs.sum(), 1 - np.cumsum(others[::-1])[::-1] / others.sum()


def accuracy(found: Sweep) -> np.ndarray:
    """The balanced accuracy at each threshold."""
    recognised, refused = rates(found.pairs, found.others)
    return (recognised + refused) / 2


def best(found: Sweep) -> tuple[float, float]:
    """The threshold of the highest accuracy, in the middle of those that share it, and that accuracy."""
    values = accuracy(found)
    first = int(values.argmax())
    below = np.flatnonzero(values[first:] < values[first] - 1e-12)
    last = first + (int(below[0]) - 1 if len(below) else len(values) - 1 - first)
    return float(THRESHOLDS[(first + last) // 2]), float(values[first])


def auc(pairs: np.ndarray, others: np.ndarray) -> float:
    """How often a pair's cosine is above a non-pair's, ties (one bin) by half; nan where there are none."""
    if not others.sum():
        return float("nan")
    below = np.cumsum(others) - others
    return float((pairs * (below + 0.5 * others)).sum() / (pairs.sum() * others.sum()))
