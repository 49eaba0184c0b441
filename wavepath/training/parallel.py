"""Data parallelism over the local devices: one step body, thin backends. The only file that knows meshes and shardings.

A task's functions are written for one shard. `jit` traces them once over the whole batch and lets XLA divide the work; `pmap` traces them for
each shard inside `collectives.axis("data")`, where the reductions that the body calls become real. State is replicated and never stacked:
`pmap` takes and returns it with axis None, so both backends hold the same arrays and write the same checkpoints.

`jit` is the default. `jax.pmap` is in maintenance mode upstream but works, and is what many launch scripts expect; a test holds them equal.
A further backend (`shard_map`) is one more branch in `_compile`; sharded parameters are one more axis in the mesh and another rule in
`state_shardings` (and its tree instead of the one replicated placement in `_compile`).
"""

import queue
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wavepath.errors import ConfigError
from wavepath.ops import collectives
from wavepath.tasks.base import Metrics, State, Task

AXIS = "data"
BACKENDS = ("jit", "pmap")


class Parallel:
    """Places state and batches on a row of devices and compiles a task's functions for them.

    Attributes:
        backend: `jit` or `pmap`.
        devices: the devices used, in order; shard i of a batch is on device i.
    """

    def __init__(self, backend: str, devices: Sequence[jax.Device]):
        if backend not in BACKENDS:
            raise ConfigError(f"config.parallel.backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self.backend, self.devices = backend, list(devices)
        # Auto axes: under the default Explicit ones the gradients of Flax linen modules fail.
        self._mesh = Mesh(np.asarray(self.devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))

    def __str__(self) -> str:
        kind = self.devices[0].device_kind
        return f"{self.backend} on {len(self.devices)} {kind} device{'s' if len(self.devices) > 1 else ''}"

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
        """The placement of every leaf of a state: replicated."""
        return jax.tree.map(lambda _: self._replicated, abstract)

    def abstract_state(self, task: Task) -> State:
        """Shapes, dtypes and placement of the task's state, without making an array: what a checkpoint is restored into."""
        abstract = jax.eval_shape(task.init, jax.random.key(0))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, self.state_shardings(abstract)
        )

    def init(self, task: Task, seed: int) -> State:
        """A fresh state made in its place: it exists on no single device first."""
        key = jax.random.key(seed)
        shardings = self.state_shardings(jax.eval_shape(task.init, key))
        return jax.jit(task.init, out_shardings=shardings)(key)

    def place(self, state: State) -> State:
        """Moves a state that was changed outside the compiled functions to where they expect it."""
        return jax.device_put(state, self.state_shardings(state))

    # Functions ---------------------------------------------------------------------------------------------------------------------------

    def train_step(self, task: Task) -> Callable[[State, Mapping[str, Any]], tuple[State, Metrics]]:
        """`(state, batch) -> (state, metrics)`; the given state is donated, metrics are sums and counts over the whole batch."""

        def body(state: State, batch: Mapping[str, Any]) -> tuple[State, Metrics]:
            state, metrics = task.train_step(state, batch)
            return state, _reduce(metrics)

        return self._compile(body, donate=True)

    def eval_step(self, task: Task) -> Callable[[State, Mapping[str, Any]], Metrics]:
        """`(state, batch) -> metrics` as sums and counts over the whole batch."""
        return self._compile(lambda state, batch: _reduce(task.eval_step(state, batch)))

    def predict(self, task: Task, names: Sequence[str] | None = None) -> Callable[[State, Mapping[str, Any]], dict[str, Any]]:
        """`(state, batch) -> named outputs`, rows in the order of the batch; `names` limits them, and the work, to those wanted."""

        def body(state: State, batch: Mapping[str, Any]) -> dict[str, Any]:
            return dict(task.predict(state, batch, names))

        if self.backend == "jit":
            return self._compile(body, rows=True)
        mapped = self._compile(body, rows=True)
        # The rows of the shards follow one another in the order of the batch.
        return lambda state, batch: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mapped(state, batch))

    def _compile(self, body: Callable, donate: bool = False, rows: bool = False) -> Callable:
        donated = (0,) if donate else ()
        if self.backend == "jit":
            out = self._split if rows else self._replicated
            return jax.jit(body, in_shardings=(self._replicated, self._split), out_shardings=out, donate_argnums=donated)

        def shard(state: State, batch: Mapping[str, Any]) -> Any:
            with collectives.axis(AXIS):
                return body(state, batch)

        return jax.pmap(
            shard, axis_name=AXIS, in_axes=(None, 0), out_axes=0 if rows else None, donate_argnums=donated, devices=self.devices
        )

    # Batches -----------------------------------------------------------------------------------------------------------------------------

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Sends a host batch to the devices, each its rows; returns at once."""
        count = len(self.devices)
        if self.backend == "pmap":
            batch = {name: array.reshape(count, array.shape[0] // count, *array.shape[1:]) for name, array in batch.items()}
        return {name: jax.device_put(array, self._split) for name, array in batch.items()}

    def prefetch(self, batches: Iterable[Mapping[str, np.ndarray]], ahead: int = 2) -> "Prefetch":
        """Iterates over `batches` on the devices; a thread keeps `ahead` of them there while a step runs."""
        return Prefetch(batches, self.put, ahead)


def make(settings: Any, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """The backend that `config.parallel` names, over the first `settings.devices` local devices (0: all).

    Raises:
        ConfigError: an unknown backend, or more devices asked for than there are.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    wanted = int(settings.devices)
    if not 0 <= wanted <= len(devices):
        raise ConfigError(f"config.parallel.devices={wanted}, but this machine has {len(devices)} ({devices[0].platform}); 0 takes all")
    return Parallel(settings.backend, devices[: wanted or None])


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
