"""The discriminator: published size, the patch that a logit sees, operations counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.patchgan import PatchGAN, patchgan_flops
from wavepath.models.stain_layers import fresh_parameters

IMAGE = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_published_size_and_shapes(norm):
    model = PatchGAN(norm=norm)
    variables = jax.eval_shape(lambda key, *x: model.init(key, *x), jax.random.key(0), IMAGE, IMAGE)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 2_768_705
    logits, out = jax.eval_shape(model.apply, variables, IMAGE, IMAGE)
    assert logits.shape == (1, 30, 30) and out["layer_3"].shape == (1, 32, 32, 256)
    counted = jax.jit(lambda v, *x: model.apply(v, *x)[0]).lower(variables, IMAGE, IMAGE).cost_analysis()["flops"]
    assert patchgan_flops(256) == pytest.approx(counted, rel=0.05)


def test_a_logit_sees_70_px_of_both_images():
    model, rng = PatchGAN(channels=4), np.random.default_rng(0)
    pair = [jnp.asarray(rng.uniform(size=(1, 96, 96, 3)).astype(np.float32)) for _ in range(2)]
    variables = fresh_parameters(model, jax.random.key(0), *pair)
    # Larger weights, or the gradient at the edge of the patch drowns.
    variables = {**variables, "params": jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim == 4 else leaf, variables["params"])}
    seen = jax.jit(jax.grad(lambda x: model.apply(variables, *x)[0][0, 5, 5]))(pair)
    for image in seen:
        rows, columns = np.nonzero(np.asarray(image[0]).any(-1))
        assert [np.ptp(places) + 1 for places in (rows, columns)] == [70, 70]


def test_too_small_images():
    with pytest.raises(ConfigError, match="images of 24 px"):
        PatchGAN().init(jax.random.key(0), jnp.zeros((1, 16, 64, 3)), jnp.zeros((1, 16, 64, 3)))
