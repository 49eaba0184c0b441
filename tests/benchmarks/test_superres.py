"""`wavepath bench superres`: arms differ in their attention alone, the table is complete, and wrong settings are refused."""

import argparse

import jax
import numpy as np
import pytest

from wavepath.benchmarks import superres
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError


def tiny():
    config = train_defaults()
    config.task, config.batch_size, config.train.steps, config.optim.warmup = "superres", 1, 10, "0"
    settings = config.superres
    settings.channels = settings.reduction = 4
    settings.blocks = settings.sr_blocks = settings.wavelet_blocks = settings.wr_blocks = 1
    settings.patch, settings.margin = 12, 2
    return config


def test_what_an_arm_leaves_out():
    task = superres.make_task(tiny(), "chunked")
    model, lr = task.model, jax.ShapeDtypeStruct((1, 12, 12, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), lr)
    operations = {}
    for arm in ("chunked", "no attention", "no transformer"):
        with superres.without(arm):
            operations[arm] = str(jax.make_jaxpr(model.apply)(params, lr))
    found = {arm: ("custom_vjp_call" in text, text.count("conv_general_dilated")) for arm, text in operations.items()}
    attends, convolutions = found["chunked"]
    assert attends and found["no attention"] == (False, convolutions) and found["no transformer"] == (False, convolutions - 1)
    assert superres.make_task(tiny(), "dense").model.attention == "dense"


@pytest.mark.slow
def test_the_report_is_complete():
    report = superres.measure(tiny(), list(superres.ARMS), 1, (1, 8, 8, 4))
    assert report["gradient_norms_equal"]
    header, rows = superres.rows(report)
    assert [row[0] for row in rows] == list(superres.ARMS) and {len(row) for row in rows} == {len(header)}
    text = "\n".join(superres.lines(report))
    assert all(word in text for word in ("dense attention takes", "share of the attention", "share of the transformer", "patches/s", "1x8x8x4"))


def test_settings_are_checked_first(monkeypatch):
    parser = argparse.ArgumentParser()
    superres.add_arguments(parser)
    monkeypatch.setattr("wavepath.benchmarks.timing.restart_with_huge_pages", lambda: pytest.fail("checked too late"))
    with pytest.raises(ConfigError, match="--runs"):
        superres.run(parser.parse_args(["--runs", "0"]))
