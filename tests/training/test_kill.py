"""`kill -9` at several points, and the same command again: bit-equal to a run that was never touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hard_task import HardTask, leaves

from wavepath.errors import EXIT_PREEMPTED
from wavepath.training.checkpoint import restore_run, saved_steps

PROGRAM = Path(__file__).with_name("hard_task.py")
STEPS = 8


def start(folder, *more, slow=0.0):
    command = [sys.executable, str(PROGRAM), str(folder), "--steps", str(STEPS), "--slow", str(slow), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Waits; returns (exit code, what it said)."""
    said = process.communicate(timeout=180)[1]
    return process.returncode, said


def stop_when(process, condition, number=signal.SIGKILL, timeout=120):
    """Sends a signal to our own child as soon as the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended before it could be stopped: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)
    return finish(process)


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def locked(folder):
    path = folder / "train.lock"
    return path.is_file() and path.stat().st_size > 0


def saving(folder):
    return any("tmp" in path.name for path in folder.glob("checkpoints/*"))


def parameters(folder):
    config, task, state = restore_run(folder, task_factory=HardTask)
    return {"step": int(state.step), **leaves(state)}


def assert_same_run(folder, reference):
    one, other = parameters(folder), parameters(reference)
    assert one["step"] == other["step"] == STEPS
    for name, value in other.items():
        np.testing.assert_array_equal(one[name], value, err_msg=name)
    records = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (folder, reference)]
    assert [[(record["step"], record["loss"], record["nce"]) for record in run] for run in records[:1]] == [
        [(record["step"], record["loss"], record["nce"]) for record in records[1]]
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    code, said = finish(start(folder))
    assert code == 0, said
    return folder


def test_killed_once_and_started_again(reference, tmp_path):
    code, _ = stop_when(start(tmp_path, slow=0.1), lambda: lines(tmp_path) >= 5)
    assert code == -signal.SIGKILL and (tmp_path / "train.lock").exists() and max(saved_steps(tmp_path)) < STEPS
    code, said = finish(start(tmp_path))
    assert code == 0 and "resuming" in said, said
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("backend", [("jit", 1), ("jit", 8), ("pmap", 8)])
def test_killed_again_and_again(tmp_path, backend):
    more = ("--backend", backend[0], "--devices", str(backend[1]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, said = finish(start(whole, *more))
    assert code == 0, said
    stop_when(start(killed, *more), lambda: locked(killed))  # before anything is compiled
    assert saved_steps(killed) == []
    stop_when(start(killed, *more, slow=0.1), lambda: lines(killed) >= 1)  # after the first step, nothing saved
    stop_when(start(killed, *more, slow=0.1), lambda: saving(killed))  # while a checkpoint is written
    stop_when(start(killed, *more, slow=0.1), lambda: 4 in saved_steps(killed))  # the moment it has its name
    before = lines(killed)
    stop_when(start(killed, *more, slow=0.1), lambda: lines(killed) > before)
    newest = saved_steps(killed)[-1]
    largest = max((killed / "checkpoints" / str(newest)).rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"")  # and the disk lost some of it
    code, said = finish(start(killed, *more))
    assert code == 0 and f"checkpoint {newest}" in said, said
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_sigterm_saves_exits_85_and_the_same_command_goes_on(reference, tmp_path):
    code, said = stop_when(start(tmp_path, slow=0.2), lambda: lines(tmp_path) >= 3, signal.SIGTERM)
    assert code == EXIT_PREEMPTED and "SIGTERM" in said, said
    assert saved_steps(tmp_path)[-1] < STEPS and not (tmp_path / "train.lock").exists()
    copy = tmp_path.with_name(tmp_path.name + "_copy")
    shutil.copytree(tmp_path, copy)  # a run folder may be moved
    code, said = finish(start(copy))
    assert code == 0, said
    assert_same_run(copy, reference)
    code, said = finish(start(copy))
    assert code == 0 and "is whole" in said
