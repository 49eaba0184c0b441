"""The co-occurrence half of `wavepath bench ops`: the patchwise loss against its dense form, counting against scikit-image, a share of a step."""

import statistics
from collections.abc import Sequence

import numpy as np

from wavepath.benchmarks.timing import peak_memory, ratios, take_turns

PATCH, PATCHES = 16, 196
OFFSETS = ((0, 1), (1, 0))
SHARPNESS = 30.0
RANGE = (-2.2, 2.7)  # about what ImageNet's normalisation makes of [0, 1]
LEVELS = (256, 32, 16)
TOLERANCE = 1e-4
# Single precision resolves a position to 1e-7 of the range: 3e-5 of a level at 256, times sharpness 30 in the argument of a sigmoid.
GRADIENT_TOLERANCE = 2e-3
LARGEST = 4 << 30
FASTER, SMALLER, STEP_SHARE = 30.0, 500.0, 5.0


def make_patches(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, target) float32[images * 196, 16, 16] inside the range: a smooth texture, and the same with noise."""
    rng = np.random.default_rng(seed)
    low, high = RANGE
    shape = (images * PATCHES, PATCH, PATCH)
    smooth = np.cumsum(np.cumsum(rng.standard_normal(shape), 1), 2)
    smooth = (smooth - smooth.min((1, 2), keepdims=True)) / np.ptp(smooth, (1, 2), keepdims=True)
    target = low + (high - low) * smooth
    prediction = np.clip(target + 0.05 * (high - low) * rng.standard_normal(shape), low, high)
    return prediction.astype(np.float32), target.astype(np.float32)


def _ours(levels: int, patches: int, masked: int | None = None):
    """(compiled function of (prediction, target) -> (losses, gradient), bytes of temporary memory)."""
    import jax

    from wavepath.ops.glcm import glcm_loss

    def total(prediction, target):
        losses = glcm_loss(prediction, target, levels, OFFSETS, value_range=RANGE, membership="sigmoid", sharpness=SHARPNESS)
        return losses.sum(), losses

    def both(prediction, target):
        (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(prediction, target)
        return losses, gradient

    shape = jax.ShapeDtypeStruct((patches, PATCH, PATCH), np.float32)
    compiled = jax.jit(both).lower(shape, shape).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def agreement(result: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, object]:
    """Differences of losses (each relative to its own value) and gradients (relative to the greatest) from the float64 dense form."""
    loss = float(np.max(np.abs(result[0] - expected[0]) / np.abs(expected[0])))
    gradient = float(np.max(np.abs(result[1] - expected[1])) / np.max(np.abs(expected[1])))
    right = loss <= TOLERANCE and gradient <= GRADIENT_TOLERANCE
    return {"loss_difference": loss, "gradient_difference": gradient, "status": "right" if right else "WRONG"}


def measure_loss(levels: int, batch: int, runs: int, torch_missing: bool, advance=lambda: None, check: int = 8) -> dict[str, object]:
    """Forward+gradient of `glcm_loss` on `batch` images of 196 patches, against the dense form in torch.

    Where the dense form would need more than 4 GB it is run image by image: one image is timed, and counts `batch` times.
    """
    import jax

    from wavepath.benchmarks.glcm_peers import dense_bytes, dense_value_and_gradient

    low, high = RANGE
    prediction, target = make_patches(batch)
    ours, temporary = _ours(levels, len(prediction))
    here, there = jax.numpy.asarray(prediction), jax.numpy.asarray(target)
    result = [np.asarray(array)[:check] for array in ours(here, there)]
    calls = {"wavepath": lambda: jax.block_until_ready(ours(here, there))}
    report: dict[str, object] = {"levels": levels, "batch": batch, "patches": len(prediction), "wavepath": {"temporary_bytes": temporary}}
    if not torch_missing:
        images = batch if dense_bytes(len(prediction), PATCH, levels, len(OFFSETS)) <= LARGEST else 1
        some = slice(0, images * PATCHES)

        def dense(first=prediction[some], second=target[some]):
            return dense_value_and_gradient(first, second, levels, OFFSETS, low, high, SHARPNESS)

        few = prediction[:check].astype(np.float64), target[:check].astype(np.float64)
        expected = dense_value_and_gradient(*few, levels, OFFSETS, low, high, SHARPNESS)
        report["wavepath"].update(agreement(result, expected))
        theirs = dense(prediction[:check], target[:check])
        peak = peak_memory(dense)
        report["dense"] = {"images_at_once": images, "temporary_bytes": peak and peak * (batch // images), "image_bytes": peak and peak // images}
        report["dense"].update(agreement(theirs, expected))
        calls["dense"] = dense
    advance()
    timed = {one.name: one for one in take_turns(calls, runs, advance)}
    report["wavepath"].update(median_ms=1e3 * timed["wavepath"].median, milliseconds=[1e3 * value for value in timed["wavepath"].seconds])
    if "dense" in timed:
        scale = batch // report["dense"]["images_at_once"]
        report["dense"].update(median_ms=1e3 * timed["dense"].median * scale, milliseconds=[1e3 * value * scale for value in timed["dense"].seconds])
        report["times_faster"] = [value * scale for value in ratios(timed["dense"], timed["wavepath"])]
        if report["dense"]["temporary_bytes"] and temporary:
            report["times_smaller"] = report["dense"]["temporary_bytes"] / temporary
    return report


def measure_counting(levels: int, images: int, side: int, runs: int, advance=lambda: None) -> dict[str, object]:
    """Hard counts of whole images (distance 1, four angles): pixel pairs a second of `cooccurrence` and scikit-image, one image at a time there."""
    import jax

    from wavepath.benchmarks.glcm_peers import counted
    from wavepath.ops.glcm import cooccurrence, offsets_from

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, levels, (images, side, side), dtype=np.uint8)
    distances, angles = [1.0], [0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    offsets = offsets_from(distances, angles)
    values = jax.block_until_ready(jax.numpy.asarray(pixels, np.float32) + 0.5)
    compiled = jax.jit(lambda x: cooccurrence(x, levels, offsets, value_range=(0.0, float(levels)), membership="hard"))
    equal = bool(np.array_equal(np.asarray(compiled(values)), counted(pixels, levels, distances, angles)))
    calls = {
        "wavepath": lambda: jax.block_until_ready(compiled(values)), "scikit-image": lambda: counted(pixels, levels, distances, angles),
    }  # fmt: skip
    advance()
    ours, theirs = take_turns(calls, runs, advance)
    pairs = images * sum((side - abs(down)) * (side - abs(right)) for down, right in offsets)
    return {
        "levels": levels, "images": images, "side": side, "equal": equal, "ratio": list(ratios(theirs, ours)),
        "wavepath_mpairs": pairs / ours.median / 1e6, "scikit_image_mpairs": pairs / theirs.median / 1e6,
    }  # fmt: skip


def measure_step(batch: int = 4, levels: int = 32, variant: str = "B", runs: int = 7, advance=lambda: None) -> dict[str, object]:
    """Time of the loss (forward+gradient, masked patches alone: three quarters) as a share of a float32 ViT MAE step of the same batch."""
    import jax

    from wavepath.config import load_config
    from wavepath.tasks.base import build

    settings = [f"batch_size={batch}", "model.dtype=float32", "train.epochs=0.0", "train.steps=100", "optim.warmup=0"]
    config = load_config(f"configs/wise_mae.py:variant={variant}", settings)
    task = build(config)
    holder = {"state": jax.block_until_ready(jax.jit(task.init)(jax.random.key(0)))}
    step = jax.jit(task.train_step, donate_argnums=0)
    rng = np.random.default_rng(0)
    specs = task.batch_spec()
    data = {
        name: jax.numpy.asarray(rng.integers(0, 256, spec.shape, dtype=np.uint8) if name == "image" else np.arange(batch).astype(spec.dtype))
        for name, spec in specs.items()
    }

    def one_step():
        holder["state"], metrics = step(holder["state"], data)
        jax.block_until_ready(holder["state"])
        return metrics

    masked = round(PATCHES * config.model.mask_ratio)
    prediction, target = (array.reshape(batch, PATCHES, PATCH, PATCH)[:, :masked].reshape(-1, PATCH, PATCH) for array in make_patches(batch))
    ours, temporary = _ours(levels, len(prediction))
    here, there = jax.numpy.asarray(prediction), jax.numpy.asarray(target)
    advance()
    timed = take_turns({"step": one_step, "loss": lambda: jax.block_until_ready(ours(here, there))}, runs, advance)
    shares = [100 * loss / whole for whole, loss in zip(timed[0].seconds, timed[1].seconds, strict=True)]
    return {
        "variant": variant, "batch": batch, "levels": levels, "masked_patches": masked,
        "step_ms": 1e3 * timed[0].median, "loss_ms": 1e3 * timed[1].median,
        "share_percent": statistics.median(shares), "share_range": [min(shares), max(shares)], "temporary_bytes": temporary,
    }  # fmt: skip


def measure(levels: Sequence[int], batch: int, runs: int, step: bool, missing: dict[str, str]) -> dict[str, object]:
    """All of it, as JSON values; `missing` receives torch where that is not installed."""
    from importlib.util import find_spec

    from wavepath.console import progress

    absent = find_spec("torch") is None
    if absent:
        missing["torch (dense co-occurrence loss)"] = "pip install torch==2.13.0"
    report: dict[str, object] = {}
    with progress("co-occurrence", (len(levels) + 2 + step) * (runs + 1), "rounds") as bar:

        def note(text: str):
            return lambda: bar.advance(1, text)

        report["loss"] = [measure_loss(count, batch, runs, absent, note(f"loss, {count} levels")) for count in levels]
        report["counting"] = [measure_counting(count, 32, 224, runs, note(f"counts, {count} levels")) for count in (16, 32)]
        if step:
            report["step"] = measure_step(runs=runs, advance=note("a training step"))
    return report


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


def rows(report: dict) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the loss's table."""
    header = [
        "levels", "patches", "status", "wavepath ms", "MB", "dense torch ms", "MB", "times faster", "times smaller", "loss off by", "gradient off by",
    ]  # fmt: skip
    lines = []
    for one in report["loss"]:
        ours, dense = one["wavepath"], one.get("dense", {})
        at_once = "" if not dense or dense["images_at_once"] == one["batch"] else f" ({one['batch']} x one image)"
        lines.append([
            str(one["levels"]), str(one["patches"]), f"{ours.get('status', '-')} / dense {dense.get('status', 'missing')}",
            f"{ours['median_ms']:.1f}", _megabytes(ours["temporary_bytes"]),
            f"{dense['median_ms']:.0f}{at_once}" if dense else "missing", _megabytes(dense.get("temporary_bytes")),
            f"{one['times_faster'][0]:.1f} ({one['times_faster'][1]:.1f} to {one['times_faster'][2]:.1f})" if dense else "-",
            f"{one['times_smaller']:.0f}" if "times_smaller" in one else "-",
            f"{ours['loss_difference']:.0e} / {dense['loss_difference']:.0e}" if dense else "-",
            f"{ours['gradient_difference']:.0e} / {dense['gradient_difference']:.0e}" if dense else "-",
        ])  # fmt: skip
    return header, lines


def bound_lines(report: dict) -> list[str]:
    """The bounds, the counting rates, and the share of a step, as plain lines."""
    lines = []

    def bound(met: bool, text: str) -> None:
        lines.append(f"{'met   ' if met else 'MISSED'}  {text}")

    for one in report["loss"]:
        right = one.get("wavepath", {}).get("status") == "right"  # a wrong result is no result, however fast
        if one["levels"] == max(LEVELS) and "times_faster" in one:
            reached = one["times_faster"][0]
            what = f"{one['levels']} levels, forward+gradient at least {FASTER:g} times as fast as the dense form"
            bound(right and reached >= FASTER, f"{what}: {reached:.1f}")
        if one["levels"] == max(LEVELS) and "times_smaller" in one:
            reached = one["times_smaller"]
            what = f"{one['levels']} levels, at least {SMALLER:g} times less temporary memory than the dense form"
            bound(right and reached >= SMALLER, f"{what}: {reached:.0f}")
    if "step" in report:
        step = report["step"]
        what = f"{step['levels']} levels, {step['masked_patches']} masked patches an image, batch {step['batch']}"
        reached = f"{step['share_percent']:.2f} % ({step['loss_ms']:.1f} of {step['step_ms']:.0f} ms)"
        bound(step["share_percent"] < STEP_SHARE, f"{what}: less than {STEP_SHARE:g} % of a ViT-{step['variant']} MAE step: {reached}")
    for one in report["counting"]:
        lines.append(
            f"counts at {one['levels']} levels, {one['images']} images of {one['side']} px, 4 offsets: {one['wavepath_mpairs']:.0f} million pairs/s, "
            f"scikit-image {one['scikit_image_mpairs']:.0f} ({one['ratio'][0]:.2f} times its speed); {'equal' if one['equal'] else 'they DIFFER'}"
        )
    return lines
