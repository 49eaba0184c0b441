"""What a fresh State takes from other runs: parameters to start from, networks that stay frozen, and the proof that they did.

Frozen networks are part of a run's own checkpoints, so that it needs the other run only once. Their checksums are recorded when they are taken over;
the loop compares them when it resumes and ahead of every save.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath.config import filled
from wavepath.console import say
from wavepath.errors import CheckpointError
from wavepath.tasks import lineage
from wavepath.tasks.base import State, Task
from wavepath.training import distributed, parallel
from wavepath.training.checkpoint import checksums, restore_run
from wavepath.training.run_folder import RunFolder

TaskFactory = Callable[[ConfigDict], Task]


def start_from(path: str, config: ConfigDict, task_factory: TaskFactory, task: Task, state: State, devices: parallel.Parallel) -> State:
    """The State with the parameters of another run of the same networks.

    Args:
        path: its run folder; `{fold}` and `{seed}` stand for `data.fold` and `seed`.

    Raises:
        CheckpointError: no run there, or parameters that do not fit.
    """
    path = filled(path, config)
    # Placed as this run's own state is, since one device may be too small for it; from there to the host.
    _, _, other = restore_run(Path(path), parallel=devices, task_factory=task_factory)
    say(f"starting from the parameters of {path} at its step {int(other.step)}")
    return devices.place(task.load(state, jax.tree.map(distributed.whole, other.params)))


def inherited(path: str, config: ConfigDict) -> dict[str, Any]:
    """What a run is to remember of the one that it starts from: its folder, and all slides that were learnt from up to there (None: not known).

    Args:
        path: as of `start_from`.
    """
    path = filled(path, config)
    return {lineage.BEFORE: {"run": path, lineage.KEY: lineage.seen(RunFolder(Path(path)).constants() or {})}}


def adopted(
    config: ConfigDict, task_factory: TaskFactory, task: Task, state: State, devices: parallel.Parallel
) -> tuple[State, dict[str, Any]]:
    """The State with the networks that the task takes from other runs, and what is to be remembered of them.

    Returns:
        The State; by the task's names for the other runs their folder, step and whatever `Task.adopt` adds, and `frozen`: the checksum of every
        array that no step may change. Nothing is added by a task without others and without frozen networks.

    Raises:
        CheckpointError: no run there. ConfigError: it does not fit.
    """
    others = {name: filled(path, config) for name, path in task.others().items()}
    constants: dict[str, Any] = {}
    if others:
        restored = {}
        for name, path in others.items():
            other_config, other, learnt = restore_run(Path(path), parallel=devices, task_factory=task_factory)
            say(f"{name} of {path} at its step {int(learnt.step)}")
            restored[name] = other_config, other, jax.tree.map(distributed.whole, learnt)
        state, constants = task.adopt(jax.tree.map(distributed.whole, state), restored)
        _check_taken(task, state, restored)
        for name, (_, _, learnt) in restored.items():
            constants[name] = {**constants.get(name, {}), "run": others[name], "step": int(learnt.step)}
        state = devices.place(state)
    if task.frozen:
        constants["frozen"] = frozen_checksums(task, state)
    return state, constants


def _check_taken(task: Task, state: State, restored: dict[str, tuple[ConfigDict, Task, State]]) -> None:
    """Proves that every frozen array is one of the other runs', bit by bit: nothing of what was drawn for the fresh State is left.

    Raises:
        CheckpointError: an array is not.
    """

    def known(tree: Any) -> dict[str, tuple[tuple[int, ...], int]]:
        shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return {path: (shapes[path], value) for path, value in checksums(tree).items()}

    theirs = set(known([(other.params, other.ema, other.stats) for _, _, other in restored.values()]).values())
    wrong = sorted(path for path, value in known({name: state.extra[name] for name in task.frozen}).items() if value not in theirs)
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} frozen arrays of task {task.config.task!r} are not those of {', '.join(restored)} (first: {wrong[0]}): a defect of the"
            " task, whose `adopt` has to take them over"
        )


def frozen_checksums(task: Task, state: State) -> dict[str, int]:
    """CRC-32 of every array that no step may change."""
    return checksums({name: state.extra[name] for name in task.frozen})


def check_frozen(task: Task, state: State) -> None:
    """Holds what is frozen against what it was at the start of the run.

    Raises:
        CheckpointError: an array of it is another.
    """
    if not task.frozen:
        return
    before, now = task.constants.get("frozen", {}), frozen_checksums(task, state)
    wrong = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(now)} frozen arrays are not what they were at the start (first: {wrong[0]}); the checkpoint or constants.json of"
            " this run was changed: start again with a new --workdir"
        )
