import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.models.mae import MAE, mae_flops
from wavepath.models.vit import VARIANTS, Variant
from wavepath.ops.patches import Masking, patchify, random_masking


def tiny(**kwargs):
    return MAE(width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, patch=4, **kwargs)


@pytest.fixture(scope="module")
def case():
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    masking = random_masking(jax.random.split(jax.random.key(1), 2), 16, 0.75)
    params = jax.jit(tiny().init)(jax.random.key(2), images, masking)
    return images, masking, params


@functools.partial(jax.jit, static_argnames="method")
def apply(params, *args, method=None):
    return tiny().apply(params, *args, method=method)


def shapes_of(name, decoder=(512, 8, 16)):
    patch = 14 if name == "H" else 16
    masking = Masking(order=jnp.arange((224 // patch) ** 2, dtype=jnp.int32)[None], keep=(224 // patch) ** 2 // 4)
    model = MAE(*VARIANTS[name], *decoder, patch=patch)
    images = jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32)
    return model, images, masking, jax.eval_shape(lambda k, x: model.init(k, x, masking), jax.random.key(0), images)


def test_parameter_count_of_the_published_model():
    """111,907,840 in the reference model, of which 2 * 197 rows are fixed positions."""
    *_, params = shapes_of("B")
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 111_907_840 - 197 * (768 + 512)


@pytest.mark.parametrize("name, visible, patches", [("B", 49, 196), pytest.param("H", 64, 256, marks=pytest.mark.slow)])
def test_a_quarter_of_the_tokens_reaches_the_encoder_and_the_rest_is_predicted(name, visible, patches):
    model, images, masking, params = shapes_of(name)
    prediction, out = jax.eval_shape(lambda p, x: model.apply(p, x, masking), params, images)
    assert out["embedded"].shape[:2] == (3, 1 + visible)
    assert all(block.shape[1] == 1 + visible for block in out["blocks"])
    assert out["decoded"].shape[:2] == (3, 1 + patches)
    assert prediction.shape == (3, patches - visible, model.patch**2 * 3)


def product_flops(jaxpr):
    """Multiplies and adds of every matrix product in a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[axis] for axis in contracted])
        for inner in jax.core.jaxprs_in_params(equation.params):
            total += product_flops(inner)
    return total


@pytest.mark.parametrize("name, published", [("S", 13.2), ("B", 19.7), ("L", 41.7), pytest.param("H", 97.3, marks=pytest.mark.slow)])
def test_flops_are_those_of_the_program_and_near_the_published(name, published):
    model, images, masking, params = shapes_of(name)
    program = jax.make_jaxpr(lambda p, x: model.apply(p, x, masking))(params, images)
    patch, n = model.patch, (224 // model.patch) ** 2
    ours = mae_flops(VARIANTS[name], Variant(512, 8, 16), patch, n, n // 4)
    np.testing.assert_allclose(product_flops(program.jaxpr), 3 * ours, rtol=1e-12)
    # The published count embeds all patches and predicts the visible ones too; here neither is done.
    saved = 2 * (n - n // 4) * patch**2 * 3 * VARIANTS[name].width + 2 * (n // 4) * 512 * patch**2 * 3
    assert abs((ours + saved) / 1e9 - published) < 0.02 * published


def test_hidden_pixels_do_not_reach_the_predictions_and_visible_ones_do(case):
    images, masking, params = case
    want, _ = apply(params, images, masking)

    def with_noise_on(ids):
        noise = np.zeros((2, 16, 48), np.float32)
        for example in range(2):
            noise[example, np.asarray(ids)[example]] = 5.0
        cells = noise.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 3)
        np.testing.assert_array_equal(patchify(jnp.asarray(cells), 4), noise)
        return apply(params, images + cells, masking)[0]

    np.testing.assert_array_equal(with_noise_on(masking.masked), want)
    assert float(jnp.abs(with_noise_on(masking.visible[:, :1]) - want).max()) > 1e-4


def test_working_in_the_mask_order_equals_putting_tokens_back_in_image_order(case):
    """The usual form: un-shuffle, add positions in image order, decode, select the masked."""
    from wavepath.ops.posembed import sincos_2d

    images, masking, params = case
    want, out = apply(params, images, masking)

    def usual(module):
        x = module.decoder_embed(out["latent"])
        full = jnp.concatenate([x[:, 1:], jnp.broadcast_to(module.mask_token, (2, 12, 8))], axis=1)
        restored = jnp.take_along_axis(full, jnp.argsort(masking.order, axis=1)[:, :, None], axis=1) + sincos_2d(8, 4, 4)
        decoded, _ = module.decoder_blocks(jnp.concatenate([x[:, :1], restored], axis=1))
        pixels = module.decoder_pred(module.decoder_norm(decoded))[:, 1:]
        return jnp.take_along_axis(pixels, masking.masked[:, :, None], axis=1)

    np.testing.assert_allclose(apply(params, method=usual), want, atol=1e-5)


def test_one_mask_for_a_group_equals_the_same_mask_for_each(case):
    images, _, params = case
    shared = random_masking(jax.random.split(jax.random.key(7), 1), 16, 0.75)
    each = Masking(order=jnp.repeat(shared.order, 2, axis=0), keep=shared.keep)
    np.testing.assert_allclose(apply(params, images, shared)[0], apply(params, images, each)[0], atol=1e-5)


def test_scan_equals_the_loop(case):
    images, masking, params = case
    inner = params["params"]
    stacked = {
        **inner, "encoder": {**inner["encoder"], "blocks": {"scanned": jax.tree.map(lambda *x: jnp.stack(x), *inner["encoder"]["blocks"].values())}},
        "decoder_blocks": {"scanned": jax.tree.map(lambda x: x[None], inner["decoder_blocks"]["0"])},
    }
    got, _ = jax.jit(tiny(scan=True, remat="full").apply)({"params": stacked}, images, masking)
    np.testing.assert_allclose(got, apply(params, images, masking)[0], atol=1e-5)


def test_the_backward_pass_scatters_nothing(case):
    """Pixels and positions are gathered, tokens never: the slow transpose of a gather does not occur."""
    images, masking, params = case
    text = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply(p, images, masking)[0] ** 2)))(params))
    assert "gather" in text and "scatter" not in text
