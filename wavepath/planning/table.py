"""Plans as text: one in full, several as a table."""

from collections.abc import Sequence

from wavepath.console import duration
from wavepath.planning.advice import flags
from wavepath.planning.compile import versions
from wavepath.planning.plan import Plan

HEADER = (
    "config", "topology", "flags", "batch", "fits", "needs GiB", "arguments", "temporary", "peak", "collectives MB", "model GFLOP/image", "step ms",
    "images/s", "MFU", "run", "chip-hours",
)  # fmt: skip
_WEEK = 7 * 24 * 3600


def size(count: float | None) -> str:
    """`1.5e9` bytes -> `1.4 GiB`; None -> `unknown`."""
    if count is None:
        return "unknown"
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.4g} {unit}"
    return f"{count:.0f} B"


def number(value: float, digits: int = 3) -> str:
    """Three digits, and all before the point: `0.0123`, `12.3`, `12,300`."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def span(pair: Sequence[float] | None, scale: float = 1.0) -> str:
    """A best and a worst number: `1.2 to 1.5`, or one where they look alike."""
    if pair is None:
        return "-"
    first, last = (number(scale * value) for value in pair)
    return first if first == last else f"{first} to {last}"


def long_duration(seconds: float) -> str:
    """Hours and minutes up to a week, then days."""
    return duration(seconds) if seconds < _WEEK else f"{seconds / 86400:.3g} days"


def verdict(plan: Plan) -> str:
    if plan.fits is None:
        return "unknown"
    return "yes" if plan.fits else "no"


def rows(plan: Plan) -> list[tuple[str, str]]:
    """All that there is to say of one plan, as names and texts."""
    done, program, times, run = plan.compiled, plan.compiled.program, plan.estimate, plan.run
    found = [
        ("config", f"{plan.config} (task {plan.task}, {plan.dtype}, {plan.parameters / 1e6:.4g} M parameters)"),
        ("devices", plan.notes[0] if plan.notes else plan.topology), ("parallel", plan.parallel),
        *([("flags", flags(plan.changes))] if plan.changes else []),
        ("batch", f"{plan.batch}, {plan.batch / plan.devices:g} on each device"),
        ("state", f"{size(plan.state[0])} on each device, {size(plan.state[1])} in all"),
        ("fits", _fits(plan)),
    ]
    if done.memory:
        memory = done.memory
        found += [
            ("arguments", f"{size(memory.arguments)} (state and batch; {size(memory.aliased)} of it written in place)"),
            ("temporary", size(memory.temporary)), ("peak", f"{size(memory.peak)} alive at once"),
        ]
    if program:
        for kind, row in plan.collectives.items():
            seconds = f", {1e3 * times.collectives[kind]:.3g} ms" if times and kind in times.collectives else ""
            found.append((kind, f"{row['executions']:g} executions of {row['count']:g} instructions, {row['bytes'] / 1e6:.4g} MB{seconds}"))
        if not plan.collectives:
            found.append(("collectives", "none"))
        model, compiled = plan.model_flops / plan.devices / 1e12, program.flops / 1e12
        image = plan.model_flops / plan.batch / 1e9
        found.append(("FLOPs", f"{image:.4g} G an image; of a step on each device {model:.4g} T of the model, {compiled:.4g} T compiled"))
        found.append(("traffic", f"{program.traffic / 1e9:.4g} GB with the memory of each device"))
    if times:
        parts = f"compute {1e3 * times.compute:.3g}, memory {1e3 * times.memory:.3g}, communication {1e3 * times.communication:.3g}"
        found += [
            ("step", f"{span((times.best, times.worst), 1e3)} ms, bound by {times.bound} (ms: {parts})"),
            ("images/s", span(times.images_per_second)), ("MFU", span(times.mfu, 100) + " %"),
        ]
    length = f"{run.steps} steps, {run.examples:.4g} images"
    if run.seconds and run.chip_hours:
        best, worst = (long_duration(seconds) for seconds in run.seconds)
        length += f": {best if best == worst else f'{best} to {worst}'}, {span(run.chip_hours)} chip-hours"
    found.append(("run", length))
    found += [("assumed", line) for line in plan.assumptions] + [("note", line) for line in plan.notes[1:]]
    took = "kept of an earlier plan" if done.kept else f"{duration(done.lowering)} to trace, {duration(done.compiling)} to compile"
    found.append(("compiled", f"{took}; {', '.join(f'{name} {version}' for name, version in versions().items())}"))
    return found


def _fits(plan: Plan) -> str:
    done = plan.compiled
    if plan.fits is None:
        return "unknown: these devices have no memory of their own; the host must hold the peaks of all"
    if plan.fits and done.memory and done.limit and done.memory.reserved > done.limit:
        alive, added = size(done.memory.peak), size(done.memory.reserved)
        return f"yes, barely: the compiler accepts {alive} alive at once of {size(done.limit)}, and with gaps its parts add up to {added}"
    if plan.fits:
        return f"yes, {size(done.used)} of {size(done.limit)}" if done.limit else "yes"
    return f"no: {size(done.needed)} needed, {size(done.limit)} there" if done.needed else f"no: {done.message}"


def advice_lines(plan: Plan) -> list[str]:
    """What to do about a plan that does not fit; empty where it does, or nothing was looked for."""
    if plan.advice is None:
        return []
    lines = [
        f"  tried {flags(trial.changes)}: {'fits' if trial.fits else trial.failed or 'does not fit'}{f', {size(trial.used)}' if trial.used else ''}"
        for trial in plan.advice.trials
    ]
    if plan.advice.changes is None:
        tail = "nothing that was tried fits; take more or larger chips, a smaller model or smaller images"
        return [*lines, tail]
    kept = f"; or, with the batch as it is, {flags(plan.advice.alternative)}" if plan.advice.alternative else ""
    return [*lines, f"it fits with {flags(plan.advice.changes)}{kept}"]


def cells(plan: Plan) -> list[str]:
    """One row of the table."""
    done, times, run = plan.compiled, plan.estimate, plan.run
    gib = (lambda count: "-" if count is None else f"{count / 2**30:.3g}")  # noqa: E731
    memory = [gib(done.used), *(gib(getattr(done.memory, name, None)) for name in ("arguments", "temporary", "peak"))]
    sent = f"{sum(row['bytes'] for row in plan.collectives.values()) / 1e6:.4g}" if done.program else "-"
    hours = "-"
    if run.seconds:
        best, worst = (long_duration(seconds) for seconds in run.seconds)
        hours = best if best == worst else f"{best} to {worst}"
    return [
        plan.config, plan.topology, flags(plan.changes) or "-", str(plan.batch), verdict(plan), *memory, sent,
        f"{plan.model_flops / plan.batch / 1e9:.4g}", span((times.best, times.worst) if times else None, 1e3),
        span(times.images_per_second if times else None), span(times.mfu if times else None, 100) + (" %" if times else ""), hours,
        span(run.chip_hours),
    ]


def table_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """A row for each plan, and below a refused one the row of what its advice leads to."""
    found = []
    for plan in plans:
        found.append(cells(plan))
        if plan.advised:
            found.append(cells(plan.advised))
    return found


def markdown(plans: Sequence[Plan]) -> str:
    """The table in Markdown, with the assumptions below it."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table_rows(plans)]
    each = [one for plan in plans for one in (plan, plan.advised) if one]
    assumed = list(dict.fromkeys(line for plan in each for line in plan.assumptions if "each chip sends" not in line))
    tail = [f"- {line}" for line in assumed]
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*lines, "", f"Compiled with {names}.", *(["", "Assumptions of the times:", "", *tail] if tail else [])]) + "\n"
