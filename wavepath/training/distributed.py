"""Several processes that train one run together: how they find each other, who writes, when they stop.

One process for each host (or for each GPU) starts the same command; `jax.distributed` joins them. From then on `jax.devices()` are the devices of
all, each process reads its own rows of every batch, all save their parts of one checkpoint, and the first process alone writes everything else and
speaks. All of them must see the run folder, under one path. In a single process everything here does nothing.
"""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wavepath import console
from wavepath.errors import ConfigError, WavepathError
from wavepath.files import folder_lock


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins the processes; to be called before anything asks JAX for a device.

    Args:
        coordinator: `host:port` of the first process; empty: found out from the environment (SLURM, Cloud TPU, GKE, MPI), with the other two.
        processes: how many there are.
        process: which of them this is, from 0.

    Raises:
        ConfigError: some of the three are given, or the environment does not say, or the others were not found.
    """
    given = bool(coordinator), processes > 0, process >= 0
    if any(given) and not all(given):
        raise ConfigError("--coordinator HOST:PORT, --processes N and --process I belong together; give all three, or --distributed alone")
    if all(given) and process >= processes:
        raise ConfigError(f"--process {process} does not exist among --processes {processes}; they count from 0")
    known = dict(coordinator_address=coordinator, num_processes=processes, process_id=process) if all(given) else {}
    try:
        jax.distributed.initialize(**known, local_device_ids=_own_devices())
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        where = f"by {coordinator}" if coordinator else "by the environment; name them with --coordinator HOST:PORT --processes N --process I"
        raise ConfigError(f"the processes did not find each other ({reason}) {where}") from None
    if not is_first():
        console.mute()


def _own_devices() -> list[int] | None:
    """No restriction (an empty list) for a process that has its host to itself; None leaves it to JAX.

    JAX gives a process under SLURM or MPI the one GPU of its number on the host, which suits a process for each GPU. With one process for each host
    (`launch/slurm.sbatch`) all GPUs but the first would lie idle, and nothing would say so. `JAX_LOCAL_DEVICE_IDS` overrules both.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return [] if _tasks_here() == 1 else None


def _tasks_here() -> int:
    """How many tasks of this job SLURM or MPI has started on this host; 0 where neither has."""
    # mpirun inside a job of SLURM: what SLURM has started are then its daemons, one on each host.
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ or "SLURM_PROCID" not in os.environ:
        return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0))
    # `2(x3),1`: two on each of three hosts, one on the fourth.
    counts: list[int] = []
    for count, hosts in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(hosts or 1)
    host = int(os.environ.get("SLURM_NODEID", 0))
    return counts[host] if host < len(counts) else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def rows() -> tuple[int, int]:
    """(index, count) of this process among those that share each batch."""
    return jax.process_index(), jax.process_count()


def of_process(value: bool, index: int = 0) -> bool:
    """What one process says, in all of them; they have to ask in the same order."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(value), is_source=jax.process_index() == index))


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[bool]:
    """Its block learns whether it is in the first process, and does its work there alone; all go on when that is done, and none if it failed.

    Raises:
        WavepathError: in the other processes, where the block failed in the first one.
    """
    with _turn(0, what):
        yield is_first()


@contextlib.contextmanager
def in_turn(what: str) -> Iterator[None]:
    """Its block is run by one process after the other, the first one first: what that makes, the others find."""
    index, count = rows()
    for turn in range(count):
        with _turn(turn, what):
            if turn == index:
                yield


@contextlib.contextmanager
def _turn(index: int, what: str) -> Iterator[None]:
    """All leave the block together; where it fails in the process whose turn it is, the others fail too, instead of waiting for it."""
    error = None
    try:
        yield
    except BaseException as raised:
        if jax.process_index() != index:
            raise
        error = raised
    failed = of_process(error is not None, index)
    if error is not None:
        raise error
    if failed:
        raise WavepathError(f"process {index} could not go on ({what}); what it says stands in its own output")


@contextlib.contextmanager
def first_holds(folder: Path, lock: str) -> Iterator[None]:
    """The lock of a folder, held by the first process for all of them."""
    with contextlib.ExitStack() as held:
        with first_alone(lock) as first:
            if first:
                held.enter_context(folder_lock(folder, lock))
        yield


def gathered(tree: Any) -> Any:
    """Arrays on the host, with the rows of all processes in the order of the batch.

    Args:
        tree: of arrays that are divided over the devices of all processes, or (after `pmap`) hold this process's rows.
    """
    if not several():
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def whole(leaf: Any) -> np.ndarray:
    """An array on the host; parts that lie with other processes are fetched, so all have to ask for it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return gathered(leaf)
    return np.asarray(leaf)


def preempted(step: int) -> bool:
    """Whether the processes have agreed to save and stop at this step, because one of them was sent SIGTERM.

    JAX's runtime catches the signal and finds the step; a handler in Python beside it would take the signal away. To be asked at every step, with
    rising numbers, by all processes. Once they have agreed, a further SIGTERM does nothing; SIGINT stops at once.
    """
    if not several():
        return False
    from jax.experimental import multihost_utils

    reached = bool(multihost_utils.reached_preemption_sync_point(step))
    if reached and threading.current_thread() is threading.main_thread():
        # Where one process has ended with another code than 0, launchers (mpirun, srun) send SIGTERM to the others, which still save.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return reached
