"""A run before it is started: whether its step fits a topology, what it exchanges, how long it may take, and what to change where it does not fit."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavepath.config import apply_overrides
from wavepath.planning import hlo, roofline, standins
from wavepath.planning.advice import MOST, Advice, advise, flags
from wavepath.planning.chips import Chip
from wavepath.planning.compile import Compiled, compile_step, versions
from wavepath.planning.roofline import DEFAULTS, Assumptions, Estimate
from wavepath.planning.topology import Topology, describe, find

_SLOW_COMPILE = 60.0  # seconds from which scanning over the layers is mentioned
Compiler = Callable[[ConfigDict, Topology], Compiled]


@dataclass(frozen=True)
class Run:
    """The configured run. `seconds` and `chip_hours` are of the best and the worst step; None where the chip is not in the table."""

    steps: int
    examples: int
    epoch: int | None
    seconds: tuple[float, float] | None
    chip_hours: tuple[float, float] | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes, FLOPs and collectives are of one device and one step unless they say otherwise.

    Attributes:
        config: name of the config, for tables.
        task: of `tasks.base.TASKS`.
        topology: as given; `devices` and `hosts` of it.
        chip: None where the table does not have it: then there are no times.
        parallel: backend and placement in words.
        changes: fields that differ from the config as it was given (of the plan that the advice leads to).
        batch: examples of a step, of all devices.
        dtype: in which the model computes.
        compiled: memory, program, or the refusal.
        model_flops: operations of the model for the whole batch, what is computed again not counted.
        parameters: trained numbers.
        state: bytes of the state on one device, and of all of it.
        estimate: None where it does not fit or the chip is not in the table.
        run: the configured one.
        notes, assumptions: in words.
        advice: where it does not fit and advice was asked for.
        advised: the plan with the advice followed.
    """

    config: str
    task: str
    topology: str
    devices: int
    hosts: int
    chip: Chip | None
    parallel: str
    changes: Mapping[str, str]
    batch: int
    dtype: str
    compiled: Compiled
    model_flops: float
    parameters: int
    state: tuple[int, int]
    estimate: Estimate | None
    run: Run
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    advice: Advice | None = None
    advised: "Plan | None" = field(default=None)

    @property
    def fits(self) -> bool | None:
        return self.compiled.fits

    @property
    def collectives(self) -> dict[str, dict[str, float]]:
        return hlo.summary(self.compiled.program) if self.compiled.program else {}

    def to_json(self) -> dict[str, Any]:
        """All of it in numbers, texts, lists and dicts."""
        done, program = self.compiled, self.compiled.program
        memory = vars(done.memory) if done.memory else None
        return {
            "config": self.config, "task": self.task, "topology": self.topology, "devices": self.devices, "hosts": self.hosts,
            "chip": self.chip.name if self.chip else None, "parallel": self.parallel, "changes": dict(self.changes), "batch": self.batch,
            "dtype": self.dtype, "fits": self.fits, "memory": memory, "limit": done.limit, "needed": done.needed, "message": done.message,
            "parameters": self.parameters, "state": {"device": self.state[0], "whole": self.state[1]},
            "collectives": self.collectives,
            "flops": {
                "model": self.model_flops, "model_of_a_device": self.model_flops / self.devices, "compiled": program.flops if program else None,
                "by_type": dict(program.by_type) if program else None,
            },
            "traffic": program.traffic if program else None,
            "estimate": self.estimate.to_json() if self.estimate else None,
            "run": vars(self.run), "seconds": {"lowering": done.lowering, "compiling": done.compiling}, "kept": done.kept,
            "notes": list(self.notes), "assumptions": list(self.assumptions),
            "advice": None if self.advice is None else {
                "changes": self.advice.changes, "alternative": self.advice.alternative,
                "trials": [dict(vars(trial), changes=dict(trial.changes)) for trial in self.advice.trials],
            },
            "advised": self.advised.to_json() if self.advised else None, "versions": versions(),
        }  # fmt: skip


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A locked copy with some fields changed, given as texts."""
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        apply_overrides(config, [f"{name}={value}" for name, value in changes.items()])
    return config.lock()


def plan(
    config: ConfigDict, topology: Topology | str, *, name: str = "", backend: str | None = None, batch: int | None = None,
    examples: int | None = None, advice: bool = True, assumptions: Assumptions = DEFAULTS, cache: Path | None = None,
    compiler: Compiler | None = None, say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans a run without its hardware and without its data.

    Args:
        config: a training config, durations in any unit. `config.parallel.devices` is ignored: all devices of the topology are used.
        topology: one that `topology.find` gave, or its name.
        name: of the config, for tables.
        backend, batch: in place of `config.parallel.backend` and `config.batch_size`.
        examples: of an epoch; None: as many as the config's data have, where it names any.
        advice: whether to look for changes where the step does not fit: up to `advice.MOST` more compiles.
        assumptions: of the estimate.
        cache: folder in which compiled steps are kept for the next plan; None: none.
        compiler: `compile_step`, for tests.
        say: is told which compile begins.

    Raises:
        ConfigError: the config, or the topology, is not possible.
    """
    topology = find(topology) if isinstance(topology, str) else topology
    given = {"parallel.devices": "0"} | ({"parallel.backend": backend} if backend else {}) | ({"batch_size": str(batch)} if batch else {})
    config = changed(config, given)
    known = examples if examples is not None else _examples(config)
    epoch = standins.EXAMPLES if known is None else known
    compile_it = compiler or (lambda resolved, topology: compile_step(resolved, topology, cache=cache))
    seen: dict[tuple[tuple[str, str], ...], Compiled] = {}

    def attempt(changes: Mapping[str, str]) -> Compiled:
        key = tuple(sorted(changes.items()))
        if key not in seen:
            number = f"compile {len(seen) + 1}" + (f" of at most {MOST + 1}" if advice and seen else "")
            say(f"{number}: {name or config.task} for {topology.name}" + (f" with {flags(changes)}" if changes else ""))
            seen[key] = compile_it(standins.resolved(changed(config, changes), examples=epoch), topology)
        return seen[key]

    def made(changes: Mapping[str, str], **more: Any) -> Plan:
        resolved = standins.resolved(changed(config, changes), examples=epoch)
        return _plan(resolved, topology, attempt(changes), name, changes, known, assumptions, **more)

    first = made({})
    if first.fits is not False or not advice:
        return first
    found = advise(config, first.compiled, attempt, devices=first.devices, state=first.state[0])
    return made({}, advice=found, advised=made(found.changes) if found.changes else None)


def _examples(config: ConfigDict) -> int | None:
    """How many the config's data have; None where it names none."""
    if not config.data.dir and not config.data.slides:
        return None
    # The number does not depend on durations, which may be in epochs.
    return len(standins.build_task(standins.resolved(config)).sources())


def _plan(
    config: ConfigDict, topology: Topology, compiled: Compiled, name: str, changes: Mapping[str, str], known: int | None, assumptions: Assumptions,
    advice: Advice | None = None, advised: Plan | None = None,
) -> Plan:
    import jax

    from wavepath.training import parallel

    task, devices = standins.build_task(config), len(topology.devices)
    placed = parallel.make(config.parallel, topology.devices)
    abstract = placed.abstract_state(task)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    one = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    batch, dtype = int(config.batch_size), str(task.dtype.name if hasattr(task.dtype, "name") else jax.numpy.dtype(task.dtype).name)
    model_flops = task.flops() * batch
    times = None
    if compiled.program and topology.chip:
        times = roofline.estimate(
            compiled.program, topology.chip, model_flops=model_flops, dtype=dtype, devices=devices, batch=batch, bandwidth=topology.bandwidth or 0.0,
            assumptions=assumptions,
        )
    steps = int(config.train.steps)
    spans = [roofline.run_time(steps, step, devices) for step in (times.best, times.worst)] if times else None
    run = Run(steps, steps * batch, known, *([tuple(part) for part in zip(*spans, strict=True)] if spans else (None, None)))
    return Plan(
        config=name or config.task, task=config.task, topology=topology.name, devices=devices, hosts=topology.hosts, chip=topology.chip,
        parallel=str(placed), changes=dict(changes), batch=batch, dtype=dtype, compiled=compiled, model_flops=model_flops,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)), state=(one, whole), estimate=times, run=run,
        notes=tuple(_notes(config, topology, compiled, known)),
        assumptions=tuple(roofline.listed(assumptions, topology.bandwidth)) if times else (), advice=advice, advised=advised,
    )


def _notes(config: ConfigDict, topology: Topology, compiled: Compiled, known: int | None) -> list[str]:
    """What the numbers rest on, beside the assumptions of the estimate."""
    notes = [describe(topology)]
    if topology.chip:
        notes.append(f"chip data: {topology.chip.source}")
    if known is None:
        notes.append(f"an epoch is taken to have {standins.EXAMPLES} examples, as no data are named (--examples N)")
    if config.task == "mae" and (config.loss.ssim or config.loss.glcm or str(config.loss.second.start).strip()):
        notes.append("ranges of values, which a run measures, are stand-ins; a second phase counts in full, beside the first")
    if config.task in ("finetune", "classify") and not config.finetune.classes:
        notes.append("two classes, as the labels are not read")
    if config.task == "stain" and (config.stain.coa or config.stain.l1 == "adaptive"):
        notes.append("the frozen encoders are of the config's form; their run is not read")
    if config.task in ("mae", "finetune") and not config.model.scan and compiled.compiling > _SLOW_COMPILE:
        notes.append("--config.model.scan=True compiles several times faster (it is another program, with other memory)")
    if compiled.program and compiled.program.unknown:
        notes.append(f"loops whose length the compiler does not say count once: {', '.join(compiled.program.unknown[:3])}")
    if compiled.program and compiled.program.opaque:
        notes.append(f"not counted: operations inside {', '.join(compiled.program.opaque[:3])}")
    return notes
