"""Frozen-feature probes (METHODS 5.2): k-NN and logistic regression, grouped splits, metrics with bootstrap intervals."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from wavepath.data.labelled import assign_folds
from wavepath.errors import ConfigError, DatasetError

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
BINARY = ("sensitivity", "specificity", "binary_accuracy", "binary_auc")  # of one class against the rest, where it is named


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold class probabilities: `scores` f64 [n, c] in the order of `classes`; `truth` i64 [n]; `groups` str [n]; `fold` i64 [n]."""

    classes: tuple[str, ...]
    truth: np.ndarray
    scores: np.ndarray
    groups: np.ndarray
    fold: np.ndarray


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int = 20) -> np.ndarray:
    """k nearest neighbours: centre by the train mean, L2-normalise, Euclidean, share of votes (METHODS 5.2).

    Args:
        train, test: features [n, d], [m, d]. labels: i64 [n] in 0..classes-1. k: capped at n.

    Returns:
        Shares of the votes f64 [m, classes]; ties are broken by the summed closeness, scaled below one vote.
    """
    mean = train.mean(0)
    a, b = _unit(train - mean), _unit(test - mean)
    k = min(k, len(a))
    similarity = b @ a.T
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    votes = np.zeros((len(b), classes))
    rows = np.arange(len(b))[:, None]
    np.add.at(votes, (rows, labels[near]), 1 + 1e-6 * similarity[rows, near])
    return votes / votes.sum(1, keepdims=True)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, seed: int = 0) -> np.ndarray:
    """Logistic probe by LBFGS, 1000 iterations: sum of cross-entropies + ||W||^2 / (2 C), C = d * classes / 100 (METHODS 5.2, squared norm).

    Features are standardised by the training part, so that C means the same for encoders of any scale.

    Returns:
        Class probabilities f64 [m, classes]; a class that is absent from `labels` has probability 0.
    """
    mean, std = train.mean(0), train.std(0)
    std = np.where(std < 1e-6 * max(1e-12, float(std.max(initial=0))), 1.0, std)
    model = LogisticRegression(C=train.shape[1] * classes / 100, max_iter=1000, solver="lbfgs", random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe that stops at 1000 iterations is the protocol, not a fault
        model.fit((train - mean) / std, labels)
    out = np.zeros((len(test), classes))
    out[:, model.classes_] = model.predict_proba((test - mean) / std)
    return out


PROBES: dict[str, Callable[..., np.ndarray]] = {"knn": knn, "logistic": logistic}


def cross_validate(
    probe: str, features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, folds: int = 5, seed: int = 0, k: int = 20
) -> Predictions:
    """Out-of-fold predictions with no group (case, slide) on both sides.

    Args:
        probe: `knn` or `logistic`. features: f32 [n, d]. labels: str [n]. groups: str [n]. folds: at most the number of groups.

    Raises:
        ConfigError: fewer than two folds, or no neighbour. DatasetError: fewer than two classes or two groups.
    """
    if folds < 2 or k < 1:
        raise ConfigError(f"--folds is at least 2 and --k at least 1, not {folds} and {k}")
    classes, truth = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DatasetError(f"all {len(labels)} labelled tiles are {classes[0]!r}; a probe needs two classes")
    number = len(np.unique(groups))
    if number < 2:
        raise DatasetError("all labelled tiles belong to one case or slide, so nothing is left to test on; label tiles of a second one")
    folds = min(folds, number)
    if number == len(groups):
        folds = max(2, min(folds, int(np.bincount(truth).min())))
    scores, fold = np.zeros((len(truth), len(classes))), assign_folds(truth, groups, folds, seed)
    for index in range(folds):
        train, test = np.flatnonzero(fold != index), np.flatnonzero(fold == index)
        if len(np.unique(truth[train])) < 2:  # the training part knows one class: that is its answer
            scores[test, truth[train][0]] = 1.0
        elif probe == "knn":
            scores[test] = knn(features[train], truth[train], features[test], len(classes), k)
        else:
            scores[test] = logistic(features[train], truth[train], features[test], len(classes), seed)
    return Predictions(tuple(str(name) for name in classes), truth, scores, np.asarray(groups, str), fold)


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
