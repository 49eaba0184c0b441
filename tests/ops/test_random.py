"""Keys: golden values, equal under jit, vmap and any cut of the batch, separate scopes, safe for 32-bit counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops import random as wr

# Taken once from this scheme (Threefry 2x32); they may never change.
STEP_0_0 = [2239503700, 216892616]
STEP_7_1000 = [1736517944, 589890770]
EXAMPLES_7 = [[534369868, 547270559], [3201251165, 1302986505]]
GROUPS_7 = [[1646929782, 713696596], [2093927533, 636448505]]
NAMED_MASK = [327972868, 3777305279]


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_golden_values():
    """A changed key scheme would silently change every resumed run."""
    assert data(wr.step_key(0, 0)).tolist() == STEP_0_0
    assert data(wr.step_key(7, 1000)).tolist() == STEP_7_1000
    assert data(wr.example_keys(7, np.array([0, 5], np.int32), np.array([0, 3], np.int32))).tolist() == EXAMPLES_7
    assert data(wr.group_keys(7, np.array([0, 2**31 + 5], np.uint32), 4)).tolist() == GROUPS_7
    assert data(wr.named(wr.step_key(0, 0), "mask")).tolist() == NAMED_MASK


def test_same_values_under_jit_and_any_split():
    ids, epochs = np.arange(12, dtype=np.int32) * 17, np.arange(12, dtype=np.int32) % 3
    whole = data(wr.example_keys(3, ids, epochs))
    assert np.array_equal(data(jax.jit(wr.example_keys, static_argnums=0)(3, ids, epochs)), whole)
    assert np.array_equal(data(jax.jit(wr.example_keys)(jnp.int32(3), ids, epochs)), whole)
    for parts in (2, 3, 12):
        split = [data(wr.example_keys(3, i, e)) for i, e in zip(np.split(ids, parts), np.split(epochs, parts), strict=True)]
        assert np.array_equal(np.concatenate(split), whole)
    mapped = jax.vmap(lambda i, e: wr.example_keys(3, i, e))(jnp.asarray(ids).reshape(4, 3), jnp.asarray(epochs).reshape(4, 3))
    assert np.array_equal(data(mapped).reshape(12, 2), whole)
    assert np.array_equal(data(jax.jit(wr.step_key, static_argnums=0)(3, jnp.int32(9))), data(wr.step_key(3, 9)))


def test_draws_do_not_depend_on_the_batch_they_are_in():
    ids, epochs = np.arange(8, dtype=np.int32), np.zeros(8, np.int32)
    draw = jax.jit(jax.vmap(lambda key: jax.random.uniform(wr.named(key, "crop"), (3,))))
    whole = np.asarray(draw(wr.example_keys(1, ids, epochs)))
    halves = [np.asarray(draw(wr.example_keys(1, ids[part], epochs[part]))) for part in (slice(0, 4), slice(4, 8))]
    assert np.array_equal(whole, np.concatenate(halves))
    assert len(np.unique(whole)) == whole.size


def test_keys_differ_where_anything_differs():
    ids = np.arange(50, dtype=np.int32)
    rows = [
        data(wr.example_keys(seed, ids, np.full(50, epoch, np.int32))) for seed in (0, 1) for epoch in (0, 1)
    ]
    rows += [data(wr.group_keys(seed, ids.astype(np.uint32), 1)) for seed in (0, 1)]
    rows += [np.stack([data(wr.step_key(0, int(step))) for step in ids])]
    keys = np.concatenate(rows)
    assert len(np.unique(keys, axis=0)) == len(keys)
    # Swapping id and epoch is another key.
    assert not np.array_equal(data(wr.example_keys(0, ids[1:2], ids[2:3])), data(wr.example_keys(0, ids[2:3], ids[1:2])))


def test_groups_share_a_key_across_any_cut():
    position = np.arange(5, 29, dtype=np.uint32)
    keys = data(wr.group_keys(0, position, 8))
    groups = position // 8
    for group in np.unique(groups):
        assert len(np.unique(keys[groups == group], axis=0)) == 1
    assert len(np.unique(keys, axis=0)) == len(np.unique(groups))
    with pytest.raises(ValueError, match="group_size"):
        wr.group_keys(0, position, 0)


def test_counters_of_every_integer_type_agree():
    high = 2**31 + 12
    keys = [
        data(wr.group_keys(0, np.array([high], dtype), 3)) for dtype in (np.uint32, np.int64, np.uint64)
    ] + [data(wr.group_keys(0, jnp.array([high], jnp.uint32), 3))]
    assert all(np.array_equal(key, keys[0]) for key in keys)
    assert np.array_equal(data(wr.step_key(2**32 + 5, 1)), data(wr.step_key(5, 1)))
    assert np.array_equal(data(wr.step_key(np.int64(5), np.int32(1))), data(wr.step_key(5, 1)))
    # A position past 2**31 is not a negative number in disguise.
    assert not np.array_equal(data(wr.group_keys(0, np.array([high], np.uint32), 3)), data(wr.group_keys(0, np.array([12], np.uint32), 3)))


def test_names_separate_uses_and_keep_the_shape():
    keys = wr.example_keys(0, np.arange(6, dtype=np.int32), np.zeros(6, np.int32))
    uses = [data(wr.named(keys, name)) for name in ("mask", "crop", "flip", "stain", "drop_path", "dropout", "noise")]
    assert all(use.shape == (6, 2) for use in uses)
    every = np.concatenate(uses)
    assert len(np.unique(every, axis=0)) == len(every)
    assert np.array_equal(data(jax.vmap(lambda key: wr.named(key, "mask"))(keys)), uses[0])


def test_default_generator_is_not_ours():
    """The hardware generator's draws depend on the batch; a config flag must not bring it in."""
    before = data(wr.step_key(0, 1))
    with jax.default_prng_impl("rbg"):
        assert np.array_equal(data(wr.step_key(0, 1)), before)


def test_coin():
    flips = [bool(wr.coin(wr.step_key(0, step), 0.3)) for step in range(200)]
    assert 35 <= sum(flips) <= 85
