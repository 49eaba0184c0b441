import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops import collectives

SHARDS = 4


def mapped(function):
    """Runs a body once a shard under pmap inside the context, as training/parallel does."""

    def body(x):
        with collectives.axis("data"):
            return function(x)

    return jax.pmap(body, axis_name="data", devices=jax.devices("cpu")[:SHARDS])


def test_outside_an_axis_everything_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    for function in (collectives.pmean, collectives.psum, collectives.all_gather):
        assert function(x) is x
    assert collectives.size() == 1 and int(collectives.index()) == 0 and collectives.axis_name() is None


def test_the_context_ends_with_its_block_and_nests():
    with collectives.axis("outer"):
        with collectives.axis(None):
            assert collectives.axis_name() is None
        assert collectives.axis_name() == "outer"
    assert collectives.axis_name() is None
    with pytest.raises(RuntimeError), collectives.axis("data"):
        raise RuntimeError
    assert collectives.axis_name() is None


@pytest.mark.multidevice
def test_reductions_and_gathering_over_shards():
    x = np.arange(SHARDS * 2 * 3, dtype=np.float32).reshape(SHARDS, 2, 3)
    out = mapped(
        lambda x: {
            "mean": collectives.pmean({"a": x}), "sum": collectives.psum(x), "all": collectives.all_gather(x),
            "wide": collectives.all_gather(x, axis=1), "index": collectives.index(), "size": jnp.asarray(collectives.size()),
        }
    )(x)
    for shard in range(SHARDS):
        np.testing.assert_allclose(out["mean"]["a"][shard], x.mean(0))
        np.testing.assert_allclose(out["sum"][shard], x.sum(0))
        np.testing.assert_array_equal(out["all"][shard], x.reshape(-1, 3))
        np.testing.assert_array_equal(out["wide"][shard], np.concatenate(x, axis=1))
    np.testing.assert_array_equal(out["index"], np.arange(SHARDS))
    np.testing.assert_array_equal(out["size"], SHARDS)


@pytest.mark.multidevice
def test_gradients_through_collectives_follow_the_stated_convention():
    """Gradients of the shard's own mean loss, averaged over shards, are those of the loss over the whole batch."""
    x = np.random.default_rng(0).normal(size=(SHARDS * 2, 3)).astype(np.float32)
    w = jnp.asarray([0.3, -0.7, 1.1])

    def loss(w, x):
        y = x * w
        centred = y - collectives.pmean(y.mean(0))  # batch statistics
        everyone = collectives.all_gather(y)
        return jnp.mean(centred**4) + jnp.mean(jnp.tanh(y @ everyone.T) ** 2)

    whole = jax.grad(loss)(w, jnp.asarray(x))
    parts = mapped(functools.partial(lambda x, w: collectives.pmean(jax.grad(loss)(w, x)), w=w))(x.reshape(SHARDS, 2, 3))
    for part in parts:
        np.testing.assert_allclose(part, whole, rtol=2e-5)
