"""The linear layer on cached features: scikit-learn's optimum on a convex toy, runs that depend on their number alone, and early stopping."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from wavepath.evaluation import linear_probe
from wavepath.evaluation.linear_probe import LinearProbe, fit_predict

TRAIN, TEST = np.arange(150), np.arange(150, 200)
CASES = np.array([f"c{index // 10:02d}" for index in range(200)])


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    return (5 + 0.1 * (rng.normal(size=(200, 6)) + np.eye(3, 6)[labels])).astype(np.float32), labels


def test_without_decay_it_reaches_the_optimum_of_logistic_regression(toy):
    x, y = toy
    mean, std = x[TRAIN].mean(0), x[TRAIN].std(0)
    oracle = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-10).fit((x[TRAIN] - mean) / std, y[TRAIN]).predict_proba((x[TEST] - mean) / std)
    settings = LinearProbe(rate=0.02, decay=0.0, batch=128, steps=2500, patience=0, runs=2)
    found = fit_predict(x, y, CASES, TRAIN, TEST, 3, 0, settings)
    assert found.shape == (2, 50, 3)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert np.abs(found - oracle).max() < 0.03, "in batches, so not to the digit"
    assert np.abs(fit_predict(x, y, CASES, TRAIN, TEST, 3, 0, LinearProbe(rate=0.02, decay=50.0, steps=500, patience=0, runs=1)) - oracle).max() > 0.1


def test_a_run_depends_on_seed_and_number_alone_and_not_on_test_rows(toy):
    x, y = toy
    settings = LinearProbe(rate=0.01, steps=250, runs=3)
    three = fit_predict(x, y, CASES, TRAIN, TEST, 3, 0, settings)
    np.testing.assert_array_equal(three, fit_predict(x, y, CASES, TRAIN, TEST, 3, 0, settings))
    np.testing.assert_allclose(fit_predict(x, y, CASES, TRAIN, TEST, 3, 0, LinearProbe(rate=0.01, steps=250, runs=2)), three[:2], atol=1e-5)
    assert np.abs(three[0] - three[1]).max() > 1e-4 and np.abs(fit_predict(x, y, CASES, TRAIN, TEST, 3, 1, settings) - three).max() > 1e-4
    other, wrong = x.copy(), y.copy()
    other[TEST[1:]], wrong[TEST] = 99.0, 0
    np.testing.assert_allclose(fit_predict(other, wrong, CASES, TRAIN, TEST, 3, 0, settings)[:, 0], three[:, 0], atol=1e-5)


def test_a_run_ends_when_its_validation_no_longer_improves_and_keeps_the_best(toy, monkeypatch):
    x, y = toy
    advance, calls = linear_probe._advance, []
    accuracies = iter([[0.5, 0.5], [0.6, 0.4], [0.6, 0.4], [0.9, 0.9], [0.9, 0.9], [0.8, 0.9]])

    def scripted(*args):
        state, _ = advance(*args)
        calls.append(state.weights["b"])
        return state, np.array(next(accuracies))

    monkeypatch.setattr(linear_probe, "_advance", scripted)
    settings = LinearProbe(rate=0.01, steps=10_000, patience=2 * linear_probe.EVERY, runs=2)
    chosen = []
    choose = linear_probe._choose
    monkeypatch.setattr(linear_probe, "_choose", lambda kept, new, old: chosen.append(kept.tolist()) or choose(kept, new, old))
    fit_predict(x, y, CASES, TRAIN, TEST, 3, 0, settings)
    # The second run has ended after two looks without a better accuracy, so its 0.9 comes too late; the first goes on to its own, and of equal ones
    # keeps the later.
    assert chosen == [[True, True], [True, False], [True, False], [True, False], [True, False], [False, False]]


def test_validation_is_by_case_and_leaves_every_class(toy):
    _, y = toy
    settings = LinearProbe(runs=4)
    learnt, held = linear_probe._parts(y, CASES, TRAIN, 0, settings)
    held = np.asarray(held)
    assert len({row.tobytes() for row in held}) > 1, "each run draws its own"
    for rows, mask in zip(learnt, held, strict=True):
        assert mask.sum() == 30 and not mask[TEST].any() and not mask[rows].any() and len(rows) == 120
        assert not set(CASES[rows]) & set(CASES[mask]) and len(np.unique(y[rows])) == 3
    # One case alone: tiles of it validate.
    (rows,), mask = linear_probe._parts(y, np.full(200, "one"), TRAIN, 0, LinearProbe(runs=1))
    assert np.asarray(mask).sum() == 30 and len(rows) == 120
    (rows,), mask = linear_probe._parts(y, CASES, TRAIN, 0, LinearProbe(runs=1, patience=0))
    assert not np.asarray(mask).any() and len(rows) == 150


def test_the_order_is_a_function_of_position_and_every_epoch_shows_each_tile_once():
    rows = np.arange(100, 107)
    whole = linear_probe._order(rows, 0, 28, (0, 1))
    np.testing.assert_array_equal(np.concatenate([linear_probe._order(rows, start, 4, (0, 1)) for start in range(0, 28, 4)]), whole)
    epochs = whole.reshape(4, 7)
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
