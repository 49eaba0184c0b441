"""The contrastive encoder: published size and shapes, frozen statistics, operations counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.stain_encoder import StainEncoder, _means, encoder_flops
from wavepath.models.stain_layers import fresh_parameters

IMAGE = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_published_size_and_shapes(norm):
    model = StainEncoder(norm=norm)
    variables = jax.eval_shape(lambda key, x: model.init(key, x), jax.random.key(0), IMAGE)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 18_740_288
    embedding, out = jax.eval_shape(model.apply, variables, IMAGE)
    assert embedding.shape == (2, 1024) and out["features"].shape == (2, 64, 64, 256)
    assert ("batch_stats" in variables) == (norm == "batch")


def test_a_frozen_encoder_sees_each_image_alone():
    model, rng = StainEncoder(channels=4, blocks=1), np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(3, 32, 32, 3)).astype(np.float32))
    variables = fresh_parameters(model, jax.random.key(0), x)
    apply = jax.jit(lambda v, x, train: model.apply(v, x, train, mutable=["batch_stats"]), static_argnums=2)
    (all_three, _), kept = apply(variables, x, False)
    (alone, out), _ = apply(variables, jnp.concatenate([x[:1], x[1:] * 0]), False)
    np.testing.assert_allclose(all_three[0], alone[0], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])
    _, moved = apply(variables, x, True)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(moved["batch_stats"]), jax.tree.leaves(kept["batch_stats"]), strict=True))
    assert out["features"].dtype == jnp.float32


def test_means_of_quarters():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    assert _means(x).ravel().tolist() == [2.0, 3.0, 5.0, 6.0]  # as torch: the middle belongs to both halves
    assert _means(x[:, :1, :1]).ravel().tolist() == [0.0] * 4


def test_sides_are_checked():
    with pytest.raises(ConfigError, match="divisible by 4, not 30 x 32"):
        StainEncoder().init(jax.random.key(0), jnp.zeros((1, 30, 32, 3)))


def test_operations():
    model = StainEncoder()
    variables = jax.eval_shape(lambda key, x: model.init(key, x), jax.random.key(0), IMAGE)
    for embedding in (True, False):
        def run(variables, x, embedding=embedding):
            found, out = model.apply(variables, x)
            return found if embedding else out["features"]

        counted = jax.jit(run).lower(variables, IMAGE).cost_analysis()["flops"] / 2
        assert encoder_flops(256, embedding=embedding) == pytest.approx(counted, rel=0.02)
