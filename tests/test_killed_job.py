"""`kill -9` at points of the main job's real commands, and the same command again: the outputs of a job that was never touched."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from wavepath.training.checkpoint import restore_run, saved_steps

TRAIN = [
    "train", "--config=configs/wise_mae.py:smoke", "--config.model.scan=True", "--config.batch_size=8", "--config.parallel.devices=1",
    "--config.train.steps=24", "--config.train.save_every=5", "--config.train.log_every=1", "--config.train.panels_every=8",
]


def start(argv):
    return subprocess.Popen([sys.executable, "-m", "wavepath", *map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(argv):
    process = start(argv)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said


def kill_when(argv, condition):
    """Kills the command as soon as the condition holds; False where it ended before that."""
    process = start(argv)
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)  # our own child
    process.communicate()
    return process.returncode == -signal.SIGKILL


def files(folder):
    """Bytes of the files that do not name the folder, or the times of the slides in it."""
    left_out = {"timings.csv", "settings.json", "info.json", "screening.json"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out}


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["grad_norm"], record["lr"]) for record in records}


@pytest.mark.slow
def test_training_and_embedding_killed_again_and_again(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*TRAIN, f"--workdir={whole}"])
    argv, phantom = [*TRAIN, f"--workdir={killed}"], killed / "phantom"
    conditions = {
        "a phantom slide is drawn": lambda: any((phantom / "slides").glob(".*.tmp")),
        "its tiles are prepared": lambda: (phantom / "tiles" / "prepare.lock").exists(),
        "the data is whole": lambda: (killed / "constants.json").exists(),
        "two steps are done": lambda: (killed / "metrics.jsonl").is_file() and (killed / "metrics.jsonl").read_text().count("\n") >= 2,
        "step 5 is being saved": lambda: any("tmp" in path.name for path in killed.glob("checkpoints/*")),
        "step 5 is saved": lambda: 5 in saved_steps(killed),
        "step 10 is saved": lambda: 10 in saved_steps(killed),
    }
    hit = {name: kill_when(argv, condition) for name, condition in conditions.items()}
    assert sum(hit.values()) >= 6, hit
    assert max(saved_steps(killed)) < 24
    finish(argv)
    (_, _, one), (_, _, other) = restore_run(killed), restore_run(whole)
    import jax

    assert int(one.step) == int(other.step) == 24
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert metrics(killed) == metrics(whole) and set(metrics(whole)) == set(range(1, 25))
    assert files(killed / "panels") == files(whole / "panels") != {}
    assert files(phantom) == files(whole / "phantom") != {}

    def embed(name):
        return ["embed", f"--checkpoint={whole}", f"--data={whole / 'phantom/tiles'}", f"--out={tmp_path / name}", "--devices=1", "--batch-size=8"]

    finish(embed("features"))
    assert kill_when(embed("again"), lambda: any((tmp_path / "again").glob("*.h5")))
    assert not (tmp_path / "again/embed.json").exists()
    finish(embed("again"))
    found = files(tmp_path / "again")
    assert found == files(tmp_path / "features") and sum(name.endswith(".h5") for name in found) == 2
