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

import jax
import numpy as np
import pytest
from hard_task import FakePipeline, FakeSource, HardTask, leaves

from wavepath.errors import EXIT_PREEMPTED, ConfigError
from wavepath.training import distributed
from wavepath.training.checkpoint import restore_run, saved_steps
from wavepath.training.parallel import Parallel

HERE = Path(__file__).parent
WAIT = 300  # seconds; a machine that does other things besides takes a minute to compile
QUICK = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compile in half the time


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
        environment = {**QUICK, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
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


def curve(folder, name="loss"):
    values = [(record["step"], record[name]) for record in records(folder) if name in record]
    assert len(dict(values)) == len(values), "one process alone writes"
    return dict(values)


def one(folder, steps, *more):
    """One process of four devices."""
    environment = {**QUICK, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
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
    assert saved_steps(run)[-1] == 40 and max(curve(run)) == 40
    assert curve(run, "order") == curve(whole, "order")  # the same examples at the same places, of both processes and of one
    # Every step, before and behind the change, to float tolerance; batch statistics and InfoNCE over all shards among it.
    want, got = curve(whole), curve(run)
    np.testing.assert_allclose([got[step] for step in want], list(want.values()), rtol=2e-2)
    np.testing.assert_allclose([got[step] for step in range(1, 6)], [want[step] for step in range(1, 6)], rtol=1e-4)


def evaluated_as_by_one(run):
    """What two processes wrote of their evaluation, 24 examples in batches of 16, is the mean over the examples one by one."""
    config, task, state = restore_run(run, task_factory=HardTask)
    examples = config.train.eval_examples
    assert examples % config.batch_size, "the last batch has padding"
    evaluate = Parallel("jit", jax.local_devices()[:1]).eval_step(task)
    parts = [evaluate(state, batch)["loss"] for batch in FakePipeline.eval_batches(FakeSource(), 4, limit=examples)]
    total, count = (sum(float(part[place]) for part in parts) for place in (0, 1))
    assert count == examples
    assert curve(run, "eval_loss") == {8: pytest.approx(total / count, rel=1e-5)}


@pytest.mark.slow
@pytest.mark.multidevice
@patient
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    with Two(whole, 8) as two:
        assert two.codes() == [0, 0]
    evaluated_as_by_one(whole)
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


@pytest.mark.parametrize(("environment", "devices"), [
    ({}, None),
    (dict(SLURM_PROCID="1", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="1(x2)"), []),  # the host to itself: all its GPUs
    (dict(SLURM_PROCID="9", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="8(x2)"), None),  # one of eight: JAX gives it one
    (dict(SLURM_PROCID="6", SLURM_NODEID="3", SLURM_STEP_TASKS_PER_NODE="2(x3),1"), []),
    (dict(SLURM_PROCID="5", SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="2(x3),1"), None),
    (dict(OMPI_COMM_WORLD_LOCAL_SIZE="1"), []), (dict(OMPI_COMM_WORLD_LOCAL_SIZE="4"), None),
    # mpirun inside a job of SLURM, which has started one daemon of it on each host.
    (dict(OMPI_COMM_WORLD_LOCAL_SIZE="8", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="1(x2)"), None),
    (dict(OMPI_COMM_WORLD_LOCAL_SIZE="1", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="8"), []),
    (dict(SLURM_PROCID="1", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="1(x2)", JAX_LOCAL_DEVICE_IDS="0,1"), None),
])  # fmt: skip
def test_a_process_that_has_its_host_to_itself_takes_all_gpus(monkeypatch, environment, devices):
    """JAX alone would take the first GPU of each host and leave seven."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_LOCAL"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: given.update(words))
    distributed.start()
    assert given == {"local_device_ids": devices}
