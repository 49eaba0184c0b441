"""Virtual staining: a training step and inference of CEFF and of what it is compared with, in one process, contenders in rotation.

A step is the task's own, on random pixels: frozen encoders, generator, discriminator, weighted L1, both gradients, both updates. Arms: `full`;
`dense`, the same with all scores of the attention at once; `no CoA`, without attention and H&E encoder; `no VMFE`, plain convolutions for the wavelet
ones; `pix2pix`, its generator of 9 blocks (6 + 3; of fewer, 3 more) under a fixed L1, without any encoder. Every arm is measured at the first crop,
at further ones `full` and `dense` alone. Small maps have dense attention anyway; there `dense` is left out. Ratios are to `full` of the same crop,
round by round; CPU seconds, of all threads, say more than the clock where other work shares the machine.

Scratch memory is what the compiler plans for the generator of published width, forward and with its gradient, of one image; nothing is run.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

VARIANTS = {"cpu": ((64, 128), 4), "paper": ((256, 512), 1)}  # crops, batch
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "dense": dict(attention="dense"),
    "no CoA": dict(coa=False),
    "no VMFE": dict(encoder="plain"),
    "pix2pix": dict(encoder="resnet", msfpm=False, coa=False, l1="fixed"),
}
EVERYWHERE = ("full", "dense")  # at every crop
MEMORY_CROPS = (512, 1024)
TOLERANCE = 1e-3  # of the gradient's length, in which `full` and `dense` may differ


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=list(VARIANTS), default="cpu", help="4 blocks and 16 channels, or the published size (default: cpu)")
    parser.add_argument("--crop", nargs="+", type=int, metavar="PX", help="multiples of 8 (default: 64 128; of the published size 256 512)")
    parser.add_argument("--batch", type=int, help="images of a step, and of a call of inference (default: 4; of the published size 1)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="(default: all)")
    parser.add_argument("--memory", nargs="*", type=int, metavar="PX", default=list(MEMORY_CROPS), help="crops to plan it for (default: 512 1024)")
    parser.add_argument("--runs", type=int, default=7, help="rounds, in each of which every contender has its turn (default: 7)")
    parser.add_argument("--threads", type=int, help="cores (default: every core this process may use)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured, every round, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="also write the tables as Markdown")


def make_config(variant: str, crop: int, batch: int, arm: str = "full") -> Any:
    """The config of an arm; of the variant `cpu` as configs/ceff.py:cpu."""
    from wavepath.defaults import train_defaults

    config = train_defaults()
    config.task, config.batch_size, config.encoders, config.train.steps, config.optim.warmup = "stain", batch, "random", 1000, "0"
    config.optim.name = "adam"
    settings = config.stain
    settings.crop, settings.norm = crop, "instance"
    if variant == "cpu":
        settings.channels = settings.encoder_channels = settings.discriminator_channels = 16
        settings.blocks = settings.encoder_blocks = 4
    settings.update(ARMS[arm])
    settings.blocks += 3 if arm == "pix2pix" else 0
    return config


def make_state(task: Any) -> Any:
    """A State of noise: kernels N(0, 0.02), scales and variances 1, all else 0. Compiles nothing, which drawing it properly would for seconds."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        name = str(getattr(path[-1], "key", ""))
        if "kernel" in name:
            return (0.02 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        return np.full(leaf.shape, "scale" in name or name == "var", leaf.dtype)

    shapes = jax.eval_shape(task.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    drawn = {name: jax.tree_util.tree_map_with_path(fill, getattr(shapes, name)) for name in ("params", "stats", "ema", "extra")}
    return jax.device_put(state.replace(**drawn))


def make_batch(task: Any) -> dict[str, Any]:
    """Random pixels in the shapes that the task asks for."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.integers(0, 256, spec.shape, np.uint8) if spec.dtype == jnp.uint8 else np.arange(spec.shape[0], dtype=spec.dtype))
        for name, spec in task.batch_spec().items()
    }


def is_dense(crop: int) -> bool:
    """Whether the attention of such crops takes all scores at once by itself."""
    from wavepath.ops.cross_attention import chunk_of

    places = (crop // 4) ** 2
    return chunk_of(places, places) == places


def contenders(arms: Iterable[str], crops: Iterable[int]) -> list[tuple[str, int]]:
    """(arm, crop) in the order of the table."""
    crops, arms = list(dict.fromkeys(crops)), list(dict.fromkeys(arms))
    return [
        (arm, crop) for crop in crops for arm in arms if (crop == crops[0] or arm in EVERYWHERE) and not (arm == "dense" and is_dense(crop))
    ]


def generator_memory(config: Any, crops: Iterable[int], compiling: Callable[..., Any] = map) -> list[dict[str, Any]]:
    """Scratch bytes of the generator of `config`, `forward` and `gradient` (value too) of one image, by crop and attention; nothing is run."""
    import jax
    import jax.numpy as jnp

    from wavepath.benchmarks.timing import planned_bytes
    from wavepath.tasks.stain import Staining

    def planned(job: tuple[int, str]) -> dict[str, Any]:
        crop, form = job
        settings = config.copy_and_resolve_references()
        settings.stain.crop, settings.stain.attention = crop, form
        model = Staining(settings).generator
        image = jax.ShapeDtypeStruct((1, crop, crop, 3), jnp.float32)
        features = jax.ShapeDtypeStruct((1, crop // 4, crop // 4, 4 * settings.stain.encoder_channels), jnp.float32)
        params = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), image, features)

        def total(params: Any, image: Any, features: Any) -> Any:
            return model.apply(params, image, features, train=True)[0].mean()

        found = {"crop": crop, "attention": form}
        for name, function in (("forward", lambda *x: model.apply(*x)[0]), ("gradient", jax.value_and_grad(total))):
            found[name] = planned_bytes(jax.jit(function).lower(params, image, features))
        return found

    return list(compiling(planned, [(crop, form) for crop in crops for form in ("chunked", "dense")]))


def measure(configs: Mapping[tuple[str, int], Any], runs: int, memory: Callable[..., list[dict[str, Any]]], threads: int = 1) -> dict[str, Any]:
    """Steps and inference by (arm, crop), and what `memory` finds, as JSON values.

    Args:
        configs: of the contenders.
        memory: takes how to map over what is compiled. threads: compile so many programs at once.
    """
    import jax

    from wavepath.benchmarks.timing import counted, ratios, take_turns
    from wavepath.console import progress
    from wavepath.tasks.stain import Staining

    calls: dict[str, Callable[[], None]] = {}
    busy: dict[str, list[float]] = {}
    steps: dict[str, dict[str, Any]] = {}

    def contend(name: str, call: Callable[[], Any]) -> None:
        busy[name] = []
        calls[name] = counted(call, busy[name])

    def compiled(item: tuple[tuple[str, int], Any]) -> tuple[str, dict[str, Any], Any, Any]:
        (arm, crop), config = item
        task = Staining(config)
        state, batch = make_state(task), make_batch(task)
        he = {"he": batch["he"]}
        step = jax.jit(task.train_step).lower(state, batch).compile()
        stain = jax.jit(lambda state, he: task.predict(state, he, ["output"])["output"]).lower(state, he).compile()
        facts = {"arm": arm, "crop": crop, "batch": int(config.batch_size)}
        bar.advance(1, f"{arm} at {crop} px compiled")
        return f"{arm} {crop}", facts, lambda: step(state, batch), lambda: stain(state, he)

    with progress("stain", len(configs) + runs + 1, "parts") as bar, ThreadPoolExecutor(max(1, threads)) as pool:
        for name, facts, step, stain in pool.map(compiled, configs.items()):
            steps[name] = facts
            if facts["arm"] in EVERYWHERE:
                facts["grad_norm"] = float(step()[1]["grad_norm"][0])
            contend(name, step)
            contend(f"{name} inference", stain)
        planned = memory(pool.map)
        bar.advance(1, "memory planned")
        timed = {one.name: one for one in take_turns(calls, runs, lambda: bar.advance(1))}
    for name, facts in steps.items():
        for prefix, key in (("", name), ("inference_", f"{name} inference")):
            facts[f"{prefix}milliseconds"] = [1e3 * value for value in timed[key].seconds]
            facts[f"{prefix}median_ms"] = 1e3 * timed[key].median
            facts[f"{prefix}cpu_ms"] = 1e3 * statistics.median(busy[key][-runs:])
        other = f"full {facts['crop']}"
        if facts["arm"] != "full" and other in steps:
            facts["over_full"] = list(ratios(timed[name], timed[other]))
            facts["inference_over_full"] = list(ratios(timed[f"{name} inference"], timed[f"{other} inference"]))
            if "grad_norm" in facts:
                norm = steps[other]["grad_norm"]
                facts["same_gradient"] = bool(abs(facts["grad_norm"] - norm) <= TOLERANCE * norm)
    return {"steps": list(steps.values()), "memory": planned}


def _ratio(facts: Mapping[str, Any], name: str) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*facts[name]) if name in facts else "1"


def tables(report: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of the steps, of inference, of memory."""
    ahead = ["crop", "arm"]
    made = []
    for title, prefix in (("step", ""), ("inference", "inference_")):
        body = []
        for facts in report["steps"]:
            median = facts[f"{prefix}median_ms"]
            least = min(facts[f"{prefix}milliseconds"])
            row = [str(facts["crop"]), facts["arm"], f"{median:.0f}", f"{least:.0f}", f"{facts[f'{prefix}cpu_ms']:.0f}"]
            body.append([*row, f"{1e3 * facts['batch'] / median:.2f}", _ratio(facts, f"{prefix}over_full")])
        made.append(([*ahead, f"{title}, median ms", "least", "CPU ms", "images/s", "time over full"], body))
    if report["memory"]:
        body = [
            [str(facts["crop"]), facts["attention"], *(f"{facts[name] / 1e6:.0f}" for name in ("forward", "gradient"))] for facts in report["memory"]
        ]
        made.append((["crop", "attention", "forward, scratch MB", "value and gradient, scratch MB"], body))
    return made


def lines(report: Mapping[str, Any]) -> list[str]:
    """What the tables do not say."""
    found = []
    for facts in report["steps"]:
        if "same_gradient" in facts:
            verdict = "gradients of one length" if facts["same_gradient"] else "but their gradients DIFFER in length"
            found.append(f"dense attention at {facts['crop']} px takes {_ratio(facts, 'over_full')} times a step's time; {verdict}")
    small = sorted({facts["crop"] for facts in report["steps"] if is_dense(facts["crop"])})
    if small:
        found.append(f"at {', '.join(map(str, small))} px the attention of `full` is dense by itself: its scores fit in one block")
    by_place = {(facts["crop"], facts["attention"]): facts["gradient"] for facts in report["memory"]}
    for crop in sorted({crop for crop, _ in by_place}):
        chunked, dense = (by_place[crop, form] for form in ("chunked", "dense"))
        sizes = f"{chunked / 1e9:.1f} GB of scratch, dense {dense / 1e9:.1f} GB"
        found.append(f"value and gradient of one image of {crop} px at published width: {sizes}")
    return found


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.timing import allocator, limit_cores, publish, restart_with_huge_pages, versions
    from wavepath.errors import ConfigError

    crops, batch = VARIANTS[args.variant]
    crops, batch = args.crop or list(crops), batch if args.batch is None else args.batch
    if min(args.runs, batch) < 1:
        raise ConfigError("--runs and --batch are at least 1")
    if any(crop < 32 or crop % 8 for crop in [*crops, *args.memory]):
        raise ConfigError("--crop and --memory take multiples of 8 px, at least 32")
    restart_with_huge_pages()
    threads = limit_cores(args.threads)
    where = machine()
    configs = {(arm, crop): make_config(args.variant, crop, batch, arm) for arm, crop in contenders(args.arms, crops)}
    published = make_config("paper", MEMORY_CROPS[0], 1)
    report = {
        "machine": where, "threads": threads, "allocator": allocator(), "versions": versions(["jax", "jaxlib", "flax"]), "runs": args.runs,
        "variant": args.variant,
        **measure(configs, args.runs, lambda compiling: generator_memory(published, args.memory, compiling), threads),
    }  # fmt: skip
    command = f"wavepath bench stain --variant {args.variant} --crop {' '.join(map(str, crops))} --batch {batch} --runs {args.runs}"
    heading = [
        f"{where['cpu'] or 'unknown processor'}, {threads} threads, load {where['load_at_start']} at the start, {args.runs} rounds",
        f"{report['allocator']}, " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"`{command}`: CEFF {args.variant}, batch {batch}, float32, instance norm",
    ]
    publish(report, heading, tables(report), lines(report), args.json, args.markdown, "What virtual staining costs: a step, an image, memory")
    return 0
