"""timm's vision transformers in and out: the same features, whatever a published encoder has beside the plain ViT."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wavepath.interop.timm_folder import write_timm_folder
from wavepath.interop.vit_names import params_to_vit
from wavepath.interop.vit_reader import vit_to_params
from wavepath.models.layers import Form
from wavepath.models.vit import ViT

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0)
FORMS = {
    "plain": {},
    "other sizes": dict(embed_dim=24, num_heads=3, mlp_ratio=2.5, depth=3, img_size=24),
    "layer scale (UNI)": dict(init_values=1e-5),
    "registers, positions for all": dict(reg_tokens=3),
    "registers, no_embed_class": dict(reg_tokens=3, no_embed_class=True),
    "no_embed_class": dict(no_embed_class=True),
    "no bias": dict(qkv_bias=False, final_norm=False),
    "swiglu (UNI2-h)": dict(reg_tokens=8, no_embed_class=True, mlp_ratio=5.33334, init_values=1e-5, architecture="vit_giant_patch14_dinov2"),
    "swiglu without layer scale": dict(mlp_ratio=2.0, init_values=None, architecture="vit_giant_patch14_dinov2"),
}
# Those whose parts the others have too.
MORE = {"other sizes", "registers, no_embed_class", "no_embed_class", "swiglu without layer scale"}


def images(side=32, seed=0):
    return np.random.default_rng(seed).normal(size=(2, side, side, 3)).astype(np.float32)


def random_model(timm, seed=0, **arguments):
    """A timm ViT whose every array is random: those that begin as zeros or ones would hide a mistake."""
    import torch

    arguments = {**SMALL, **arguments}
    architecture = arguments.pop("architecture", "vit_tiny_patch16_224")
    scale = arguments.pop("init_values", None)
    model = timm.create_model(architecture, **arguments) if scale is None else timm.create_model(architecture, init_values=scale, **arguments)
    if scale is None and architecture != "vit_tiny_patch16_224":
        for block in model.blocks:  # create_model drops a None, and this architecture has layer scale by itself
            block.ls1, block.ls2 = torch.nn.Identity(), torch.nn.Identity()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.5 if value.ndim == 1 else 1.0 / np.sqrt(value[0].numel()) if name.endswith("weight") else 0.5
            value.copy_(torch.tensor(rng.normal(size=value.shape) * spread + ("norm" in name and name.endswith("weight")), dtype=torch.float32))
    return model.eval()


def features(model, x):
    import torch

    with torch.no_grad():
        tokens = model.forward_features(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    return np.concatenate([tokens[:, :1], tokens[:, model.num_prefix_tokens :]], axis=1)


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def form(fields, **changes):
    names = {"mlp_hidden": "hidden", "register_tokens": "registers", "position_grid": "grid"}
    found = {names.get(name, name): value for name, value in fields.items() if name not in ("width", "depth", "heads", "patch")}
    return Form(**{**found, **changes})


def ours(encoder, x, **changes):
    fields = encoder.fields
    model = ViT(fields["width"], fields["depth"], fields["heads"], fields["patch"], form=form(fields, **changes))
    return jax.jit(model.apply)({"params": encoder.params}, x)


def near(a, b, tolerance=1e-5):
    """Equal to rounding, by the size of the features."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in MORE else ()) for name in FORMS])
def test_features_are_timms_both_ways(timm, tmp_path, name):
    model = random_model(timm, **FORMS[name])
    x = images(FORMS[name].get("img_size", 32))
    want = features(model, x)
    encoder = vit_to_params(arrays(model), heads=model.blocks[0].attn.num_heads)
    tokens, out = ours(encoder, x)
    near(tokens, want)
    near(out["mean"], want[:, 1:].mean(axis=1))
    assert not encoder.left_out

    side = x.shape[1]
    settings = {**encoder.fields, "image_size": side, "mean": (0.5, 0.6, 0.7), "std": (0.2, 0.2, 0.3)}
    write_timm_folder(encoder.params, settings, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    near(features(loaded, x), want)
    assert loaded.pretrained_cfg["mean"] in ([0.5, 0.6, 0.7], (0.5, 0.6, 0.7)) and tuple(loaded.pretrained_cfg["input_size"]) == (3, side, side)
    # What we wrote, read again, is what we had.
    again = vit_to_params(load_file(tmp_path / "model.safetensors"), heads=encoder.fields["heads"])
    assert jax.tree.structure(again.params) == jax.tree.structure(encoder.params)
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(encoder.params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("side", [24, 40])
def test_another_image_size_resizes_the_table_as_timm_does(timm, side):
    model = random_model(timm, dynamic_img_size=True, reg_tokens=2, no_embed_class=True)
    x = images(side)
    near(ours(vit_to_params(arrays(model), heads=4), x)[0], features(model, x), 2e-5)


def test_an_export_for_another_image_size_has_the_table_of_that_size(timm, tmp_path):
    model = random_model(timm, dynamic_img_size=True)
    encoder = vit_to_params(arrays(model), heads=4)
    write_timm_folder(encoder.params, {**encoder.fields, "image_size": 48, "mean": (0, 0, 0), "std": (1, 1, 1)}, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.pos_embed.shape == (1, 37, 32)
    near(features(loaded, images(48)), features(model, images(48)), 2e-5)


def test_the_fixed_positions_go_out_as_a_table_and_come_back_as_none(timm, tmp_path):
    model = ViT(32, 2, 4, 8, scan=True)
    x = images()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    settings = dict(width=32, depth=2, heads=4, patch=8, image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    write_timm_folder(params, settings, tmp_path)
    table = load_file(tmp_path / "model.safetensors")["pos_embed"]
    assert table.shape == (1, 17, 32) and not table[0, 0].any()
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    near(features(loaded, x), jax.jit(model.apply)({"params": params}, x)[0])
    back = vit_to_params(load_file(tmp_path / "model.safetensors"), heads=4)
    assert "pos_embed" not in back.params and "positions" not in back.fields and "0" in back.params["blocks"]


def test_names_of_dinov2s_own_checkpoints(timm):
    """`register_tokens`, `mlp.w12`, a mask token, chunks of blocks, a class row in the table although there are registers."""
    model = random_model(timm, architecture="vit_giant_patch14_dinov2", reg_tokens=2, no_embed_class=True, init_values=1.0, mlp_ratio=3.0)
    theirs = {}
    for name, value in arrays(model).items():
        name = name.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        name = name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0.")
        theirs["teacher.backbone." + name] = value
    theirs["teacher.backbone.mask_token"] = np.zeros((1, 32), np.float32)
    row = np.full((1, 1, 32), 0.25, np.float32)
    theirs["teacher.backbone.pos_embed"] = np.concatenate([row, theirs["teacher.backbone.pos_embed"]], axis=1)
    theirs["teacher.backbone.cls_token"] = theirs["teacher.backbone.cls_token"] - row
    theirs |= {name.replace("teacher", "student"): np.zeros_like(value) for name, value in theirs.items()}
    theirs["teacher.dino_head.last_layer.weight"] = np.zeros((3, 3), np.float32)
    encoder = vit_to_params(theirs, heads=4)
    near(ours(encoder, images())[0], features(model, images()))
    assert "teacher.dino_head.last_layer.weight" in encoder.left_out and "teacher.backbone.mask_token" in encoder.left_out
    assert any("'teacher.backbone.' is taken" in note for note in encoder.notes)


def test_prefixes_and_heads_are_left_out_and_said(timm):
    model = random_model(timm, num_classes=3)
    theirs = {f"module.{name}": value for name, value in arrays(model).items()}
    encoder = vit_to_params(theirs)
    assert encoder.left_out == ("module.head.bias", "module.head.weight")
    assert encoder.fields["heads"] == 1 and "heads assumed" in encoder.notes[0]
    assert vit_to_params(theirs, config={"model_args": {"num_heads": 2}}).fields["heads"] == 2


def test_sixteen_bit_files_are_read(timm, tmp_path):
    import ml_dtypes

    from wavepath.interop.weight_files import read_weight_files

    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in params_to_vit(vit_to_params(arrays(random_model(timm))).params).items()}
    tensors["pos_embed"] = np.zeros((1, 17, 32), ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "half.safetensors")
    params = vit_to_params(read_weight_files(tmp_path / "half.safetensors").tensors).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"].astype(np.float32))
