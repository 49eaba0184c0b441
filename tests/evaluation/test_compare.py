"""Comparing runs: seeds are collapsed, spread is the sample deviation, nothing vanishes."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from wavepath.errors import ConfigError
from wavepath.evaluation.compare import compare, mean_curve, text_table
from wavepath.training.runs import read_run


def write_run(folder, losses, *, config=None, status="done", auc=None, every=5):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": (i + 1) * every, "loss": loss, "images_per_second": 9.0}) + "\n" for i, loss in enumerate(losses))
    )
    (folder / "status.json").write_text(json.dumps({"status": status}))
    (folder / "config.json").write_text(json.dumps(config or {}))
    if auc is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps({"probes": {"knn": {"auc": {"value": auc, "low": 0, "high": 1}}}}))
    return folder


@pytest.fixture
def swept(tmp_path):
    for arm, base in (("lr=10", 3.0), ("lr=2", 1.0)):
        for seed in range(3):
            write_run(tmp_path / "sweep" / arm / f"seed{seed}", [9.0, 5.0, base + seed], auc=0.5 + 0.1 * seed if arm == "lr=2" else None)
    return tmp_path / "sweep"


def test_seeds_of_an_arm_are_collapsed(swept):
    found = compare([swept])
    assert [group.name for group in found.groups] == ["lr=2", "lr=10"]
    assert found.metrics == ("loss", "knn.auc")
    loss, _, auc = found.lines
    assert (loss.group, loss.mean, loss.std, loss.n, loss.low, loss.high) == ("lr=2", 2.0, 1.0, 3, 1.0, 3.0)
    assert (auc.metric, auc.group, auc.n) == ("knn.auc", "lr=2", 3)
    assert auc.mean == pytest.approx(0.6) and auc.std == pytest.approx(0.1)
    assert text_table(found).splitlines()[2].split() == ["loss", "lr=2", "2", "1", "3", "1", "3"]


def test_metrics_are_chosen_by_name_or_pattern(swept):
    assert compare([swept], metrics=["knn.*", "images_per_second"]).metrics == ("knn.auc", "images_per_second")
    with pytest.raises(ConfigError, match="did you mean loss"):
        compare([swept], metrics=["los"])


def test_files(swept, tmp_path):
    compare([swept], out=tmp_path / "out")
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["lr=2", "lr=10", "lr=2"] and float(rows[0]["std"]) == 1.0
    assert (tmp_path / "out" / "comparison.md").read_text().count("\n") == 5
    picture = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB"))
    assert picture.shape[0] > 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20  # lines and bands, not an empty frame


def test_loose_runs_are_grouped_by_config_without_the_seed(tmp_path):
    for name, seed, rate in (("a", 0, 0.1), ("b", 1, 0.1), ("c", 0, 0.2)):
        folder = tmp_path / name
        write_run(folder, [1.0], config={"seed": seed, "optim": {"lr": rate}, "data": {"dir": str(folder / "phantom")}})
    found = compare([tmp_path / name for name in "abc"])
    assert [(group.name, len(group.runs)) for group in found.groups] == [("lr=0.1", 2), ("lr=0.2", 1)]


def test_runs_of_unknown_config_are_nobodys_repetition(tmp_path):
    for name in "ab":
        (write_run(tmp_path / name, [1.0]) / "config.json").unlink()
    assert [group.name for group in compare([tmp_path]).groups] == ["a", "b"]


def test_arms_of_one_name_in_two_sweeps_stay_apart(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name / "base" / "seed0", [1.0])
    assert [group.name for group in compare([tmp_path / "one", tmp_path / "two"]).groups] == ["one/base", "two/base"]


def test_a_single_run_has_no_spread_and_a_diverged_one_shows(tmp_path):
    write_run(tmp_path / "x" / "seed0", [2.0])
    write_run(tmp_path / "y" / "seed0", [2.0])
    write_run(tmp_path / "y" / "seed1", [math.nan])
    single, diverged = compare([tmp_path], out=tmp_path / "out").lines
    assert (single.mean, single.n) == (2.0, 1) and math.isnan(single.std)
    assert math.isnan(diverged.mean) and diverged.n == 2


def test_unfinished_runs_are_said(tmp_path, capsys):
    write_run(tmp_path / "run", [2.0, 1.0], status="preempted")
    compare([tmp_path / "run"])
    assert "is stopped at step 10" in capsys.readouterr().err


def test_the_mean_curve_uses_the_steps_of_all_runs(tmp_path):
    runs = [read_run(write_run(tmp_path / "a", [3.0, 2.0, 1.0])), read_run(write_run(tmp_path / "b", [5.0, 4.0]))]
    assert mean_curve(runs, "loss") == ([5, 10], [4.0, 3.0], [pytest.approx(2**0.5)] * 2)
    assert mean_curve(runs, "other") == ([], [], [])


def test_no_curves_no_picture(tmp_path):
    run = write_run(tmp_path / "run", [], auc=0.7)
    assert compare([run], out=tmp_path / "out").metrics == ("knn.auc",)
    assert not (tmp_path / "out" / "curves.png").exists()
