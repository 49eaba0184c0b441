"""The classifier's parts are what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.classifier import Classifier
from wavepath.models.vit import ViT

SIZE = (16, 2, 2)


def built(**settings):
    model = Classifier(*SIZE, classes=3, patch=4, **settings)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    # Away from the fresh head, whose logits are all but zero.
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    return model, params, images


def test_mean_pooling_skips_the_final_norm_and_the_class_token():
    model, params, images = built()
    logits, out = jax.jit(model.apply)({"params": params}, images)
    _, encoded = jax.jit(ViT(*SIZE, patch=4).apply)({"params": params["encoder"]}, images)
    mean = np.asarray(encoded["blocks"][-1][:, 1:].mean(1))
    centred = mean - mean.mean(1, keepdims=True)
    pooled = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out["pooled"], pooled, atol=1e-5)
    np.testing.assert_allclose(logits, pooled @ np.asarray(params["head"]["kernel"]), atol=1e-4)
    assert set(params) == {"encoder", "fc_norm", "head"} and logits.shape == (2, 3)


def test_class_token_pooling_has_no_norm_of_its_own():
    model, params, images = built(pool="cls")
    _, out = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_array_equal(out["pooled"], out["cls"])
    assert set(params) == {"encoder", "head"}


def test_a_fresh_head_is_all_but_zero_and_an_unknown_pool_is_refused():
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(Classifier(*SIZE, classes=3, patch=4).init)(jax.random.key(0), images)["params"]
    assert 0 < np.abs(params["head"]["kernel"]).max() < 1e-4 and not params["head"]["bias"].any()
    with pytest.raises(ConfigError, match="config.finetune.pool"):
        Classifier(*SIZE, classes=3, patch=4, pool="max").init(jax.random.key(0), images)
