"""Both folds of the fine-tuning smoke run and their pooled scores, through the command line, with nothing given."""

import csv
import json
from collections import Counter

import pytest

from wavepath.cli import main


@pytest.mark.slow
def test_smoke_of_both_folds_and_their_scores(tmp_path, capsys):
    folds, out = tmp_path / "folds", tmp_path / "evaluation"
    argv = ["sweep", "--config=configs/finetune.py:smoke", "--grid", "config.data.fold=0,1", "--workdir", str(folds)]
    assert main([*argv, "--config.parallel.devices=1", "--config.writers.tensorboard=false"]) == 0
    assert main(["evaluate", "--runs", str(folds), "--positive", "tumour", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    (entry,) = results["probes"].values()
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "sensitivity", "specificity", "binary_accuracy", "binary_auc"):
        assert name in shown and 0 <= entry[name]["value"] <= 1, name
    assert entry["folds"] == 2 and results["groups"] == 2 and "tumour" in results["classes"]
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    constants = [json.loads(path.read_text()) for path in sorted(folds.rglob("constants.json"))]
    assert len({row["tile"] for row in rows}) == len(rows) == results["tiles"] == sum(results["classes"].values())
    assert len(rows) == sum(sum(one["held_out_tiles"].values()) for one in constants)
    assert Counter(row["label"] for row in rows) == results["classes"]
    for one in constants:  # what one run has held out is what the other has learnt
        assert {row["case"] for row in rows} >= set(one["held_out_cases"]) and sum(one["training_tiles"].values()) < len(rows)
