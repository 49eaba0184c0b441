"""Two real processes train one run: stopped, killed, and gone on with as one."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hard_task import HardTask, leaves

from wavepath.errors import EXIT_PREEMPTED, ConfigError
from wavepath.training import distributed
from wavepath.training.checkpoint import restore_run, saved_steps

HERE = Path(__file__).parent
WAIT = 300  # seconds; a machine that does other things besides takes a minute to compile


def free_port():
    with socket.socket() as end:
        end.bind(("localhost", 0))
        return end.getsockname()[1]


class TooBusyError(Exception):
    """The runtime gives processes half a minute to meet in a collective, and one of them compiled for longer: says nothing of the code."""


def patient(body):
    """A test that is begun anew, twice at most, where the machine was too busy for the runtime's patience."""

    @functools.wraps(body)
    def wrapped(tmp_path, **fixtures):
        for attempt in range(3):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            try:
                return body(folder, **fixtures)
            except TooBusyError:
                if attempt == 2:
                    raise

    return wrapped


class Two:
    """Two processes of two devices each."""

    def __init__(self, folder, steps, *more):
        self.folder, port = folder, free_port()
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
        self.logs = [folder.with_name(f"{folder.name}.log{index}") for index in range(2)]
        self.processes = []
        for index, log in enumerate(self.logs):
            words = ["hard_task.py", folder, "--steps", steps, "--devices", 0, "--look", "--coordinator", f"localhost:{port}", "--processes", 2]
            command = [sys.executable, *map(str, [*words, "--process", index, *more])]
            with log.open("w") as file:
                self.processes.append(subprocess.Popen(command, cwd=HERE, env=environment, stderr=file, stdout=file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self):
        codes = [process.wait(timeout=WAIT) for process in self.processes]
        if set(codes) - {0, EXIT_PREEMPTED}:
            self.explain()
        return codes

    def explain(self):
        said = "\n".join(log.read_text()[-3000:] for log in self.logs)
        if "Gloo context initialization failed" in said:
            raise TooBusyError(said)
        print(said)

    def until(self, step):
        """Waits for a step to be written."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if any(record["step"] >= step for record in records(self.folder)):
                return
            if any(process.poll() is not None for process in self.processes):
                self.explain()
                raise AssertionError(f"ended ahead of step {step}")
            time.sleep(0.05)
        raise AssertionError(f"step {step} did not come within {WAIT} s")


def records(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder):
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def one(folder, steps, *more):
    """One process of four devices."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    words = ["hard_task.py", folder, "--steps", steps, "--devices", 4, *more]
    subprocess.run([sys.executable, *map(str, words)], cwd=HERE, env=environment, check=True, capture_output=True, timeout=WAIT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    one(folder, 40)
    return folder


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("words", [("--backend", "jit", "--fsdp", 4), ("--backend", "pmap")], ids=["fsdp", "pmap"])
@patient
def test_two_processes_stop_together_and_one_goes_on(tmp_path, whole, words):
    run = tmp_path / "run"
    with Two(run, 40, "--slow", 0.3, *words) as two:
        two.until(3)
        two.processes[1].send_signal(signal.SIGTERM)  # to one of them
        assert two.codes() == [EXIT_PREEMPTED] * 2
    stopped = saved_steps(run)[-1]
    assert 3 <= stopped < 40 and json.loads((run / "status.json").read_text())["status"] == "preempted"
    one(run, 40)
    assert saved_steps(run)[-1] == 40 and max(losses(run)) == 40
    # Every step, before and behind the change, to float tolerance; batch statistics and InfoNCE over all shards among it.
    want, got = losses(whole), losses(run)
    np.testing.assert_allclose([got[step] for step in want], list(want.values()), rtol=2e-2)
    np.testing.assert_allclose([got[step] for step in range(1, 6)], [want[step] for step in range(1, 6)], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.multidevice
@patient
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    with Two(whole, 8) as two:
        assert two.codes() == [0, 0]
    with Two(run, 8, "--slow", 0.5, "--save-seconds", 0.7) as two:  # by the clock of one process, in both
        two.until(4)
        two.processes[1].kill()
        assert two.processes[0].wait(timeout=WAIT) != 0  # it does not wait for ever for one that is gone
    assert saved_steps(run) and saved_steps(run)[-1] < 8
    with Two(run, 8) as two:
        assert two.codes() == [0, 0]
    ends = [leaves(restore_run(folder, task_factory=HardTask)[2]) for folder in (whole, run)]
    for name, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][name], err_msg=name)  # the same topology: the same bits


@pytest.mark.parametrize(
    ("given", "message"),
    [(("host:1", 0, -1), "belong together"), (("", 2, 0), "belong together"), (("host:1", 2, 2), "--process 2 does not exist among --processes 2")],
)
def test_half_an_address_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        distributed.start(*given)
