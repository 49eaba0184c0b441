"""Features in two dimensions, coloured by label: by principal components, or by UMAP where it is installed."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.curves import PALETTE
from wavepath.files import atomic_path

NAMES = {"pca": "principal components", "umap": "UMAP"}
METHODS = tuple(NAMES)
MOST = 5000  # points drawn: more hide one another, and UMAP takes minutes
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")  # of the ninth class on, together with the colours
_DPI = 200


def feature_map(features: Float[np.ndarray, "n d"], method: str = "pca", seed: int = 0) -> Float32[np.ndarray, "n 2"]:
    """Points in the plane, of features that are standardised by column.

    Args:
        method: `pca` (scikit-learn's, the sign of a component such that its largest loading is positive) or `umap` (cosine distances, 15
            neighbours or fewer; its axes and distances between clusters mean nothing).
        seed: of UMAP.

    Raises:
        ConfigError: an unknown method, or UMAP is not installed. DatasetError: features that are not finite.
    """
    return (pca(features) if method == "pca" else (_umap(features, method, seed), None))[0]


def check_method(method: str) -> None:
    """Refuses a method that there is not, or UMAP where it is not installed; to be asked before anything that takes long.

    Raises:
        ConfigError: naming what there is, or what to install.
    """
    if method not in METHODS:
        raise ConfigError(f"a map of features is made by {' or '.join(METHODS)}, not {method!r}")
    if method == "umap" and (sys.modules.get("umap", ...) is None or importlib.util.find_spec("umap") is None):
        raise ConfigError("UMAP is not installed; `pip install umap-learn` (or wavepath[umap]), or take the method pca")


def pca(features: Float[np.ndarray, "n d"]) -> tuple[Float32[np.ndarray, "n 2"], tuple[float, float]]:
    """The first two principal components and the shares of the variance that they explain; where there are fewer the rest is 0."""
    from sklearn.decomposition import PCA

    x = _standardised(features)
    count = min(2, *x.shape)
    points, shares = np.zeros((len(x), 2), np.float32), [0.0, 0.0]
    if count and np.ptp(x) > 0:
        # The exact solver of many examples: a randomised one would want a seed.
        solver = "covariance_eigh" if x.shape[1] <= len(x) else "full"
        model = PCA(n_components=count, svd_solver=solver)
        points[:, :count] = model.fit_transform(x)
        shares[:count] = [float(share) for share in model.explained_variance_ratio_]
    return points, (shares[0], shares[1])


def _standardised(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise DatasetError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} feature vectors hold nan or inf; embed these slides again")
    mean, std = x.mean(0), x.std(0)
    # A column that does not vary says nothing; divided by its rounding error it would say most.
    return (x - mean) / np.where(std < 1e-6 * max(1e-12, float(std.max(initial=0))), 1.0, std)


def _umap(features: np.ndarray, method: str, seed: int) -> np.ndarray:
    check_method(method)
    import umap

    x = _standardised(features)
    if len(x) < 4:
        raise DatasetError(f"UMAP needs at least 4 feature vectors, got {len(x)}; take the method pca")
    model = umap.UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, n_jobs=1, init="random" if len(x) < 16 else "spectral")
    return np.asarray(model.fit_transform(x), np.float32)


def draw_feature_map(
    path: Path, points: Float[np.ndarray, "n 2"], labels: Sequence[str], title: str = "", explained: tuple[float, float] | None = None, *,
    most: int = MOST, seed: int = 0, counts: dict[str, int] | None = None,
) -> None:
    """Draws the points as PNG, a colour (of many classes with a marker) for each label, counts in the legend.

    Args:
        explained: shares of the variance, at the axes; None (UMAP): axes without numbers.
        most: points drawn, a seeded draw of more. counts: of the labels, where the points are a draw already.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points, labels = np.asarray(points), np.asarray(labels, str)
    names, number = np.unique(labels, return_counts=True)
    counts = counts or {str(name): int(count) for name, count in zip(names, number, strict=True)}
    keep = _draw(len(points), most, seed)
    rng = np.random.default_rng(seed)
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(4.8, 4.3 + 0.22 * rows), layout="constrained")
    axis = figure.subplots()
    size = float(np.clip(3000 / max(1, len(keep)), 4, 45))
    place = np.searchsorted(names, labels)
    for index, name in enumerate(names):  # empty ones, for the legend
        style = dict(color=PALETTE[index % len(PALETTE)], marker=MARKERS[index // len(PALETTE) % len(MARKERS)])
        axis.scatter([], [], s=30, label=f"{name} ({counts[str(name)]})", **style)
    # In a shuffled order, so that no class lies over all others; a call for each of some stretches, since a call has one marker.
    for stretch in np.array_split(rng.permutation(keep), 12):
        for index in np.unique(place[stretch]):
            chosen = stretch[place[stretch] == index]
            style = dict(color=PALETTE[index % len(PALETTE)], marker=MARKERS[index // len(PALETTE) % len(MARKERS)])
            axis.scatter(*points[chosen].T, s=size, alpha=0.75, linewidths=0.25, edgecolors="white", **style)
    if explained is None:
        axis.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    else:
        first, second = (f"component {number} ({share:.0%} of the variance)" for number, share in enumerate(explained, start=1))
        axis.set(xlabel=first, ylabel=second)
        axis.grid(alpha=0.2)
    axis.tick_params(labelsize=8)
    if title:
        axis.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", fontsize=8, ncols=min(3, len(names)), frameon=False)
    with atomic_path(path) as temporary:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(temporary))


def _draw(count: int, most: int, seed: int) -> np.ndarray:
    return np.arange(count) if count <= most else np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def write_feature_map(
    path: Path, features: Float[np.ndarray, "n d"], labels: Sequence[str], title: str = "", *, method: str = "pca", seed: int = 0, most: int = MOST
) -> None:
    """Maps and draws. Components are those of all features, of which `most` are drawn; UMAP sees the drawn ones alone.

    Raises:
        As `feature_map`.
    """
    features, labels = np.asarray(features), np.asarray(labels, str)
    names, number = np.unique(labels, return_counts=True)
    counts = {str(name): int(count) for name, count in zip(names, number, strict=True)}
    keep = _draw(len(features), most, seed)
    if method == "pca":
        points, explained = pca(features)
        points = points[keep]
    else:
        points, explained = _umap(features[keep], method, seed), None
    if len(keep) < len(features):
        title = f"{title}, {len(keep)} of {len(features)} drawn".lstrip(", ")
    draw_feature_map(path, points, labels[keep], title, explained, most=most, seed=seed, counts=counts)
