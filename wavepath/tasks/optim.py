"""Optimiser and schedule: AdamW by the MAE recipe, Adam as adversarial networks use it, plain SGD for comparisons; exponential averages."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from wavepath.errors import ConfigError

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "halve", "linear", "constant")
TOKENS = ("cls_token", "reg_token", "pos_embed")  # what an encoder learns beside its layers


def make_optimizer(
    settings: Any, lr: float, total_steps: int, batch_size: int, *, scales: Callable[[Any], Any] | None = None,
    decays: Callable[[Any], Any] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and the rate by step.

    Args:
        settings: `config.optim`: `name` (adamw, adam, sgd), `b1`, `b2`, `weight_decay`, `clip_norm` (0: off), `schedule` (see `schedule`), `warmup`,
            `halve_every` and `hold` (steps; the last two are read where the schedule has them), `min_lr`.
        lr: rate for 256 examples a step; the peak rate is `lr * batch_size / 256`.
        total_steps: length of the run.
        batch_size: examples of one update, over all devices and micro-batches.
        scales: parameters -> factor on the rate of each (see `layer_scales`); None: one rate for all.
        decays: parameters -> whether weight decay applies to each; by default `decayed` with adamw, and all with adam.

    Raises:
        ConfigError: an unknown optimiser or a schedule that does not fit.

    Source: METHODS 5.1, 3.2. The weight decay of adamw is decoupled and leaves out biases and norms; that of adam is added to the (clipped) gradient
    of every parameter and goes through its moments, as that of torch's `Adam` does.
    """
    halve_every, hold = (
        whole_steps(settings[field], field) if settings.schedule == kind else 0 for kind, field in (("halve", "halve_every"), ("linear", "hold"))
    )
    peak, warmup = lr * batch_size / 256, whole_steps(settings.warmup, "warmup")
    rate = schedule(peak, total_steps, warmup, settings.min_lr, kind=settings.schedule, halve_every=halve_every, hold=hold)
    if settings.name not in OPTIMIZERS:
        raise ConfigError(f"config.optim.name={settings.name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    chain = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm > 0 else []
    if settings.name == "adam" and settings.weight_decay > 0:
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask=decays))
    if settings.name != "sgd":
        chain.append(optax.scale_by_adam(b1=settings.b1, b2=settings.b2))
    if settings.name == "adamw" and settings.weight_decay > 0:
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask=decays or decayed))
    if scales is not None:
        # Behind the weight decay, which is part of the step that a smaller rate shrinks.
        chain.append(optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, scales(params))))
    return optax.chain(*chain, optax.scale_by_learning_rate(rate)), rate


def layer_scales(params: Any, depth: int, decay: float) -> Any:
    """The factor on each parameter's learning rate under layer-wise decay: `decay ** (depth + 1 - layer)`.

    Layer 0 is the patch embedding, learned tokens and positions, layer i + 1 block i, layer `depth` + 1 everything behind the blocks (norms, head).

    Args:
        params: with an encoder (`patch_embed`, `cls_token`, `blocks/<i>/...` or, scanned, `blocks/scanned/...`) anywhere in it.
        depth: number of blocks.
        decay: in (0, 1]; 1 leaves every rate as it is.

    Returns:
        The tree of `params`: a number for each, of scanned blocks an array [depth, 1, ...].

    Source: METHODS 2.5 (0.75), as in the fine-tuning of BEiT and MAE.
    """

    def one(path: tuple, leaf: Array) -> Any:
        names = [str(getattr(part, "key", "")) for part in path]
        if {"patch_embed", *TOKENS} & set(names):
            return decay ** (depth + 1)
        if "blocks" not in names:
            return 1.0
        block = names[names.index("blocks") + 1]
        if block == "scanned":
            powers = decay ** (depth - jnp.arange(depth, dtype=leaf.dtype))
            return powers.reshape(depth, *(1,) * (leaf.ndim - 1))
        return decay ** (depth - int(block))

    return jax.tree_util.tree_map_with_path(one, params)


def schedule(
    peak: float, total_steps: int, warmup: int, end: float = 0.0, *, kind: str = "cosine", halve_every: int = 0, hold: int = 0
) -> optax.Schedule:
    """Linear warm-up to `peak`, then what `kind` says, one value for each step.

    The warm-up counts from 1, so that the first step moves (a rate of 0 would waste it) and step `warmup - 1` already has the peak rate.

    Args:
        kind: `cosine`: half a cosine from `peak` to `end`; `halve`: half the rate from each multiple of `halve_every` steps on, counted from the
            first step of the run, and never below `end`; `linear`: `peak` for the first `hold` steps, then a straight line that reaches `end` behind
            the last step; `constant`: `peak`.
        halve_every: steps.
        hold: steps from the first of the run on. Behind the end of the run: the rate does not fall; within the warm-up: it falls behind that.

    Raises:
        ConfigError: a run without steps, a warm-up longer than the run, an unknown kind, or halving every 0 steps.
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"config.optim.schedule={kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if kind == "halve" and halve_every < 1:
        raise ConfigError(f"config.optim.halve_every is {halve_every} steps; give at least 1, or config.optim.schedule=constant")
    if total_steps < 1:
        raise ConfigError(f"the run has {total_steps} steps; set config.train.steps, epochs or examples")
    if not 0 <= warmup <= total_steps:
        raise ConfigError(f"config.optim.warmup is {warmup} steps and the run has {total_steps}; shorten the warm-up")

    def rate(step: Array | int) -> Array:
        halvings = jnp.asarray(step, jnp.int32) // max(halve_every, 1)  # in integers: a quotient of floats may fall short of a whole number
        step = jnp.asarray(step, jnp.float32)
        rising = peak * (step + 1) / max(warmup, 1)
        if kind == "cosine":
            progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
            falling = end + (peak - end) * 0.5 * (1 + jnp.cos(math.pi * progress))
        elif kind == "linear":
            start = max(hold, warmup)
            falling = peak + (end - peak) * jnp.clip((step - start) / max(total_steps - start, 1), 0.0, 1.0)
        elif kind == "halve":
            falling = jnp.maximum(peak * 0.5 ** halvings.astype(jnp.float32), min(end, peak))
        else:
            falling = jnp.float32(peak)
        return jnp.where(step < warmup, rising, falling)

    return rate


def whole_steps(value: int | str, field: str) -> int:
    """A duration of `config.optim` as a number of steps; percents and epochs must be resolved before a task is built.

    Raises:
        ConfigError: anything that is not a whole number.
    """
    text = str(value).strip()
    if not text.isdigit():
        raise ConfigError(
            f"config.optim.{field}={value!r} depends on the length of the run; call wavepath.training.durations.resolve first, or give steps"
        )
    return int(text)


def decayed(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but biases and norm scales.

    Decided by name and not by the number of dimensions: scanned blocks stack their biases, which then look like matrices.
    """

    def one(path: tuple, leaf: Array) -> bool:
        return leaf.ndim > 1 and str(getattr(path[-1], "key", "")) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(one, params)


def ema_update(average: Any, params: Any, decay: float) -> Any:
    """`decay * average + (1 - decay) * params`, leaf by leaf."""
    return jax.tree.map(lambda old, new: old * decay + new * (1 - decay), average, params)
