"""Random keys in two scopes, and never a device: per step, and per example.

A step key is equal on every device (coins that all shards must throw alike). An example key depends on the run's seed, the example and
the epoch alone, and a group key on the seed and the position alone: so masks, crops and dropout are the same whatever the number of
devices, the backend, or the cut of the batch, and a resumed run draws what the uninterrupted one drew. No key is ever folded
with an axis index.

The generator is named (Threefry 2x32) and not taken from `jax_default_prng_impl`: under the hardware generator `rbg` the values of a
vmapped draw depend on the batch.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Key, Scalar, UInt32

_IMPL = "threefry2x32"

# Scopes that must not meet: `step_key(seed, 3)` and `example_keys(seed, [3], [0])` come from different roots.
_STEP, _EXAMPLE, _GROUP = 0x57455031, 0x57455032, 0x57455033

Counter = int | np.integer | Integer[Array, "*b"] | Integer[np.ndarray, "*b"]


def _word(value: Counter) -> UInt32[Array, "*b"]:
    """The lower 32 bits of an integer or an integer array, so that int32, uint32, int64 and Python integers agree.

    Host integers are cut on the host: with 64-bit types off, JAX refuses large Python integers and saturates or wraps by its own rules.
    """
    if isinstance(value, int | np.integer):
        return jnp.uint32(int(value) & 0xFFFFFFFF)
    if isinstance(value, np.ndarray):
        return jnp.asarray(value.astype(np.uint32))
    return value.astype(jnp.uint32)


def _root(seed: Counter, scope: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(_word(seed), impl=_IMPL), jnp.uint32(scope))


def step_key(seed: Counter, step: Counter) -> Key[Array, ""]:
    """The key of one step, equal on every device.

    Args:
        seed: the run's seed, modulo 2**32.
        step: step number, modulo 2**32; may be traced.

    Source: DESIGN section 3, "Randomness has two scopes".
    """
    return jax.random.fold_in(_root(seed, _STEP), _word(step))


def example_keys(
    seed: Counter, example_id: Integer[Array, "b"] | Integer[np.ndarray, "b"], epoch: Integer[Array, "b"] | Integer[np.ndarray, "b"]
) -> Key[Array, "b"]:
    """One key for each example of a batch, from the seed, its id and its epoch alone.

    Args:
        seed: the run's seed, modulo 2**32.
        example_id: [b], as the batch carries it (int32).
        epoch: [b], as the batch carries it (int32).

    Returns:
        Typed keys [b]; use them under `jax.vmap`.
    """
    root = _root(seed, _EXAMPLE)
    fold = jax.vmap(lambda example, turn: jax.random.fold_in(jax.random.fold_in(root, example), turn))
    return fold(_word(example_id), _word(epoch))


def group_keys(seed: Counter, position: Integer[Array, "b"] | Integer[np.ndarray, "b"], group_size: int) -> Key[Array, "b"]:
    """One key for each row of a batch, equal for the rows of a group: keyed by `position // group_size`.

    Where groups do not straddle shards, `group_keys(...)[::group_size]` is one key a group.

    Args:
        seed: the run's seed, modulo 2**32.
        position: [b] positions in the run (uint32: after 2**32 examples they start again at 0).
        group_size: examples that share a key, 1 or more.

    Raises:
        ValueError: if `group_size` is less than 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; it must be 1 or more")
    root = _root(seed, _GROUP)
    return jax.vmap(lambda group: jax.random.fold_in(root, group))(_word(position) // jnp.uint32(group_size))


def named(key: Key[Array, "*b"], name: str) -> Key[Array, "*b"]:
    """A sub-key for one use (`"mask"`, `"crop"`, `"drop_path"`): adding a use does not change what the others draw.

    The name enters by its CRC-32, which is the same everywhere (Python's own string hash is not).
    """
    word = jnp.uint32(zlib.crc32(name.encode("utf-8")))
    fold = jax.random.fold_in
    for _ in range(key.ndim):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(key, word)


def coin(key: Key[Array, ""], probability: float | Scalar) -> Scalar:
    """True with the given probability: for choices that all devices make alike, from a step key."""
    return jax.random.uniform(key) < probability
