"""Sweeps with a stand-in for `wavepath train`: arms, resuming, failures, signals, the table."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from wavepath.errors import ConfigError, LockedError
from wavepath.training import sweep as wp
from wavepath.training.sweep import Axis, Sweep

CONFIG = '''
from ml_collections import ConfigDict
from wavepath.config import parse_arg

def get_config(arg=""):
    arg = parse_arg(arg, variant="B")
    return ConfigDict(dict(seed=0, lr=1e-3, top=0.2, size=(1.0, 2.0), name="", train=dict(steps=20), data=dict(dir=""),
                           parallel=dict(devices=0), variant=arg.variant))
'''
TRAIN = '''
import json, signal, sys, time
from pathlib import Path
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
run, lr, name = Path(flags["workdir"]), float(flags.get("config.lr", 1)), flags.get("config.name", "")
run.mkdir(parents=True, exist_ok=True)
with open(run / "calls.txt", "a") as file:
    file.write("x\\n")
if lr == 0.5:
    print("starting"); print("wavepath: error: loss is not finite at step 3", file=sys.stderr); sys.exit(1)
def end(status, code, step=20):
    (run / "status.json").write_text(json.dumps(dict(status=status, step=step, steps=20, seconds=1.5)))
    sys.exit(code)
if name == "slow":
    signal.signal(signal.SIGTERM, lambda *_: end("preempted", 85, 10))
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 5}\\n')
    time.sleep(60)
if name == "crash":
    raise ValueError("a defect")
(run / "metrics.jsonl").write_text(json.dumps(dict(step=20, loss=lr + int(flags["config.seed"]), lr=lr)) + "\\n")
(run / "config.json").write_text(json.dumps(dict(seed=int(flags["config.seed"]), lr=lr)))
end("done", 0)
'''


@pytest.fixture
def make(tmp_path):
    """A function that makes sweeps in one folder, with the stand-in as their training."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    (tmp_path / "fake_train.py").write_text(TRAIN)

    def build(*grid, seeds=1, then="", overrides=(), spec=""):
        launcher = (sys.executable, str(tmp_path / "fake_train.py"))
        return Sweep(spec or str(tmp_path / "tiny.py"), tmp_path / "sw eep", tuple(map(wp.parse_axis, grid)), seeds, tuple(overrides), then, launcher)

    return build


def table(sweep) -> list[dict[str, str]]:
    with open(sweep.workdir / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def calls(sweep, run) -> int:
    return len((sweep.workdir / run / "calls.txt").read_text().splitlines())


def test_parse_axis():
    assert wp.parse_axis("config.lr=1e-4,3e-4") == Axis("lr", ("1e-4", "3e-4"))
    assert wp.parse_axis("size=(0.2,1.0),(0.5,1.0)").values == ("(0.2,1.0)", "(0.5,1.0)")
    assert wp.parse_axis("data.dir='a,b',\"c\"").values == ("a,b", "c")
    for bad in ("lr", "lr=", "=1", "lr=1,,2", "lr=1,1", "size=(1,2"):
        with pytest.raises(ConfigError):
            wp.parse_axis(bad)


def test_arms_are_the_product_with_short_unique_names():
    arms = wp.make_arms([Axis("train.steps", ("1", "2")), Axis("eval.steps", ("3",)), Axis("data.dir", ("x/tiles", "y/tiles"))])
    assert len(arms) == 4 == len({arm.slug for arm in arms})
    assert arms[0].settings == (("train.steps", "1"), ("eval.steps", "3"), ("data.dir", "x/tiles"))
    assert arms[0].slug.startswith("train.steps=1_eval.steps=3_dir=tiles-")
    assert [arm.slug for arm in wp.make_arms([])] == ["base"]
    # The folder of a value does not depend on what else is in the axis: values may be added later.
    assert wp.make_arms([Axis("data.dir", ("y/tiles",))])[0].slug == wp.make_arms([Axis("data.dir", ("x/tiles", "y/tiles"))])[1].slug
    for value, other in itertools.permutations(["..", "a b", "a/b", "b", "a:b", "/"], 2):
        slugs = [arm.slug for arm in wp.make_arms([Axis("x", (value, other))])]
        assert len(set(slugs)) == 2 and not any("/" in slug or " " in slug for slug in slugs)


def test_plan_goes_seed_by_seed_and_checks_everything_first(make):
    sweep = make("lr=1,2", seeds=2, overrides=["top=0.4"], then="echo {run} {seed} {arm} ${HOME}")
    jobs = wp.plan(sweep)
    assert [(job.arm.slug, job.seed) for job in jobs] == [("lr=1", 0), ("lr=2", 0), ("lr=1", 1), ("lr=2", 1)]
    assert jobs[3].command[2:] == [f"--config={sweep.spec}", f"--workdir={jobs[3].folder}", "--config.top=0.4", "--config.lr=2", "--config.seed=1"]
    assert jobs[3].then == f"echo '{jobs[3].folder}' 1 lr=2 ${{HOME}}"
    assert wp.plan(make("arg.variant=S,B"))[0].command[2].endswith("tiny.py:variant=S")
    for grid, words in (("lrr=1", "config.lr"), ("lr=fast", "a number"), ("seed=1,2", "--seeds"), ("arg.variannt=S", "variant")):
        with pytest.raises(ConfigError, match=words):
            wp.plan(make(grid))
    with pytest.raises(ConfigError, match="twice"):
        wp.plan(make("lr=1", "config.lr=2"))
    with pytest.raises(ConfigError, match="at least one"):
        wp.plan(make(seeds=0))
    assert not sweep.workdir.exists()


def test_a_failed_arm_is_listed_and_the_rest_goes_on(make):
    sweep = make("lr=1,0.5,2", seeds=2)
    jobs, code = wp.run_sweep(sweep)
    assert code == 3
    assert [(row["lr"], row["seed"], row["status"], row["loss"]) for row in table(sweep)] == [
        ("1", "0", "done", "1"), ("0.5", "0", "failed", ""), ("2", "0", "done", "2"),
        ("1", "1", "done", "2"), ("0.5", "1", "failed", ""), ("2", "1", "done", "3"),
    ]  # fmt: skip
    assert table(sweep)[1]["reason"] == "loss is not finite at step 3"
    assert (sweep.workdir / "table.md").read_text().count("\n") == 8
    # Again: what is done is left alone, what failed is tried again; values and seeds may be added.
    jobs, code = wp.run_sweep(make("lr=1,0.5,2,3", seeds=2))
    assert code == 3 and len(jobs) == 8
    assert (calls(sweep, "lr=1/seed0"), calls(sweep, "lr=0.5/seed0"), calls(sweep, "lr=3/seed1")) == (1, 2, 1)


def test_exit_codes(make):
    assert wp.run_sweep(make("lr=1"))[1] == 0
    assert wp.run_sweep(make("lr=0.5"))[1] == 1


def test_a_defect_is_reported_with_its_last_line_and_the_log(make):
    sweep = make("name=crash")
    jobs, _ = wp.run_sweep(sweep)
    assert jobs[0].reason.startswith("ValueError: a defect (exit code 1, ") and "seed0.log" in jobs[0].reason


def test_another_config_does_not_mix_in(make):
    wp.run_sweep(make("lr=1"))
    with pytest.raises(ConfigError, match=r"top 0.2 -> 0.4"):
        wp.run_sweep(make("lr=1", overrides=["top=0.4"]))
    with pytest.raises(ConfigError, match="train.steps 20 -> 30"):
        wp.run_sweep(make("lr=1", overrides=["train.steps=30"]))
    assert wp.run_sweep(make("lr=1", overrides=["lr=7"]))[1] == 0  # every arm sets it anyway
    assert wp.run_sweep(make("lr=1", overrides=["parallel.devices=2"]))[1] == 0  # another machine goes on with it


def test_the_command_after_each_training(make):
    script = "mkdir -p {run}/evaluation && echo '{\"probes\": {\"knn\": {\"auc\": {\"value\": 0.{seed}5}}}}' > {run}/evaluation/results.json"
    sweep = make("lr=1,2", seeds=2, then=script)
    assert wp.run_sweep(sweep)[1] == 0
    assert [row["knn.auc"] for row in table(sweep)] == ["0.05", "0.05", "0.15", "0.15"]
    # A command that fails fails the run, and the training is not repeated for it.
    broken = make("lr=1,2", seeds=1, then="echo wavepath: error: no labels; test {arm} = lr=1")
    jobs, code = wp.run_sweep(broken)
    assert code == 3 and [job.status for job in jobs] == ["done", "failed"]
    assert jobs[1].reason == "after training: no labels"
    assert calls(sweep, "lr=2/seed0") == 1


def test_the_table_is_whole_after_every_arm(make, monkeypatch):
    seen = []
    write = wp.write_table

    def spy(jobs, root):
        write(jobs, root)
        seen.append([row["status"] for row in table(sweep)])

    monkeypatch.setattr(wp, "write_table", spy)
    sweep = make("lr=1,2")
    wp.run_sweep(sweep)
    assert seen == [["pending", "pending"], ["done", "pending"], ["done", "done"]]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 85), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_lets_the_running_arm_save(make, request, number, expected):
    # A shell starts background jobs with interrupts ignored, and the tests may be one.
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    old = signal.signal(number, handler)
    request.addfinalizer(lambda: signal.signal(number, old))
    sweep = make("name=slow,x", overrides=["lr=1"])

    def send():
        while not (sweep.workdir / "name=slow" / "seed0" / "metrics.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    if expected is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            wp.run_sweep(sweep)
    else:
        assert wp.run_sweep(sweep)[1] == expected
    thread.join()
    assert signal.getsignal(number) is before
    assert [(row["status"], row["step"]) for row in table(sweep)] == [("stopped", "10"), ("pending", "")]
    assert json.loads((sweep.workdir / "name=slow/seed0/status.json").read_text())["status"] == "preempted"
    assert not (sweep.workdir / "sweep.lock").exists()


def test_two_sweeps_do_not_share_a_folder(make):
    sweep = make("lr=1")
    sweep.workdir.mkdir()
    other = subprocess.Popen(["sleep", "30"])
    try:
        (sweep.workdir / "sweep.lock").write_text(json.dumps({"pid": other.pid, "host": os.uname().nodename}))
        with pytest.raises(LockedError):
            wp.run_sweep(sweep)
    finally:
        other.kill()
        other.wait()
    assert wp.run_sweep(sweep)[1] == 0  # the holder is dead
