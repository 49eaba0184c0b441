"""The launchers for real: two processes that find each other through SLURM's environment, stop together, are queued again, and go on elsewhere."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wavepath.training.checkpoint import saved_steps

LAUNCH = Path(__file__).parents[1] / "launch"
WAIT = 400  # seconds; a machine that does other things besides takes minutes to start two processes and compile
WORDS = [
    "--config=configs/wise_mae.py:smoke", "--config.train.log_every=1", "--config.train.save_every=1000", "--config.train.panels_every=0",
    "--config.optim.schedule=constant", "--config.optim.warmup=0",  # the rate does not depend on the length of the run
]
DIVIDED = ["--config.parallel.fsdp=4", "--config.parallel.fsdp_min_size=64"]
# As on two hosts with a task each, that are one here: it starts what it is given, and notes the processes. Harsher than `srun` is told to be: once a
# task has ended with another code than 0, the others are sent TERM.
SRUN = """#!{python}
import os, pathlib, subprocess, sys, time
assert sys.argv[1] == "--kill-on-bad-exit=0"
count, here = int(os.environ["SLURM_NTASKS"]), pathlib.Path(sys.argv[0])
step = dict(SLURM_STEP_NODELIST="localhost,localhost", SLURM_STEP_NUM_NODES=str(count), SLURM_STEP_TASKS_PER_NODE=f"1(x{{count}})")
tasks = [
    subprocess.Popen(sys.argv[2:], env={{**os.environ, **step, "SLURM_PROCID": str(index), "SLURM_NODEID": str(index), "SLURM_LOCALID": "0"}})
    for index in range(count)
]
here.with_name("tasks").write_text(" ".join(str(task.pid) for task in tasks))
while not any(task.poll() for task in tasks) and any(task.poll() is None for task in tasks):
    time.sleep(0.01)
for task in tasks:
    task.poll() is None and task.terminate()
codes = [task.wait() for task in tasks]
here.with_name("codes").write_text(" ".join(map(str, codes)))
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$0.calls"\n'


def port(low, high):
    """One that nobody listens on."""
    for number in range(low + os.getpid() % 1000, high):
        with socket.socket() as end:
            if end.connect_ex(("localhost", number)):
                return number
    raise AssertionError("no port is free")


def start(script, run, words, folder, **environment):
    """The launcher; two devices for each process, unless `environment` says otherwise."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "WAVEPATH": str(Path(sys.executable).with_name("wavepath")),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PATH": f"{folder}:{os.environ['PATH']}",
        **environment,
    }
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), str(run), *WORDS, *words], cwd=LAUNCH.parent, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def records(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.is_file() else []


def until(condition, process, folder):
    end = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_run_under_slurm_is_preempted_queued_again_and_goes_on_with_local_processes(tmp_path):
    run, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    # JAX takes the port from the job's number.
    job = port(61440, 65535) - 61440
    slurm = start("slurm.sbatch", run, ["--config.train.steps=100000", *DIVIDED], tools, SLURM_JOB_ID=str(job), SLURM_NTASKS="2")
    try:
        until(lambda: len(records(run)) >= 3, slurm, tools)
        os.kill(int((tools / "tasks").read_text().split()[1]), signal.SIGTERM)  # to one of them: our own process
        assert slurm.wait(timeout=WAIT) == 0
    finally:
        if slurm.poll() is None:
            for task in (tools / "tasks").read_text().split() if (tools / "tasks").is_file() else ():
                os.kill(int(task), signal.SIGKILL)
        slurm.kill()
    said = (tools / "log").read_text()
    assert (tools / "codes").read_text() == "85 85"
    assert "on 4 cpu devices, state in 4 parts" in said and "stopped after saving; queued again" in said, said[-3000:]
    assert (tools / "scontrol.calls").read_text() == f"requeue {job}\n"
    (stopped,) = saved_steps(run)
    assert json.loads((run / "status.json").read_text())["status"] == "preempted" and stopped >= 3

    steps = stopped + 2
    again = dict(PROCESSES="2", PORT=str(port(29500, 31000)), RESTARTS="0")
    second = start("local.sh", run, [f"--config.train.steps={steps}", *DIVIDED], tools, **again)
    assert second.wait(timeout=WAIT) == 0, (tools / "log").read_text()[-3000:]
    assert f"at step {stopped} of {steps}" in (tools / "log").read_text()
    assert [record["step"] for record in records(run)] == list(range(1, steps + 1))

    # The examples at their places: the losses of one process on one device that nobody stopped.
    whole = tmp_path / "whole"
    alone = dict(RESTARTS="0", XLA_FLAGS="--xla_force_host_platform_device_count=1")
    assert start("local.sh", whole, [f"--config.train.steps={steps}"], tools, **alone).wait(timeout=WAIT) == 0
    want, got = ([record["loss"] for record in records(folder)] for folder in (whole, run))
    assert got == pytest.approx(want, rel=1e-3)
    assert min(abs(one - other) / one for one, other in zip(want, want[1:], strict=False)) > 2e-3, "other examples have other losses"
    assert json.loads((run / "status.json").read_text())["status"] == "done"
