"""Metrics on disk: whole lines, no step twice, TensorBoard and W&B only where asked for."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from wavepath.errors import ConfigError
from wavepath.training.writers import JsonlWriter, Writers, trim


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_floats_are_written_in_full_and_nan_as_null(tmp_path):
    writer = JsonlWriter(tmp_path, 0)
    writer.scalars(1, {"loss": np.float32(0.1), "psnr": float("nan")})
    writer.close()
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert record["step"] == 1 and np.float32(record["loss"]) == np.float32(0.1) and record["psnr"] is None and record["time"] > 1e9


def test_a_resume_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    writer = JsonlWriter(tmp_path, 2)
    writer.scalars(3, {"loss": 1.5})
    writer.close()
    assert [(record["step"], record["loss"]) for record in lines(path)] == [(1, 3), (2, 2), (3, 1.5)]


def test_a_last_line_without_its_end_is_not_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    trim(path, 9)
    assert path.read_text() == '{"step": 1}\n'


def test_tensorboard_files_hold_scalars_and_panels(tmp_path):
    writers = Writers(tmp_path, ConfigDict({"tensorboard": True, "wandb": ""}), {}, 0)
    writers.scalars(3, {"loss": 0.5})
    writers.image(3, "panel", np.zeros((8, 8, 3), np.uint8))
    writers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["tensors"]) | set(events.Tags()["images"]) >= {"loss", "panel"}


def test_without_tensorboard_tensorflow_is_not_touched(tmp_path):
    writers = Writers(tmp_path, ConfigDict({"tensorboard": False, "wandb": ""}), {}, 0)
    writers.close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_without_wandb_the_error_says_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'wavepath\[wandb\]'"):
        Writers(tmp_path, ConfigDict({"tensorboard": False, "wandb": "tiles"}), {}, 0)


def test_wandb_gets_the_metrics_and_a_resumed_run_its_identity(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.util = types.SimpleNamespace(generate_id=lambda: "abc123")
    fake.Image = lambda pixels: ("image", pixels.shape)
    fake.init = lambda **given: calls.append(given) or types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writers = Writers(tmp_path, ConfigDict({"tensorboard": False, "wandb": "tiles"}), {"lr": 1.0}, 0)
        writers.scalars(1, {"loss": 2.0})
        writers.image(1, "panel", np.zeros((4, 4, 3), np.uint8))
        writers.close()
        fake.util.generate_id = lambda: "another"
    first, second = (call for call in calls if isinstance(call, dict))
    assert first["project"] == "tiles" and first["config"] == {"lr": 1.0} and first["resume"] == "allow"
    assert first["id"] == second["id"] == "abc123"
    assert (1, {"loss": 2.0}) in calls and (1, {"panel": ("image", (4, 4, 3))}) in calls and calls[-1] == "finish"
