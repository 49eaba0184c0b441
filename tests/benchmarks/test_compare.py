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
    assert "another kind" in compare.text(report(kind="train"), new, "old.json")
    chosen = compare.text(old, {**new, "compare": ["ms"]}, "old.json")
    assert "noise" not in chosen and " ms " in chosen


def test_a_zero_that_was_is_no_ratio():
    text = compare.text(report(waits={"share": 0.0}), report(waits={"share": 0.5}), "old.json")
    assert ["waits", "share", "0", "0.5", "nan"] in [line.split() for line in text.splitlines()]


def test_the_old_file_is_read_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("wavepath.benchmarks.data.measure", lambda *_: pytest.fail("measured first"))
    other = tmp_path / "other.json"
    other.write_text("[1]")
    for path, said in ((tmp_path / "none.json", "no file"), (other, "not a report")):
        args, module = cli.parse("bench", ["data", "--compare", str(path)])
        with pytest.raises(ConfigError, match=said):
            module.run(args)


def test_every_kind_is_compared(tmp_path, monkeypatch, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report(slides=[{"id": "s", "rate": 10.0}])))

    def measured(args):
        args.json.write_text(json.dumps(report(slides=[{"id": "s", "rate": 30.0}])))
        return 7

    monkeypatch.setattr("wavepath.benchmarks.data.run", measured)
    args, module = cli.parse("bench", ["data", "--compare", str(old)])
    assert module.run(args) == 7  # the exit code is that of the measurement
    assert ["s", "rate", "10", "30", "3"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert not args.json.exists()
    args, module = cli.parse("bench", ["data", "--compare", str(old), "--json", str(tmp_path / "new.json")])
    assert module.run(args) == 7 and args.json.exists()
