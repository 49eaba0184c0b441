"""`wavepath bench train`: the three arms are measured on one step and one source, and the report says which half bounds."""

import contextlib

import pytest

from wavepath import cli
from wavepath.benchmarks import train
from wavepath.errors import ConfigError

FACTS = dict(task="mae", source="tiles", examples=100, order="global", batch=8, devices=2, device_kind="cpu", flops=2e9)


def row(name, *rates, **more):
    return {"name": name, "rates": list(rates), "images_per_second": sorted(rates)[len(rates) // 2], "cpu_ms": 3.0, **more}


def test_the_report_says_which_half_bounds():
    wait = dict(waits=[0.01, 0.05, 0.02], data_wait=0.02)
    report = {"facts": FACTS, "rows": [row("end to end", 80.0, 75.0, 90.0, **wait), row("step alone", 100.0), row("input alone", 400.0)]}
    header, body = train.table_of(report)
    assert {len(cells) for cells in body} == {len(header)}
    assert body[0] == ["end to end", "80", "75 to 90", "40", "3", "160", "2.0 % (1.0 to 5.0)"] and body[2][-2:] == ["", ""]
    text = "\n".join(train.lines(report))
    assert "the step bounds: end to end reaches 80 % of it" in text and "4 times as fast" in text and "would reach 80 images/s" in text
    report["rows"][2] = row("input alone", 90.0)
    report["facts"] = {**FACTS, "device_kind": "TPU v5 lite"}
    text = "\n".join(train.lines(report))
    assert "the input bounds: end to end reaches 89 % of it" in text and "same cores" not in text


def test_arms_take_turns(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    seen = []

    class Fake:
        def window(self, arm, count):
            seen.append((arm, count))
            return {"images_per_second": float(len(seen)), "cpu_seconds": 0.002, **({} if arm == "input alone" else {"data_wait": 0.1})}

    rows = train.measure(Fake(), 5, 2)
    assert seen == [(arm, 5) for arm in (*train.ARMS, "step alone", "input alone", "end to end")]
    assert rows[0]["rates"] == [1.0, 6.0] and rows[0]["data_wait"] == 0.1 and rows[1]["cpu_ms"] == 2.0
    assert "data_wait" not in rows[1], "a step that is given its batch waits for nothing"


def test_settings_are_checked_first(monkeypatch):
    monkeypatch.setattr("wavepath.benchmarks.timing.restart_with_huge_pages", lambda: pytest.fail("checked too late"))
    for flags, said in ((["--steps", "0"], "--steps"), (["--config.bach_size=3"], "batch_size")):
        args, module = cli.parse("bench", ["train", "--config", "configs/wise_mae.py:smoke", *flags])
        with pytest.raises(ConfigError, match=said):
            module.run(args)


@pytest.mark.slow
def test_training_on_phantoms_end_to_end():
    from wavepath.config import load_config

    config = load_config("configs/wise_mae.py:smoke", ["batch_size=8", "parallel.devices=1", "model.scan=true"])
    with train.with_data(config) as given, contextlib.closing(train.Bench(given)) as bench:
        assert bench.facts["examples"] > 20 and bench.facts["batch"] == 8
        rows = train.measure(bench, 3, 1)
        loss = bench.loss
    assert [one["name"] for one in rows] == list(train.ARMS) and all(one["images_per_second"] > 0 for one in rows)
    assert 0 <= rows[0]["data_wait"] < 1 and 0.1 < loss < 3
