"""A plan in full: with a compiler that is a formula, with XLA's for CPUs, and with that of TPUs where libtpu is."""

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from wavepath.config import load_config
from wavepath.errors import ConfigError, WavepathError
from wavepath.planning import compile as compiling
from wavepath.planning import standins
from wavepath.planning.chips import CHIPS
from wavepath.planning.compile import Compiled, CompilerError, Memory, Record, compile_step, memory_of, refusal, versions
from wavepath.planning.hlo import Collective, Program
from wavepath.planning.plan import changed, plan
from wavepath.planning.table import HEADER, advice_lines, cells, long_duration, markdown, number, rows, size, span, table_rows
from wavepath.planning.topology import Topology, find

GIB = 2**30
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed (pip install "wavepath[tpu]")')
DOT = """HloModule m

ENTRY %main (p: f32[8,4], q: f32[4,2]) -> f32[8,2] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[4,2]{1,0} parameter(1)
  ROOT %dot = f32[8,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
SMOKE = "configs/wise_mae.py:smoke"


@pytest.fixture(scope="module")
def slice_of_chips():
    """Four CPU devices that call themselves v5e: plans of it have times."""
    return Topology("v5e:2x2", "v5e", (2, 2), find("cpu:4").devices, CHIPS["v5e"])


def compiler(config, topology):
    """Fits up to 4 rows on a device, with recomputation up to 16."""
    program = Program((Collective("all-reduce", 4e6, 4, 1, 1, "x", "f32"),), 1e9, 1e8, {"bf16": 1e9})
    rows_here = config.batch_size // len(topology.devices) // config.optim.accumulate
    used = int(GIB * (1 + 3 * rows_here / (4 if config.model.remat == "full" else 1)))
    if used > 15 * GIB:
        return Compiled(False, None, None, used, 15 * GIB, "RESOURCE_EXHAUSTED: too much", 1.0, 70.0)
    return Compiled(True, Memory(GIB, GIB, GIB, used - GIB, used), program, None, 15 * GIB, "", 1.0, 2.0)


def test_a_plan_that_fits(slice_of_chips):
    made = plan(load_config(SMOKE), slice_of_chips, name="smoke", compiler=compiler)
    assert made.fits and made.advice is None and (made.devices, made.batch) == (4, 16)
    assert made.collectives == {"all-reduce": {"count": 1, "executions": 1, "bytes": 4e6}}
    # 4 MB twice 3/4 of the way at 80 % of 100 GB/s.
    assert made.estimate.communication == pytest.approx(6e6 / 80e9)
    assert made.run.steps == 20 and made.run.examples == 320 and made.run.chip_hours[1] == pytest.approx(20 * made.estimate.worst * 4 / 3600)
    assert made.state == (made.state[1], made.state[1]) and made.parameters > 1e5
    json.dumps(made.to_json())
    text = "\n".join(f"{name}: {value}" for name, value in rows(made))
    for part in (
        "fits: yes", "arguments: 1 GiB", "all-reduce: 1 executions of 1 instructions, 4 MB", "MFU", "60% of the chip's peak", "1000000 examples",
    ):  # fmt: skip
        assert part in text
    assert advice_lines(made) == [] and len(cells(made)) == len(HEADER)


def test_a_plan_that_does_not_fit_is_followed_by_one_that_does(slice_of_chips):
    said = []
    made = plan(load_config(SMOKE), slice_of_chips, batch=64, compiler=compiler, say=said.append)
    assert made.fits is False and made.estimate is None and made.run.seconds is None
    assert made.advice.changes == {"model.remat": "full"} and made.advised.fits and made.advised.batch == 64
    assert "it fits with --config.model.remat=full" in advice_lines(made)[-1]
    assert said == ["compile 1: mae for v5e:2x2", "compile 2 of at most 6: mae for v5e:2x2 with --config.model.remat=full"]
    found = table_rows([made])
    assert [row[4] for row in found] == ["no", "yes"] and found[0][5] == "49" and found[1][2] == "--config.model.remat=full"
    assert "no: 49 GiB needed, 15 GiB there" in dict(rows(made))["fits"]
    assert json.loads(json.dumps(made.to_json()))["advised"]["fits"] is True
    assert "| no |" in markdown([made]) and "Assumptions of the times" in markdown([made])


def test_without_advice_nothing_more_is_compiled(slice_of_chips):
    said = []
    made = plan(load_config(SMOKE), slice_of_chips, batch=64, compiler=compiler, say=said.append, advice=False)
    assert made.fits is False and made.advice is None and len(said) == 1
    assert "config.model.scan=True" in " ".join(made.notes)  # it took 70 seconds


def test_what_the_compiler_accepts_with_gaps_beyond_the_limit_is_said_to_fit_barely(slice_of_chips):
    memory = Memory(7 * GIB, 7 * GIB, 7 * GIB, 9 * GIB, 14 * GIB)
    made = plan(load_config(SMOKE), slice_of_chips, compiler=lambda *_: Compiled(True, memory, None, limit=15 * GIB))
    assert dict(rows(made))["fits"] == "yes, barely: the compiler accepts 14 GiB alive at once of 15 GiB, and with gaps its parts add up to 16 GiB"


def test_where_nothing_fits(slice_of_chips):
    made = plan(load_config(SMOKE), slice_of_chips, batch=4, compiler=lambda *_: Compiled(False, None, None, 90 * GIB, 15 * GIB))
    assert made.advice.changes is None and made.advised is None and "nothing that was tried fits" in advice_lines(made)[-1]


def test_a_topology_without_a_table_has_no_times():
    made = plan(load_config(SMOKE), "cpu:8", backend="pmap", compiler=compiler, examples=1000)
    assert made.estimate is None and made.assumptions == () and made.parallel.startswith("pmap on 8 cpu") and made.run.epoch == 1000
    assert "unknown" in dict(rows(plan(load_config(SMOKE), "cpu:2", compiler=lambda *_: Compiled(None, Memory(1, 1, 1, 1, 2), None))))["fits"]


def test_an_epoch_is_of_the_data_where_the_config_names_any(slice_of_chips, monkeypatch):
    class Named:
        def sources(self):
            return range(640)

    built = standins.build_task
    config = changed(load_config(SMOKE), {"train.steps": "0", "train.epochs": "2"})
    found = [plan(config, slice_of_chips, compiler=compiler, examples=320).run]
    monkeypatch.setattr(standins, "build_task", lambda config: Named() if config.train.steps == 2 * standins.EXAMPLES // 16 else built(config))
    found.append(plan(changed(config, {"data.dir": "TILES"}), slice_of_chips, compiler=compiler).run)
    assert [(run.epoch, run.steps) for run in found] == [(320, 40), (640, 80)]


def test_a_divided_state_is_smaller_on_each_device(slice_of_chips):
    made = plan(changed(load_config(SMOKE), {"parallel.fsdp": "0", "parallel.fsdp_min_size": "1"}), slice_of_chips, compiler=compiler)
    assert made.state[0] < 0.3 * made.state[1]


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(ConfigError, match="not divisible by 8 devices; use 8 or 16"):
        plan(load_config(SMOKE), "cpu:8", batch=12, cache=tmp_path)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", (int(20.5 * GIB), int(15.75 * GIB))),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (299.14G) exceeds available HBM (15.75G).",
         (int(299.14 * GIB), int(15.75 * GIB))),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate", (None, None)),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_memory(message, found):
    assert refusal(message) == found


def test_records_come_back(tmp_path):
    text = DOT
    record = Record(tmp_path / "folder", "key")
    assert record.read() is None
    record.write(Compiled(True, Memory(1, 2, 3, 4, 5), None, None, 10, "", 1.0, 2.0), text)
    found = record.read()
    assert found.memory == Memory(1, 2, 3, 4, 5) and found.program.flops == 2 * 8 * 4 * 2 and found.compiling == 2.0
    refused = Record(tmp_path, "other")
    refused.write(Compiled(False, None, None, 20, 10, "no"), "")
    assert refused.read() == Compiled(False, None, None, 20, 10, "no")
    whole = record.text.read_bytes()
    for broken in (b"no gzip", whole[:-9], whole[:12] + b"xxxx" + whole[16:], gzip.compress(b"\xff")):
        record.text.write_bytes(broken)
        with pytest.raises(WavepathError, match="is damaged"):
            record.read()
    record.sizes.write_text('{"record": 0}')
    assert record.read() is None


def test_a_record_is_of_one_machine_and_its_flags(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)
    devices = find("cpu:8").devices
    chips = Topology("v5e:2x2", "v5e", (2, 2), devices[:4], CHIPS["v5e"])
    plain = hashlib.sha256("\n".join(["1", "v5e:2x2", *(f"{name} {version}" for name, version in versions().items()), "text"]).encode()).hexdigest()
    assert compiling._key("text", chips) == plain != compiling._key("other", chips)
    assert len({compiling._key("text", Topology("local", "local", (count,), devices[:count], None)) for count in (2, 4)}) == 2
    assert len({compiling._key("text", Topology("local", "local", (2,), devices[:2], CHIPS[name])) for name in ("h100-sxm", "h200")}) == 2
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setenv("XLA_FLAGS", " --xla_force_host_platform_device_count=8 ")  # how many devices is in the name
    assert compiling._key("text", chips) == plain
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "--xla_dump_to=here")
        assert compiling._key("text", chips) != plain
        monkeypatch.delenv(name)


def test_the_peak_of_a_cpu_is_the_sum():
    class Stats:
        argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes, temp_size_in_bytes, peak_memory_in_bytes = 10, 6, 4, 5, 12

    assert memory_of(Stats).peak == 12 and memory_of(Stats, has_peak=False).peak == memory_of(Stats).reserved == 17


def test_numbers_as_text():
    assert [size(value) for value in (None, 10, 2048, 3 * 2**20, 1.5 * GIB)] == ["unknown", "10 B", "2 KiB", "3 MiB", "1.5 GiB"]
    assert [span(None), span((1.0, 1.001)), span((1.0, 2.0)), span((0.5, 0.25), 100)] == ["-", "1", "1 to 2", "50 to 25"]
    assert [number(value) for value in (0.012345, 12.345, 999.4, 12915.37)] == ["0.0123", "12.3", "999", "12,915"]
    assert [long_duration(value) for value in (3725.0, 30 * 86400)] == ["1h02m", "30 days"]


@pytest.mark.slow
def test_on_cpus_and_a_second_time_from_what_was_kept(tmp_path, monkeypatch):
    config = changed(load_config(SMOKE), {"model.variant": "XT", "model.image_size": "32", "prepare.tiles.size": "32"})
    made = plan(config, "cpu:8", cache=tmp_path)
    done = made.compiled
    assert made.fits is None and not done.kept and done.memory.arguments > 0 and done.memory.temporary > 0
    # Float32 gradients of all parameters, and the metrics.
    assert made.collectives["all-reduce"]["bytes"] == pytest.approx(4 * made.parameters, rel=0.02)
    monkeypatch.setattr(compiling, "_without_cache", lambda compile_it: pytest.fail("compiled again"))
    again = plan(config, "cpu:8", cache=tmp_path)
    assert again.compiled.kept and again.compiled.memory == done.memory and again.compiled.program == done.program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        ("configs/glcm_mae.py:smoke", []), ("configs/finetune.py:smoke", []), ("configs/resnet.py:smoke", []), ("configs/cwt_net.py:smoke", []),
        ("configs/ceff_encoders.py:smoke", []), ("configs/ceff.py:cpu", ["stain.crop=32", "stain.margin=0"]),
    ],
)  # fmt: skip
def test_every_task_is_planned_without_its_data(spec, overrides, monkeypatch):
    """Down to the compiler, which is left out; the constants that a run would measure, and the encoders of a first stage, are stand-ins."""

    class Compiled:
        def memory_analysis(self):
            return type("Stats", (), {f"{name}_size_in_bytes": 1 for name in ("argument", "output", "alias", "temp")})

        def as_text(self):
            return DOT

    monkeypatch.setattr(compiling, "_without_cache", lambda compile_it: Compiled())
    made = plan(load_config(spec, overrides), "cpu:2")
    assert made.compiled.lowering > 0 and made.model_flops > 0 and made.parameters > 0


GOLDEN = """
import json, sys
from wavepath.planning.topology import prepare_environment
prepare_environment(["v5e:2x2"])
from wavepath.config import load_config
from wavepath.planning.plan import plan
config = load_config("configs/wise_mae.py:smoke", ["model.dtype=bfloat16", "model.image_size=32", "prepare.tiles.size=32", "batch_size=64"])
print(json.dumps(plan(config, "v5e:2x2").to_json()))
"""


@pytest.mark.slow
@needs_libtpu
def test_golden_memory_and_collectives_of_a_tpu():
    """Arguments and collectives follow from the shapes; temporary memory is the compiler's, and may move a little with its versions."""
    done = subprocess.run([sys.executable, "-c", GOLDEN], capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": ""})
    found = json.loads(done.stdout)
    assert found["fits"] is True and found["limit"] == 15.75 * GIB
    memory, state = found["memory"], found["state"]
    # 16 rows of 32 x 32 x 3 bytes and 12 of numbers on each chip; small arrays are padded to the tiles of its memory, a ninth more in all.
    assert memory["arguments"] == 8_484_352 and 0 < memory["arguments"] - state["device"] - 16 * (32 * 32 * 3 + 12) < 0.15 * state["device"]
    assert memory["aliased"] == 8_286_720  # the whole state is updated in place
    assert memory["temporary"] == pytest.approx(15_997_440, rel=0.1) and memory["peak"] == pytest.approx(15_062_016, rel=0.1)
    # All gradients in bfloat16, as the compiler moves the sum before their conversion, and a few numbers for the metrics.
    assert found["collectives"] == {"all-reduce": {"count": 2, "executions": 2, "bytes": 1_259_780}}
    assert found["collectives"]["all-reduce"]["bytes"] == pytest.approx(2 * found["parameters"], rel=0.01)
    assert found["flops"]["compiled"] == pytest.approx(found["flops"]["model_of_a_device"], rel=0.05)


REFUSED = """
import json
from wavepath.planning.topology import prepare_environment
prepare_environment(["v5e:1x1"])
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from wavepath.config import load_config
from wavepath.planning.plan import plan
from wavepath.training import parallel

def lower_step(self, task):
    # In place of a network, which takes the compiler minutes to refuse: two products, between them 128 KiB an example that has to be kept.
    place = SingleDeviceSharding(self.devices[0])
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((task.config.batch_size, 128), (128, 65536)))
    return jax.jit(lambda x, w: (x @ w) @ jnp.tanh(x @ w).sum(0)).lower(x, w)

parallel.Parallel.lower_step = lower_step
config = load_config("configs/wise_mae.py:smoke", [f"batch_size={2**18}", "model.remat=full"])
print(json.dumps(plan(config, "v5e:1x1").to_json()))
"""


@pytest.mark.slow
@needs_libtpu
def test_what_a_tpu_has_no_memory_for_is_refused_and_what_is_proposed_fits():
    """By the compiler itself: its message is read, and its answer to the smaller batch is the advice."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": ""})
    found = json.loads(done.stdout)
    assert found["fits"] is False and found["needed"] > found["limit"] == 15.75 * GIB and "RESOURCE_EXHAUSTED" in found["message"]
    advised, batch = found["advised"], int(found["advice"]["changes"]["batch_size"])
    assert advised["fits"] is True and advised["batch"] == batch and advised["limit"] == found["limit"]
    assert batch * 2**17 < advised["memory"]["temporary"] + 2**30 < found["limit"] + 2**30 and batch > 0.8 * found["limit"] / 2**17


def test_what_is_compiled_is_the_step_of_the_trainer(monkeypatch):
    """`compile_step` lowers `Parallel.train_step` for the topology's devices, and says in one line what the compiler refuses for another reason."""
    from jax.errors import JaxRuntimeError

    from wavepath.training import parallel

    class Lowered:
        def as_text(self):
            return "text"

        def compile(self):
            raise JaxRuntimeError(message)

    monkeypatch.setattr(parallel.Parallel, "lower_step", lambda self, task: Lowered())
    config = standins.resolved(load_config(SMOKE))
    message = "RESOURCE_EXHAUSTED: Used 20G of 16G hbm"
    assert compile_step(config, find("cpu:8")).needed == 20 * GIB
    message = "INTERNAL: something else\nand more"
    with pytest.raises(CompilerError, match="step of task mae for cpu:8 .INTERNAL: something else and more.") as error:
        compile_step(config, find("cpu:8"))
    assert "\n" not in str(error.value)
