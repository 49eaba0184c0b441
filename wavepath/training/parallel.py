"""Data parallelism over devices, of one process or of several: one step body, thin backends. The only file that knows meshes and shardings.

A task's functions are written for one shard. `jit` traces them once over the whole batch and lets XLA divide the work; `pmap` and `shard_map` trace
them for each shard inside `collectives.axis("data")`, where the reductions that the body calls become real. State is never stacked: `pmap` takes and
returns it with axis None, so all backends hold the same arrays and write the same checkpoints.

`jit` is the default. `jax.pmap` is in maintenance mode upstream but works, and is what many launch scripts expect; a test holds them equal.

State is replicated, or, with `jit` and `fsdp` above 1, divided: of every large array (parameters, moments, averages, frozen networks) each device of
a group of `fsdp` holds a part, from its initialisation on; XLA gathers what a layer needs and scatters its gradient. The batch is divided over all
devices either way.
"""

import contextlib
import math
import queue
import re
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wavepath.errors import ConfigError
from wavepath.ops import collectives
from wavepath.ops.platform import traced_for
from wavepath.tasks.base import Metrics, State, Task
from wavepath.training import distributed

AXIS, PARTS = "data", "fsdp"
BACKENDS = ("jit", "pmap", "shard_map")
MIN_SIZE = 2**14  # elements below which an array stays replicated
_GROUPS = 10  # of arrays that stay replicated, in the log


class Parallel:
    """Places state and batches on a row of devices and compiles a task's functions for them.

    Attributes:
        backend: `jit`, `pmap` or `shard_map`.
        devices: the devices used, in order; shard i of a batch is on device i.
        fsdp: neighbours that divide the state among them; 1: each holds all of it.
        min_size: elements below which an array stays replicated.
        rules: (regular expression, dimension or None): the first one found in the path of an array (`.params['mae']['encoder']['pos_embed']`)
            says which dimension is divided, None that none is; without one it is the largest that `fsdp` divides.

    Raises:
        ConfigError: an unknown backend, or `fsdp` with another backend than `jit`, or one that does not divide the devices.
    """

    def __init__(
        self, backend: str, devices: Sequence[jax.Device], *, fsdp: int = 1, min_size: int = MIN_SIZE,
        rules: Sequence[tuple[str, int | None]] = (),
    ):
        if backend not in BACKENDS:
            raise ConfigError(f"config.parallel.backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self.backend, self.devices = backend, list(devices)
        self.fsdp, self.min_size, self.rules = int(fsdp) or len(self.devices), int(min_size), tuple(tuple(rule) for rule in rules)
        if self.fsdp < 1 or len(self.devices) % self.fsdp:
            raise ConfigError(f"config.parallel.fsdp={fsdp} does not divide the {len(self.devices)} devices; choose a divisor, or 0 for all of them")
        if self.fsdp > 1 and backend != "jit":
            raise ConfigError(f"config.parallel.fsdp={fsdp} divides the state, which backend {backend} replicates; use config.parallel.backend=jit")
        # Auto axes: under the default Explicit ones the gradients of Flax linen modules fail.
        grid = np.asarray(self.devices).reshape(-1, self.fsdp)
        self._mesh = Mesh(grid, (AXIS, PARTS), axis_types=(AxisType.Auto,) * 2)
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec((AXIS, PARTS)))
        # Under pmap each of several processes holds a state, and rows, of its own devices.
        self._own = self._replicated
        if backend == "pmap" and distributed.several():
            own = [device for device in self.devices if device.process_index == jax.process_index()]
            self._own = NamedSharding(Mesh(np.asarray(own), (AXIS,), axis_types=(AxisType.Auto,)), PartitionSpec())

    def __str__(self) -> str:
        kind = self.devices[0].device_kind
        parts = f", state in {self.fsdp} parts" if self.fsdp > 1 else ""
        return f"{self.backend} on {len(self.devices)} {kind} device{'s' if len(self.devices) > 1 else ''}{parts}"

    def check(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuses a batch that cannot be divided.

        Raises:
            ConfigError: naming the numbers, and batch sizes that fit.
        """
        parts = len(self.devices) * accumulate
        if batch_size % parts:
            below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
            of = f"{len(self.devices)} devices" + (f" x {accumulate} accumulation steps" if accumulate > 1 else "")
            sizes = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(f"config.batch_size={batch_size} is not divisible by {of}; use {sizes}, or another config.parallel.devices")

    # State -------------------------------------------------------------------------------------------------------------------------------

    def state_shardings(self, abstract: State) -> State:
        """The placement of every leaf of a state.

        Raises:
            ConfigError: a rule names a dimension that an array does not have, or that does not divide.
        """
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self._placement(jax.tree_util.keystr(path), leaf.shape), abstract)

    def _placement(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        if self.fsdp == 1:
            return self._own
        rule = next((dimension for pattern, dimension in self.rules if re.search(pattern, path)), "auto")
        if rule is None or (rule == "auto" and math.prod(shape) < self.min_size):
            return self._replicated
        fitting = [dimension for dimension, size in enumerate(shape) if size % self.fsdp == 0 and size]
        if rule == "auto":
            chosen = max(fitting, key=lambda dimension: shape[dimension], default=None)
            if chosen is None:
                return self._replicated
        elif rule in fitting:
            chosen = rule
        else:
            raise ConfigError(f"config.parallel.fsdp_rules: dimension {rule} of {path} {shape} cannot be divided by {self.fsdp}")
        return NamedSharding(self._mesh, PartitionSpec(*[PARTS if dimension == chosen else None for dimension in range(len(shape))]))

    def describe(self, abstract: State) -> str:
        """How much of a state is divided, and all arrays that are not, by their names."""
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        sizes = {jax.tree_util.keystr(path): math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in leaves}
        placed = zip(sizes, jax.tree.leaves(self.state_shardings(abstract)), strict=True)
        whole = {path: sizes[path] for path, place in placed if place.is_fully_replicated}
        total, kept = sum(sizes.values()), sum(whole.values())
        groups = [f"{len(each)} {name} ({sum(each) / 1e6:.2g} MB)" for name, each in sorted(_grouped(whole).items(), key=lambda one: -sum(one[1]))]
        return (
            f"state of {total / 1e6:.3g} MB, {(kept + (total - kept) / self.fsdp) / 1e6:.3g} MB on each device: {len(sizes) - len(whole)} of"
            f" {len(sizes)} arrays in {self.fsdp} parts" + (f"; whole stay {', '.join(groups)}" if whole else "")
        )

    def abstract_state(self, task: Task) -> State:
        """Shapes, dtypes and placement of the task's state, without making an array: what a checkpoint is restored into (see `imported`)."""
        abstract = jax.eval_shape(task.init, jax.random.key(0))
        placed = self.state_shardings(abstract) if self._own is self._replicated else jax.tree.map(lambda _: self._replicated, abstract)
        return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, placed)

    def exported(self, state: State) -> State:
        """The state as checkpoints take it: of arrays that all processes share. Under `pmap` each has copies of its own, which Orbax refuses."""
        return self._moved(state, self._replicated)

    def imported(self, state: State) -> State:
        """The inverse of `exported`, for a state that was restored."""
        return self._moved(state, self._own)

    def _moved(self, state: State, target: NamedSharding) -> State:
        if self._own is self._replicated:
            return state

        def move(leaf: jax.Array) -> jax.Array:
            copies = [shard.data for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, target, copies)

        return jax.tree.map(move, state)

    def init(self, task: Task, seed: int) -> State:
        """A fresh state made in its place: it exists on no single device first."""
        return self._init(task)(jax.random.key(seed))

    def lower_init(self, task: Task) -> jax.stages.Lowered:
        """The program of `init`: what a device needs while the state is made."""
        return self._init(task).lower(jax.random.key(0))

    def _init(self, task: Task) -> Callable:
        return jax.jit(task.init, out_shardings=self.state_shardings(jax.eval_shape(task.init, jax.random.key(0))))

    def place(self, state: State) -> State:
        """Moves a state that was changed outside the compiled functions to where they expect it."""
        return jax.device_put(state, self.state_shardings(state))

    # Functions ---------------------------------------------------------------------------------------------------------------------------

    def train_step(self, task: Task) -> Callable[[State, Mapping[str, Any]], tuple[State, Metrics]]:
        """`(state, batch) -> (state, metrics)`; the given state is donated, metrics are sums and counts over the whole batch."""

        def body(state: State, batch: Mapping[str, Any]) -> tuple[State, Metrics]:
            state, metrics = task.train_step(state, batch)
            return state, _reduce(metrics)

        return self._compile(task, body, step=True)

    def lower_step(self, task: Task) -> jax.stages.Lowered:
        """The program of `train_step`, from shapes alone: `.compile()` compiles it for the devices, which need not be of this machine.

        Neither a state nor a batch is made; `task.constants` have to be set where the task asks for any.
        """
        shapes = {name: spec.shape for name, spec in task.batch_spec().items()}
        if self.backend == "pmap":
            count = len(self.devices)
            shapes = {name: (count, shape[0] // count, *shape[1:]) for name, shape in shapes.items()}
        batch = {
            name: jax.ShapeDtypeStruct(shapes[name], spec.dtype, sharding=None if self.backend == "pmap" else self._split)
            for name, spec in task.batch_spec().items()
        }
        return self.train_step(task).lower(self.abstract_state(task), batch)

    def eval_step(self, task: Task) -> Callable[[State, Mapping[str, Any]], Metrics]:
        """`(state, batch) -> metrics` as sums and counts over the whole batch."""
        return self._compile(task, lambda state, batch: _reduce(task.eval_step(state, batch)))

    def predict(self, task: Task, names: Sequence[str] | None = None) -> Callable[[State, Mapping[str, Any]], dict[str, Any]]:
        """`(state, batch) -> named outputs`, rows in the order of the batch; `names` limits them, and the work, to those wanted."""

        def body(state: State, batch: Mapping[str, Any]) -> dict[str, Any]:
            return dict(task.predict(state, batch, names))

        mapped = self._compile(task, body, rows=True)
        if self.backend != "pmap":
            return mapped
        # The rows of the shards follow one another in the order of the batch.
        return lambda state, batch: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mapped(state, batch))

    def _rows_kept(self) -> contextlib.AbstractContextManager:
        """Where the state is divided, keeps what layers return divided by rows.

        XLA would carry the placement of a layer's parameters over to what it returns, and then send activations instead of parameters: for a ViT-B on
        four chips twenty times the bytes (docs/weak_scaling.md).
        """
        if self.fsdp == 1:
            return contextlib.nullcontext()

        def keep(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            out = call(*args, **kwargs)
            by_rows = context.method_name == "__call__" and isinstance(out, jax.Array) and out.ndim > 1 and not out.shape[0] % len(self.devices)
            return jax.lax.with_sharding_constraint(out, self._split) if by_rows else out

        return nn.intercept_methods(keep)

    def _compile(self, task: Task, body: Callable, step: bool = False, rows: bool = False) -> Callable:
        """`body` on every shard of a batch; its result is a state and metrics (`step`), rows of the batch (`rows`), or metrics."""
        donated = (0,) if step else ()

        def traced(state: State, batch: Mapping[str, Any]) -> Any:
            # Operators take the form that suits these devices, which need not be those of this machine.
            with traced_for(self.devices[0].platform), self._rows_kept():
                return body(state, batch)

        if self.backend == "jit":
            # One placement for all arrays, or a tree of them.
            state = self._replicated if self.fsdp == 1 else self.state_shardings(jax.eval_shape(task.init, jax.random.key(0)))
            out = self._split if rows else (state, self._replicated) if step else self._replicated
            return jax.jit(traced, in_shardings=(state, self._split), out_shardings=out, donate_argnums=donated)

        def shard(state: State, batch: Mapping[str, Any]) -> Any:
            with collectives.axis(AXIS):
                return traced(state, batch)

        if self.backend == "pmap":
            return jax.pmap(
                shard, axis_name=AXIS, in_axes=(None, 0), out_axes=0 if rows else None, donate_argnums=donated, devices=self.devices
            )
        whole, split = PartitionSpec(), PartitionSpec(AXIS)
        # Not checked for replication: a step body takes the gradient of its own shard and reduces it by hand, as under pmap.
        mapped = jax.shard_map(shard, mesh=self._mesh, in_specs=(whole, split), out_specs=split if rows else whole, check_vma=False)
        return jax.jit(mapped, donate_argnums=donated)

    # Batches -----------------------------------------------------------------------------------------------------------------------------

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Sends a host batch to the devices, each its rows; returns at once. Of several processes each sends its own share of the batch."""
        if self.backend == "pmap":
            count = len(self.devices) // jax.process_count()
            batch = {name: array.reshape(count, array.shape[0] // count, *array.shape[1:]) for name, array in batch.items()}
        if distributed.several():
            if self.backend == "pmap":
                return {name: jax.device_put(array, NamedSharding(self._own.mesh, PartitionSpec(AXIS))) for name, array in batch.items()}
            return {name: jax.make_array_from_process_local_data(self._split, array) for name, array in batch.items()}
        return {name: jax.device_put(array, self._split) for name, array in batch.items()}

    def prefetch(self, batches: Iterable[Mapping[str, np.ndarray]], ahead: int = 2) -> "Prefetch":
        """Iterates over `batches` on the devices; a thread keeps `ahead` of them there while a step runs."""
        return Prefetch(batches, self.put, ahead)


def make(settings: Any, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """The backend that `config.parallel` names, over the first `settings.devices` local devices (0: all), or over the devices of several processes.

    Raises:
        ConfigError: an unknown backend, or more devices asked for than there are, or some of the devices of several processes.
    """
    devices = list(devices or (jax.devices() if distributed.several() else jax.local_devices()))
    wanted = int(settings.devices)
    if not 0 <= wanted <= len(devices):
        raise ConfigError(f"config.parallel.devices={wanted}, but this machine has {len(devices)} ({devices[0].platform}); 0 takes all")
    if distributed.several() and wanted not in (0, len(devices)):
        raise ConfigError(f"config.parallel.devices={wanted}: {jax.process_count()} processes train on all of their {len(devices)} devices; give 0")
    # Shard i of a batch lies on device i, and a process reads its rows in one piece.
    devices.sort(key=lambda device: device.process_index)
    return Parallel(
        settings.backend, devices[: wanted or None], fsdp=settings.get("fsdp", 1), min_size=settings.get("fsdp_min_size", MIN_SIZE),
        rules=settings.get("fsdp_rules", ()),
    )


def for_tools(settings: Any, devices: int = 0) -> Parallel:
    """The backend of a run's `config.parallel` over the first `devices` local devices, each with the whole state: for work without a gradient.

    Args:
        devices: 0: as many as the run was told to use, at most those here.

    Raises:
        ConfigError: more devices asked for than there are.
    """
    local = jax.local_devices()
    if not 0 <= devices <= len(local):
        raise ConfigError(f"--devices {devices}, but this machine has {len(local)} ({local[0].platform}); 0 takes as many as the run did")
    return Parallel(settings.backend, local[: devices or int(settings.devices) or None])


def _grouped(sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Sizes of arrays of one name: with that of their layer, numbers left out, where these are few groups, else by itself."""
    for length in (2, 1):
        found: dict[str, list[int]] = {}
        for path, size in sizes.items():
            names = [re.sub(r"_?\d+$", "", name) for name in re.findall(r"[^\W\d]\w*", path)]
            found.setdefault(".".join(names[-length:]), []).append(size)
        if len(found) <= _GROUPS:
            break
    return found


def _reduce(metrics: Metrics) -> Metrics:
    """Sums and counts over all shards. Floats, so that one backend's integer counts are not another's floats."""
    return {name: tuple(collectives.psum(jnp.asarray(part, jnp.result_type(float))) for part in pair) for name, pair in metrics.items()}


class Prefetch:
    """Batches on the devices, fetched and sent by a thread. Iterate over it; `close()` ends the thread.

    An error in the input pipeline is raised where the batch is asked for.
    """

    def __init__(self, batches: Iterable[Mapping[str, np.ndarray]], put: Callable[[Mapping[str, np.ndarray]], Any], ahead: int):
        self._batches = batches
        self._queue: queue.Queue = queue.Queue(maxsize=max(1, ahead))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(iter(batches), put), name="wavepath-prefetch", daemon=True)
        self._thread.start()

    def _work(self, batches: Iterator[Mapping[str, np.ndarray]], put: Callable[[Mapping[str, np.ndarray]], Any]) -> None:
        try:
            for batch in batches:
                if not self._offer((put(batch), None)):
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # handed over, not hidden: the consumer raises it
            self._offer((None, error))

    def _offer(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # asked again, it says the same
            raise error
        return batch

    def close(self) -> None:
        """Stops the thread and the input behind it; batches that wait are dropped."""
        self._stop.set()
        # Closed first where it can be: the thread may be waiting inside it. A generator that is running cannot, and ends with the thread.
        if hasattr(self._batches, "close") and not isinstance(self._batches, types.GeneratorType):
            self._batches.close()
        self._thread.join(timeout=10)
