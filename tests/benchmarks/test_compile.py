"""`wavepath bench compile`: cold and warm processes are told apart, and a child's mistake is the command's."""

import json

import pytest

from wavepath import cli
from wavepath.benchmarks import compile as compiling
from wavepath.benchmarks import step
from wavepath.errors import ConfigError, WavepathError

SMOKE = "configs/wise_mae.py:smoke"


def one(seconds, hit):
    return dict(
        trace=1.0, lower=0.5, compile=seconds, compile_cpu=2 * seconds, hit=hit, stablehlo_lines=100, arguments=1, scratch=2, planned=3_000_000,
        devices=1, device_kind="cpu", batch=4,
    )


def test_rows_are_medians_of_cold_and_warm(monkeypatch):
    asked = []

    def child(spec, overrides, batch, cache):
        cold = not list(cache.iterdir())
        (cache / "entry").write_bytes(b"x" * 2_000_000)
        asked.append((tuple(overrides), cold))
        return one((10.0 if "model.scan=true" in overrides else 20.0) + len(asked) / 10 if cold else 0.5, not cold)

    monkeypatch.setattr(compiling, "_run_child", child)
    rows = compiling.measure(compiling.cases([SMOKE], step.variants(["model.scan=false,true"]), ["lr=1"]), 4, 3)
    assert asked[:4] == [(("lr=1", f"model.scan={value}"), cold) for value in ("false", "true") for cold in (True, False)]
    assert asked[4][0][-1] == "model.scan=true", "the second round begins with the second variant"
    header, body = compiling.table_of({"rows": rows})
    found = dict(zip(header, body[0], strict=True))
    assert found["config"] == f"{SMOKE} model.scan=false" and found["compile cold s"] == "20.7 (20.1 to 20.9)" and found["from the cache s"] == "0.50"
    assert found["cache entry MB"] == "2.0" and found["planned MB"] == "3" and len(rows[0]["trace_seconds"]) == 6
    assert compiling.lines({"rows": rows}) == ["batch 4 on 1 cpu device"]
    assert "NOT find" in compiling.lines({"rows": [{**rows[0], "hit": False}]})[-1]


def test_every_config_has_every_variant():
    variants = [("a=1", ["a=1"]), ("a=2", ["a=2"])]
    assert compiling.cases(["x", "y", "x"], variants, ["b=3"]) == [
        (f"{spec} a={value}", spec, ["b=3", f"a={value}"]) for spec in ("x", "y") for value in (1, 2)
    ]
    assert compiling.cases(["x"], [("", [])], []) == [("x", "x", [])]


def test_a_mistake_is_said_before_a_child_is_started(monkeypatch):
    monkeypatch.setattr(compiling, "_run_child", lambda *_: pytest.fail("started"))
    for flags, said in (
        (["--runs", "0"], "--runs"), (["--batch", "4", "--vary", "batch_size=8,16"], "give one of them alone"),
        (["--config.modle.scan=1"], "model.scan"), (["--vary", "model.scan=perhaps"], "true or false"),
    ):
        args, module = cli.parse("bench", ["compile", "--config", SMOKE, *flags])
        with pytest.raises(ConfigError, match=said):
            module.run(args)


@pytest.mark.slow
def test_the_cache_serves_the_second_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    tiny = ["train.steps=5", "optim.warmup=0", "task=mae", "model.image_size=32", "prepare.tiles.size=32", "model.scan=true"]
    (row,) = compiling.measure(compiling.cases([SMOKE], step.variants([]), tiny), 2, 1)
    assert row["hit"] and row["entry_bytes"] > 10_000 and row["stablehlo_lines"] > 1000
    assert len(row["cached_seconds"]) == len(row["cold_seconds"]) == 1 and json.dumps(row)
    with pytest.raises(WavepathError, match="not divisible"):
        compiling.measure(compiling.cases([SMOKE], step.variants([]), [*tiny, "optim.accumulate=2"]), 3, 1)
