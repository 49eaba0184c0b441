import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.vit import VARIANTS, ViT, variant, vit_flops

# timm's parameter counts with a class token and learned positions, without the classifier; ours has fixed positions.
TIMM = {"Ti": 5_717_416 - 193_000, "S": 22_050_664 - 385_000, "B": 85_798_656, "L": 304_326_632 - 1_025_000, "H": 632_045_800 - 1_281_000}


def tiny(**kwargs):
    return ViT(width=16, depth=2, heads=2, patch=4, **kwargs)


@pytest.mark.parametrize("name", list(TIMM))
@pytest.mark.parametrize("scan", [False, True])
def test_parameter_counts_are_timms(name, scan):
    patch = 14 if name == "H" else 16
    model = ViT(*VARIANTS[name], patch=patch, scan=scan)
    tokens = (224 // patch) ** 2 + 1
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count + tokens * VARIANTS[name].width == TIMM[name]


@pytest.mark.parametrize("name, full, quarter", [("S", 9.2, 2.3), ("B", 35.1, 8.8), ("L", 123.1, 30.8), ("H", 334.6, 82.9)])
def test_flops_are_the_published_ones(name, full, quarter):
    patch = 14 if name == "H" else 16
    tokens = (224 // patch) ** 2
    assert abs(vit_flops(tokens, VARIANTS[name], patch) / 1e9 - full) < 0.006 * full
    # The published count embeds all patches and then drops most; here the visible alone are embedded.
    saved = 2 * (tokens - tokens // 4) * patch**2 * 3 * VARIANTS[name].width
    assert abs((vit_flops(tokens // 4, VARIANTS[name], patch) + saved) / 1e9 - quarter) < 0.01 * quarter


def test_outputs_by_name_and_other_image_sizes():
    model, images = tiny(), jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)
    tokens, out = jax.jit(model.apply)(params, images)
    assert tokens.shape == (2, 17, 16) and out["embedded"].shape == (2, 17, 16) and len(out["blocks"]) == 2
    np.testing.assert_array_equal(out["cls"], tokens[:, 0])
    np.testing.assert_allclose(out["mean"], tokens[:, 1:].mean(1), atol=1e-6)
    assert jax.jit(model.apply)(params, jnp.zeros((1, 24, 32, 3)))[0].shape == (1, 49, 16)


def test_visible_patches_are_embedded_as_in_the_whole_image():
    model, images = tiny(), jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)
    ids = jnp.asarray([[3, 0, 9], [15, 2, 7]], jnp.int32)
    _, whole = jax.jit(model.apply)(params, images)
    _, part = jax.jit(model.apply)(params, images, ids)
    for example in range(4):
        want = whole["embedded"][example][jnp.concatenate([jnp.zeros(1, jnp.int32), 1 + ids[example // 2]])]
        np.testing.assert_allclose(part["embedded"][example], want, atol=1e-6)


def test_the_order_of_visible_patches_does_not_matter():
    model, images = tiny(), jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)
    one, _ = jax.jit(model.apply)(params, images, jnp.asarray([[3, 0, 9]], jnp.int32))
    other, _ = jax.jit(model.apply)(params, images, jnp.asarray([[9, 3, 0]], jnp.int32))
    np.testing.assert_allclose(one[:, jnp.asarray([0, 3, 1, 2])], other, atol=1e-5)


def test_compute_in_bfloat16_keeps_float32_parameters():
    model, images = tiny(dtype=jnp.bfloat16), jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    tokens, _ = jax.jit(model.apply)(params, images)
    assert tokens.dtype == jnp.bfloat16
    wide, _ = jax.jit(tiny().apply)(params, images)
    np.testing.assert_allclose(np.asarray(tokens, np.float32), wide, atol=0.1)


def test_initial_weights_are_xavier_uniform_and_biases_zero():
    model = ViT(width=64, depth=1, heads=2, patch=4)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]
    for path, fan in ((params["patch_embed"], 48 + 64), (params["blocks"]["0"]["attn"]["qkv"], 64 + 192), (params["blocks"]["0"]["mlp"]["fc1"], 320)):
        bound = np.sqrt(6 / fan)
        top = float(jnp.abs(path["kernel"]).max())
        assert 0.97 * bound < top <= bound
        np.testing.assert_array_equal(path["bias"], 0)
    assert 0.01 < float(params["cls_token"].std()) < 0.03


def test_unknown_variant_names_the_choices():
    with pytest.raises(ConfigError, match="Ti, S, B, L, H"):
        variant("XL")
