"""One step body for every task: the same steps from each backend, on one device and on eight, with a state that is whole or in parts."""

import dataclasses

import jax
import numpy as np
import pytest
from hard_task import HardTask, hard_config, leaves
from ml_collections import ConfigDict

from wavepath.defaults import train_defaults
from wavepath.models.resnet import DEPTHS
from wavepath.models.vit import VARIANTS, Variant
from wavepath.ops import collectives
from wavepath.tasks.base import build
from wavepath.training import parallel

BATCH, STEPS = 8, 3
# Small arrays are divided too, so that every kind of layer meets a divided parameter.
BACKENDS = {
    "jit on 1": dict(backend="jit", devices=1), "jit on 8": dict(backend="jit", devices=8), "pmap on 8": dict(backend="pmap", devices=8),
    "shard_map on 8": dict(backend="shard_map", devices=8), "jit on 8, divided by 8": dict(backend="jit", devices=8, fsdp=0, fsdp_min_size=8),
}
IMAGES, COUPLED = 1e-5, 1e-2  # what rounding may do in float32: to a loss of single images, and with batch statistics or a batch-wide loss


FEW = ("jit on 1", "pmap on 8", "jit on 8, divided by 8")  # those that differ most


@dataclasses.dataclass(frozen=True)
class Case:
    """A task at a size of seconds.

    Attributes:
        fields: what its config has beside the defaults.
        tolerance: in float32.
        dtype: the field that holds its dtype.
        constants: as measured in a source.
        backends: in float64.
    """

    fields: dict
    tolerance: float
    dtype: str = "model.dtype"
    constants: dict = dataclasses.field(default_factory=dict)
    backends: tuple[str, ...] = tuple(BACKENDS)


def vit(task, side=8, patch=4, **fields):
    tiny = dict(variant="test", patch=patch, image_size=side, decoder_width=8, decoder_depth=1, decoder_heads=2)
    return {"task": task, "prepare.tiles.size": side, **{f"model.{name}": value for name, value in tiny.items()}, **fields}


def group(task, **fields):
    """Fields of `config.<task>`."""
    return {f"{task}.{name}": value for name, value in fields.items()}


PAIRS = group("stain", crop=32, margin=8, encoder_channels=4, encoder_blocks=1)
RANGES = {"pixel_range": [-2.2, 2.7], "value_range": [-2.2, 2.7]}
CLASSES = {"classes": ["a", "b", "c"]}
CASES = {
    "mae": Case(vit("mae"), IMAGES),
    "mae with InfoNCE": Case(vit("mae", **{"loss.contrast_weight": 0.5}), COUPLED),
    # The second phase, with its SSIM and co-occurrence terms, begins at the second step.
    "glcm mae": Case(
        vit("mae", side=16, patch=8, **{
            "loss.norm_pix": False, "loss.second.start": "1", "loss.cooccurrence.levels": 8, "loss.ssim_window.size": 7,
        }), IMAGES, constants=RANGES,
    ),
    # The coin makes some of the steps `ref` and some `wr`.
    "superres": Case(
        {"task": "superres", **group("superres", scale=4, blocks=1, channels=8, sr_blocks=1, wavelet_blocks=1, wr_blocks=1, reduction=4, patch=12,
                                     margin=4)},
        IMAGES, "superres.dtype", {"mean": [0.7, 0.4, 0.6]},
    ),
    "encoders": Case({"task": "stain_encoders", **PAIRS, "stain.symmetric": True}, COUPLED, "stain.dtype"),
    "stain": Case(
        {"task": "stain", "encoders": "random", **PAIRS, **group("stain", channels=4, blocks=1, encoder="resnet", msfpm=False,
                                                                 discriminator_channels=4, discriminator_layers=1)},
        COUPLED, "stain.dtype",
    ),
    "finetune": Case(vit("finetune"), IMAGES, constants=CLASSES, backends=FEW),
    "classify": Case(
        {"task": "classify", "classify.depth": 4, "model.image_size": 32, "prepare.tiles.size": 32}, COUPLED, constants=CLASSES, backends=FEW
    ),
    "hard": Case({}, COUPLED, "data.dir"),
}
RATES = {"mae": 0.8, "superres": 1.0, "stain": 0.032, "stain_encoders": 0.1, "finetune": 0.8, "classify": 0.5}


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch, quick_compile):
    monkeypatch.setitem(VARIANTS, "test", Variant(16, 1, 2))
    monkeypatch.setitem(DEPTHS, 4, ((1,), False))


def make(case, dtype):
    """The task: SGD at a constant rate, since Adam would hide a gradient that is too large by a factor."""
    if not case.fields:
        return HardTask(hard_config(batch_size=BATCH))
    config = train_defaults()
    config.batch_size, config.lr, config.train.steps = BATCH, RATES[case.fields["task"]], 10
    config.optim.name, config.optim.warmup, config.optim.schedule = "sgd", "0", "constant"
    config.update_from_flattened_dict({**case.fields, case.dtype: dtype})
    task = build(config)
    task.constants = dict(case.constants)
    return task


def batches_of(task):
    """Batches of noise."""
    for number in range(STEPS):
        rng = np.random.default_rng(number)
        batch = {name: rng.integers(0, 256, spec.shape).astype(spec.dtype) for name, spec in task.batch_spec().items() if spec.ndim == 4}
        ids = np.arange(BATCH)
        known = {"example_id": ids * 5 + number, "epoch": ids % 2, "position": ids + number * BATCH, "label": ids % 3}
        yield batch | {name: known[name].astype(spec.dtype) for name, spec in task.batch_spec().items() if spec.ndim == 1}


def run(task, initial, settings):
    """(update of the parameters, update of the statistics, metrics of every step)."""
    devices = parallel.make(ConfigDict(settings))
    state, start = devices.place(initial), leaves(initial)
    step, found = devices.train_step(task), []
    for batch in batches_of(task):
        state, metrics = step(state, devices.put(batch))
        found.append({name: float(total) / float(count) for name, (total, count) in metrics.items() if float(count)})
    end = leaves(state)
    moved = {name: end[name].astype(np.float64) - value for name, value in start.items() if name.startswith((".params", ".stats"))}
    return [np.concatenate([moved[name].ravel() for name in moved if kind in name] or [np.zeros(0)]) for kind in (".params", ".stats")], found


def apart(one, other):
    """Norm of the difference, in parts of the norm."""
    return float(np.linalg.norm(other - one) / np.linalg.norm(one)) if one.size else 0.0


def compare(case, dtype, backends):
    """{backend: (distance of the parameters' updates, of the statistics', largest relative difference of a metric)} from one device."""
    first, *others = backends
    task = make(case, dtype)
    # Copied: on a CPU these are views of arrays that will be donated.
    initial = jax.tree.map(np.array, jax.device_get(parallel.make(ConfigDict(BACKENDS[first])).init(task, 0)))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((initial.params, initial.stats))} == {dtype}
    (params, stats), metrics = run(task, initial, BACKENDS[first])
    assert np.linalg.norm(params) > 1e-4
    found = {}
    for name in others:
        (moved, counted), said = run(task, initial, BACKENDS[name])
        pairs = [(one[key], other[key]) for one, other in zip(metrics, said, strict=True) for key in one | other]
        found[name] = apart(params, moved), apart(stats, counted), max(abs(a - b) / max(abs(a), 1e-3) for a, b in pairs)
    return found


@pytest.mark.multidevice
def test_one_device_and_eight_take_the_same_steps():
    """The one of these that is always run: the others take minutes."""
    found = compare(CASES["mae"], "float32", FEW[:2])
    assert max(found["pmap on 8"][:2]) < IMAGES and found["pmap on 8"][2] < 1e-3, found


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("name", CASES)
def test_in_float64_they_agree_to_rounding(name):
    with jax.enable_x64(True):
        found = compare(CASES[name], "float64", CASES[name].backends)
    print(name, {backend: tuple(f"{value:.1e}" for value in values) for backend, values in found.items()})
    assert all(max(values) < 1e-9 for values in found.values()), found


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("name", ["mae", "glcm mae", "superres", "encoders", "stain"])
def test_in_float32_they_agree_as_well_as_rounding_allows(name):
    case = CASES[name]
    found = compare(case, "float32", tuple(BACKENDS) if name in ("mae", "stain") else FEW)
    print(name, {backend: tuple(f"{value:.1e}" for value in values) for backend, values in found.items()})
    assert all(max(values[:2]) < case.tolerance and values[2] < 1e-3 for values in found.values()), found


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_wrong_reduction_would_be_noticed(monkeypatch):
    """Gradients summed over the devices instead of averaged: eight times as long a step, which Adam would have hidden."""
    monkeypatch.setattr(collectives, "pmean", collectives.psum)
    with jax.enable_x64(True):
        (distance, _, _) = compare(CASES["mae"], "float64", FEW[:2])["pmap on 8"]
    assert distance > 1
