"""What the compiled training step exchanges between devices, by number and by bytes, of each backend."""

import importlib.util
import math

import jax
import pytest
from hard_task import SIDE, HardTask, hard_config
from ml_collections import ConfigDict

from wavepath.models.vit import VARIANTS, Variant
from wavepath.ops.platform import traced_for
from wavepath.planning import hlo
from wavepath.planning.topology import find
from wavepath.tasks.base import build
from wavepath.training import parallel

pytestmark = [pytest.mark.multidevice, pytest.mark.slow]
SHARDED = ["jit", "pmap", "shard_map"]
METRICS = 64  # bytes of a step's sums and counts, at most
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed (pip install "wavepath[tpu]")')


@pytest.fixture(scope="module", autouse=True)
def tiny_variant():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "test", Variant(16, 2, 2))
        yield


def mae(**fields):
    """A masked autoencoder of two layers and one on the images of the hard task; `fields` of the config, `__` for the dot."""
    return build(hard_config(**(dict(
        task="mae", model__variant="test", model__patch=2, model__image_size=SIDE, model__dtype="float32", model__decoder_width=8,
        model__decoder_depth=1, model__decoder_heads=2, prepare__tiles__size=SIDE, optim__warmup="0",
    ) | fields)))  # fmt: skip


def program(backend, task, devices=8):
    """The compiled step; `fsdp` is jit with all arrays in as many parts as there are devices."""
    placed = {"backend": "jit", "fsdp": 0, "fsdp_min_size": 8} if backend == "fsdp" else {"backend": backend}
    own = devices if isinstance(devices, (list, tuple)) else jax.devices()[:devices]
    found = hlo.read(parallel.make(ConfigDict({**placed, "devices": 0}), own).lower_step(task).compile().as_text())
    assert not found.unknown
    return found


def size(task, *path, of="params"):
    """Bytes of a part of a state, all of a field by default."""
    tree = getattr(jax.eval_shape(task.init, jax.random.key(0)), of)
    for name in path:
        tree = tree[name]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_reduced_once(found, task, most=2):
    """Gradients go round once, in a few exchanges behind the last loop, and nothing else does but metrics."""
    table = hlo.summary(found)
    assert set(table) == {"all-reduce"}
    assert table["all-reduce"]["count"] == table["all-reduce"]["executions"] <= most
    assert size(task) <= table["all-reduce"]["bytes"] <= size(task) + METRICS
    assert all(one.group == 8 and one.groups == 1 and one.dtype == "f32" for one in found.collectives)


@pytest.mark.parametrize("backend", SHARDED)
def test_gradients_are_reduced_once(backend):
    task = mae()
    check_reduced_once(program(backend, task), task)


def test_gradients_reduced_one_by_one_are_found(monkeypatch):
    """With `check_vma`, the default of `shard_map`, JAX itself sums the gradient of each parameter where it arises; ours would come on top."""
    mapped = jax.shard_map
    # Gradients by hand, which layers have on the CPU, do not pass `check_vma`.
    monkeypatch.setattr(parallel, "traced_for", lambda kind: traced_for("tpu"))
    monkeypatch.setattr(parallel.jax, "shard_map", lambda body, **options: mapped(body, **{**options, "check_vma": True}))
    task = mae()
    found = program("shard_map", task)
    table = hlo.summary(found)
    assert table["all-reduce"]["count"] > 40 and table["all-reduce"]["bytes"] > 1.9 * size(task)
    with pytest.raises(AssertionError):
        check_reduced_once(found, task)


def test_micro_batches_are_reduced_once_behind_their_loop():
    task = mae(optim__accumulate=2)
    check_reduced_once(program("pmap", task), task)


@pytest.mark.parametrize(("backend", "count"), [("jit", 3), ("pmap", 2)])
def test_scanned_layers_send_the_gradient_of_each_layer_once(backend, count):
    """Under jit each layer's leaves within the backward loop, a layer at a time; under pmap all leave behind it."""
    task = mae(model__scan=True)
    table = hlo.summary(program(backend, task))
    assert set(table) == {"all-reduce"} and table["all-reduce"]["executions"] <= count
    assert size(task) <= table["all-reduce"]["bytes"] <= size(task) + METRICS


@pytest.mark.parametrize("backend", SHARDED)
def test_batch_statistics_and_gathered_embeddings_are_all_that_comes_on_top(backend):
    """A GAN with batch normalisation and InfoNCE: two optimisers, and a loss over the whole batch."""
    task = HardTask(hard_config())
    found = program(backend, task)
    table = hlo.summary(found)
    assert set(table) == {"all-reduce", "all-gather"}
    # The discriminator's loss does not see its embedding; jit reduces its gradients from real and from made images apart.
    gradients = size(task, "g") + (size(task, "d") - size(task, "d", "Dense_1")) * (2 if backend == "jit" else 1)
    # The two normalisations with their gradients are sums of 8 numbers, on each of five passes.
    statistics = [one for one in found.collectives if one.kind == "all-reduce" and one.bytes <= 64]
    large = [one for one in found.collectives if one.kind == "all-reduce" and one.bytes > 64]
    assert len(large) <= 2 and gradients <= sum(one.bytes for one in large) <= gradients + METRICS
    assert len(statistics) <= 20 and sum(one.bytes for one in statistics) <= 20 * 64
    # InfoNCE needs the embeddings of the whole batch: 16 rows of 8 numbers.
    assert (table["all-gather"]["count"], table["all-gather"]["bytes"]) == (1, 16 * 8 * 4)
    assert all(one.times == 1 for one in found.collectives)


def test_a_divided_state_gathers_parameters_and_no_moments():
    """Under Adam the moments are twice the parameters. XLA forms no reduce-scatter on a CPU: it reduces gradients whole and keeps its part."""
    task = mae(optim__name="adamw")
    assert size(task, of="opt") >= 2 * size(task)
    found = program("fsdp", task)
    table = hlo.summary(found)
    assert set(table) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert 0.95 * size(task) <= table["all-gather"]["bytes"] <= 1.2 * size(task)
    norms = 4 * len(jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)).params))
    assert size(task) <= table["all-reduce"]["bytes"] + table.get("reduce-scatter", {"bytes": 0})["bytes"] <= size(task) + 2 * norms + METRICS
    assert all(one.times == 1 for one in found.collectives)


@pytest.mark.parametrize(("make", "share"), [(lambda: mae(model__scan=True), 2.0), (lambda: HardTask(hard_config()), 1.6)], ids=["scan", "hard"])
def test_a_divided_state_sends_no_activations(make, share):
    """Parameters are gathered, forwards and backwards; rows of the batch stay where they are."""
    task = make()
    table = hlo.summary(program("fsdp", task))
    assert set(table) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert table["all-gather"]["bytes"] <= share * size(task)


@pytest.fixture
def no_cache():
    """What was compiled for a TPU cannot be read back from JAX's cache without one."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@needs_libtpu
@pytest.mark.parametrize("backend", ["jit", "fsdp"])
def test_on_a_tpu(backend, no_cache):
    """From the TPU compiler, for four v5e chips. It multiplies float32 in bfloat16, and gathers parameters in that, forwards and backwards."""
    task = mae(optim__name="adamw", optim__accumulate=2) if backend == "jit" else mae(optim__name="adamw")
    found = program(backend, task, find("v5e:2x2").devices)
    table = hlo.summary(found)
    assert all(one.group == 4 for one in found.collectives)
    if backend == "jit":  # two micro-batches, one exchange
        assert set(table) == {"all-reduce"} and table["all-reduce"]["executions"] <= 2
        assert size(task) <= table["all-reduce"]["bytes"] <= size(task) + METRICS
    else:  # gradients are reduced in part by rings of permutations
        assert 0.5 * size(task) <= table["all-gather"]["bytes"] <= size(task)
        assert sum(row["bytes"] for kind, row in table.items() if kind != "all-gather") <= 1.2 * size(task)
