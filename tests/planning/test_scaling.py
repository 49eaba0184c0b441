"""Weak scaling on paper, with a compiler that is a formula, and of a small model with the compiler of TPUs."""

import importlib.util
import json

import pytest

from wavepath.cli import main
from wavepath.config import load_config
from wavepath.errors import ConfigError
from wavepath.planning import scaling
from wavepath.planning import topology as topologies
from wavepath.planning.chips import CHIPS
from wavepath.planning.compile import Compiled, Memory
from wavepath.planning.hlo import Collective, Program
from wavepath.planning.topology import Topology, find

SMOKE = "configs/wise_mae.py:smoke"
MEMORY = Memory(1, 1, 1, 1, 2)


@pytest.fixture
def slices(monkeypatch):
    """CPU devices that call themselves slices of v5e: four of them stand for all."""

    def made(name):
        family, shape = topologies.parse(name)
        return Topology(name, family, shape, find("cpu:8").devices[: shape[0] * shape[1]], CHIPS[family])

    monkeypatch.setattr(scaling, "find", made)


def compiler(config, topology):
    """A step of 1 ms of computing, with an all-reduce of 8 MB, or a gathering and a scattering of as much."""
    count = len(topology.devices)
    kinds = ("all-gather", "reduce-scatter") if config.parallel.fsdp != 1 else ("all-reduce",)
    one = tuple(Collective(kind, 8e6, count, 1, 3, kind, "bf16") for kind in kinds)
    return Compiled(True, MEMORY, Program(one, 1e11, 1e6, {"bf16": 197e12 * 0.6 * 1e-3}))


def test_a_table_over_slices(slices):
    config = load_config(SMOKE)
    first, second = scaling.table(config, "v5e", (4, 8), per_device=2, compiler=compiler)
    assert (first.topology, second.topology, first.devices, second.devices) == ("v5e:2x2", "v5e:2x4", 4, 8)
    # Twice 3/4 and twice 7/8 of 24 MB.
    assert (first.exchanges, first.sent, second.sent) == (3, pytest.approx(36e6), pytest.approx(42e6))
    assert first.efficiency == (1, 1) and second.efficiency[0] == pytest.approx(1) and 0.5 < second.efficiency[1] < 1
    # Two lines of 100 GB/s each way, half of which pass the middle, at 80 %.
    assert first.seconds["worst"] - first.seconds["best"] == pytest.approx(36e6 / (0.8 * 100e9))
    assert first.images_per_second == pytest.approx((8 / first.seconds["best"], 8 / first.seconds["worst"]))
    text = scaling.markdown([first, second])
    assert text.count("\n| jit | ") == 2 and "| 24.0 | 0.0 | 0.0 | 0.0 | 36.0 |" in text and "Compiled with jax " in text
    assert all(len(row) == len(scaling.HEADER) for row in scaling.cells([first, second]))
    json.dumps([row.to_json() for row in (first, second)])


def test_a_divided_state_and_a_picture(slices, tmp_path):
    rows = scaling.table(load_config(SMOKE), "v5e", (4, 8), "fsdp", per_device=2, compiler=compiler)
    assert rows[0].collectives == {"all-gather": 24e6, "reduce-scatter": 24e6} and rows[0].sent == pytest.approx(36e6)
    scaling.picture(rows, tmp_path / "scaling.png")
    assert 1000 < (tmp_path / "scaling.png").stat().st_size < 100_000


def test_a_step_that_does_not_fit_is_an_error_with_a_way_out(slices):
    refused = Compiled(False, None, None, 20, 10, "RESOURCE_EXHAUSTED: no")
    with pytest.raises(ConfigError, match="--weak-scaling v5e:32, or --config.model.remat=full"):
        scaling.table(load_config(SMOKE), "v5e", (4,), compiler=lambda config, topology: refused)


@pytest.mark.parametrize(("family", "shapes"), [
    ("v5e", [(2, 2), (4, 4), (8, 8), (16, 16)]), ("v5p", [(2, 2, 1), (2, 2, 4), (4, 4, 4), (4, 8, 8)]),
])  # fmt: skip
def test_slices_are_even_and_known_to_the_planner(family, shapes):
    assert [scaling.shape(family, count) for count in scaling.DEVICES] == shapes
    assert all(topologies.parse(f"{family}:{'x'.join(map(str, shape))}") == (family, shape) for shape in shapes)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: scaling.parse("h200"), "no TPU"), (lambda: scaling.parse("v5e:0"), "no TPU with its batch"),
    (lambda: scaling.parse("v5e:2x2"), "v5e:64"),
    (lambda: scaling.shape("v5e", 12), "powers of two"), (lambda: scaling.shape("a100-40", 4), "no TPU"),
    (lambda: scaling.table(None, "v5e", backend="horovod"), "choose one of jit, fsdp, pmap, shard_map"),
])
def test_what_cannot_be_is_refused(call, match):
    with pytest.raises(ConfigError, match=match):
        call()


def test_the_command_takes_no_topology_beside_it(capsys):
    assert main(["plan", f"--config={SMOKE}", "--weak-scaling", "v5e", "--topology", "v5e:4x4"]) == 1
    assert "leave out --topology, --batch and --sweep" in capsys.readouterr().err


def test_chip_and_batch():
    assert scaling.parse("v5e") == ("v5e", 64) and scaling.parse("V5P:16") == ("v5p", 16)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed (pip install "wavepath[tpu]")')
def test_work_and_exchange_of_a_device_hardly_change_with_the_slice():
    first, second = scaling.table(load_config(SMOKE), "v5e", (4, 16), per_device=4)
    assert second.flops == pytest.approx(first.flops, rel=0.01) and second.traffic == pytest.approx(first.traffic, rel=0.1)
    assert second.collectives == pytest.approx(first.collectives, rel=0.01) and set(first.collectives) == {"all-reduce"}
    assert second.sent == pytest.approx(first.sent * (15 / 16) / (3 / 4), rel=0.01)
