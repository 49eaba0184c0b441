"""transformers' ViTMAE, both ways: with random weights and a given mask the same loss and pixels, by its own files and by ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from wavepath.errors import ConfigError
from wavepath.interop import hf_vitmae
from wavepath.interop.mae_names import mae_to_params
from wavepath.models.layers import Form
from wavepath.models.mae import MAE
from wavepath.ops.patches import Masking, gather_patches, normalise_patches, patchify

SIDE, PATCH, KEEP, N = 32, 8, 4, 16
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=SIDE, patch_size=PATCH, decoder_hidden_size=16,
    decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="the oracle: pip install torch")
    return pytest.importorskip("transformers", reason="the oracle: pip install transformers")


def made(transformers, **options):
    """A ViTMAE with random weights and the fixed positions, which some versions of transformers leave at nought in a new model."""
    import torch

    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **options)).eval()
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(N)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch():
    draw = np.random.default_rng(0)
    return draw.normal(size=(3, SIDE, SIDE, 3)).astype(np.float32), draw.random((3, N)).astype(np.float32)


def theirs(model, images, noise):
    import torch

    with torch.no_grad():
        out = model(torch.tensor(images).permute(0, 3, 1, 2), noise=torch.tensor(noise))
    return float(out.loss), out.logits.numpy()


def ours(params, model, images, noise, eps, norm_pix):
    network = MAE(
        model["width"], model["depth"], model["heads"], model["decoder_width"], model["decoder_depth"], model["decoder_heads"],
        patch=model["patch"], form=Form(norm_eps=eps, hidden=model["mlp_hidden"], qkv_bias=model["qkv_bias"]),
    )  # fmt: skip
    masking = Masking(order=jnp.asarray(np.argsort(noise, 1), jnp.int32), keep=KEEP)
    pixels, _ = jax.jit(network.apply)({"params": params}, jnp.asarray(images), masking)
    target = gather_patches(patchify(jnp.asarray(images), PATCH), masking.masked)
    target = normalise_patches(target) if norm_pix else target
    return float(((pixels - target) ** 2).mean()), np.asarray(pixels), np.asarray(masking.masked)


@pytest.mark.parametrize(("norm_pix", "qkv_bias"), [(True, True), pytest.param(False, False, marks=pytest.mark.slow)])
def test_loss_and_pixels_agree_both_ways(norm_pix, qkv_bias, transformers, tmp_path):
    model = made(transformers, norm_pix_loss=norm_pix, qkv_bias=qkv_bias)
    images, noise = batch()
    loss, logits = theirs(model, images, noise)
    model.save_pretrained(tmp_path / "theirs")
    said = hf_vitmae.read_config(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    assert hf_vitmae.is_vitmae(saved)
    found = mae_to_params(hf_vitmae.to_mae(saved), said["heads"], said["decoder_heads"])
    assert found.model["positions"] == "sincos" and not found.left and said["norm_pix"] == norm_pix and said["model"]["norm_eps"] == 1e-12
    mine, pixels, masked = ours(found.params, found.model, images, noise, 1e-12, norm_pix)
    assert abs(mine - loss) < 1e-4
    np.testing.assert_allclose(pixels, np.take_along_axis(logits, masked[:, :, None], 1), atol=1e-4)

    settings = {**found.model, **said["model"], "norm_pix": norm_pix, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    (tmp_path / "ours").mkdir()
    hf_vitmae.write_vitmae(found.params, settings, tmp_path / "ours")
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    again_loss, again_logits = theirs(again.eval(), images, noise)
    assert abs(again_loss - loss) < 1e-5
    np.testing.assert_allclose(again_logits, logits, atol=1e-5)
    for name in ("layer_norm_eps", "norm_pix_loss", "mask_ratio", "qkv_bias", "intermediate_size", "decoder_intermediate_size"):
        assert getattr(again.config, name) == getattr(model.config, name), name
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "ours")
    assert tuple(processor.image_mean) == (0.5, 0.4, 0.3) and processor.size["height"] == SIDE


def test_the_written_names_are_those_of_the_released_files(transformers, tmp_path):
    found = mae_to_params(hf_vitmae.to_mae({name: value.numpy() for name, value in made(transformers).state_dict().items()}), 2, 4)
    settings = {**found.model, "norm_eps": 1e-6, "mask_ratio": 0.75, "norm_pix": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    hf_vitmae.write_vitmae(found.params, settings, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    for name in (
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight",
        "vit.encoder.layer.1.attention.attention.query.weight", "vit.encoder.layer.0.attention.output.dense.bias",
        "vit.encoder.layer.0.intermediate.dense.weight", "vit.encoder.layer.0.output.dense.weight", "vit.encoder.layer.0.layernorm_before.bias",
        "vit.layernorm.weight", "decoder.mask_token", "decoder.decoder_pos_embed", "decoder.decoder_layers.1.attention.attention.value.bias",
        "decoder.decoder_layers.0.layernorm_after.weight", "decoder.decoder_norm.weight", "decoder.decoder_pred.bias", "decoder.decoder_embed.weight",
    ):  # fmt: skip
        assert name in names
    back = hf_vitmae.to_mae(names)
    assert hf_vitmae.from_mae(back).keys() == names.keys()
    assert all(np.array_equal(value, names[name]) for name, value in hf_vitmae.from_mae(back).items())


def test_an_encoder_alone_is_a_vitmaemodel(transformers, tmp_path):
    model = made(transformers)
    images, noise = batch()
    found = mae_to_params(hf_vitmae.to_mae({name: value.numpy() for name, value in model.state_dict().items()}), 2, 4)
    settings = {**found.model, "norm_eps": 1e-12, "mask_ratio": 0.75, "norm_pix": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    hf_vitmae.write_vitmae({"encoder": found.params["encoder"]}, settings, tmp_path)
    loaded, info = transformers.ViTMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.architectures == ["ViTMAEModel"]
    import torch

    with torch.no_grad():
        inputs = torch.tensor(images).permute(0, 3, 1, 2)
        expected = model.vit(inputs, noise=torch.tensor(noise)).last_hidden_state
        np.testing.assert_allclose(loaded.eval()(inputs, noise=torch.tensor(noise)).last_hidden_state, expected, atol=1e-5)
        # For features no patch is masked; their mean does not mind that they are shuffled.
        whole = transformers.ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0).eval()(inputs).last_hidden_state
    assert whole.shape[1] == N + 1
    network = MAE(32, 2, 2, 16, 2, 4, patch=PATCH, form=Form(norm_eps=1e-12, hidden=96))
    _, out = jax.jit(lambda params, images: network.apply({"params": params}, images, method="encode"))(found.params, jnp.asarray(images))
    np.testing.assert_allclose(out["cls"], whole[:, 0], atol=1e-5)
    np.testing.assert_allclose(out["mean"], whole[:, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reg_token": np.zeros((1, 4, 8))}, "no register tokens"), ({"norm": None}, "no encoder without a final norm"),
        ({"ls1": {"scale": np.ones(8)}}, "no layer scale"),
        ({"mlp": {"fc1": {"kernel": np.zeros((8, 64))}, "fc2": {"kernel": np.zeros((32, 8))}}}, "gated MLP"),
    ],
)  # fmt: skip
def test_what_a_vitmae_has_not_is_named(change, message, tmp_path):
    mlp = {"fc1": {"kernel": np.zeros((8, 32))}, "fc2": {"kernel": np.zeros((32, 8))}}
    encoder = {"norm": {}, "blocks": {"0": {"mlp": mlp, **{name: change[name] for name in ("ls1", "mlp") if name in change}}}}
    encoder |= {name: value for name, value in change.items() if name not in ("ls1", "mlp")}
    encoder = {name: value for name, value in encoder.items() if value is not None}
    with pytest.raises(ConfigError, match=message + ".*--format timm"):
        hf_vitmae.write_vitmae({"encoder": encoder}, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_incomplete_set_of_queries_keys_and_values_is_no_projection():
    tensors = {f"vit.encoder.layer.0.attention.attention.{name}.weight": np.zeros((4, 4)) for name in ("query", "key")}
    assert hf_vitmae.to_mae(tensors) == {}
    assert hf_vitmae.to_mae({"something.else": 1}) == {"something.else": 1}
