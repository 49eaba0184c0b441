"""Super-resolution: a training step and inference of CWT-Net, in one process, contenders in rotation.

The step is the task's own (crop, both losses, gradient, Adam) on random pixels. Its arms: `chunked`, the attention as it is; `dense`, the same
network with all scores at once and automatic differentiation; `no attention`, in which what would be transferred is the value itself; `no
transformer`, in which also the enlarged and reduced value and the merging convolution are gone, so that residual blocks remain. Shares are
1 - (time without) / (time with), round by round; CPU seconds, of all threads, say more than the clock where other work shares the machine.
Inference enlarges low-resolution patches in `wr` mode. Scratch memory is what the compiler plans, and needs no run: it is also given for the
attention alone at the published size (batch 16, 64 px, 64 channels, forward and gradient).
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("cpu", "paper")
ARMS = ("chunked", "dense", "no attention", "no transformer")
PUBLISHED = (16, 64, 64, 64)
TOLERANCE = 1e-4  # of the greatest value; the arms `chunked` and `dense` are compared before they are timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=VARIANTS, default="cpu", help="4 blocks, 32 channels, 32 px; or the published size (default: cpu)")
    parser.add_argument("--scale", type=int, choices=(2, 4, 8), default=2, help="(default: 2)")
    parser.add_argument("--batch", type=int, default=16, help="patches of a step, and of a call of inference (default: 16)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="of the step (default: all)")
    parser.add_argument("--runs", type=int, default=7, help="rounds, in each of which every contender has its turn (default: 7)")
    parser.add_argument("--threads", type=int, help="cores (default: every core this process may use)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured, every round, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="also write the tables as Markdown")


def make_task(config: Any, arm: str):
    """The task of `config`, its attention of the arm's form."""
    from wavepath.tasks.superres import SuperResolution

    class Arm(SuperResolution):
        def _network(self, mean: tuple[float, ...]) -> Any:
            return super()._network(mean).clone(attention="dense" if arm == "dense" else None)

    task = Arm(config)
    task.constants = {"mean": [0.72, 0.43, 0.64]}
    return task


@contextlib.contextmanager
def without(arm: str):
    """Within, networks are traced without what the arm leaves out; parameters stay as they are."""
    from unittest import mock

    import flax.linen as nn
    import jax.numpy as jnp

    from wavepath.models import cwtnet

    if arm not in ("no attention", "no transformer"):
        yield
        return

    def nothing(query, key, value, **settings):
        return value, jnp.ones_like(value[..., :1])

    def merge(following, args, kwargs, context):
        return args[0][..., args[0].shape[-1] // 2 :] if context.module.name == "merge" else following(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cwtnet, "hard_attention", nothing))
        if arm == "no transformer":
            stack.enter_context(mock.patch.object(cwtnet, "up_and_down", lambda x: x))
            stack.enter_context(nn.intercept_methods(merge))
        yield


def make_batch(task: Any) -> dict[str, Any]:
    """Random pixels, smoothed over a few, in the shapes that the task asks for."""
    import jax.numpy as jnp
    import numpy as np

    rng, batch = np.random.default_rng(0), {}
    for name, spec in task.batch_spec().items():
        pixels = spec.dtype == jnp.uint8
        batch[name] = jnp.asarray(rng.integers(0, 256, spec.shape, dtype=np.uint8) if pixels else np.arange(spec.shape[0]).astype(spec.dtype))
    return batch


def attention_memory(shape: tuple[int, ...] = PUBLISHED) -> dict[str, int]:
    """Scratch bytes of the attention's forward and gradient by form, as compiled; nothing is run."""
    import jax
    import numpy as np

    from wavepath.benchmarks.timing import scratch_bytes
    from wavepath.ops.hard_attention import hard_attention

    def planned(impl: str | None) -> int:
        def total(*inputs):
            return sum(x.sum() for x in hard_attention(*inputs, impl=impl))

        specs = [jax.ShapeDtypeStruct(shape, np.float32)] * 3
        return scratch_bytes(jax.jit(jax.grad(total, (0, 1, 2))).lower(*specs).compile())

    return {"chunked": planned(None), "dense": planned("dense")}


def measure(config: Any, arms: list[str], runs: int, memory_shape: tuple[int, ...] = PUBLISHED) -> dict[str, Any]:
    """Steps by arm, inference and memory, as JSON values."""
    import jax
    import numpy as np

    from wavepath.benchmarks.timing import counted, ratios, scratch_bytes, take_turns
    from wavepath.console import progress

    tasks = {arm: make_task(config, arm) for arm in arms}
    first = next(iter(tasks.values()))
    batch, patch, b = make_batch(first), int(config.superres.patch), int(config.batch_size)
    # Behind a bicubic skip a fresh network's last convolution is 0, and so would be most of its gradient.
    state = jax.block_until_ready(jax.jit(first.init)(jax.random.key(0)))
    state = state.replace(params=jax.tree.map(lambda x: x + 0.01, state.params))
    calls, steps, results, busy = {}, {}, {}, {}

    def contend(name: str, call: Callable[[], Any]) -> None:
        busy[name] = []
        calls[name] = counted(call, busy[name])

    with progress("superres", len(arms) + 1 + runs, "parts") as bar:
        for arm, task in tasks.items():
            with without(arm):
                step = jax.jit(task.train_step).lower(state, batch).compile()
            steps[arm] = {"temporary_bytes": scratch_bytes(step)}
            if arm in ("chunked", "dense"):
                results[arm] = float(step(state, batch)[1]["grad_norm"][0])
            contend(arm, lambda step=step: step(state, batch))
            bar.advance(1, f"{arm} compiled")
        low = {"lr": batch["lr"][:, :patch, :patch]}
        enlarge = jax.jit(lambda state, low: first.predict(state, low, ["output"])["output"]).lower(state, low).compile()
        contend("inference", lambda: enlarge(state, low))
        timed = {one.name: one for one in take_turns(calls, runs, lambda: bar.advance(1))}
        memory = attention_memory(memory_shape)
        bar.advance(1)
    for arm in arms:
        steps[arm].update(median_ms=1e3 * timed[arm].median, milliseconds=[1e3 * value for value in timed[arm].seconds])
        steps[arm]["cpu_ms"] = 1e3 * statistics.median(busy[arm][2:])  # the first two are not timed either
    report: dict[str, Any] = {"steps": steps, "batch": b, "patch": patch, "memory_shape": list(memory_shape), "attention_bytes": memory}
    seconds = timed["inference"].median
    side = patch * int(config.superres.scale)
    report["inference"] = {"median_ms": 1e3 * seconds, "patches_per_second": b / seconds, "megapixels_per_second": b * side**2 / seconds / 1e6}
    if len(results) == 2:
        norm = results["dense"]
        report["dense_over_chunked"] = list(ratios(timed["dense"], timed["chunked"]))
        report["dense_over_chunked_cpu"] = steps["dense"]["cpu_ms"] / steps["chunked"]["cpu_ms"]
        report["gradient_norms_equal"] = bool(np.isfinite(norm) and abs(results["chunked"] - norm) <= TOLERANCE * norm)
    for arm, name in (("no attention", "attention_share"), ("no transformer", "transformer_share")):
        if arm in timed and "chunked" in timed:
            # The least and the greatest change places with the sign.
            median, least, greatest = ratios(timed[arm], timed["chunked"])
            report[name] = [1 - median, 1 - greatest, 1 - least]
            report[f"{name}_cpu"] = 1 - steps[arm]["cpu_ms"] / steps["chunked"]["cpu_ms"]
    return report


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the steps' table."""
    b = report["batch"]
    lines = [
        [
            arm, *(f"{x:.0f}" for x in (one["median_ms"], min(one["milliseconds"]), one["cpu_ms"])), f"{1e3 * b / one['median_ms']:.1f}",
            _megabytes(one["temporary_bytes"]),
        ]
        for arm, one in report["steps"].items()
    ]
    return ["step", "median ms", "least", "CPU ms", "patches/s", "scratch MB"], lines


def lines(report: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    found = []
    if "dense_over_chunked" in report:
        median, least, greatest = report["dense_over_chunked"]
        equal = "gradients of one length" if report["gradient_norms_equal"] else "but their gradients DIFFER in length"
        by_cpu = report["dense_over_chunked_cpu"]
        spread = f"{least:.2f} to {greatest:.2f}; CPU seconds {by_cpu:.2f}"
        found.append(f"a step with dense attention takes {median:.2f} times as long ({spread}); {equal}")
    for name in ("attention", "transformer"):
        if f"{name}_share" in report:
            median, least, greatest = (100 * value for value in report[f"{name}_share"])
            by_cpu = 100 * report[f"{name}_share_cpu"]
            found.append(f"share of the {name} in a step: {median:.0f} % ({least:.0f} to {greatest:.0f}; CPU seconds {by_cpu:.0f} %)")
    one, memory = report["inference"], report["attention_bytes"]
    found.append(
        f"inference (wr), {report['batch']} patches of {report['patch']} px at a time: {one['patches_per_second']:.1f} patches/s,"
        f" {one['megapixels_per_second']:.3f} million pixels out/s"
    )
    shape = "x".join(map(str, report["memory_shape"]))
    chunked, dense = (_megabytes(memory[name]) for name in ("chunked", "dense"))
    found.append(f"attention alone at {shape}, forward and gradient: {chunked} MB of scratch, dense {dense} MB")
    return found


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.timing import allocator, limit_cores, publish, restart_with_huge_pages, versions
    from wavepath.defaults import train_defaults
    from wavepath.errors import ConfigError

    if min(args.runs, args.batch) < 1:
        raise ConfigError("--runs and --batch are at least 1")
    restart_with_huge_pages()
    threads = limit_cores(args.threads)
    config = train_defaults()
    config.task, config.batch_size, config.train.steps, config.optim.warmup = "superres", args.batch, 1000, "0"
    config.superres.scale = args.scale
    if args.variant == "cpu":  # as configs/cwt_net.py:cpu
        config.superres.channels, config.superres.blocks, config.superres.patch, config.superres.margin = 32, 4, 32, 8
        config.superres.skip = "bicubic"
    where = machine()
    report = {
        "machine": where, "threads": threads, "allocator": allocator(), "versions": versions(["jax", "jaxlib", "flax"]), "runs": args.runs,
        "variant": args.variant, "scale": args.scale, **measure(config, args.arms, args.runs),
    }  # fmt: skip
    heading = [
        f"{where['cpu'] or 'unknown processor'}, {threads} threads, load {where['load_at_start']} at the start, {args.runs} rounds",
        f"{report['allocator']}, " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"CWT-Net {args.variant}, {args.scale}x, batch {args.batch}, patches of {report['patch']} px",
    ]
    publish(report, heading, [rows(report)], lines(report), args.json, args.markdown)
    return 0
