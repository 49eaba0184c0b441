"""Frozen-feature probes (METHODS 5.2): k-NN, SimpleShot, logistic regression, a linear layer; grouped splits, metrics with bootstrap intervals."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from wavepath.data.labelled import assign_folds
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.linear_probe import LinearProbe, fit_predict

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
BINARY = ("sensitivity", "specificity", "binary_accuracy", "binary_auc")  # of one class against the rest, where it is named


K = 20  # neighbours
_PAIRS = 1 << 24  # similarities of k-NN that are held at once
COLUMNS = ("truth", "scores", "groups", "fold", "tiles", "slides")


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold class probabilities: `scores` f64 [n, c] in the order of `classes`; `truth` i64 [n]; `groups` str [n]; `fold` i64 [n]; of tiles
    also their names and slides, str [n]."""

    classes: tuple[str, ...]
    truth: np.ndarray
    scores: np.ndarray
    groups: np.ndarray
    fold: np.ndarray
    tiles: np.ndarray | None = None
    slides: np.ndarray | None = None

    def rows(self, keep: np.ndarray) -> "Predictions":
        """Those at `keep` (places, or a mask)."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return Predictions(self.classes, **{name: None if column is None else column[keep] for name, column in columns.items()})


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int = K) -> np.ndarray:
    """k nearest neighbours: centre by the train mean, L2-normalise, Euclidean, share of votes (METHODS 5.2).

    Args:
        train, test: features [n, d], [m, d]. labels: i64 [n] in 0..classes-1. k: capped at n.

    Returns:
        Shares of the votes f64 [m, classes]; ties are broken by the summed closeness, scaled below one vote.
    """
    mean = train.mean(0)
    a, b = _unit(train - mean), _unit(test - mean)
    k = min(k, len(a))
    votes = np.zeros((len(b), classes))
    stretch = max(1, _PAIRS // len(a))  # all pairs at once would be tens of GB for 100,000 tiles
    for start in range(0, len(b), stretch):
        similarity = b[start : start + stretch] @ a.T
        near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        rows = np.arange(len(similarity))[:, None]
        np.add.at(votes, (start + rows, labels[near]), 1 + 1e-6 * similarity[rows, near])
    return votes / votes.sum(1, keepdims=True)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, seed: int = 0, cost: float = 0.0) -> np.ndarray:
    """Logistic probe by LBFGS, 1000 iterations: sum of cross-entropies + ||W||^2 / (2 C), C = d * classes / 100 (METHODS 5.2, squared norm).

    Features are standardised by the training part, so that C means the same for encoders of any scale. (The peer's code has the mean of the
    cross-entropies and the norm itself, which holds the weights back more, and more so the more tiles there are.)

    Args:
        cost: C; 0: as above.

    Returns:
        Class probabilities f64 [m, classes]; a class that is absent from `labels` has probability 0.
    """
    mean, std = train.mean(0), train.std(0)
    std = np.where(std < 1e-6 * max(1e-12, float(std.max(initial=0))), 1.0, std)
    model = LogisticRegression(C=cost or train.shape[1] * classes / 100, max_iter=1000, solver="lbfgs", random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe that stops at 1000 iterations is the protocol, not a fault
        model.fit((train - mean) / std, labels)
    out = np.zeros((len(test), classes))
    out[:, model.classes_] = model.predict_proba((test - mean) / std)
    return out


def simpleshot(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """SimpleShot: centre by the train mean, L2-normalise, nearest class mean by Euclidean distance (METHODS 5.2).

    Returns:
        f64 [m, classes]: the softmax of minus the distance, which ranks as the distances do; it is no calibrated probability. A class that is
        absent from `labels` has 0.
    """
    mean = train.mean(0)
    a, b = _unit(train - mean), _unit(test - mean)
    present = np.unique(labels)
    prototypes = np.stack([a[labels == index].mean(0) for index in present])
    out = np.zeros((len(test), classes))
    out[:, present] = softmax(-np.linalg.norm(b[:, None] - prototypes[None], axis=2).astype(float), axis=1)
    return out


PROBES = ("knn", "simpleshot", "logistic", "sgd")


@dataclass(frozen=True)
class ProbeSettings:
    """k of k-NN (None: 20, or as many as there are); C of the logistic probe (0: d * classes / 100); the SGD probe's own."""

    k: int | None = None
    cost: float = 0.0
    sgd: LinearProbe = LinearProbe()


def probe_folds(
    truth: np.ndarray, groups: np.ndarray, folds: int = 5, seed: int = 0, testable: np.ndarray | None = None
) -> np.ndarray:
    """The fold in which each tile is tested, int64 [n]; -1: in none, and trained on in all.

    Args:
        truth: class numbers [n]. groups: str [n]. folds: at most the number of groups that can be tested.
        testable: bool [n]; tiles that may only be trained on are false. Where another tile of their case is tested, they are left out of that fold.

    Raises:
        ConfigError: fewer than two folds. DatasetError: nothing left to train on.
    """
    if folds < 2:
        raise ConfigError(f"--folds is at least 2, not {folds}")
    tested = np.ones(len(truth), bool) if testable is None else testable
    names = np.unique(groups[tested])
    only = ~np.isin(groups, names)  # cases without a tile that is tested
    if len(names) < 2 and not only.any():
        raise DatasetError("all labelled tiles belong to one case or slide, so nothing is left to test on; label tiles of a second one")
    fold = np.full(len(truth), -1)
    if len(names) == 1:
        fold[groups == names[0]] = 0
        return fold
    folds = min(folds, len(names))
    if len(names) == tested.sum():
        folds = max(2, min(folds, int(np.bincount(truth[tested])[np.unique(truth[tested])].min())))
    part = assign_folds(truth[tested], groups[tested], folds, seed)
    of_case = dict(zip(groups[tested].tolist(), part.tolist(), strict=True))
    return np.array([of_case.get(case, -1) for case in groups.tolist()], np.int64)


def cross_validate(
    probe: str, features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, folds: int = 5, seed: int = 0, testable: np.ndarray | None = None,
    settings: ProbeSettings | None = None, advance: Callable[[], None] = lambda: None,
) -> list[Predictions]:
    """Out-of-fold predictions with no group (case, slide) on both sides.

    Args:
        probe: one of `PROBES`. features: f32 [n, d]. labels: str [n]. groups: str [n].
        folds, testable: see `probe_folds`.
        advance: called after each fold.

    Returns:
        Of `sgd` one for each run, else one; of the testable rows alone, in their order.

    Raises:
        ConfigError: fewer than two folds, no neighbour, or more than the smallest training part has. DatasetError: fewer than two classes or two
            groups.
    """
    settings = settings or ProbeSettings()
    if probe not in PROBES:
        raise ConfigError(f"--probe {probe} is not one of {', '.join(PROBES)}")
    if settings.k is not None and settings.k < 1:
        raise ConfigError(f"--k is at least 1, not {settings.k}")
    if not 0 <= settings.cost < np.inf:
        raise ConfigError(f"--logistic-c is above 0, or 0 for d * classes / 100, not {settings.cost:g}")
    classes, truth = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DatasetError(f"all {len(labels)} labelled tiles are {classes[0]!r}; a probe needs two classes")
    groups = np.asarray(groups, str)
    tested = np.ones(len(truth), bool) if testable is None else testable
    fold = probe_folds(truth, groups, folds, seed, tested)
    numbers = np.unique(fold[tested])
    fewest = min(int((fold != index).sum()) for index in numbers)
    if probe == "knn" and settings.k is not None and settings.k > fewest:
        raise ConfigError(f"--k {settings.k} is more than the {fewest} tiles that the smallest training part has; give at most --k {fewest}")
    runs = settings.sgd.runs if probe == "sgd" else 1
    scores = np.zeros((runs, len(truth), len(classes)))
    for index in numbers:
        train, test = np.flatnonzero(fold != index), np.flatnonzero((fold == index) & tested)
        if len(np.unique(truth[train])) < 2:  # the training part knows one class: that is its answer
            scores[:, test, truth[train][0]] = 1.0
        elif probe == "sgd":
            scores[:, test] = fit_predict(features, truth, groups, train, test, len(classes), seed, settings.sgd)
        else:
            more = {"knn": (settings.k or K,), "simpleshot": (), "logistic": (seed, settings.cost)}[probe]
            fit = {"knn": knn, "simpleshot": simpleshot, "logistic": logistic}[probe]
            scores[0, test] = fit(features[train], truth[train], features[test], len(classes), *more)
        advance()
    names = tuple(str(name) for name in classes)
    return [Predictions(names, truth[tested], part[tested], groups[tested], fold[tested]) for part in scores]


def score(truth: np.ndarray, scores: np.ndarray, positive: int | None = None) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro F1 and AUC (one-vs-rest macro for more than two classes; nan where only one class is present).

    With a `positive` class also sensitivity, specificity and accuracy of it against the rest, from the class that is predicted (METHODS 2.5),
    and the AUC of its probability; nan where the positive class, or every other, is absent.

    The definitions are scikit-learn's, over the classes that are present; counted here because the bootstrap asks a thousand times.
    """
    classes = scores.shape[1]
    counts = confusion_counts(truth, scores.argmax(1), classes)
    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    present = true > 0
    values = {
        "accuracy": float(hits.sum() / len(truth)),
        "balanced_accuracy": float(np.mean(hits[present] / true[present])),
        "macro_f1": float(np.mean(2 * hits[present] / (true[present] + predicted[present]))),
        "auc": _auc(truth, scores, np.flatnonzero(present)),
    }
    if positive is not None:
        found, all_of = int(counts[positive, positive]), int(true[positive])
        others, alarms = len(truth) - all_of, int(predicted[positive]) - found
        values["sensitivity"] = found / all_of if all_of else float("nan")
        values["specificity"] = (others - alarms) / others if others else float("nan")
        values["binary_accuracy"] = (found + others - alarms) / len(truth)
        values["binary_auc"] = _area(truth == positive, scores[:, positive]) if all_of and others else float("nan")
    return values


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts i64 [c, c], rows the truth, columns the prediction."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def _auc(truth: np.ndarray, scores: np.ndarray, present: np.ndarray) -> float:
    if len(present) < 2:
        return float("nan")
    return float(np.mean([_area(truth == index, scores[:, index]) for index in (present if scores.shape[1] > 2 else [1])]))


def _area(positive: np.ndarray, scores: np.ndarray) -> float:
    # Mann-Whitney: the share of (positive, negative) pairs in the right order, ties by half.
    count = int(positive.sum())
    return float((rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def bootstrap(
    predictions: Predictions | Sequence[Predictions], *, samples: int = 1000, seed: int = 0, level: float = 0.95, positive: int | None = None
) -> dict[str, tuple[float, float]]:
    """Percentile intervals by resampling groups (cases or slides), since tiles of one case are not independent.

    Args:
        predictions: of one run; or of several seeds over the same groups: then the interval is that of their mean, each resample of the groups
            being the same for all of them.
        positive: the class that is scored against the rest.

    Returns:
        metric -> (low, high); nan where no resample defined it.
    """
    many = [predictions] if isinstance(predictions, Predictions) else list(predictions)
    rng = np.random.default_rng(seed)
    names = np.unique(np.concatenate([one.groups for one in many]))
    rows = [_members(np.searchsorted(names, one.groups), len(names)) for one in many]
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        chosen = rng.integers(0, len(names), len(names))
        values = []
        for one, places in zip(many, rows, strict=True):
            pick = np.concatenate([places[index] for index in chosen])
            if len(pick):
                values.append(score(one.truth[pick], one.scores[pick], positive))
        for name in values[0] if values else ():
            drawn.setdefault(name, []).append(float(np.mean([value[name] for value in values])))
    tail = 100 * (1 - level) / 2
    result = {}
    for name in (*METRICS, *(BINARY if positive is not None else ())):
        finite = np.array(drawn.get(name, ()))
        finite = finite[np.isfinite(finite)]
        result[name] = tuple(float(v) for v in np.percentile(finite, [tail, 100 - tail])) if len(finite) else (float("nan"), float("nan"))
    return result


def _members(member: np.ndarray, count: int) -> list[np.ndarray]:
    """The places of each of `count` groups."""
    order = np.argsort(member, kind="stable")
    return np.split(order, np.searchsorted(member[order], np.arange(1, count)))


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts i64 [c, c] of out-of-fold predictions, rows the truth, columns the prediction."""
    return confusion_counts(predictions.truth, predictions.scores.argmax(1), len(predictions.classes))
