"""`wavepath bench stain`: what its arms leave out, which are measured where, a whole report, and wrong settings."""

import argparse

import jax
import numpy as np
import pytest

from wavepath.benchmarks import stain
from wavepath.benchmarks.timing import planned_bytes
from wavepath.errors import ConfigError
from wavepath.tasks.stain import Staining


def tiny(arm, crop=32):
    config = stain.make_config("cpu", crop, 1, arm)
    settings = config.stain
    settings.channels = settings.encoder_channels = settings.discriminator_channels = 4
    settings.encoder_blocks, settings.discriminator_layers = 1, 1
    settings.msfpm, settings.blocks = False, 1
    return config


def test_what_an_arm_leaves_out():
    tasks = {arm: Staining(stain.make_config("paper", 256, 1, arm)) for arm in stain.ARMS}
    assert {arm: task.encoders for arm, task in tasks.items()} == {
        "full": ("he", "ihc"), "dense": ("he", "ihc"), "no CoA": ("ihc",), "no VMFE": ("he", "ihc"), "pix2pix": ()
    }  # fmt: skip
    made = {arm: task.generator for arm, task in tasks.items()}
    assert {arm: (model.encoder, model.msfpm, model.coa, model.blocks) for arm, model in made.items()} == {
        "full": ("vmfe", True, True, 6), "dense": ("vmfe", True, True, 6), "no CoA": ("vmfe", True, False, 6), "no VMFE": ("plain", True, True, 6),
        "pix2pix": ("resnet", False, False, 9),
    }  # fmt: skip
    assert {model.channels for model in made.values()} == {64}
    assert tasks["dense"].generator.attention == "dense" != tasks["full"].generator.attention


def test_every_arm_at_the_first_crop_and_dense_only_where_it_differs():
    assert stain.contenders(stain.ARMS, (64, 128)) == [("full", 64), ("no CoA", 64), ("no VMFE", 64), ("pix2pix", 64), ("full", 128)]
    assert stain.contenders(["full", "dense", "pix2pix"], (256, 512)) == [
        ("full", 256), ("dense", 256), ("pix2pix", 256), ("full", 512), ("dense", 512)
    ]  # fmt: skip


def test_the_state_that_is_timed_is_one_of_the_task():
    task = Staining(tiny("full"))
    shapes, state = jax.eval_shape(task.init, jax.random.key(0)), stain.make_state(task)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        assert np.asarray(leaf).any() or "bias" in jax.tree_util.keystr(path)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt))
    assert all((np.asarray(leaf) == 1).all() for path, leaf in jax.tree_util.tree_leaves_with_path(state.extra) if "'var'" in str(path[-1]))


def test_scores_that_a_library_would_hide_are_counted():
    def attention(q, k, v):
        return jax.nn.softmax(q @ k.T, axis=-1) @ v

    lowered = jax.jit(attention).lower(*[jax.ShapeDtypeStruct((512, 32), np.float32)] * 3)
    assert planned_bytes(lowered) >= 512 * 512 * 4


def facts(arm, crop, ms, **more):
    return {
        "arm": arm, "crop": crop, "batch": 2, "median_ms": ms, "milliseconds": [ms], "cpu_ms": ms, "inference_median_ms": ms / 4,
        "inference_milliseconds": [ms / 4], "inference_cpu_ms": ms / 4, **more,
    }  # fmt: skip


def test_tables_and_remarks():
    memory = [{"crop": 512, "attention": form, "forward": 1e9 * factor, "gradient": 2e9 * factor} for form, factor in (("chunked", 1), ("dense", 4))]
    dense = facts("dense", 256, 500.0, over_full=[2.0, 1.5, 2.5], inference_over_full=[1.0, 1.0, 1.0], grad_norm=1.0, same_gradient=False)
    report = {"steps": [facts("full", 64, 100.0), dense], "memory": memory}
    steps, inference, planned = stain.tables(report)
    assert all(len(row) == len(header) for header, rows in (steps, inference, planned) for row in rows)
    assert steps[1][1][-1] == "2.00 (1.50 to 2.50)" and steps[1][0][5:] == ["20.00", "1"] and inference[1][0][5] == "80.00"
    assert planned[1][1] == ["512", "dense", "4000", "8000"]
    text = "\n".join(stain.lines(report))
    assert "DIFFER in length" in text and "at 64 px the attention of `full` is dense by itself" in text and "2.0 GB of scratch, dense 8.0 GB" in text


def test_settings_are_checked_first(monkeypatch):
    parser = argparse.ArgumentParser()
    stain.add_arguments(parser)
    monkeypatch.setattr("wavepath.benchmarks.timing.restart_with_huge_pages", lambda: pytest.fail("checked too late"))
    for argv, words in ((["--runs", "0"], "--runs"), (["--crop", "60"], "multiples of 8"), (["--memory", "16"], "multiples of 8")):
        with pytest.raises(ConfigError, match=words):
            stain.run(parser.parse_args(argv))


@pytest.mark.slow
def test_the_report_is_complete():
    configs = {(arm, 32): tiny(arm) for arm in ("full", "dense")}
    for config in configs.values():
        config.stain.encoder, config.stain.l1 = "resnet", "fixed"  # wavelets and the other encoder take most of the compiling
    configs["full", 32].stain.attention, configs["full", 32].stain.attention_chunk = "chunked", 16  # so that the two are two
    found = stain.measure(configs, 1, lambda compiling: stain.generator_memory(configs["full", 32], [128], compiling), 2)
    by_arm = {facts["arm"]: facts for facts in found["steps"]}
    assert by_arm["dense"]["same_gradient"] and "over_full" in by_arm["dense"] and "over_full" not in by_arm["full"]
    assert all(facts["median_ms"] > 0 < facts["inference_median_ms"] for facts in found["steps"])
    assert [(one["crop"], one["attention"]) for one in found["memory"]] == [(128, "chunked"), (128, "dense")]
    chunked, dense = found["memory"]
    assert dense["forward"] > chunked["forward"] > 0 and dense["forward"] >= 32**4 * 4 and dense["gradient"] > chunked["gradient"] > 0
    assert stain.tables(found) and stain.lines(found)
