"""What one training objective gives the loop and the tools: a State and a handful of pure functions.

The loop, the parallel backends and the evaluators know `Task` and `State` and nothing of any method. All functions of a task are pure and
written for one shard of a batch; reductions over shards go through `wavepath.ops.collectives`.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jaxtyping import Array, Int

from wavepath.errors import CheckpointError, ConfigError, DatasetError

Batch = Mapping[str, Array]
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count), local to the shard

_ONE_RESOLUTION = 1.025  # slides within this ratio of each other show one, as in data.sources

TASKS = {
    "mae": "wavepath.tasks.mae:MaskedAutoencoding",
    "encoder": "wavepath.tasks.encoder:Encoder",
    "finetune": "wavepath.tasks.finetune:FineTuning",
    "mil": "wavepath.tasks.mil:MultipleInstance",
    "classify": "wavepath.tasks.classify:Classification",
    "superres": "wavepath.tasks.superres:SuperResolution",
    "stain_encoders": "wavepath.tasks.stain_encoders:StainEncoders",
    "stain": "wavepath.tasks.stain:Staining",
}


@struct.dataclass
class State:
    """Everything that a run must save to go on bit-exactly. Each field but `step` is a dict by network name.

    Attributes:
        step: steps taken.
        params: trained parameters, float32.
        opt: optimiser states.
        stats: statistics that are not trained by gradient (batch normalisation).
        ema: exponential averages of `params`; empty when off.
        extra: whatever else a task carries from step to step.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    opt: dict[str, Any]
    stats: dict[str, Any] = struct.field(default_factory=dict)
    ema: dict[str, Any] = struct.field(default_factory=dict)
    extra: dict[str, Any] = struct.field(default_factory=dict)


class Task:
    """One training objective. Subclasses set `networks` and `coupled` and define the methods.

    Attributes:
        config: the resolved config (`train.steps` and `optim.warmup` are step numbers).
        networks: names of the parameter trees in `State.params`.
        constants: what `measure` found in the training source, set before the first step and by whoever restores a run.
        coupled: whether the loss couples the examples of a batch (InfoNCE, batch statistics); then a batch cannot be accumulated from parts.
        embeds: whether `predict` offers the features `cls` and `mean`.
        validates: whether `held_out` gives a part that may choose when training stops (`train.patience`), because results come from another one.
        frozen: entries of `State.extra` that no step may change; the loop holds them against what they were at the start.
    """

    networks: tuple[str, ...] = ()
    coupled: bool = False
    embeds: bool = False
    validates: bool = False
    frozen: tuple[str, ...] = ()

    def __init__(self, config: Any):
        self.config = config
        self.constants: dict[str, Any] = {}

    def check_accumulation(self) -> None:
        """Refuses settings of `optim.accumulate` that would change the loss or that do not divide the batch."""
        parts, batch = int(self.config.optim.accumulate), int(self.config.batch_size)
        if parts < 1 or batch % parts:
            raise ConfigError(f"config.optim.accumulate={parts} does not divide config.batch_size={batch}; choose a divisor of it")
        if parts > 1 and self.coupled:
            raise ConfigError(
                f"config.optim.accumulate={parts} would change the loss of task {self.config.task!r}, which compares the examples of a batch"
                " with one another; set config.optim.accumulate=1 and config.model.remat=full (less memory) or a smaller config.batch_size"
            )

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract global training batch, from the config alone."""
        raise NotImplementedError

    def init(self, rng: Array) -> State:
        """A fresh State from one key; pure and jit-able, needs no data."""
        raise NotImplementedError

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. Metrics include `loss`, `grad_norm` and `lr`."""
        raise NotImplementedError

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """Metrics without an update; rows whose `batch["mask"]` is 0 are padding and count nothing."""
        raise NotImplementedError

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Named outputs for features and pictures; `names` limits them, and the work, to those wanted (None: all)."""
        raise NotImplementedError

    def flops(self) -> float:
        """Floating-point operations of one training step for one example, counted from the model's shapes."""
        raise NotImplementedError

    def sources(self) -> Any:
        """The data source that the config names."""
        # Imported here: reading data brings TensorFlow, which building a task must not.
        from wavepath.data.sources import open_source

        return open_source(self.config)

    def pipeline(self) -> Any:
        """The module whose `batches` and `eval_batches` read the source."""
        from wavepath.data import pipeline

        return pipeline

    def held_out(self, source: Any) -> Any:
        """What the loop evaluates on: a source that is kept out of training where the task has one, else the training source itself.

        Args:
            source: as `sources` gave it; `constants` are set.
        """
        return source

    def measure(self, source: Any) -> dict[str, Any]:
        """Constants that one pass over the source must find before training; none by default."""
        return {}

    def others(self) -> dict[str, str]:
        """Run folders, by name, of other tasks whose trained networks a fresh State takes over; none by default."""
        return {}

    def adopt(self, state: State, others: Mapping[str, tuple[Any, "Task", State]]) -> tuple[State, dict[str, Any]]:
        """Takes over what `others` named.

        Args:
            state: a fresh State.
            others: by name the run's config, its task and its State, on the host.

        Returns:
            The State, and what the run should remember of them, added to its constants.

        Raises:
            ConfigError: a run that does not fit this config.
        """
        return state, {}

    def load(self, state: State, params: Mapping[str, Any]) -> State:
        """Starts from restored parameters: networks in `params` replace those of the same name, averages restart from them.

        Args:
            state: a fresh State.
            params: by network, as another run's `State.params`.

        Raises:
            CheckpointError: no network in common, or a parameter missing, left over or of another shape (named).
        """
        shared = [name for name in self.networks if name in params]
        if not shared:
            raise CheckpointError(
                f"the parameters to start from hold {_listed(params)}, and task {self.config.task!r} has {_listed(self.networks)};"
                " choose a run of the same task"
            )
        merged = dict(state.params)
        ema = dict(state.ema)
        for name in shared:
            merged[name] = merge_params(state.params[name], params[name], name)
            if name in ema:
                ema[name] = jax.tree.map(np.copy, merged[name])
        return state.replace(params=merged, ema=ema)


def trained_on(source: Any, scale: int = 1) -> dict[str, Any]:
    """What a run should know of its training set, for `Task.measure`; what the source does not say is left out.

    Args:
        source: of windows.
        scale: pixels of the source for each pixel that the network is given, on a side.

    Returns:
        `train_slides`: the ids of its slides (a folder may be divided otherwise later); `mpp`: micrometres per px of what the network is given, where
        all slides have one.
    """
    slides = sorted({str(name) for name in getattr(source, "slides", ())})
    found: dict[str, Any] = {"train_slides": slides} if slides else {}
    mpps = sorted({span.mpp or 0.0 for span in getattr(source, "spans", ()) if span.stop > span.start})
    if mpps and mpps[0] > 0 and mpps[-1] <= mpps[0] * _ONE_RESOLUTION:
        found["mpp"] = round(mpps[0] * scale, 6)
    return found


def kept_out(config: Any, held: Any, source: Any, unit: str, remedy: str) -> Any:
    """What a task with data divided beforehand evaluates on, for `Task.held_out`: the test part, or, where it is empty and not needed, `source`.

    Args:
        held: the test part. unit: what it consists of. remedy: where to look and which command divides anew.

    Raises:
        DatasetError: it is empty, and the run is to be evaluated or drawn.
    """
    if len(held):
        return held
    if config.train.eval_every or config.train.panels_every:
        raise DatasetError(
            f"{held.name} has no test {unit} as large as a window; {remedy}, or train without evaluation and pictures (config.train.eval_every=0,"
            " config.train.panels_every=0)"
        )
    return source


def merge_params(own: Any, given: Any, name: str) -> Any:
    """`given` in the structure and dtypes of `own`, on the host: a large network need not fit on one device; differences are errors that name them.

    Raises:
        CheckpointError: as described.
    """
    want = traverse_util.flatten_dict(own, sep="/")
    have = traverse_util.flatten_dict(given, sep="/")
    shapes = [
        f"{path} {tuple(jnp.shape(have[path]))} instead of {tuple(jnp.shape(leaf))}"
        for path, leaf in want.items()
        if path in have and jnp.shape(have[path]) != jnp.shape(leaf)
    ]
    missing = [path for path in want if path not in have]
    extra = [path for path in have if path not in want]
    problems = [f"{title}: {_listed(items)}" for title, items in (("shape", shapes), ("missing", missing), ("left over", extra)) if items]
    if problems:
        raise CheckpointError(
            f"the parameters of {name!r} do not fit this model ({'; '.join(problems)}); give the model's fields (config.model, or of staining"
            " config.stain) the values of the run they come from"
        )
    return traverse_util.unflatten_dict({path: np.asarray(have[path], leaf.dtype) for path, leaf in want.items()}, sep="/")


def _listed(items: Iterable[str], limit: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "") if items else "nothing"


def task_class(name: str) -> type[Task]:
    """The class of a task by its name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in TASKS:
        raise ConfigError(f"config.task={name!r} is unknown; choose one of {', '.join(sorted(TASKS))}")
    module, kind = TASKS[name].split(":")
    return getattr(importlib.import_module(module), kind)


def build(config: Any) -> Task:
    """The task that `config.task` names.

    Raises:
        ConfigError: unknown name, or settings that do not fit together.
    """
    return task_class(config.task)(config)
