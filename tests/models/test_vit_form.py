"""What imported encoders have beside the plain ViT: off by default, and each part doing what its definition says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.classifier import Classifier
from wavepath.models.layers import Form, LayerScale, Mlp
from wavepath.models.mae import MAE
from wavepath.models.vit import VARIANTS, ViT, vit_flops
from wavepath.ops.patches import random_masking

ALL = Form(mlp="swiglu", hidden=24, layer_scale=0.1, registers=3, positions="learned", norm_eps=1e-5)
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


def filled(module, *args, seed=1):
    """Random parameters of the right shapes, without compiling the network's own start."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def made(form=None, x=IMAGES, depth=1, **settings):
    model = ViT(width=16, depth=depth, heads=2, patch=4, **settings, **({"form": form} if form else {}))
    return model, filled(model, x)


def run(model, params, *args, x=IMAGES):
    return jax.jit(model.apply)({"params": params}, x, *args)


def test_without_a_form_parameters_and_outputs_are_what_they_were():
    _, params = made()
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert len(names) == 2 + 1 + 2 + 12 and not [name for name in names if "'ls" in name or "reg" in name or "pos" in name]


def test_every_form_has_its_parameters():
    _, params = made(ALL)
    assert params["reg_token"].shape == (1, 3, 16) and params["pos_embed"].shape == (1, 16, 16)
    block = params["blocks"]["0"]
    assert block["mlp"]["fc1"]["kernel"].shape == (16, 48) and block["mlp"]["fc2"]["kernel"].shape == (24, 16)
    start = LayerScale(0.1).init(jax.random.key(0), IMAGES.reshape(2, 48, 16))["params"]["scale"]
    assert block["ls2"]["scale"].shape == (16,) and (np.asarray(start) == np.float32(0.1)).all()
    _, bare = made(Form(qkv_bias=False, final_norm=False))
    assert "bias" not in bare["blocks"]["0"]["attn"]["qkv"] and "bias" in bare["blocks"]["0"]["attn"]["proj"] and "norm" not in bare


def test_registers_take_part_and_are_not_returned():
    model, params = made(Form(registers=3))
    tokens, out = run(model, params)
    assert tokens.shape == (2, 17, 16) and out["embedded"].shape == (2, 20, 16) and out["blocks"][-1].shape == (2, 20, 16)
    np.testing.assert_allclose(out["mean"], tokens[:, 1:].mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(out["embedded"][0, 1:4], params["reg_token"][0])
    other = run(model, {**params, "reg_token": 9 * params["reg_token"] + jnp.arange(16.0)})[0]
    assert np.abs(other - tokens).max() > 1e-3


def test_layer_scale_multiplies_both_branches():
    _, params = made()
    scaled = {**params, "blocks": {
        number: {**block, "ls1": {"scale": jnp.full(16, 0.5)}, "ls2": {"scale": jnp.full(16, 0.25)}} for number, block in params["blocks"].items()
    }}  # fmt: skip
    halved = jax.tree.map(lambda leaf: leaf, params)
    for block in halved["blocks"].values():
        block["attn"] = {**block["attn"], "proj": jax.tree.map(lambda leaf: 0.5 * leaf, block["attn"]["proj"])}
        block["mlp"] = {**block["mlp"], "fc2": jax.tree.map(lambda leaf: 0.25 * leaf, block["mlp"]["fc2"])}
    model, plain = ViT(16, 1, 2, 4, form=Form(layer_scale=1.0)), ViT(16, 1, 2, 4)
    np.testing.assert_allclose(run(model, scaled)[0], run(plain, halved)[0], atol=1e-5)


def test_swiglu_is_its_definition():
    x = jax.random.normal(jax.random.key(0), (1, 3, 4))
    mlp = Mlp(5, kind="swiglu")
    params = mlp.init(jax.random.key(1), x)["params"]
    both = x @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    a, b = both[..., :5], both[..., 5:]
    want = (a / (1 + jnp.exp(-a)) * b) @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(mlp.apply({"params": params}, x), want, atol=1e-6)
    with pytest.raises(ConfigError, match="config.model.mlp='relu' is unknown; choose one of gelu, swiglu"):
        Mlp(5, kind="relu").init(jax.random.key(1), x)


def test_a_learned_table_is_added_patch_by_patch_and_resized():
    model, params = made(Form(positions="learned", grid=4))
    _, out = run(model, params)
    _, moved = run(model, {**params, "pos_embed": params["pos_embed"].at[0, 5].add(1.0)})
    changed = np.abs(moved["embedded"] - out["embedded"]).max(axis=(0, 2))
    assert changed[6] > 0.9 and np.delete(changed, 6).max() == 0
    ids = jnp.asarray([[3, 0, 9], [15, 2, 7]], jnp.int32)
    _, part = run(model, params, ids)
    np.testing.assert_allclose(part["embedded"][1, 1:], out["embedded"][1][1 + ids[1]], atol=1e-6)


def test_a_constant_table_stays_constant_at_any_size():
    model, params = made(Form(positions="learned", grid=4))
    flat = {**params, "pos_embed": jnp.ones_like(params["pos_embed"])}
    wide = jnp.zeros((1, 24, 32, 3))
    _, resized = run(model, flat, x=wide)
    bias = flat["patch_embed"]["bias"]
    np.testing.assert_allclose(resized["embedded"][0, 1:], np.broadcast_to(1.0 + bias, (48, 16)), atol=1e-5)
    with pytest.raises(ConfigError, match="position_grid"):
        made(Form(positions="learned"), x=wide)
    with pytest.raises(ConfigError, match="config.model.positions='rope' is unknown"):
        made(Form(positions="rope"))


@pytest.mark.slow
def test_scan_and_remat_give_the_same_features_and_gradients():
    model, params = made(ALL, depth=2)
    layers = list(params["blocks"].values())
    scanned = {**params, "blocks": {"scanned": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}
    other = ViT(16, 2, 2, 4, scan=True, remat="full", form=ALL)

    def loss(model):
        return lambda params: (model.apply({"params": params}, IMAGES)[0] ** 2).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss(model)))(params)
    value_scanned, gradient_scanned = jax.jit(jax.value_and_grad(loss(other)))(scanned)
    np.testing.assert_allclose(value, value_scanned, rtol=1e-5)
    for name in ("pos_embed", "reg_token"):
        assert np.abs(gradient[name]).max() > 0
        np.testing.assert_allclose(gradient[name], gradient_scanned[name], atol=1e-5)
    np.testing.assert_allclose(gradient["blocks"]["1"]["ls2"]["scale"], gradient_scanned["blocks"]["scanned"]["ls2"]["scale"][1], atol=1e-5)


def test_an_autoencoder_leaves_the_registers_out_of_its_decoder():
    masking = random_masking(jax.random.split(jax.random.key(2), 2), 16, 0.75)
    mae = MAE(16, 1, 2, 8, 1, 2, patch=4, form=ALL)
    params = filled(mae, IMAGES, masking)
    block = params["decoder_blocks"]["0"]
    assert "ls1" not in block and block["mlp"]["fc1"]["kernel"].shape == (8, 32)
    prediction, out = jax.eval_shape(mae.apply, {"params": params}, IMAGES, masking)
    assert prediction.shape == (2, 12, 48) and out["latent"].shape == (2, 5, 16) and out["decoded"].shape == (2, 17, 8)


def test_a_classifier_leaves_the_registers_out_of_its_mean():
    head = Classifier(16, 1, 2, 3, patch=4, form=ALL)
    params = {**filled(head, IMAGES), "fc_norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}
    _, out = run(head, params)
    last = np.asarray(out["blocks"][-1])[:, 4:].mean(axis=1)
    centred = last - last.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out["pooled"], centred / np.sqrt(last.var(axis=1, keepdims=True) + 1e-5), atol=1e-4)


def test_flops_count_registers_and_gates():
    size, plain = VARIANTS["S"], Form()
    base = vit_flops(196, size, 16)
    assert vit_flops(196, size, 16, form=plain) == base
    assert vit_flops(196, size, 16, form=Form(registers=4)) - base == vit_flops(200, size, 16) - base - 4 * 2 * 16 * 16 * 3 * 384
    # Three products of two thirds of the width cost what two products cost.
    assert vit_flops(196, size, 16, form=Form(mlp="swiglu", hidden=1024)) == pytest.approx(base)
