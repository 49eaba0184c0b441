"""The launchers: what they would run, and that they start a preempted run again."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
WORDS = ["RUN", "--config=configs/wise_mae.py:variant=B", "--config.data.dir=a folder"]


def launch(script, *words, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], env={**os.environ, "WAVEPATH": "wavepath", **environment}, capture_output=True, text=True, timeout=60
    )


def dry(script, *words, **environment):
    done = launch(script, "--dry-run", *words, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_one_process_or_several_on_this_machine():
    train = ["wavepath", "train", "--workdir=RUN", *WORDS[1:]]
    assert dry("local.sh", *WORDS) == [train]
    joined = ["--coordinator", "localhost:1234", "--processes", "2", "--process"]
    assert dry("local.sh", *WORDS, PROCESSES="2", PORT="1234") == [[*train, *joined, "0"], [*train, *joined, "1"]]


def test_slurm_tasks_find_each_other():
    train = ["srun", "--kill-on-bad-exit=0", "wavepath", "train", "--workdir=RUN", *WORDS[1:]]
    assert dry("slurm.sbatch", *WORDS) == [train]
    assert dry("slurm.sbatch", *WORDS, SLURM_NTASKS="4") == [[*train, "--distributed"]]


def test_all_workers_of_a_pod_do_the_same():
    copied, installed, trained = dry("tpu_pod.sh", *WORDS, TPU="pod", ZONE="zone", PROJECT="mine")
    assert all(command[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] and {"--zone=zone", "--worker=all", "--project=mine"} <= set(command)
               for command in (copied, installed, trained))
    assert copied[4] == "scp" and "setup_environment '[tpu]'" in installed[-1]
    folder, train = trained[-1].removeprefix("--command=").split(" && ")
    assert folder == "cd wavepath" and shlex.split(train) == [".venv/bin/wavepath", "train", "--workdir=RUN", *WORDS[1:], "--distributed"]


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_without_words_they_say_how_to_use_them(script):
    done = launch(script, TPU="", ZONE="")
    assert done.returncode == 2 and f"launch/{script}" in done.stderr


def test_pods_restart_after_a_preemption_alone():
    (jobs,) = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    (workers,) = jobs["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["wavepath", "train", "--workdir=WORKDIR", "--config=CONFIG", "--config.data.dir=TILES", "--distributed"]
    assert job["parallelism"] == job["completions"] and job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [85]
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_are_sound(script):
    checked = Path(sys.executable).with_name("shellcheck")
    if not checked.exists():
        pytest.skip("shellcheck is not installed beside this Python (pip install 'wavepath[test]')")
    done = subprocess.run([str(checked), "-x", f"launch/{script}"], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def stand_in(tmp_path):
    """Stands for `wavepath`: notes how it was called, ends with the codes that it is given one after the other; on TERM with 85."""
    path = tmp_path / "wavepath"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(85))\n"
        "notes = pathlib.Path(sys.argv[0] + '.calls'); notes.open('a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "codes = os.environ['CODES'].split(','); called = len(notes.read_text().splitlines())\n"
        "time.sleep(60) if codes[0] == 'wait' and called == 1 else None\n"
        "sys.exit(int(codes[min(called, len(codes)) - 1].replace('wait', '0')))\n"
    )
    path.chmod(0o755)
    return path


def test_a_preempted_run_is_started_again_and_a_failed_one_is_not(stand_in, tmp_path):
    calls = Path(f"{stand_in}.calls")
    done = launch("local.sh", *WORDS, WAVEPATH=str(stand_in), CODES="85,85,0")
    assert done.returncode == 0 and len(calls.read_text().splitlines()) == 3
    calls.unlink()
    assert launch("local.sh", *WORDS, WAVEPATH=str(stand_in), CODES="1").returncode == 1 and len(calls.read_text().splitlines()) == 1
    calls.unlink()
    assert launch("local.sh", *WORDS, WAVEPATH=str(stand_in), CODES="85", RESTARTS="2").returncode == 85 and len(calls.read_text().splitlines()) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_and_ends_it(stand_in, number):
    environment = {**os.environ, "WAVEPATH": str(stand_in), "CODES": "wait,0"}
    # Tests that are started in the background ignore SIGINT, and a shell cannot trap what it was told to ignore.
    command = ["env", "--default-signal", "bash", str(LAUNCH / "local.sh"), *WORDS]
    script = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    calls = Path(f"{stand_in}.calls")
    end = time.monotonic() + 30
    while not calls.exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    script.send_signal(number)
    assert script.wait(timeout=30) == 85 and len(calls.read_text().splitlines()) == 1
