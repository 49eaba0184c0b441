"""ROC curves against scikit-learn, their areas and intervals against the table's, and what is drawn of them."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from wavepath.evaluation.curves import GRID, MACRO, draw_roc, roc_curves, roc_points
from wavepath.evaluation.probes import Predictions, bootstrap, score


def _predictions(count, classes, power=1.0, seed=0, ties=False, per_group=2):
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % len(classes)
    logits = rng.normal(size=(count, len(classes)))
    logits[np.arange(count), truth] += power
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = np.round(scores, 1) if ties else scores
    groups = np.array([f"case{index // per_group}" for index in range(count)])
    return Predictions(tuple(classes), truth, scores, groups, np.zeros(count, np.int64))


@pytest.mark.parametrize("ties", [False, True])
def test_points_are_scikit_learns(ties):
    one = _predictions(60, "ab", ties=ties)
    fpr, tpr = roc_points(one.truth == 1, one.scores[:, 1])
    want = roc_curve(one.truth, one.scores[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(fpr, want[0], atol=1e-12)
    np.testing.assert_allclose(tpr, want[1], atol=1e-12)
    assert np.trapezoid(tpr, fpr) == pytest.approx(roc_auc_score(one.truth, one.scores[:, 1]), abs=1e-12)


def test_weights_count_examples_so_often():
    one = _predictions(30, "ab", ties=True)
    weights = np.random.default_rng(1).integers(0, 4, 30).astype(float)
    fpr, tpr = roc_points(one.truth == 1, one.scores[:, 1], weights)
    many = np.repeat(np.arange(30), weights.astype(int))
    assert np.trapezoid(tpr, fpr) == pytest.approx(roc_auc_score(one.truth[many], one.scores[many, 1]), abs=1e-12)
    with pytest.raises(ValueError, match="positive and negative"):
        roc_points(np.ones(3, bool), np.arange(3.0))


@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_areas_and_intervals_are_the_tables(classes):
    seeds = [_predictions(60, classes, seed=seed) for seed in range(2)]
    found = roc_curves(seeds, bootstraps=60, seed=3)
    curve = found["b" if len(classes) == 2 else MACRO]
    assert curve.auc == pytest.approx(np.mean([score(one.truth, one.scores)["auc"] for one in seeds]), abs=1e-12)
    np.testing.assert_allclose((curve.auc_low, curve.auc_high), bootstrap(seeds, samples=60, seed=3)["auc"], atol=1e-12)
    assert (curve.low <= curve.high).all() and np.mean((curve.low <= curve.tpr) & (curve.tpr <= curve.high)) > 0.9
    assert curve.low[-1] == curve.high[-1] == curve.tpr[-1] == 1
    for name, each in found.items():
        if name != MACRO:
            index = classes.index(name)
            assert each.auc == pytest.approx(np.mean([roc_auc_score(one.truth == index, one.scores[:, index]) for one in seeds]), abs=1e-12)


def test_the_mean_curve_is_the_mean_of_the_curves():
    seeds = [_predictions(40, "ab", seed=seed) for seed in range(3)]
    want = np.mean([np.interp(GRID, *roc_points(one.truth == 1, one.scores[:, 1])) for one in seeds], axis=0)
    np.testing.assert_allclose(roc_curves(seeds, bootstraps=0)["b"].tpr, want, atol=1e-12)
    # What is reached without a false alarm counts at 0.
    second = np.array([0.1, 0.2, 0.9, 0.8])
    best = Predictions(("a", "b"), np.array([0, 0, 1, 1]), np.stack([1 - second, second], 1), np.array(list("wxyz")), np.zeros(4))
    curve = roc_curves([best], bootstraps=0)["b"]
    assert (curve.tpr == 1).all() and curve.auc == 1 and np.isnan(curve.auc_low)


def test_absent_classes_are_left_out_and_resamples_may_lack_one():
    few = _predictions(8, "ab", per_group=1)  # a resample of eight cases lacks a class now and then
    curve = roc_curves([few], bootstraps=200)["b"]
    assert np.isfinite([curve.auc_low, curve.auc_high, *curve.low, *curve.high]).all()
    known = Predictions(("a", "b", "c"), few.truth, np.column_stack([few.scores, np.zeros(8)]), few.groups, few.fold)
    assert list(roc_curves([known], bootstraps=0)) == ["a", "b", MACRO]
    alone = Predictions(("a", "b"), np.zeros(8, int), few.scores, few.groups, few.fold)
    assert roc_curves([alone], bootstraps=5) == {}


def test_the_picture_and_its_points(tmp_path):
    seeds = [_predictions(40, "ab", seed=seed) for seed in range(2)]
    areas = draw_roc(tmp_path / "roc.png", seeds, bootstraps=20, title="slides")
    assert set(areas) == {""} and set(areas[""]) == {"b"} and set(areas[""]["b"]) == {"auc", "low", "high"}
    with Image.open(tmp_path / "roc.png") as image:
        assert image.size == (960, 920)
    with open(tmp_path / "roc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(GRID) and rows[0]["class"] == "b"
    drawn = np.array([[float(row[name]) for name in ("fpr", "tpr", "low", "high")] for row in rows]).T
    np.testing.assert_allclose(drawn[1], roc_curves(seeds, bootstraps=0)["b"].tpr, atol=1e-5)
    assert (np.diff(drawn[0]) > 0).all() and (drawn[2] <= drawn[3]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"roc.png", "roc.csv"}


def test_arms_on_one_axis(tmp_path):
    arms = {f"arm {power}": [_predictions(30, "abc", power)] for power in (0.5, 2)}
    areas = draw_roc(tmp_path / "roc.png", arms, bootstraps=0)
    assert list(areas) == list(arms) and all(set(each) == {"a", "b", "c", MACRO} for each in areas.values())
    assert areas["arm 0.5"][MACRO]["auc"] < areas["arm 2"][MACRO]["auc"] and areas["arm 2"][MACRO]["low"] is None
    assert set(draw_roc(tmp_path / "b.png", arms, positive="b", bootstraps=0)["arm 2"]) == {"b"}
    # More names than a legend inside has room for: the picture grows, the plot stays.
    draw_roc(tmp_path / "many.png", {f"network {index} on features": [_predictions(12, "ab", seed=index)] for index in range(9)}, bootstraps=0)
    sizes = [Image.open(tmp_path / name).size for name in ("roc.png", "many.png")]
    assert sizes[0][1] < sizes[1][1] and sizes[0][0] == sizes[1][0]


def test_nothing_is_drawn_of_one_class(tmp_path):
    few = _predictions(8, "ab")
    assert draw_roc(tmp_path / "roc.png", [Predictions(("a", "b"), np.zeros(8, int), few.scores, few.groups, few.fold)]) == {}
    assert not list(tmp_path.iterdir())
