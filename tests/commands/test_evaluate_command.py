"""`wavepath evaluate` as a user types it: probes with a positive class, and flags that do not go together."""

import json

import numpy as np
import pytest

from wavepath import cli
from wavepath.interop.features import write_features


@pytest.fixture
def features(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(8):
        label = index % 2
        names = np.array([f"{'ab'[label]}/{index}_{tile}" for tile in range(6)])
        values = rng.normal(size=(6, 4)) + 2 * label
        write_features(tmp_path / "features" / f"s{index}.h5", values, np.zeros((6, 2), int), {}, {"names": names})
    return tmp_path / "features"


def test_a_positive_class_adds_sensitivity_and_specificity(features, tmp_path, capsys):
    flags = ["--features", str(features), "--label-pattern", "^(.)/", "--case-pattern", "/([0-9]+)_", "--folds", "2", "--probe", "knn"]
    assert cli.main(["evaluate", *flags, "--positive", "b", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["probes"]["knn"]
    assert "sensitivity" in shown and 0 <= entry["specificity"]["low"] <= entry["specificity"]["value"] <= 1
    assert "binary_auc" in shown and entry["binary_auc"]["low"] <= entry["binary_auc"]["value"] and entry["folds"] == 2
    assert cli.main(["evaluate", *flags, "--out", str(tmp_path / "out")]) == 0
    assert "sensitivity" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--features", "x"], "--features needs labels"),
        (["--features", "x", "--label-pattern", "(.)", "--partial"], "--partial belongs to --runs"),
        (["--features", "x", "--label-pattern", "(.)", "--data", "y"], "--data belongs to --runs"),
        (["--runs", "x", "--label-pattern", "(.)"], "--label-pattern belongs to --features; leave it out with --runs, which takes labels and cases"),
        (["--runs", "x", "--case-pattern", "(.)"], "--case-pattern belongs to --features"),
        (["--runs", "x", "--probe", "knn"], "--probe belongs to the probes of --features"),
        (["--runs", "x", "--pool", "cls"], "--pool belongs to"),
        (["--runs", "x", "--folds", "5"], "--folds belongs to"),
        (["--runs", "x", "--k", "20"], "--k belongs to"),
        (["--runs", "x", "--max-per-class", "0"], "--max-per-class belongs to"),
        (["--runs", "x"], "no run in x"),
        (["--stain", "x", "--lpips", "y"], "--lpips belongs to --superres"),
        (["--stain", "x", "--k", "3"], "--k belongs to the probes of --features; leave it out with --stain"),
        (["--stain", "x", "--max-images", "-1"], "not a number of images"),
        (["--stain", "x", "--protocol", "crop", "--tile", "64"], "belong to whole images"),
        (["--stain-encoders", "x", "--tile", "64"], "--tile belongs to --superres, --stain; leave it out with --stain-encoders"),
        (["--superres", "x", "--features-of", "y"], "--features-of belongs to --stain"),
        (["--stain-encoders", "x"], "no run in x"),
        (["--stain", "x"], "no run in x"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    assert cli.main(["evaluate", *flags, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_case_that_the_pattern_does_not_find_is_refused(features, tmp_path, capsys):
    flags = ["--features", str(features), "--label-pattern", "^(.)/", "--case-pattern", "/(0)_", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", *flags]) == 1
    assert "finds nothing in 'b/1_0'" in capsys.readouterr().err
