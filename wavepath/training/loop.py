"""The one training loop, for every task: read it from top to bottom.

Order inside the loop: evaluate and draw (old state) -> save -> fetch a batch -> step -> write. Metrics are fetched one step late, after the
next step has been sent off, so that the device never waits for the host. A save waits for the metrics of its own step: a state behind a
loss that is not finite is never written.

The same command run again goes on where the last whole checkpoint is. The batch of a step, its augmentations and its masks are functions of
the seed and the position, so the parameters after step N do not depend on how often the run was killed.
"""

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from ml_collections import ConfigDict

from wavepath.console import progress, say, warn
from wavepath.errors import CheckpointError, ConfigError, DatasetError, TrainingDiverged
from wavepath.files import writable_folder
from wavepath.tasks.base import Metrics, State, Task, build
from wavepath.training import distributed, durations, parallel
from wavepath.training.checkpoint import Checkpointer, check_sizes, saved_steps
from wavepath.training.chrono import Chrono, TraceWindow, speed_note
from wavepath.training.early_stopping import EarlyStopping
from wavepath.training.evaluator import Evaluator
from wavepath.training.run_folder import RunFolder, identity_of
from wavepath.training.runs import read_curves
from wavepath.training.start import adopted, check_frozen, inherited, start_from
from wavepath.training.writers import METRICS, Writers


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        step: steps taken, over all restarts.
        status: `done` or `preempted`.
        metrics: the last metrics written.
        seconds: wall time of training, over all restarts.
        images_per_second: over all restarts.
        fresh: whether this call took any step; False where the run was whole already.
    """

    step: int
    status: str
    metrics: dict[str, float]
    seconds: float
    images_per_second: float
    fresh: bool


def train(
    config: ConfigDict, workdir: Path, *, task_factory: Callable[[ConfigDict], Task] = build, pipeline: Any = None
) -> TrainResult:
    """Trains, or goes on training, in a run folder.

    Args:
        config: from `wavepath.config.load_config`; durations in any unit.
        workdir: the run folder; see `wavepath.training.run_folder` for what it holds.
        task_factory: how a config becomes a task.
        pipeline: a module with `batches` and `eval_batches` in place of `wavepath.data.pipeline`.

    Raises:
        ConfigError: fields that do not fit together, or that differ from those of the run in the folder.
        CheckpointError: checkpoints that cannot be restored or written.
        TrainingDiverged: a loss or gradient that is not finite; the last good checkpoint stays.
        LockedError: another process trains in the folder.
    """
    workdir = writable_folder(Path(workdir))
    with distributed.first_holds(workdir, "train.lock"):
        return _train(config, RunFolder(workdir), task_factory, pipeline)


def _train(given: ConfigDict, run: RunFolder, task_factory: Callable[[ConfigDict], Task], pipeline: Any) -> TrainResult:
    # The same run? ------------------------------------------------------------------------------------------------------------------------
    resuming = bool(saved_steps(run.folder))  # before the first checkpoint there is nothing that another config could spoil
    changed = run.check_given(given) if resuming else []
    whole = _whole(run, changed)
    if whole:
        say(f"{run.folder} is whole: {whole.step} steps done; nothing to do (give more config.train.steps to go on)")
        return whole
    if changed:
        say(f"resuming with changed fields: {', '.join(changed)}")

    # Data, and durations in steps ---------------------------------------------------------------------------------------------------------
    trace_window = durations.window(given.profile)
    with distributed.in_turn("data"):
        config = _with_data(given, run.folder)
    source = task_factory(_provisional(config)).sources()
    if len(source) == 0:
        raise DatasetError(f"{source.name} holds no example; see its manifest.csv for why, or give another config.data.dir")
    identity = identity_of(source)
    if resuming:
        run.check_source(identity)
    config = durations.resolve(config, len(source))
    if resuming:
        run.keep_phase(config, max(saved_steps(run.folder)))
    if config.data.order == "auto":
        config.data.order = run.kept_order() if resuming else getattr(source, "best_order", "global")
    steps, batch_size = config.train.steps, config.batch_size

    # Devices and task ---------------------------------------------------------------------------------------------------------------------
    devices = parallel.make(config.parallel)
    devices.check(batch_size, config.optim.accumulate)
    task = task_factory(config)
    with distributed.first_alone("constants") as first:
        if first and not (resuming and run.constants() is not None):  # those of a start that saved nothing may be of other data
            run.write_constants(dict(task.measure(source)))
    task.constants = constants = run.constants()

    # State: 1. the newest whole checkpoint of this run; 2. another run's parameters; 3. from scratch ----------------------------------------
    checkpoints = Checkpointer(run.folder, keep=config.train.keep)
    found = checkpoints.restore(devices.abstract_state(task)) if resuming else None
    if found:
        start, state, meta = found[0], devices.imported(found[1]), found[2]
        chrono = Chrono(steps, batch_size, meta["chrono"])
        say(f"resuming {run.folder} at step {start} of {steps}")
    else:
        start, state, chrono = 0, devices.init(task, config.seed), Chrono(steps, batch_size)
        if config.init_from:
            state = start_from(config.init_from, config, task_factory, task, state, devices)
        state, found_out = adopted(config, task_factory, task, state, devices)
        if config.init_from:
            found_out |= inherited(config.init_from, config)
        if found_out:
            task.constants = constants | found_out
            run.write_constants(task.constants)
    check_frozen(task, state)
    if start > steps:
        raise ConfigError(f"{run.folder} is at step {start}, past config.train.steps={steps}; give at least {start}, or a new --workdir")

    # The loop -------------------------------------------------------------------------------------------------------------------------------
    pipeline = pipeline or task.pipeline()
    train_step = devices.train_step(task)
    evaluate = Evaluator(config, devices, task, task.held_out(source), pipeline)
    patience = EarlyStopping(config.train, run.folder, task, devices, meta.get("early_stopping") if found else None)
    writers = Writers(run.folder, config.writers, config.to_dict(), start)
    trace = TraceWindow(trace_window, run.folder / "profile")
    host_batches = _batches(pipeline, source, config, start * batch_size)
    batches = devices.prefetch(host_batches)
    say(_banner(config, task, state, source, devices))
    if devices.fsdp > 1:
        say(devices.describe(state))
    # Together: a start that was refused must not leave a longer run that counts as done.
    run.write_configs(given, config, identity)
    run.write_status("running", start, steps, chrono.seconds, chrono.rate())
    last_metrics = _last_metrics(run)
    pending: tuple[int, Metrics] | None = None  # the step whose metrics are still on the device
    saved_at, status = time.monotonic(), "done"

    with StopSignals() as stop, progress(f"train {run.folder.name}", steps - start, "steps") as bar:

        def settle() -> None:
            """Fetches the metrics of the pending step, refuses what is not finite, and writes."""
            nonlocal pending, last_metrics
            if pending is None:
                return
            (number, metrics), pending = pending, None
            values = mean_metrics(metrics)
            _refuse_nonfinite(number, values, checkpoints)
            chrono.stepped(first=number == start + 1)
            note = ""
            if number % config.train.log_every == 0 or number in (1, steps):
                report = chrono.report(number)
                replaced = getattr(host_batches, "corrupt_count", 0)
                last_metrics = {**values, "epoch": number * batch_size / len(source), **report} | ({"replaced": replaced} if replaced else {})
                writers.scalars(number, last_metrics)
                note = speed_note(values.get("loss"), report)
            bar.advance(1, note)

        try:
            for step in range(start, steps + 1):
                last, new = step == steps or patience.exhausted, step > start
                # Read once: a signal that comes between the save and the end below waits for the next round.
                stopping = stop.requested or distributed.preempted(step)

                # Evaluate and draw, with the state as it is before the next step.
                if new and config.train.eval_every and (last or durations.due(step, config.train.eval_every)):
                    settle()
                    with chrono.paused():
                        values = evaluate.metrics(state)
                        writers.scalars(step, values)
                        last_metrics |= values
                        patience.look(step, values, state)
                    last = last or patience.exhausted
                if new and config.train.panels_every and (last or durations.due(step, config.train.panels_every)):
                    settle()
                    with chrono.paused():
                        evaluate.panel(state, step, run.folder, writers)

                # Save, once this very state is known to be finite.
                by_time = 0 < config.train.save_seconds and distributed.of_process(config.train.save_seconds <= time.monotonic() - saved_at)
                if new and (last or stopping or by_time or durations.due(step, config.train.save_every)):
                    settle()
                    with chrono.paused():
                        check_frozen(task, state)
                        checkpoints.wait()  # until the last save is whole, the one before it counts, and so does its best
                        patience.write()
                        checkpoints.save(step, devices.exported(state), {"chrono": chrono.saved(), "version": _versions(), **patience.saved()})
                        run.write_status("running", step, steps, chrono.seconds, chrono.rate())
                    saved_at = time.monotonic()
                if stopping:
                    status = "done" if last else "preempted"
                    break
                if last:
                    break
                checkpoints.poll()

                # Fetch, step, and only then look at the step before.
                trace.before(step + 1, state)
                with chrono.waiting():
                    batch = next(batches)
                state, metrics = train_step(state, batch)
                for leaf in jax.tree.leaves(metrics):
                    leaf.copy_to_host_async()
                settle()
                pending = step + 1, metrics
            settle()
            trace.close(state)
            checkpoints.wait()
        except TrainingDiverged:
            run.write_status("diverged", max(saved_steps(run.folder), default=0), steps, chrono.seconds, chrono.rate())
            raise
        finally:
            trace.close()
            batches.close()
            writers.close()
            checkpoints.close()
            patience.close()

    run.write_status(status, step, steps, chrono.seconds, chrono.rate(), **patience.status(step < steps))
    if replaced := getattr(host_batches, "corrupt_count", 0):
        warn(f"{replaced} examples could not be read; the next readable ones took their places (config.data.on_corrupt=replace)")
    if status == "done":
        patience.tell(step, steps)
    if status == "preempted":
        say(f"stopped by {stop.name or 'SIGTERM'} at step {step} of {steps}, saved; run the same command again to go on")
    return TrainResult(step, status, last_metrics, chrono.seconds, chrono.rate(), fresh=True)


# The parts of the above ---------------------------------------------------------------------------------------------------------------------


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a wish that the loop reads between steps; a second one acts as it always did.

    Of several processes none listens here: see `distributed.preempted`.

    Attributes:
        requested: whether a signal has come.
        name: which.
    """

    def __init__(self) -> None:
        self.requested, self.name = False, ""
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested, self.name = True, signal.Signals(number).name
        self._restore()
        # Written past `print`: its buffer refuses a second writer, and the signal may have come in the middle of a line.
        os.write(2, f"{self.name}: saving after this step; send it again to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> "StopSignals":
        # Python delivers signals to the main thread alone; elsewhere (a notebook's worker) the caller stops the run its own way. Of several processes
        # JAX's runtime catches them, and finds a step at which all can stop.
        if not distributed.several() and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()


def mean_metrics(metrics: Metrics) -> dict[str, float]:
    """Sums and counts on the device -> means on the host; a metric with a count of zero (a term that this phase does not have) is left out."""
    return {name: float(total) / float(count) for name, (total, count) in sorted(jax.device_get(metrics).items()) if count}


def _refuse_nonfinite(step: int, values: Mapping[str, float], checkpoints: Checkpointer) -> None:
    wrong = [f"{name}={value}" for name, value in values.items() if ("loss" in name or name == "grad_norm") and not math.isfinite(value)]
    if wrong:
        checkpoints.wait()
        kept = saved_steps(checkpoints.run)
        where = f"the last good checkpoint is step {kept[-1]} in {checkpoints.run}" if kept else "no checkpoint had been saved"
        raise TrainingDiverged(
            f"{', '.join(wrong)} at step {step}: training has diverged; {where}. Lower config.lr, lengthen config.optim.warmup, or clip"
            " gradients (config.optim.clip_norm=1.0), in a new --workdir"
        )


def _whole(run: RunFolder, changed: list[str]) -> TrainResult | None:
    """The result of a run that is done, from its files alone; None where there is something to do."""
    status = run.status()
    longer = any(field.startswith(("train.steps ", "train.epochs ", "train.examples ", "train.patience")) for field in changed)
    if status.get("status") != "done" or longer or status["step"] not in saved_steps(run.folder):
        return None
    try:
        check_sizes(run.folder, status["step"])
    except CheckpointError as error:
        warn(f"the last checkpoint of {run.folder} is damaged ({error}); its steps are taken again")
        return None
    return TrainResult(status["step"], "done", _last_metrics(run), status["seconds"], status["images_per_second"], fresh=False)


def _last_metrics(run: RunFolder) -> dict[str, float]:
    curves, _ = read_curves(run.folder / METRICS)
    return {name: values[-1] for name, (_, values) in curves.items()}


def _with_data(config: ConfigDict, folder: Path) -> ConfigDict:
    """The config with a data folder: phantoms made for the run where none is given."""
    if config.data.dir or config.data.slides or config.data.bags:
        return config
    # Imported here: making slides brings the imaging libraries, which a run on prepared tiles does not need.
    from wavepath.data.default import ensure_phantom_data

    given = "no config.data.bags" if config.task == "mil" else "no config.data.dir and no config.data.slides"
    say(f"{given}: training on phantom data made for this run")
    return ensure_phantom_data(config, folder)


def _provisional(config: ConfigDict) -> ConfigDict:
    """A config to open the source with: epochs become steps only when the source's size is known."""
    config = config.copy_and_resolve_references()
    config.train.steps, config.train.epochs, config.train.examples, config.optim.warmup = 1, 0.0, 0, "0"
    if config.loss.second.start:
        config.loss.second.start = "0"
    return durations.resolve(config, 1)


def _batches(pipeline: Any, source: Any, config: ConfigDict, position: int) -> Any:
    return pipeline.batches(
        source, batch_size=config.batch_size, seed=config.seed, start_position=position, order=config.data.order, window=config.data.window,
        host=distributed.rows(), prefetch=config.data.prefetch, on_corrupt=config.data.on_corrupt,
    )


def _versions() -> dict[str, str]:
    from wavepath import __version__

    return {"wavepath": __version__, "jax": jax.__version__}


def _banner(config: ConfigDict, task: Task, state: State, source: Any, devices: parallel.Parallel) -> str:
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    networks = ", ".join(f"{name} {size / 1e6:.3g} M" for name, size in sizes.items())
    epochs = config.train.steps * config.batch_size / len(source)
    return (
        f"{config.task}: {networks} parameters, {task.flops() / 1e9:.3g} GFLOP an example; {len(source)} examples from {source.name}; "
        f"{config.train.steps} steps of {config.batch_size} ({epochs:.3g} epochs, warm-up {config.optim.warmup}); {devices}"
    )
