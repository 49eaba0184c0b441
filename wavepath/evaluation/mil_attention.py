"""Attention of bag networks on disk, a file for each slide, and which slides are drawn (`evaluation.mil_pictures`).

Attention of a slide is that of the run that has not seen its case. Every slide gets its file, of whatever network.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavepath.data.bags import BagSource
from wavepath.evaluation.mil_runs import BagRun, Each
from wavepath.interop.attention import Attention, attention_path, write_attention

FOLDER = "attention"


@dataclass(frozen=True)
class Exported:
    """A slide whose attention lies at `path`; the network it is of, and its true (or '') and predicted class."""

    slide: str
    path: Path
    network: str
    label: str
    predicted: str


class AttentionExport:
    """Writes attention into `<out>/attention/<slide_id>.h5`, of several arms into a folder for each."""

    def __init__(self, out: Path, several: bool):
        self._out, self._several = Path(out) / FOLDER, several

    def of(self, run: BagRun, source: BagSource, arm: str, places: set[int], exported: list[Exported], ensemble: int = 1) -> Each:
        """What `BagPredictor.predict` calls for each slide: writes those at `places` and notes them in `exported`.

        Args:
            ensemble: runs that the attention is a mean of, `run` being the first.
        """
        folder = self._out / slug(arm) if self._several else self._out
        model = {"run": str(run.folder.resolve()), "network": run.config.mil.network, "checkpoint": run.checkpoint, "runs": ensemble}
        model |= {"seed": run.seed, "fold": run.fold} if ensemble == 1 else {}

        def each(place: int, probability: np.ndarray, attention: np.ndarray) -> None:
            if place not in places:
                return
            bag = source.read(place)
            label = source.classes[source.labels[place]] if source.labels[place] >= 0 else ""
            predicted = run.classes[int(probability.argmax())]
            path = attention_path(folder, source.slides[place])
            write_attention(
                path, Attention(
                    source.slides[place], bag.coords, attention, probability, run.classes, predicted, label, bag.attributes,
                    model | {"case": str(source.cases[place])},
                ),
            )  # fmt: skip
            exported.append(Exported(source.slides[place], path, run.config.mil.network, label, predicted))

        return each


def slug(name: str) -> str:
    """An arm's name as that of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", name).strip("_") or "arm"


def spread(exported: Iterable[Exported], count: int) -> list[Exported]:
    """At most `count` slides, of every class (the predicted one where the true is not known) as many as can be, evenly over their order."""
    groups: dict[str, list[Exported]] = {}
    for one in exported:
        groups.setdefault(one.label or one.predicted, []).append(one)
    share: dict[str, int] = dict.fromkeys(groups, 0)
    for _ in range(min(count, sum(map(len, groups.values())))):
        share[min((name for name in groups if share[name] < len(groups[name])), key=lambda name: share[name])] += 1
    chosen = [groups[name][index * len(groups[name]) // number] for name, number in share.items() for index in range(number)]
    return sorted(chosen, key=lambda one: one.slide)
