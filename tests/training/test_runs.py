"""Run folders are read in every state a kill can leave them in."""

import json
import math

import pytest

from wavepath.errors import WavepathError
from wavepath.training import runs


def write_run(folder, losses, status="done", results=None, config=None, every=5, **more):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": (index + 1) * every, "time": 1.0, "loss": loss, "lr": 0.1, **more} for index, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status:
        (folder / "status.json").write_text(json.dumps({"status": status, "step": len(losses) * every, "steps": 100, "seconds": 2.5}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if results is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder


def test_a_finished_run(tmp_path):
    results = {"tiles": 40, "probes": {"knn": {"folds": 5, "accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}, "auc": {"value": None}}}}
    run = runs.read_run(write_run(tmp_path / "run", [3.0, 2.0], results=results))
    assert (run.status, run.step, run.steps, run.seconds, run.damaged) == ("done", 10, 100, 2.5, 0)
    assert run.curves["loss"] == ([5, 10], [3.0, 2.0])
    assert run.finals() == {"loss": 2.0, "lr": 0.1, "knn.accuracy": 0.8}


def test_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    joined = '{"step": 15, "lo{"step": 10, "loss": 2.5}'
    path.write_text('{"step": 5, "loss": 3}\n{"step": 10, "loss": 2}\n' + joined + '\n{"step": 15, "loss": 1}\n{"step": 20')
    curves, damaged = runs.read_curves(path)
    assert curves == {"loss": ([5, 10, 15], [3.0, 2.0, 1.0])}
    assert damaged == 2
    path.write_text('{"step": 10, "loss": 2}\n{"step": 5, "loss": 9}\n{"step": 10, "loss": 7, "note": "x", "ok": true}\n')
    assert runs.read_curves(path) == ({"loss": ([5, 10], [9.0, 7.0])}, 0)


@pytest.mark.parametrize(("status", "expected"), [("done", "done"), ("preempted", "stopped"), (None, "stopped"), ("failed", "failed")])
def test_status(tmp_path, status, expected):
    assert runs.read_run(write_run(tmp_path, [1.0], status=status)).status == expected


def test_nothing_there(tmp_path):
    run = runs.read_run(tmp_path / "none")
    assert (run.status, run.step, run.finals()) == ("pending", 0, {})
    with pytest.raises(WavepathError, match="no run in"):
        runs.find_runs([tmp_path])


def test_results_in_folders_below(tmp_path):
    write_run(tmp_path, [1.0], results={"accuracy": 0.5, "nested": {"auc": {"value": 0.6}}, "note": "x", "good": True})
    (tmp_path / "evaluation" / "colon").mkdir()
    (tmp_path / "evaluation" / "colon" / "results.json").write_text('{"probes": {"knn": {"auc": {"value": 0.9}}}}')
    assert runs.read_results(tmp_path) == {"accuracy": 0.5, "nested.auc": 0.6, "colon/knn.auc": 0.9}


def test_find_runs_in_natural_order_without_inner_folders(tmp_path):
    for name in ("lr=10/seed0", "lr=2/seed10", "lr=2/seed9"):
        write_run(tmp_path / name, [1.0], config={"seed": 0})
    (tmp_path / "lr=10/seed0/tiles").mkdir()
    (tmp_path / "lr=10/seed0/tiles/config.json").write_text("{}")
    found = runs.find_runs([tmp_path, tmp_path / "lr=2/seed9"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["lr=2/seed9", "lr=2/seed10", "lr=10/seed0"]


def test_main_metrics_leave_out_housekeeping():
    assert runs.main_metrics(["lr", "eval/loss", "grad_norm", "loss", "images_per_second", "knn.auc"]) == ["loss", "eval/loss", "knn.auc"]


def test_not_a_number_is_a_value(tmp_path):
    for text in ("null", "NaN"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": ' + text + "}\n")
        assert math.isnan(runs.read_run(tmp_path).finals()["loss"])
