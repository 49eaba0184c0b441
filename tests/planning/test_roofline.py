"""The roofline against numbers by hand."""

import pytest

from wavepath.planning.chips import CHIPS, Chip
from wavepath.planning.hlo import Collective, Program
from wavepath.planning.roofline import Assumptions, communication, compute_seconds, estimate, listed, run_time, volume

CHIP = Chip("toy", "TPU toy", {"bfloat16": 100.0, "float32": 100.0}, 1000, 1000, 10.0, 5.0, 4, "made up")
WHOLE = Assumptions(1.0, 1.0, 1.0)


def collective(kind="all-reduce", size=80.0, group=4, times=1):
    return Collective(kind, size, group, 1, times, "x", "f32")


def program(flops=200.0, traffic=10.0, collectives=(), dtype="bf16"):
    return Program(tuple(collectives), flops, traffic, {dtype: flops})


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-reduce", 120.0), ("all-gather", 60.0), ("reduce-scatter", 60.0), ("all-to-all", 60.0), ("collective-permute", 80.0)]
)
def test_volume(kind, sent):
    assert volume(collective(kind)) == sent
    assert volume(collective(kind, group=1)) == 0.0


def test_communication_counts_executions():
    found = communication([collective(times=3), collective("all-gather"), collective()], 10.0)
    assert found == {"all-reduce": pytest.approx(4 * 12.0), "all-gather": pytest.approx(6.0)}


def test_precision_costs_passes_on_a_tpu():
    assert compute_seconds({"bf16": 100.0, "f32": 100.0}, CHIP) == pytest.approx(2.0)
    assert compute_seconds({"f32:highest": 100.0}, CHIP) == pytest.approx(6.0)
    h100 = CHIPS["h100-sxm"]
    assert compute_seconds({"f32:highest": h100.peak["float32"]}, h100) == pytest.approx(1.0)


def made(**given):
    values = dict(model_flops=640.0, dtype="bfloat16", devices=4, batch=8, bandwidth=60.0, assumptions=WHOLE) | given
    return estimate(given.pop("program", program(collectives=[collective()])), CHIP, **{k: v for k, v in values.items() if k != "program"})


def test_a_step_that_computes():
    """200 FLOP at 100 a second: 2 s; memory 1 s; 120 bytes at 60: 2 s more when nothing hides them. The model has 160 of them on a device: 1.6 s."""
    found = made()
    assert (found.compute, found.memory, found.communication, found.model) == pytest.approx((2.0, 1.0, 2.0, 1.6))
    assert (found.best, found.worst, found.bound) == (pytest.approx(2.0), pytest.approx(4.0), "compute")
    assert found.images_per_second == pytest.approx((4.0, 2.0))
    assert found.mfu == pytest.approx((0.8, 0.4))
    assert found.collectives == {"all-reduce": pytest.approx(2.0)}


def test_what_bounds_it():
    assert made(program=program(traffic=50.0)).bound == "memory"
    slow = made(bandwidth=6.0)
    assert (slow.bound, slow.best, slow.worst) == ("communication", pytest.approx(20.0), pytest.approx(22.0))
    alone = made(program=program(), bandwidth=0.0)  # one chip has no links to use
    assert (alone.communication, alone.best) == (0.0, alone.worst)


def test_shares_of_the_peaks():
    found = made(assumptions=Assumptions(compute=0.5, memory=0.25, links=0.5))
    assert (found.compute, found.memory, found.communication) == pytest.approx((4.0, 4.0, 4.0))
    assert found.mfu[0] == pytest.approx(0.4)
    lines = listed(Assumptions(compute=0.5), 60e9)
    assert "50%" in lines[0] and any("60 GB/s" in line for line in lines)
    assert not any("GB/s" in line for line in listed(Assumptions(), None))


def test_mfu_is_by_the_dtype_of_the_model():
    h100 = CHIPS["h100-sxm"]
    both = [
        estimate(program(1e12, 0.0, dtype=short), h100, model_flops=1e12, dtype=dtype, devices=1, batch=1, bandwidth=0.0, assumptions=WHOLE)
        for short, dtype in (("bf16", "bfloat16"), ("f32", "float32"))
    ]
    assert [one.mfu[0] for one in both] == pytest.approx([1.0, 1.0])
    assert both[1].best == pytest.approx(2 * both[0].best)


def test_time_of_a_run():
    assert run_time(7200, 0.5, 16) == (3600.0, 16.0)
