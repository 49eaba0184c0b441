"""What is no encoder of ours is refused, and every array that is at fault is named."""

import jax
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.interop.vit_names import params_to_vit
from wavepath.interop.vit_reader import vit_to_params
from wavepath.models.vit import ViT
from wavepath.ops.posembed import sincos_2d


def filled(module):
    """Random parameters of the right shapes, without compiling the network's own start."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 12, 12, 3), np.float32))["params"]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tensors():
    """A plain ViT under timm's names, with a table of 3 x 3 positions and a row for the class token."""
    params = filled(ViT(16, 2, 2, 4))
    table = np.random.default_rng(0).normal(size=(1, 10, 16)).astype(np.float32)
    return {**params_to_vit(params), "pos_embed": table}


def changed(tensors, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    found = {**tensors, **changes}
    return {name: value for name, value in found.items() if value is not None}


def test_what_was_found_out(tensors):
    encoder = vit_to_params(tensors, heads=2)
    assert encoder.fields == dict(
        width=16, depth=2, patch=4, heads=2, norm_eps=1e-6, mlp_hidden=0, qkv_bias=True, positions="learned", position_grid=3
    )
    np.testing.assert_array_equal(encoder.params["cls_token"][0, 0], tensors["cls_token"][0, 0] + tensors["pos_embed"][0, 0])
    np.testing.assert_array_equal(encoder.params["pos_embed"][0], tensors["pos_embed"][0, 1:])


def test_fixed_positions_are_not_stored_and_nearly_fixed_ones_are(tensors):
    table = np.concatenate([np.zeros((1, 16), np.float32), sincos_2d(16, 3, 3)])[None]
    encoder = vit_to_params({**tensors, "pos_embed": table}, heads=2)
    assert "pos_embed" not in encoder.params and "positions" not in encoder.fields and encoder.grid == 3
    assert "pos_embed" not in vit_to_params({**tensors, "pos_embed": table.astype(np.float16)}, heads=2).params
    table = table + np.float32(2e-3)
    assert "pos_embed" in vit_to_params({**tensors, "pos_embed": table}, heads=2).params


BAD = {
    "missing": (dict(blocks__1__mlp__fc2__weight=None), r"missing: blocks\.1\.mlp\.fc2\.weight"),
    "a block": (dict(blocks__2__norm1__weight=np.ones(16)), r"missing: blocks\.2\.norm1\.bias, blocks\.2\.attn\.qkv\.weight"),
    "no class token": (dict(cls_token=None), "missing: cls_token"),
    "no positions": (dict(pos_embed=None), "missing: pos_embed"),
    "shape": (dict(norm__bias=np.zeros(5)), r"of another shape: norm\.bias \(5,\) instead of \(16,\)"),
    "matrix": (dict(blocks__0__attn__proj__weight=np.zeros((16, 8))), r"of another shape: block 0 attn/proj \(8, 16\) instead of \(16, 16\)"),
    "half a layer scale": (dict(blocks__0__ls1__gamma=np.ones(16), blocks__0__ls2__gamma=np.ones(16)), "missing: block 1 layer scale"),
    "positions": (dict(pos_embed=np.zeros((1, 8, 16))), "pos_embed 8 rows, which are not those of a square grid"),
    "unknown": (dict(blocks__0__attn__q_norm__weight=np.ones(8)), r"left over and unknown: blocks\.0\.attn\.q_norm\.weight"),
    "DeiT": (dict(dist_token=np.zeros((1, 1, 16))), "left over and unknown: dist_token"),
    "not finite": (dict(norm__bias=np.full(16, np.nan)), "norm.bias holds values that are not finite"),
    "grey images": (dict(patch_embed__proj__weight=np.zeros((16, 1, 4, 4))), "only square patches of RGB"),
    "a block of a huge number": (dict(blocks__4000000000__norm1__weight=np.ones(16)), r"left over and unknown: blocks\.4000000000\.norm1\.weight"),
    "quantised": (dict(norm__bias=np.zeros(16, np.int8)), "norm.bias is of int8, not of floating-point numbers"),
    "texts": (dict(norm__bias=np.array(["a"] * 16)), "norm.bias is of <U1, not of floating-point numbers"),
    "no ViT": (dict(patch_embed__proj__weight=None), "no vision transformer"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(tensors, name):
    changes, words = BAD[name]
    with pytest.raises(DatasetError, match=words):
        vit_to_params(changed(tensors, **changes), heads=2)


CONFIGS = {
    "heads": (dict(num_attention_heads="many"), "config.json gives num_heads='many', which is no such number"),
    "half a head": (dict(num_attention_heads=0.5), "num_heads='0.5'"),
    "eps": (dict(layer_norm_eps=[1]), "layer_norm_eps"),
    "GELU by tanh": (dict(hidden_act="gelu_new"), "asks for the activation 'gelu_new'"),
    "SiLU without a gate": (dict(hidden_act="silu"), "asks for the activation 'silu'"),
    "timm's class": (dict(model_args=dict(act_layer="torch.nn.SiLU")), "asks for the activation 'torch.nn.SiLU'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_config_json_says_must_fit(tensors, name):
    config, words = CONFIGS[name]
    with pytest.raises(DatasetError, match=words):
        vit_to_params(tensors, config=config)


def test_activations_are_known_by_names_and_by_classes(tensors):
    """UNI2-h's config.json has the path of the class, transformers' DINOv2 the activation that its gated MLP has not."""
    gated = {**tensors}
    for number in range(2):
        gated |= {f"blocks.{number}.mlp.fc2.weight": np.ones((16, 32), np.float32)}
    for config in (dict(model_args=dict(act_layer="torch.nn.SiLU")), dict(hidden_act="gelu"), dict(layer_norm_eps=None)):
        assert vit_to_params(gated, heads=2, config=config).fields["mlp"] == "swiglu"
    assert "mlp" not in vit_to_params(tensors, heads=2, config=dict(model_args=dict(act_layer="<class 'torch.nn.modules.activation.GELU'>"))).fields


def test_several_encoders_are_told_apart_or_asked_about(tensors):
    both = {f"{name}.{key}": value for name in ("left", "right") for key, value in tensors.items()}
    with pytest.raises(DatasetError, match="several encoders: 'left.', 'right.'; choose one with --prefix"):
        vit_to_params(both, heads=2)
    assert len(vit_to_params(both, heads=2, prefix="right").left_out) == len(tensors)
    with pytest.raises(DatasetError, match="--prefix middle. has no encoder; there are 'left.', 'right.'"):
        vit_to_params(both, heads=2, prefix="middle")


def test_heads_must_divide_the_width(tensors):
    with pytest.raises(DatasetError, match="3 heads do not divide a width of 16"):
        vit_to_params(tensors, heads=3)


def test_scanned_blocks_go_out_like_any_other():
    scanned = filled(ViT(16, 2, 2, 4, scan=True))
    found = params_to_vit(scanned)
    np.testing.assert_array_equal(found["blocks.1.attn.proj.weight"], scanned["blocks"]["scanned"]["attn"]["proj"]["kernel"][1].T)
    assert set(found) == set(params_to_vit(filled(ViT(16, 2, 2, 4))))
