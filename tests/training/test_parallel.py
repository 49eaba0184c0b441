"""Placement of states and batches on devices; that all backends take the same steps is in test_same_steps.py."""

import math
import re
import time

import jax
import numpy as np
import pytest
from hard_task import SIDE, FakePipeline, FakeSource, HardTask, hard_config
from ml_collections import ConfigDict

from wavepath.config import load_config
from wavepath.errors import ConfigError
from wavepath.models.vit import VARIANTS, Variant
from wavepath.tasks.base import build
from wavepath.training import durations, parallel


def mae_config():
    """A masked autoencoder of seconds, on the images of the hard task."""
    return hard_config(
        task="mae", lr=1.6, model__variant="test", model__patch=2, model__image_size=SIDE, model__dtype="float32", model__decoder_width=8,
        model__decoder_depth=1, model__decoder_heads=2, prepare__tiles__size=SIDE, optim__warmup="0",
    )


def make_parallel(backend, count):
    """`fsdp` stands for jit with a state in as many parts as there are devices, small arrays too."""
    fsdp = {"backend": "jit", "fsdp": 0, "fsdp_min_size": 8} if backend == "fsdp" else {"backend": backend}
    return parallel.make(ConfigDict({**fsdp, "devices": count}))


@pytest.fixture(scope="module", autouse=True)
def tiny_variant(quick_compile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "test", Variant(16, 2, 2))
        yield


@pytest.mark.multidevice
def test_predictions_come_back_in_the_order_of_the_batch():
    config = hard_config()
    task = HardTask(config)
    batch = next(FakePipeline.eval_batches(FakeSource(), 16))
    outputs = {}
    for backend, count in (("jit", 1), ("jit", 8), ("pmap", 8)):
        devices = parallel.make(ConfigDict({"backend": backend, "devices": count}))
        outputs[backend, count] = jax.device_get(devices.predict(task, ["example_id", "reconstruction"])(devices.init(task, 0), devices.put(batch)))
    for got in outputs.values():
        assert set(got) == {"example_id", "reconstruction"}
        np.testing.assert_array_equal(got["example_id"], batch["example_id"])
        np.testing.assert_allclose(got["reconstruction"], outputs["jit", 1]["reconstruction"], atol=1e-6)


@pytest.mark.multidevice
@pytest.mark.parametrize("backend", parallel.BACKENDS)
def test_eval_counts_only_what_the_mask_allows(backend):
    task = HardTask(hard_config())
    devices = parallel.make(ConfigDict({"backend": backend, "devices": 8}))
    batch = next(FakePipeline.eval_batches(FakeSource(), 16, limit=5))
    total, count = devices.eval_step(task)(devices.init(task, 0), devices.put(batch))["loss"]
    assert float(count) == 5 and float(total) > 0


@pytest.mark.multidevice
@pytest.mark.parametrize("backend", parallel.BACKENDS)
def test_the_state_lies_whole_on_every_device_and_is_donated(backend):
    task = HardTask(hard_config())
    devices = parallel.make(ConfigDict({"backend": backend, "devices": 8}))
    state = devices.init(task, 0)
    new, _ = devices.train_step(task)(state, devices.put(next(FakePipeline.batches(FakeSource(), batch_size=16, seed=0))))
    kernel, old = new.params["d"]["Conv_0"]["kernel"], state.params["d"]["Conv_0"]["kernel"]
    assert kernel.shape == old.shape and kernel.sharding.is_fully_replicated and len(kernel.sharding.device_set) == 8
    assert old.is_deleted()
    assert devices.abstract_state(task).params["d"]["Conv_0"]["kernel"].sharding.is_equivalent_to(kernel.sharding, kernel.ndim)


PUBLISHED = {
    "wise_mae:variant=B": {}, "cwt_net": {"mean": [0.7, 0.4, 0.6]}, "ceff:bci": {}, "ceff_encoders:bci": {}, "finetune": {"classes": ["a", "b"]},
}


def bytes_of(shapes, placed):
    """(of the whole state, on each device)."""
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True))
    return tuple(
        sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in each)
        for each in ([(leaf.shape, leaf) for leaf, _ in pairs], [(place.shard_shape(leaf.shape), leaf) for leaf, place in pairs])
    )


@pytest.mark.multidevice
@pytest.mark.parametrize("spec", [name if name == "wise_mae:variant=B" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED])
def test_a_state_of_the_published_size_takes_an_eighth_on_each_of_eight(spec):
    """Moments, averages, statistics and frozen encoders among it; what stays whole for being small costs less than a seventh more."""
    config = load_config(spec)
    with config.unlocked():
        config.encoders = "RUN"
    task = build(durations.resolve(config, 1000))
    task.constants = PUBLISHED[spec]
    devices = parallel.make(ConfigDict({**config.parallel, "backend": "jit", "devices": 8, "fsdp": 0}))
    abstract = devices.abstract_state(task)
    whole, held = bytes_of(abstract, devices.state_shardings(abstract))
    assert len(devices.devices) == devices.fsdp == 8 and whole > 5e7
    assert held <= whole / 7
    trained = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract.params))
    assert whole > 3 * trained, "two moments for each parameter"


@pytest.mark.multidevice
@pytest.mark.slow
def test_a_divided_state_is_never_whole_on_a_device():
    """From its initialisation on: neither what the compiled function returns nor what it needs on the way."""
    config = mae_config()
    with config.unlocked():
        config.optim.name, config.ema = "adamw", 0.99
    task = build(config)
    devices = make_parallel("fsdp", 8)
    state = devices.init(task, 0)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert {type(part).__name__ for part in jax.tree.leaves(state.opt, is_leaf=lambda part: hasattr(part, "mu"))} >= {"ScaleByAdamState"}
    memory = devices.lower_init(task).compile().memory_analysis()
    assert memory.output_size_in_bytes <= whole / 7 and memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 2
    for _ in range(2):
        held = {}
        for leaf in jax.tree.leaves(state):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        assert len(held) == 8 and max(held.values()) <= whole / 7
        state, _ = devices.train_step(task)(state, devices.put(next(FakePipeline.batches(FakeSource(), batch_size=16, seed=0))))
    said = devices.describe(state)
    assert "in 8 parts" in said
    # All that stay whole are named, in few groups: their numbers add up.
    named = [int(number) for number in re.findall(r"(\d+) [a-z_.]+ \(", said.partition("whole stay ")[2])]
    whole = [place for place in jax.tree.leaves(devices.state_shardings(state)) if place.is_fully_replicated]
    assert sum(named) == len(whole) >= 3


def test_arrays_that_stay_whole_are_named_in_few_groups():
    small = {f".{part}['block_{number}']['norm{place}']['bias']": 4 for part in ("params", "ema") for number in range(3) for place in (1, 2)}
    assert parallel._grouped(small) == {"norm.bias": [4] * 12}
    many = small | {f".params['{layer}']['scale']": 8 for layer in "abcdefghijkl"}
    assert parallel._grouped(many) == {"bias": [4] * 12, "scale": [8] * 12}


@pytest.mark.multidevice
def test_rules_choose_the_dimension_that_is_divided():
    abstract = {"a": {"kernel": jax.ShapeDtypeStruct((16, 64), np.float32)}, "b": jax.ShapeDtypeStruct((9, 3), np.float32)}

    def spec(*rules, min_size=1):
        placed = parallel.Parallel("jit", jax.devices(), fsdp=4, min_size=min_size, rules=rules).state_shardings(abstract)
        return tuple(placed["a"]["kernel"].spec), tuple(placed["b"].spec)

    assert spec() == ((None, "fsdp"), ())  # nothing of 9 x 3 can be divided by 4
    assert spec(("kernel", 0)) == (("fsdp", None), ())
    assert spec(("kernel", None)) == spec(min_size=1025) == ((), ())
    with pytest.raises(ConfigError, match=r"dimension 1 of \['b'\] \(9, 3\) cannot be divided by 4"):
        spec(("b", 1))
    with pytest.raises(ConfigError, match="fsdp=3 does not divide the 8 devices"):
        parallel.Parallel("jit", jax.devices(), fsdp=3)
    with pytest.raises(ConfigError, match="use config.parallel.backend=jit"):
        parallel.Parallel("pmap", jax.devices(), fsdp=2)


@pytest.mark.multidevice
def test_tools_take_what_there_is_of_a_larger_machine():
    settings = ConfigDict({"backend": "jit", "devices": 256, "fsdp": 16})
    assert [(len(one.devices), one.fsdp) for one in (parallel.for_tools(settings), parallel.for_tools(settings, 2))] == [(8, 1), (2, 1)]
    with pytest.raises(ConfigError, match=r"--devices 9, but this machine has 8"):
        parallel.for_tools(settings, 9)


@pytest.mark.multidevice
def test_numbers_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"devices=9.*has 8"):
        parallel.make(ConfigDict({"backend": "jit", "devices": 9}))
    with pytest.raises(ConfigError, match="choose one of jit, pmap, shard_map"):
        parallel.make(ConfigDict({"backend": "xmap", "devices": 1}))
    eight = parallel.make(ConfigDict({"backend": "jit", "devices": 0}))
    assert len(eight.devices) == 8
    eight.check(16)
    with pytest.raises(ConfigError, match=r"batch_size=20 is not divisible by 8 devices; use 16 or 24"):
        eight.check(20)
    with pytest.raises(ConfigError, match=r"batch_size=8 is not divisible by 8 devices x 2 accumulation steps; use 16"):
        eight.check(8, accumulate=2)


def one_device():
    return parallel.make(ConfigDict({"backend": "jit", "devices": 1}))


def test_prefetch_runs_ahead_and_keeps_the_order():
    made = []

    def numbers():
        for number in range(6):
            made.append(number)
            yield {"x": np.full(2, number)}

    ahead = one_device().prefetch(numbers(), ahead=2)
    assert int(next(ahead)["x"][0]) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:  # two wait in the queue, one is on offer
        time.sleep(0.01)
    assert made == [0, 1, 2, 3]
    assert [int(batch["x"][0]) for batch in ahead] == [1, 2, 3, 4, 5]


def test_an_error_in_the_input_arrives_where_the_batch_is_asked_for():
    def broken():
        yield {"x": np.zeros(2)}
        raise ValueError("shard 3")

    ahead = one_device().prefetch(broken())
    next(ahead)
    for _ in range(2):
        with pytest.raises(ValueError, match="shard 3"):
            next(ahead)


def test_closing_prefetch_ends_its_thread_and_the_input():
    ended = []

    class Endless:
        def __iter__(self):
            return self

        def __next__(self):
            return {"x": np.zeros(2)}

        def close(self):
            ended.append(True)

    ahead = one_device().prefetch(Endless())
    next(ahead)
    ahead.close()
    assert not ahead._thread.is_alive() and ended == [True]
