"""transformers' vision transformers (Phikon's ViT, DINOv2 with and without registers, ViTMAE's encoder) give the features that they give there."""

import jax
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.interop.vit_names import HF, params_to_vit
from wavepath.interop.vit_reader import vit_to_params
from wavepath.interop.weight_files import preprocessing, read_weight_files
from wavepath.models.layers import Form
from wavepath.models.vit import ViT
from wavepath.ops.posembed import sincos_2d

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[bench]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[bench]'")

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
MODELS = {
    "ViT (Phikon)": ("ViT", dict(intermediate_size=72)),
    "ViT without bias": ("ViT", dict(intermediate_size=128, qkv_bias=False, layer_norm_eps=1e-3)),
    "DINOv2": ("Dinov2", {}),
    "DINOv2, SwiGLU": ("Dinov2", dict(use_swiglu_ffn=True)),
    "DINOv2 with registers": ("Dinov2WithRegisters", dict(num_register_tokens=3)),
    "ViTMAE, its encoder": ("ViTMAE", dict(intermediate_size=128, mask_ratio=0.0)),
}
MORE = {"DINOv2", "ViT (Phikon)"}  # whose parts the others have too


def random_model(kind, head="Model", **arguments):
    """Every array random but fixed positions: those that begin as zeros or ones would hide a mistake.

    ViTMAE's table is filled with sines when it is trained from the start, not when it is built, so that is done here.
    """
    config = getattr(transformers, f"{kind}Config")(**SMALL, **arguments)
    model = getattr(transformers, kind + head)(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if kind == "ViTMAE" and "position" in name:
                value[0, 1:] = torch.tensor(sincos_2d(32, 4, 4))
            else:
                value.copy_(torch.tensor(rng.normal(size=value.shape) * (0.5 if value.ndim == 1 else 0.2), dtype=torch.float32))
    return model.eval()


def ours(encoder, x, **changes):
    names = {"mlp_hidden": "hidden", "register_tokens": "registers", "position_grid": "grid"}
    fields = encoder.fields
    found = {names.get(name, name): value for name, value in fields.items() if name not in ("width", "depth", "heads", "patch")}
    model = ViT(fields["width"], fields["depth"], fields["heads"], fields["patch"], form=Form(**{**found, **changes}))
    return jax.jit(model.apply)({"params": encoder.params}, x)[0]


def theirs(model, x, registers=0):
    with torch.no_grad():
        pixels = torch.tensor(x.transpose(0, 3, 1, 2))
        extra = {"noise": torch.linspace(0, 1, 16)[None].repeat(len(x), 1)} if "MAE" in type(model).__name__ else {}
        tokens = model(pixels, **extra).last_hidden_state.numpy()
    return np.concatenate([tokens[:, :1], tokens[:, 1 + registers :]], axis=1)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in MORE else ()) for name in MODELS])
def test_features_of_a_saved_folder_are_those_of_transformers(tmp_path, name):
    kind, arguments = MODELS[name]
    model = random_model(kind, **arguments)
    model.save_pretrained(tmp_path)
    weights = read_weight_files(tmp_path)
    encoder = vit_to_params(weights.tensors, config=weights.config)
    assert encoder.fields["heads"] == 2 and preprocessing(weights.config, weights.preprocessor) == {"image_size": 32}
    assert not [name for name in encoder.left_out if "mask_token" not in name and "pooler" not in name]
    x = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    want = theirs(model, x, arguments.get("num_register_tokens", 0))
    np.testing.assert_allclose(ours(encoder, x), want, atol=1e-5 * max(1, np.abs(want).max()))
    assert (encoder.fields.get("positions") == "learned") == (kind != "ViTMAE")
    if kind in ("ViT", "ViTMAE"):
        eps = arguments.get("layer_norm_eps", 1e-12)
        assert encoder.fields["norm_eps"] == eps
        if eps == 1e-3:  # so large that a wrong one shows
            assert np.abs(ours(encoder, x, norm_eps=1e-6) - want).max() > 3e-4


def test_names_that_version_5_gives_its_modules_are_read_too():
    """As `torch.save(model.state_dict())` writes them."""
    x = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    for kind, arguments in (("ViT", {}), ("Dinov2", dict(use_swiglu_ffn=True))):
        model = random_model(kind, **arguments)
        tensors = {f"vit.{name}": value.numpy() for name, value in model.state_dict().items()} | {"classifier.weight": np.zeros((2, 32))}
        encoder = vit_to_params(tensors, config=model.config.to_dict())
        want = theirs(model, x)
        np.testing.assert_allclose(ours(encoder, x), want, atol=1e-5 * max(1, np.abs(want).max()))
        assert "classifier.weight" in encoder.left_out


def test_our_parameters_under_the_released_names_load_without_a_missing_one(tmp_path):
    from safetensors.numpy import save_file

    model = random_model("ViT", intermediate_size=128)
    model.save_pretrained(tmp_path)
    weights = read_weight_files(tmp_path)
    written = params_to_vit(vit_to_params(weights.tensors, config=weights.config).params, HF)
    same = set(written) - {"embeddings.cls_token"}  # which took over its row of the table
    assert set(weights.tensors) - set(written) == {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_embeddings"}
    for name in same:
        np.testing.assert_array_equal(written[name], weights.tensors[name])
    save_file(written, tmp_path / "again.safetensors")


def test_an_activation_that_is_none_of_ours_is_refused():
    tensors = {name: value.numpy() for name, value in random_model("ViT", hidden_act="quick_gelu").state_dict().items()}
    with pytest.raises(DatasetError, match="'quick_gelu'; only exact GELU"):
        vit_to_params(tensors, config={"hidden_act": "quick_gelu"})
