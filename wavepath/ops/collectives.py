"""Reductions over the shards of a batch that need no axis name.

`training/parallel` runs a step body once for each shard (`pmap`, `shard_map`) inside `with axis("data"):`; the functions here read that name
while the body is traced. Outside such a context, so under plain `jit`, where the body already sees the whole batch, they are the identity.
Models and losses therefore call them freely and run unchanged on every backend.

Differentiation convention: a body takes gradients of its own shard's mean loss and then calls `pmean(grads)`. Under that convention the
transposes of all functions here are right, also when they stand inside the loss (batch statistics, gathered negatives).
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

_AXIS: ContextVar[str | None] = ContextVar("wavepath_axis", default=None)


@contextlib.contextmanager
def axis(name: str | None) -> Iterator[None]:
    """Names the mapped axis while its block is traced; `None` makes the functions here the identity again."""
    token = _AXIS.set(name)
    try:
        yield
    finally:
        _AXIS.reset(token)


def axis_name() -> str | None:
    """The mapped axis, or None where one trace sees the whole batch."""
    return _AXIS.get()


def size() -> int:
    """The number of shards (a Python int while tracing); 1 outside a mapped axis."""
    name = _AXIS.get()
    return 1 if name is None else jax.lax.axis_size(name)


def index() -> Int[Array, ""]:
    """This shard's place among the shards, for offsets into gathered arrays. Never for randomness: keys belong to examples."""
    name = _AXIS.get()
    return jnp.zeros((), jnp.int32) if name is None else jax.lax.axis_index(name).astype(jnp.int32)


def pmean(tree: Any) -> Any:
    """Mean of every leaf over the shards."""
    name = _AXIS.get()
    return tree if name is None else jax.lax.pmean(tree, name)


def psum(tree: Any) -> Any:
    """Sum of every leaf over the shards."""
    name = _AXIS.get()
    return tree if name is None else jax.lax.psum(tree, name)


def all_gather(x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
    """Concatenates the shards' arrays along `axis` in shard order: `[b, d]` on each of s shards gives `[s*b, d]` on all.

    The gradient of a gathered row returns to the shard that owns it, summed over the shards that used it.
    """
    name = _AXIS.get()
    return x if name is None else jax.lax.all_gather(x, name, axis=axis, tiled=True)
