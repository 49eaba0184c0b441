"""`wavepath bench ... --compare OLD.json`: numbers of one name are set side by side, and what differs in the circumstances is said."""

import json

import pytest

from wavepath import cli
from wavepath.benchmarks import compare
from wavepath.errors import ConfigError

MACHINE = {"cpu": "a", "cpus": 2, "load_at_start": 0.1, "python": "3.11"}


def report(**more):
    return {"machine": MACHINE, "versions": {"jax": "0.10.2"}, "threads": 2, "runs": 3, **more}


def test_numbers_are_found_by_name_and_size():
    found = compare.numbers(report(
        rows=[{"name": "step", "batch": 16, "median_ms": 4.0, "milliseconds": [1.0, 2.0], "rates": [1.0, 5.0, 3.0], "ok": True, "bad": float("nan")}],
        steps=[{"arm": "full", "crop": 64, "cpu_ms": 7}, {"arm": "full", "crop": 128, "cpu_ms": 9}, {"arm": "full", "crop": 64, "cpu_ms": 8}],
        memory={"chunked": 10},
    ))  # fmt: skip
    assert found == {
        ("step batch 16", "median_ms"): 4.0, ("step batch 16", "rates"): 3.0, ("full crop 64", "cpu_ms"): 7.0, ("full crop 128", "cpu_ms"): 9.0,
        ("full crop 64 (2)", "cpu_ms"): 8.0, ("memory", "chunked"): 10.0,
    }  # fmt: skip


def test_the_table_has_ratios_and_warnings():
    old = report(kind="step", rows=[{"name": "a", "ms": 100.0, "flops": 5, "noise": 1.0}, {"name": "gone", "ms": 1.0}])
    new = report(kind="step", rows=[{"name": "a", "ms": 50.0, "flops": 5, "noise": 1.01}, {"name": "fresh", "ms": 1.0}])
    new |= {"threads": 1, "versions": {"jax": "0.11.0"}, "machine": {**MACHINE, "load_at_start": 9.0}}
    text = compare.text(old, new, "old.json")
    lines = [line.split() for line in text.splitlines()]
    assert ["a", "ms", "100", "50", "0.5"] in lines and ["a", "noise", "1", "1.01", "same"] in lines
    assert "1 numbers are exactly as they were" in text and "only now: fresh" in text and "only then: gone" in text
    assert "warning: threads: 2 then, 1 now" in text and "warning: jax: 0.10.2 then, 0.11.0 now" in text and "load_at_start" not in text
    chosen = compare.text(old, {**new, "compare": ["ms"]}, "old.json")
    assert "noise" not in chosen and " ms " in chosen


def test_a_zero_that_was_is_no_ratio():
    text = compare.text(report(waits={"share": 0.0}), report(waits={"share": 0.5}), "old.json")
    assert ["waits", "share", "0", "0.5", "was", "0"] in [line.split() for line in text.splitlines()]


def test_another_case_is_warned_of():
    """What stands at the top of a report and says what was measured is in no row's name."""
    facts = {"examples": 10, "task": "mae", "flops": 2.0}
    old = report(batch_size=128, order="global", source="TILES", image_shape=[8, 8, 3], median=5.0, facts=facts)
    new = report(batch_size=8, order="blocks", source="OTHER", image_shape=[9, 8, 3], median=6.0, facts={**facts, "examples": 11, "flops": 3.0})
    found = compare.differences(old, {**new, "command": "c"})
    assert found == [
        "command: not said then, c now", "batch_size: 128 then, 8 now", "order: global then, blocks now", "source: TILES then, OTHER now",
        "image_shape: [8, 8, 3] then, [9, 8, 3] now", "examples: 10 then, 11 now",
    ]
    assert compare.differences(old, {**old, "median": 7.0, "kind": "input"}) == []
    assert ("", "median") in compare.numbers(old) and ("", "batch_size") not in compare.numbers(old)


def test_the_old_file_is_read_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("wavepath.benchmarks.data.measure", lambda *_: pytest.fail("measured first"))
    other = tmp_path / "other.json"
    other.write_text("[1]")
    train, unnamed = tmp_path / "train.json", tmp_path / "unnamed.json"
    train.write_text(json.dumps(report(kind="train")))
    unnamed.write_text(json.dumps(report()))
    for path, said in (
        (tmp_path / "none.json", "no file"), (other, "not a report"), (train, "`wavepath bench train`; give one that `wavepath bench data"),
        (unnamed, "does not say of what"),
    ):
        args, module = cli.parse("bench", ["data", "--compare", str(path)])
        with pytest.raises(ConfigError, match=said):
            module.run(args)


def test_every_kind_is_compared(tmp_path, monkeypatch, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report(kind="data", slides=[{"id": "s", "rate": 10.0}])))

    def measured(args):
        args.json.write_text(json.dumps(report(slides=[{"id": "s", "rate": 30.0}])))
        return 7

    monkeypatch.setattr("wavepath.benchmarks.data.run", measured)
    args, module = cli.parse("bench", ["data", "--compare", str(old)])
    assert module.run(args) == 7  # the exit code is that of the measurement
    assert ["s", "rate", "10", "30", "3"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert not args.json.exists()
    args, module = cli.parse("bench", ["data", "--compare", str(old), "--json", str(tmp_path / "new.json")])
    assert module.run(args) == 7 and json.loads(args.json.read_text())["kind"] == "data"
    assert cli.parse("bench", ["data", "--json", str(tmp_path / "new.json")])[0].compare is None
