"""What `wavepath bench step` makes of its measurements: rates of images, shares, and the table."""

import math

from wavepath.benchmarks import step_table
from wavepath.benchmarks.step_table import Measured


def measured(seconds, cpu=1.0, **more):
    facts = dict(batch=8, devices=1, device_kind="cpu", dtype="float32", flops=1e9)
    return Measured({**facts, **more}, seconds, cpu, {"loss": 1.0})


def test_contenders_of_different_batch_are_held_against_each_other_by_images():
    found = {"eight": measured([1.0, 2.0, 1.0]), "sixteen": measured([2.0, 4.0, 2.0], cpu=1.5, batch=16), "fast": measured([0.5, 0.5, 0.5])}
    eight, sixteen, fast = step_table.rows_of(found, "eight", [], {})
    assert sixteen["images_per_second"] == eight["images_per_second"] == 8 and sixteen["rate_over_base"] == [1.0, 1.0, 1.0]
    assert sixteen["cpu_over_base"] == 0.75 and "rate_over_base" not in eight and "share_of_product" not in eight and "mfu" not in eight
    assert fast["rate_over_base"] == [2.0, 2.0, 4.0] and fast["cpu_over_base"] == 1.0 and fast["loss"] == 1.0


def test_shares_are_of_all_the_devices():
    """Eight images of 1 GFLOP in a second, where one product reaches 8 GFLOP/s, or a chip's units 16."""
    found = {
        "cpu": measured([1.0], devices=4), "gpu": measured([1.0], device_kind="a gpu"), "gpus": measured([1.0], device_kind="a gpu", devices=4),
    }
    shares = [row["share_of_product"] for row in step_table.rows_of(found, "cpu", [8e9], {})]
    assert shares == [1.0, 1.0, 0.25], "devices of a CPU are parts of one"
    rows = step_table.rows_of(found, "cpu", [], {"float32": 16e9})
    assert [row["mfu"] for row in rows[1:]] == [0.5, 0.125] and rows[2]["images_per_second_per_device"] == 2


def row(name, milliseconds, **more):
    facts = dict(batch=8, devices=2, device_kind="cpu", dtype="float32", flops=1e9, parameters=10**6, scratch=10**6, planned=3 * 10**6)
    median = sorted(milliseconds)[len(milliseconds) // 2]
    rate = 1e3 * 8 / median
    return {
        "name": name, **facts, "milliseconds": milliseconds, "median_ms": median, "cpu_ms": 2 * median, "images_per_second": rate,
        "images_per_second_per_device": rate / 2, "flops_per_second": 1e9 * rate, **more,
    }  # fmt: skip


def test_the_table_says_what_shares_are_of():
    ours, torch = row("wavepath", [100.0, 110.0, 90.0], share_of_product=0.5, rate_over_base=[0.9, 0.8, 1.0]), row("torch", [90.0, 90.0, 90.0])
    report = {"rows": [ours, torch], "base": "torch", "product": {"flops_per_second": 1.6e11, "each": {"matrix product": 1.6e11}}}
    header, body = step_table.table_of(report)
    assert {len(cells) for cells in body} == {len(header)} and "of the product" in header and "MFU" not in header
    found = dict(zip(header, body[0], strict=True))
    assert found["images/s"] == "80" and found["per device"] == "40" and found["of the product"] == "50.0 %" and found["GFLOP/s"] == "80"
    assert found["rate over torch"] == "0.90 (0.80 to 1.00)" and body[1][header.index("rate over torch")] == "1"
    assert any("GFLOP/s of one large square product" in line for line in step_table.lines(report))
    alone = {"rows": [row("wavepath", [100.0], mfu=0.4)], "base": "wavepath"}
    header, body = step_table.table_of(alone)
    assert "MFU" in header and "40.0 %" in body[0] and not any(name.startswith("rate over") for name in header)
    lost = {"rows": [row("wavepath", [1.0], loss=math.nan)], "base": "wavepath"}
    assert any("may not be that of real training" in line for line in step_table.lines(lost))


def test_a_peak_that_is_a_bound_is_shown_as_one():
    rows = [row("a", [1.0], device_peak=5 * 10**6, device_peak_is_bound=False), row("b", [1.0], device_peak=7 * 10**6, device_peak_is_bound=True)]
    report = {"rows": [*rows, row("torch", [1.0])], "base": "a"}
    header, body = step_table.table_of(report)
    assert header[-1] == "device peak MB, first step alone" and [cells[-1] for cells in body] == ["5", "at most 7", ""]
    assert any("greatest use so far" in line for line in step_table.lines(report))
    assert {len(cells) for cells in body} == {len(header)}
