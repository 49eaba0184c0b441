"""`wavepath sweep` and `wavepath compare` as a user types them."""

import json
import sys

from wavepath import cli
from wavepath.training import sweep

TRAIN = """
import json, sys
from pathlib import Path
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[2:])
run = Path(flags["workdir"]); run.mkdir(parents=True)
lr = float(flags["config.lr"])
(run / "metrics.jsonl").write_text("".join(json.dumps(dict(step=s, loss=lr * s)) + chr(10) for s in (1, 2)))
(run / "status.json").write_text(json.dumps(dict(status="done", step=2, steps=2, seconds=1)))
"""


def test_dry_run_prints_the_commands_and_writes_nothing(capsys, tmp_path):
    argv = ["sweep", "--config=wise_mae:smoke", "--grid", "config.lr=1e-4,3e-4", "--seeds", "2", "--workdir", str(tmp_path / "d"), "--dry-run"]
    assert cli.main([*argv, "--config.train.steps=4", "--then", "wavepath embed --checkpoint {run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].endswith("--config.train.steps=4 --config.lr=1e-4 --config.seed=0 &&")
    assert " -m wavepath train --config=wise_mae:smoke " in lines[0]
    assert lines[1] == f"  wavepath embed --checkpoint {tmp_path / 'd' / 'lr=1e-4' / 'seed0'}"
    assert not (tmp_path / "d").exists()


def test_mistakes_are_one_line(capsys, tmp_path):
    for flags, words in ((["--grid", "config.lrr=1"], "did you mean config.lr"), (["--grid", "lr"], "--grid takes"), (["--config.lr=x"], "a number")):
        assert cli.main(["sweep", "--config=wise_mae:smoke", "--workdir", str(tmp_path / "d"), *flags]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_sweep_then_compare(capsys, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAIN)
    real = sweep.Sweep
    monkeypatch.setattr(sweep, "Sweep", lambda *args: real(*args, launcher=(sys.executable, str(tmp_path / "train.py"), "train")))
    folder = tmp_path / "swept"
    assert cli.main(["sweep", "--config=wise_mae:smoke", "--grid", "config.lr=1,2", "--seeds", "2", "--workdir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:5] for line in out.splitlines()[2:]] == [["loss", "lr=1", "2", "0", "2"], ["loss", "lr=2", "4", "0", "2"]]
    assert json.loads((folder / "sweep.json").read_text())["axes"] == [{"name": "lr", "values": ["1", "2"]}]
    assert cli.main(["compare", str(folder), "--out", str(tmp_path / "comparison"), "--metric", "loss"]) == 0
    streams = capsys.readouterr()
    assert streams.out == out and "curves.png" in streams.err
    assert (tmp_path / "comparison" / "curves.png").stat().st_size > 5000


def test_compare_without_runs(capsys, tmp_path):
    assert cli.main(["compare", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("wavepath: error: no run in ")
