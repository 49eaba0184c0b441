"""A training step of any config, on a synthetic batch: images a second, model FLOPs, memory; backends, variants and PyTorch side by side.

The step is the one that `wavepath train` compiles: augmentation, loss, gradient, optimiser, metrics, its state donated. Contenders take turns in
one process, warm-up excluded, each waited for on the device. FLOPs are the model's own (a multiply and an add count two, a backward pass twice its
forward pass, recomputation nothing). Of an accelerator whose peak is known the share of it is the MFU; elsewhere the measure is a large matrix
product that takes its turn among the contenders, and the share is of what that reaches.

`--peer torch` adds transformers' ViTMAE of the same sizes with PyTorch's fused attention and fused AdamW (extra [bench]). Augmentation is no part
of its step (PyTorch augments in the loader), so wavepath's step is then measured with and without.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavepath.errors import ConfigError

BACKENDS = ("jit", "pmap", "shard_map")
PEER, PRODUCT = "torch", "matrix product"
PLAIN = dict(crop_scale=(1.0, 1.0), hflip=False, vflip=False, rot90=False, stain_jitter=0.0)  # the augmentation that leaves a tile as it is
COMPARED = (  # by --compare
    "median_ms", "cpu_ms", "images_per_second", "mfu", "share_of_product", "rate_over_base", "cpu_over_base", "flops", "parameters", "planned",
    "scratch", "device_peak",
)  # fmt: skip
_SIDES = {"cpu": 2048}  # of the matrices of the product that shares are taken of
_SIDE = 8192
_SETTLE = 0.05  # a step keeps its threads longer than an operator does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="as config.parallel.backend, several for a comparison (default: the config's)")
    parser.add_argument("--peer", choices=[PEER], help="also the same network in PyTorch: task mae with squared error alone")
    parser.add_argument("--runs", type=int, default=7, help="rounds, in each of which every contender has its turn (default: 7)")
    parser.add_argument("--threads", type=int, help="cores (default: every core this process may use)")
    add_output_arguments(parser)


def add_config_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What `step` and `compile` share; `several`: configs, one behind the other."""
    told = "config file, with its arguments behind a colon; fields as --config.FIELD=VALUE"
    parser.add_argument("--config", required=True, nargs="+" if several else None, help=told + (" (for all of several)" if several else ""))
    parser.add_argument("--batch", type=int, help="examples of a step (default: config.batch_size)")
    parser.add_argument(
        "--vary", nargs="+", default=[], metavar="FIELD=A,B", help="measure each value of a field of the config; of several, every combination"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured, every round, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="also write the tables as Markdown")


# Contenders ---------------------------------------------------------------------------------------------------------------------------------


def variants(fields: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, overrides) of every combination of `field=a,b` texts; one without a name where there are none.

    Raises:
        ConfigError: no values, or one field twice.
    """
    from wavepath.config import split_list

    choices: dict[str, list[str]] = {}
    for text in fields:
        name, _, values = text.partition("=")
        name = name.strip().removeprefix("--").removeprefix("config.")
        if not name or not values or name in choices:
            raise ConfigError(f"--vary {text}: give a field once, with its values, as in model.remat=none,full")
        choices[name] = [value for value in split_list(values) if value]
    made = []
    for values in itertools.product(*choices.values()):
        overrides = [f"{name}={value}" for name, value in zip(choices, values, strict=True)]
        made.append((" ".join(overrides), overrides))
    return made


def check_batch(overrides: Iterable[str], batch: int | None) -> None:
    """Refuses a batch that is said twice: one of the two would go unheard.

    Raises:
        ConfigError: so, or a batch below 1.
    """
    if batch is None:
        return
    if batch < 1:
        raise ConfigError("--batch is at least 1")
    if said := [text for text in overrides if text.partition("=")[0].strip() == "batch_size"]:
        raise ConfigError(f"--batch {batch} and {said[0]}: give one of them alone")


def load(spec: str, overrides: Sequence[str], batch: int | None) -> Any:
    """A config ready for a step without data: durations in steps, of the batch asked for.

    Raises:
        ConfigError: of the config, or of the batch.
    """
    from wavepath.config import load_config
    from wavepath.planning.standins import resolved

    check_batch(overrides, batch)
    return resolved(load_config(spec, overrides), batch=batch)


def is_plain(config: Any) -> bool:
    """Whether its augmentation leaves a tile as it is."""
    return all(tuple(value) == tuple(config.augment[name]) if isinstance(value, tuple) else not config.augment[name] for name, value in PLAIN.items())


def without_augmentation(config: Any) -> Any:
    """A copy whose tiles are taken as they are."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.augment.update(PLAIN)
    return config.lock()


def contenders(configs: Mapping[str, Any], backends: Sequence[str], peer: bool) -> dict[str, Any]:
    """Name to config of every step of ours, in the order of the table.

    Args:
        configs: by the name of the variant, "" where there is one. backends: empty: the config's. peer: also without augmentation.
    """
    found = {}
    for variant, config in configs.items():
        for backend in backends or (config.parallel.backend,):
            chosen = config.copy_and_resolve_references()
            with chosen.unlocked():
                chosen.parallel.backend = backend
            name = " ".join(part for part in ("wavepath", backend if len(backends) > 1 else "", variant) if part)
            found[name] = chosen.lock()
            if peer and not is_plain(chosen):
                found[f"{name}, no augmentation"] = without_augmentation(chosen)
    return found


@dataclass
class Step:
    """A step of ours, compiled, with its state and batch on the devices: `call()` takes one step and returns what it has to be waited for.

    Attributes:
        facts: what is known without running it, as JSON values.
        metrics: of the last step, on the device.
    """

    call: Callable[[], Any]
    facts: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)


def compiled_step(config: Any) -> Step:
    """The training step of a resolved config, compiled for the devices that it names, on a synthetic batch.

    Raises:
        ConfigError: settings or a batch that do not fit.
    """
    import jax
    import jax.numpy as jnp

    from wavepath.planning.standins import build_task, host_batch
    from wavepath.training import parallel

    devices = parallel.make(config.parallel)
    devices.check(config.batch_size, config.optim.accumulate)
    task = build_task(config)
    compiled = devices.lower_step(task).compile()
    state, batch = devices.init(task, config.seed), devices.put(host_batch(task))
    facts = {
        "batch": int(config.batch_size), "devices": len(devices.devices), "device_kind": devices.devices[0].device_kind,
        "backend": devices.backend, "dtype": jnp.dtype(task.dtype).name, "flops": float(task.flops()),
        "parameters": sum(leaf.size for tree in state.params.values() for leaf in jax.tree.leaves(tree)), **planned(compiled),
    }  # fmt: skip
    made = Step(lambda: None, facts)
    held = [state]
    del state  # donated by the first step

    def call() -> Any:
        held[0], made.metrics = compiled(held[0], batch)
        return held[0], made.metrics

    made.call = call
    return made


def planned(compiled: Any) -> dict[str, int]:
    """Bytes on one device by the compiler's plan: `arguments` (state and batch), `scratch` (temporaries), `planned` (both, and results beside them).

    `compiler_peak` is the compiler's own figure, where it gives one; not every compiler counts the same in it.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    parts = {"arguments": analysis.argument_size_in_bytes, "scratch": analysis.temp_size_in_bytes}
    parts["planned"] = sum(parts.values()) + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    if peak := getattr(analysis, "peak_memory_in_bytes", 0):
        parts["compiler_peak"] = peak
    return {name: int(value) for name, value in parts.items()}


def product_call(device: Any, dtype: str) -> tuple[Callable[[], Any], float]:
    """A square matrix product on a device: what its units reach, as a call, and its FLOPs."""
    import jax
    import jax.numpy as jnp

    side = _SIDES.get(device.platform, _SIDE)
    a = jax.device_put(jnp.full((side, side), 0.5, dtype), device)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * side**3


def _device_memory() -> Mapping[str, int]:
    """What the first device says of its memory; nothing where it keeps no count, as a CPU."""
    import jax

    return jax.local_devices()[0].memory_stats() or {}


def own_peak(held: Mapping[str, int], before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """`device_peak`: bytes that a contender's first step brings a device to, its state and batch with them, those of the others left out.

    The device only keeps the greatest count so far. Where the step does not surpass that, it tells no more than that its own is at most
    `device_peak`: then `device_peak_is_bound` is True.

    Args:
        held: the device's figures before the contender was made. before: when it was compiled and its state was there. after: behind its first step.
    """
    names = ("bytes_in_use", "peak_bytes_in_use")
    if any(name not in one for name in names for one in (held, before, after)):
        return {}
    peak = after["peak_bytes_in_use"]
    return {"device_peak": int(peak - held["bytes_in_use"]), "device_peak_is_bound": peak <= before["peak_bytes_in_use"]}


# Measuring ----------------------------------------------------------------------------------------------------------------------------------


def measure(configs: Mapping[str, Any], runs: int, peer: bool, threads: int) -> dict[str, Any]:
    """Every contender's step, as JSON values: `rows`, and `product`, where there is no known peak to take shares of.

    Args:
        configs: by name, as `contenders` made them. peer: also PyTorch, of the first config.
    """
    import jax

    from wavepath.benchmarks.step_table import Measured, rows_of
    from wavepath.benchmarks.timing import counted, peak_memory, take_turns
    from wavepath.console import progress
    from wavepath.planning.chips import chip_of

    calls: dict[str, Callable[[], None]] = {}
    busy: dict[str, list[float]] = {}
    steps: dict[str, Any] = {}

    def contend(name: str, call: Callable[[], Any]) -> None:
        busy[name] = []
        calls[name] = counted(call, busy[name])

    with progress("step", len(configs) + runs + peer + 1, "parts") as bar:
        for name, config in configs.items():
            held = _device_memory()
            steps[name] = compiled_step(config)
            contend(name, steps[name].call)
            before = _device_memory()
            calls[name]()  # alone: what stands in memory before it are states and batches
            steps[name].facts |= own_peak(held, before, _device_memory())
            bar.advance(1, f"{name} compiled")
        first = next(iter(steps.values())).facts
        products: dict[str, float] = {}
        if peer:
            from wavepath.benchmarks import torch_mae

            steps[PEER] = torch_mae.make_step(next(iter(configs.values())), threads)
            contend(PEER, steps[PEER].call)
            name = f"{PRODUCT} ({PEER})"
            call, products[name] = torch_mae.product_call(_SIDES.get(jax.default_backend(), _SIDE))
            contend(name, call)
            bar.advance(1, "PyTorch ready")
        chip = chip_of(first["device_kind"])
        if chip is None:
            call, products[PRODUCT] = product_call(jax.devices()[0], "float32" if jax.default_backend() == "cpu" else first["dtype"])
            contend(PRODUCT, call)
        timed = {one.name: one for one in take_turns(calls, runs, lambda: bar.advance(1), _SETTLE)}
        bar.advance(1, "memory")
        for step in steps.values():
            step.facts["resident_rise"] = peak_memory(counted(step.call, []))
    # The best of the libraries, round by round: both halves of a share meet the same load.
    best = [max(flops / timed[name].seconds[turn] for name, flops in products.items()) for turn in range(runs)] if products else []
    base = PEER if peer else next(iter(steps))
    found = {
        name: Measured(step.facts, timed[name].seconds, statistics.median(busy[name][-runs:]), _check(step)) for name, step in steps.items()
    }
    report: dict[str, Any] = {"rows": rows_of(found, base, best, chip.peak if chip else {}), "base": base, "chip": chip.name if chip else None}
    if best:
        report["product"] = {
            "flops_per_second": statistics.median(best), "each": {name: flops / timed[name].median for name, flops in products.items()},
        }
    return report


def _check(step: Step) -> dict[str, Any]:
    """The loss of the last step: a step of numbers that are not finite measures nothing."""
    if "loss" not in step.metrics:
        return {}
    total, count = (float(part) for part in step.metrics["loss"])
    return {"loss": total / count if count else math.nan}


# Running ---------------------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.step_table import command_of, heading, lines, table_of
    from wavepath.benchmarks.timing import allocator, limit_cores, publish, restart_with_huge_pages, versions

    if args.runs < 1:
        raise ConfigError("--runs is at least 1")
    chosen = variants(args.vary)
    for _, overrides in chosen:
        check_batch([*args.config_overrides, *overrides], args.batch)
    if args.peer:
        from wavepath.benchmarks import torch_mae

        torch_mae.require()
    restart_with_huge_pages()
    threads = limit_cores(args.threads)
    where = machine()
    configs = {name: load(args.config, [*args.config_overrides, *overrides], args.batch) for name, overrides in chosen}
    if args.peer:
        torch_mae.check_all(configs.values())
    named = ["jax", "jaxlib", "flax", *(["torch", "transformers"] if args.peer else [])]
    flags = [*(["--backend", *args.backend] if args.backend else []), *([f"--peer {args.peer}"] if args.peer else []), f"--runs {args.runs}"]
    flags += [f"--threads {args.threads}"] if args.threads else []
    report = {
        "command": command_of("step", args, flags),
        "machine": where, "threads": threads, "allocator": allocator(), "versions": versions(named), "runs": args.runs,
        "compare": COMPARED, **measure(contenders(configs, args.backend or (), bool(args.peer)), args.runs, bool(args.peer), threads),
    }  # fmt: skip
    publish(report, heading(report), [table_of(report)], lines(report), args.json, args.markdown)
    return 0
