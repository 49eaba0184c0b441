"""Gradient accumulation: one batch in several micro-batches, one update, one reduction over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wavepath.errors import ConfigError

Loss = Callable[[Any, Any], tuple[Array, Any]]


def value_and_grad(loss: Loss, params: Any, batch: Any, parts: int) -> tuple[Array, Any, Any]:
    """Loss, auxiliary sums and gradients of a batch that is worked through in `parts` micro-batches.

    Micro-batch k holds examples k, k + parts, k + 2*parts, ...: where a batch lies on several devices, every device then works on all of
    them. The gradient is the mean over micro-batches of equal size, so that of the whole batch if `loss` is a mean over examples.

    Args:
        loss: `(params, micro_batch) -> (mean loss, sums)`; `sums` is a tree that adds up over micro-batches.
        params: differentiated.
        batch: tree of arrays with the example axis first.
        parts: number of micro-batches; divides the batch on every device.

    Returns:
        (mean loss, summed `sums`, gradients).

    Raises:
        ConfigError: `parts` does not divide this shard's batch.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, sums), grads = grad(params, batch)
        return value, sums, grads
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % parts:
        raise ConfigError(f"config.optim.accumulate={parts} does not divide the {size} examples of one device; choose a divisor of {size}")
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1), batch)

    def add(carry: Any, one: Any) -> tuple[Any, None]:
        (value, sums), grads = grad(params, one)
        return jax.tree.map(jnp.add, carry, (value, sums, grads)), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
    (value, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (value, sums, grads), _ = jax.lax.scan(add, (value, sums, grads), micro)
    return value / parts, sums, jax.tree.map(lambda g: g / parts, grads)
