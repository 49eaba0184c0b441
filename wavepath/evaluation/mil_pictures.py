"""The pictures of an evaluation of slides: ROC, a map of the slides' mean features, and of some slides heatmaps, QuPath tiles, strips of tiles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavepath.console import progress
from wavepath.data.bags import BagSource
from wavepath.evaluation.attention_pictures import draw_attention
from wavepath.evaluation.curves import draw_roc
from wavepath.evaluation.feature_map import write_feature_map
from wavepath.evaluation.mil_attention import Exported, slug, spread
from wavepath.evaluation.probes import Predictions
from wavepath.evaluation.slide_pictures import open_pixels
from wavepath.interop.attention import read_attention

HEATMAPS = "heatmaps"
FLAT = ("mean",)  # networks whose attention says nothing
Picture = dict[str, str]


@dataclass(frozen=True)
class Drawing:
    """What is drawn.

    Attributes:
        tiles: prepared folder of the slides: thumbnails and tiles. slides: or the slides themselves.
        heatmaps: of so many slides, of every class alike; 0: none.
        mode: of their colours, see `inference.heatmap.normalised`.
        seed, bootstraps: of the intervals of the ROC.
        map_method: of the picture of the slides' mean features, see `evaluation.feature_map`.
    """

    tiles: Path | None = None
    slides: Path | None = None
    heatmaps: int = 6
    mode: str = "rank"
    seed: int = 0
    bootstraps: int = 1000
    map_method: str = "pca"

    def all(
        self, out: Path, results: dict, curves: Mapping[str, Sequence[Predictions]], exported: Mapping[str, Sequence[Exported]],
        sources: Mapping[str, BagSource],
    ) -> list[Picture]:  # fmt: skip
        """Draws everything into `out`.

        Args:
            results: of the evaluation: `classes`, `positive`.
            curves: by arm the predictions of each seed; empty where no labels are known.
            exported: by arm the slides with attention. sources: by arm the bags that they are of.

        Returns:
            The pictures for results.json: `file` below `out`, `title`, `kind` (`roc`, `map`, `heatmap`, `geojson`, `tiles`).
        """
        found: list[Picture] = []
        if curves and draw_roc(out / "roc.png", curves, positive=results["positive"], bootstraps=self.bootstraps, seed=self.seed):
            what = "of all folds together, with 95 % bands over cases"
            found.append({"file": "roc.png", "title": f"ROC {what}", "kind": "roc"})
        found += self._maps(out, exported, sources)
        found += self._heatmaps(out, exported)
        return found

    def _maps(self, out: Path, exported: Mapping[str, Sequence[Exported]], sources: Mapping[str, BagSource]) -> Iterator[Picture]:
        """The slides' mean features, for each folder of features."""
        drawn: list[BagSource] = []
        for arm, source in sources.items():
            labels = {one.slide: one.label or one.predicted for one in exported[arm]}
            if any(source is other for other in drawn) or len(labels) < 3:
                continue
            drawn.append(source)
            places = [place for place, slide in enumerate(source.slides) if slide in labels]
            means = np.stack([source.bag(place).mean(axis=0, dtype=np.float64) for place in places])
            name = "features_map.png" if len(drawn) == 1 else f"features_map_{len(drawn)}.png"
            told = "class" if any(one.label for one in exported[arm]) else "predicted class"
            title = f"Mean features of {len(places)} slides of {Path(source.name).name} by {told}"
            write_feature_map(out / name, means, [labels[source.slides[place]] for place in places], title, method=self.map_method, seed=self.seed)
            yield {"file": name, "title": title, "kind": "map"}

    def _heatmaps(self, out: Path, exported: Mapping[str, Sequence[Exported]]) -> list[Picture]:
        """The same slides for all arms whose attention says something."""
        arms = {arm: {one.slide: one for one in these} for arm, these in exported.items() if these and these[0].network not in FLAT}
        if not arms or not self.heatmaps:
            return []
        chosen = [one.slide for one in spread(next(iter(arms.values())).values(), self.heatmaps)]
        found: list[Picture] = []
        with open_pixels(self.tiles, self.slides) as pixels, progress("heatmaps", len(chosen) * len(arms), "slides") as bar:
            for arm, these in arms.items():
                folder = Path(HEATMAPS) / slug(arm) if len(exported) > 1 else Path(HEATMAPS)
                for slide in chosen:
                    if slide in these:
                        read = read_attention(these[slide].path, slide)
                        stem, title = (folder / slide).as_posix(), arm if len(exported) > 1 else ""
                        found += draw_attention(out, stem, read, pixels=pixels, mode=self.mode, arm=title)
                    bar.advance(1, slide)
        return found
