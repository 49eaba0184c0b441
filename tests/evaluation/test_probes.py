"""Probes against scikit-learn and closed forms; splits that never share a group."""

import numpy as np
import pytest
from sklearn import metrics
from sklearn.neighbors import KNeighborsClassifier

from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.probes import Predictions, bootstrap, cross_validate, knn, logistic, score


def _blobs(n=120, d=6, classes=3, gap=4.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (rng.normal(size=(n, d)) + gap * np.eye(classes, d)[labels]).astype(np.float32), labels


def test_knn_equals_scikit_learn_on_centred_unit_vectors():
    x, y = _blobs(gap=1.5)
    train, test = x[:80], x[80:]
    mean = train.mean(0)
    unit = [(v - mean) / np.linalg.norm(v - mean, axis=1, keepdims=True) for v in (train, test)]
    oracle = KNeighborsClassifier(5).fit(unit[0], y[:80]).predict_proba(unit[1])
    ours = knn(train, y[:80], test, 3, k=5)
    clear = np.sort(oracle, 1)[:, -1] - np.sort(oracle, 1)[:, -2] > 1e-9  # ties may be broken either way
    assert clear.sum() > 20
    np.testing.assert_array_equal(ours.argmax(1)[clear], oracle.argmax(1)[clear])
    np.testing.assert_allclose(ours, oracle, atol=1e-4)


def test_knn_k_is_capped_by_the_train_set():
    x, y = _blobs(10)
    assert np.allclose(knn(x, y, x, 3, k=500).sum(1), 1)


def test_logistic_separates_blobs_and_leaves_absent_classes_at_zero():
    x, y = _blobs(gap=6.0)
    assert (logistic(x[:80], y[:80], x[80:], 3).argmax(1) == y[80:]).mean() > 0.95
    two = y[:80] < 2
    assert (logistic(x[:80][two], y[:80][two], x[80:], 3)[:, 2] == 0).all()


def test_score_of_a_known_table():
    truth = np.array([0, 0, 0, 1])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    values = score(truth, scores)
    assert values["accuracy"] == 0.75
    assert values["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["auc"] == pytest.approx(2 / 3)  # one of three negatives scores above the positive
    assert values["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


@pytest.mark.parametrize("classes", [2, 5])
def test_score_equals_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 200)
    scores = np.round(rng.dirichlet(np.ones(classes), 200) + 0.3 * np.eye(classes)[truth], 1)  # rounded: ties
    values, predicted = score(truth, scores), scores.argmax(1)
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert values["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))
    assert values["macro_f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    areas = [metrics.roc_auc_score(truth == index, scores[:, index]) for index in (range(classes) if classes > 2 else [1])]
    assert values["auc"] == pytest.approx(np.mean(areas))


def test_no_group_is_on_both_sides():
    x, y = _blobs(90)
    groups = np.array([f"case{i % 9}" for i in range(90)])
    result = cross_validate("knn", x, y.astype(str), groups, folds=4)
    for group in np.unique(groups):
        assert len(np.unique(result.fold[groups == group])) == 1
    assert (result.fold >= 0).all() and len(np.unique(result.fold)) == 4


def test_shuffled_labels_score_by_chance():
    x, y = _blobs(300, gap=5.0)
    groups = np.arange(300).astype(str)
    honest = score(*_truth(cross_validate("logistic", x, y.astype(str), groups)))["balanced_accuracy"]
    shuffled = np.random.default_rng(1).permutation(y).astype(str)
    chance = score(*_truth(cross_validate("logistic", x, shuffled, groups)))["balanced_accuracy"]
    assert honest > 0.9 and abs(chance - 1 / 3) < 0.12


def _truth(predictions):
    return predictions.truth, predictions.scores


def test_interval_holds_the_value_and_widens_with_fewer_groups():
    x, y = _blobs(240, gap=1.5)
    many = cross_validate("knn", x, y.astype(str), np.arange(240).astype(str))
    few = cross_validate("knn", x, y.astype(str), np.array([f"g{i // 40}" for i in range(240)]))
    value = score(*_truth(many))["accuracy"]
    low, high = bootstrap(many, samples=200)["accuracy"]
    assert low < value < high
    low_few, high_few = bootstrap(few, samples=200)["accuracy"]
    assert 0 < high - low < 0.25 and high_few - low_few > 0


def test_one_class_or_one_group_is_refused():
    x, _ = _blobs(20)
    with pytest.raises(DatasetError, match="two classes"):
        cross_validate("knn", x, np.array(["a"] * 20), np.arange(20).astype(str))
    with pytest.raises(DatasetError, match="second one"):
        cross_validate("knn", x, np.array(["a", "b"] * 10), np.array(["g"] * 20))


@pytest.mark.parametrize("wrong", [dict(folds=1), dict(k=0)])
def test_too_few_folds_or_neighbours_are_refused(wrong):
    x, y = _blobs(20)
    with pytest.raises(ConfigError, match="--folds is at least 2 and --k at least 1"):
        cross_validate("knn", x, y.astype(str), np.arange(20).astype(str), **wrong)


def test_one_class_against_the_rest_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 3, 60), rng.random((60, 3))
    for positive in range(3):
        values = score(truth, scores, positive)
        binary = truth == positive, scores.argmax(1) == positive
        assert values["sensitivity"] == pytest.approx(metrics.recall_score(*binary))
        assert values["specificity"] == pytest.approx(metrics.recall_score(*binary, pos_label=False))
        assert values["binary_accuracy"] == pytest.approx(metrics.accuracy_score(*binary))
        assert values["binary_auc"] == pytest.approx(metrics.roc_auc_score(binary[0], scores[:, positive]))
        assert values["binary_accuracy"] > values["accuracy"], "of three classes the other two count as one"
    assert np.isnan(score(np.zeros(5, int), rng.random((5, 2)), 1)["sensitivity"])
    assert np.isnan(score(np.ones(5, int), rng.random((5, 2)), 1)["specificity"])
    assert np.isnan(score(np.ones(5, int), rng.random((5, 2)), 1)["binary_auc"])


def test_the_interval_over_seeds_is_that_of_their_mean():
    x, y = _blobs(240, gap=1.5)
    groups = np.array([f"g{i // 8}" for i in range(240)])
    one = cross_validate("knn", x, y.astype(str), groups)
    assert bootstrap([one, one], samples=50, positive=0) == bootstrap(one, samples=50, positive=0)
    noise = Predictions(one.classes, one.truth, np.random.default_rng(0).random(one.scores.shape), one.groups, one.fold)
    mean = (score(*_truth(one))["accuracy"] + score(*_truth(noise))["accuracy"]) / 2
    low, high = bootstrap([one, noise], samples=100)["accuracy"]
    assert low < mean < high < score(*_truth(one))["accuracy"]
