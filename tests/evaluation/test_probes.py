"""Probes against scikit-learn and closed forms; splits that never share a group."""

import numpy as np
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation import probes
from wavepath.evaluation.linear_probe import LinearProbe
from wavepath.evaluation.probes import Predictions, ProbeSettings, bootstrap, cross_validate, knn, logistic, probe_folds, score, simpleshot


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


def test_knn_takes_its_test_rows_in_stretches(monkeypatch):
    x, y = _blobs(gap=1.5)
    whole = knn(x[:80], y[:80], x[80:], 3, k=5)
    monkeypatch.setattr(probes, "_PAIRS", 80 * 7)
    np.testing.assert_allclose(knn(x[:80], y[:80], x[80:], 3, k=5), whole, atol=1e-9)


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
    (result,) = cross_validate("knn", x, y.astype(str), groups, folds=4)
    for group in np.unique(groups):
        assert len(np.unique(result.fold[groups == group])) == 1
    assert (result.fold >= 0).all() and len(np.unique(result.fold)) == 4


def test_shuffled_labels_score_by_chance():
    x, y = _blobs(300, gap=5.0)
    groups = np.arange(300).astype(str)
    honest = score(*_truth(*cross_validate("logistic", x, y.astype(str), groups)))["balanced_accuracy"]
    shuffled = np.random.default_rng(1).permutation(y).astype(str)
    chance = score(*_truth(*cross_validate("logistic", x, shuffled, groups)))["balanced_accuracy"]
    assert honest > 0.9 and abs(chance - 1 / 3) < 0.12


def _truth(predictions):
    return predictions.truth, predictions.scores


def test_interval_holds_the_value_and_widens_with_fewer_groups():
    x, y = _blobs(240, gap=1.5)
    (many,) = cross_validate("knn", x, y.astype(str), np.arange(240).astype(str))
    (few,) = cross_validate("knn", x, y.astype(str), np.array([f"g{i // 40}" for i in range(240)]))
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


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(folds=1), "--folds is at least 2, not 1"),
        (dict(settings=ProbeSettings(k=0)), "--k is at least 1, not 0"),
        (dict(settings=ProbeSettings(k=17)), "--k 17 is more than the 16 tiles that the smallest training part has; give at most --k 16"),
        (dict(settings=ProbeSettings(cost=-1.0)), "--logistic-c is above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong, message):
    x, y = _blobs(20)
    with pytest.raises(ConfigError, match=message):
        cross_validate("knn", x, (y > 0).astype(str), np.arange(20).astype(str), **wrong)


def test_k_is_capped_where_it_is_not_asked_for():
    x, y = _blobs(20)
    (found,) = cross_validate("knn", x, (y > 0).astype(str), np.arange(20).astype(str))
    assert np.isfinite(found.scores).all()


def test_simpleshot_is_the_nearest_centroid_of_centred_unit_vectors():
    x, y = _blobs(gap=1.5)
    train, test, known = x[:80], x[80:], y[:80]
    mean = train.mean(0)
    unit = [(v - mean) / np.linalg.norm(v - mean, axis=1, keepdims=True) for v in (train, test)]
    ours = simpleshot(train, known, test, 4)
    np.testing.assert_array_equal(ours.argmax(1), NearestCentroid().fit(unit[0], known).predict(unit[1]))
    distance = np.stack([np.linalg.norm(unit[1] - unit[0][known == index].mean(0), axis=1) for index in range(3)], 1)
    np.testing.assert_allclose(ours[:, :3], np.exp(-distance) / np.exp(-distance).sum(1, keepdims=True), rtol=1e-5)
    assert (ours[:, 3] == 0).all(), "a class that was not there"


def test_the_cost_of_the_logistic_probe_is_scikit_learns():
    x, y = _blobs(gap=1.0)
    z = (x - x[:80].mean(0)) / x[:80].std(0)
    for cost in (0.0, 0.01):
        oracle = LogisticRegression(C=cost or 6 * 3 / 100, max_iter=1000).fit(z[:80], y[:80]).predict_proba(z[80:])
        np.testing.assert_allclose(logistic(x[:80], y[:80], x[80:], 3, cost=cost), oracle, atol=2e-3)


def test_tiles_that_are_not_tested_on_are_trained_on_but_never_beside_their_case():
    x, y = _blobs(60)
    groups = np.array([f"c{index // 5:02d}" for index in range(60)])  # 12 cases
    testable = np.ones(60, bool)
    testable[:20] = False  # four whole cases
    testable[20:22] = False  # and a part of a fifth
    fold = probe_folds(y, groups, 4, 0, testable)
    assert (fold[:20] == -1).all() and len(np.unique(fold[20:25])) == 1 and fold[20] >= 0 and set(fold[20:]) == {0, 1, 2, 3}
    (found,) = cross_validate("knn", x, y.astype(str), groups, folds=4, testable=testable)
    assert len(found.truth) == 38 and not set(found.groups) & {"c00", "c01", "c02", "c03"}
    np.testing.assert_array_equal(found.truth, y[testable])
    # One case alone is left to test on: the others teach.
    testable[:] = groups == "c05"
    (found,) = cross_validate("knn", x, y.astype(str), groups, folds=4, testable=testable)
    np.testing.assert_allclose(found.scores, knn(x[~testable], y[~testable], x[testable], 3))


def test_the_sgd_probe_gives_one_prediction_for_each_run():
    x, y = _blobs(60)
    settings = ProbeSettings(sgd=LinearProbe(rate=0.01, steps=250, runs=2))
    first, second = cross_validate("sgd", x, y.astype(str), np.array([f"c{index // 5}" for index in range(60)]), folds=2, settings=settings)
    np.testing.assert_array_equal(first.fold, second.fold)
    assert score(*_truth(first))["accuracy"] > 0.9 and 0 < np.abs(first.scores - second.scores).max() < 0.5


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
    (one,) = cross_validate("knn", x, y.astype(str), groups)
    assert bootstrap([one, one], samples=50, positive=0) == bootstrap(one, samples=50, positive=0)
    noise = Predictions(one.classes, one.truth, np.random.default_rng(0).random(one.scores.shape), one.groups, one.fold)
    mean = (score(*_truth(one))["accuracy"] + score(*_truth(noise))["accuracy"]) / 2
    low, high = bootstrap([one, noise], samples=100)["accuracy"]
    assert low < mean < high < score(*_truth(one))["accuracy"]
