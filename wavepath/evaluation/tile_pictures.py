"""Pictures of an evaluation of tiles: ROC curves, and a map of the features of each encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from wavepath.evaluation.curves import draw_roc
from wavepath.evaluation.encoded import file_name
from wavepath.evaluation.feature_map import NAMES, write_feature_map
from wavepath.evaluation.labels import Labelled
from wavepath.evaluation.probes import Predictions

MOST_CURVES = 8  # that can be told apart


def draw_rows(
    out: Path, rows: Mapping[str, Sequence[Predictions]], *, positive: str = "", bootstraps: int = 1000, seed: int = 0
) -> list[dict[str, str]]:
    """Draws `roc.png` of the rows of a table, the first `MOST_CURVES` of them.

    Returns:
        What results.json lists of it; empty where no curve is defined.
    """
    shown = dict(list(rows.items())[:MOST_CURVES])
    if not draw_roc(out / "roc.png", shown, positive=positive, bootstraps=bootstraps, seed=seed):
        return []
    (first, *_) = shown.values()
    names = first[0].classes
    of = positive or (names[1] if len(names) == 2 else "each class against the rest" if len(shown) == 1 else "mean of each class against the rest")
    title = f"ROC of {of}, 95 % bands over cases" + (f"; {MOST_CURVES} of {len(rows)} rows" if len(rows) > MOST_CURVES else "")
    return [{"file": "roc.png", "title": title, "kind": "roc"}]


def draw_maps(out: Path, encoders: Mapping[str, Labelled], seed: int = 0, method: str = "pca") -> list[dict[str, str]]:
    """Draws the features of each encoder in the plane of their first two principal components (or by UMAP), coloured by label.

    Returns:
        What results.json lists of it.
    """
    pictures = []
    for name, data in encoders.items():
        path = out / (f"features_map_{file_name(name)}.png" if len(encoders) > 1 else "features_map.png")
        write_feature_map(path, data.features, data.labels.tolist(), name, method=method, seed=seed)
        pictures.append({"file": path.name, "title": f"Features of {name}: {NAMES[method]}", "kind": "map"})
    return pictures
