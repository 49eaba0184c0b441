"""Metrics as sum-and-count pairs: means over shards, micro-batches and ragged last batches are exact, where means of means are not."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wavepath.ops import collectives

Pair = tuple[Array, Array]


def pair(values: Array, mask: Array | None = None) -> Pair:
    """(sum, count) of per-example values [b]; `mask` [b] weights them, 0 for padding."""
    if mask is None:
        return jnp.sum(values), jnp.asarray(values.shape[0], values.dtype)
    mask = mask.astype(values.dtype)
    # A padded row may hold anything, also a value that is not finite: it is replaced, not multiplied by zero.
    return jnp.sum(jnp.where(mask > 0, values, 0) * mask), jnp.sum(mask)


def constant(value: Array) -> Pair:
    """A value that is the same on every shard (a rate, a norm of averaged gradients)."""
    value = jnp.asarray(value)
    return value, jnp.ones((), value.dtype)


def reduce(metrics: Mapping[str, Pair]) -> dict[str, Pair]:
    """Sums over the shards of the mapped axis; the identity outside one."""
    return collectives.psum(dict(metrics))


def merge(many: Iterable[Mapping[str, Pair]]) -> dict[str, Pair]:
    """Sums over batches."""
    total: dict[str, Pair] = {}
    for metrics in many:
        for name, (value, count) in metrics.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


def compute(metrics: Mapping[str, Pair]) -> dict[str, float]:
    """The means as Python floats, fetched from the device in one go; a count of 0 gives NaN."""
    host = jax.device_get(dict(metrics))
    return {name: float(value) / float(count) if float(count) else float("nan") for name, (value, count) in host.items()}
