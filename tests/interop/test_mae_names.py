"""facebookresearch's masked autoencoders, held against a network of timm's blocks under their names: same loss, same pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.interop.mae_names import is_mae, mae_to_params, params_to_mae
from wavepath.models.layers import Form
from wavepath.models.mae import MAE
from wavepath.ops.patches import Masking, gather_patches, patchify
from wavepath.ops.posembed import sincos_2d

D, E, SIDE, PATCH, GRID = 32, 16, 24, 8, 3


def reference(timm, torch):
    """The published autoencoder from timm's parts: encoder on the visible, unshuffled decoder, pixels in the order (y, x, channel)."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Block

    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            make = torch.nn.Parameter
            norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
            self.patch_embed = PatchEmbed(SIDE, PATCH, 3, D)
            self.cls_token, self.mask_token = make(torch.randn(1, 1, D)), make(torch.randn(1, 1, E))
            for name, width in (("pos_embed", D), ("decoder_pos_embed", E)):
                table = np.concatenate([np.zeros((1, width), np.float32), sincos_2d(width, GRID, GRID)])
                self.register_parameter(name, make(torch.tensor(table)[None], requires_grad=False))
            self.blocks = torch.nn.ModuleList(Block(D, 2, 4, qkv_bias=True, norm_layer=norm) for _ in range(2))
            self.norm, self.decoder_norm = norm(D), norm(E)
            self.decoder_embed, self.decoder_pred = torch.nn.Linear(D, E), torch.nn.Linear(E, PATCH * PATCH * 3)
            self.decoder_blocks = torch.nn.ModuleList(Block(E, 2, 4, qkv_bias=True, norm_layer=norm) for _ in range(1))

        def forward(self, images, order, keep):
            x = self.patch_embed(images) + self.pos_embed[:, 1:]
            gather = lambda x, ids: torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))  # noqa: E731
            x = gather(x, order[:, :keep])
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
            for block in self.blocks:
                x = block(x)
            x = self.decoder_embed(self.norm(x))
            hidden = self.mask_token.expand(len(x), order.shape[1] - keep, -1)
            rest = gather(torch.cat([x[:, 1:], hidden], 1), order.argsort(1))
            x = torch.cat([x[:, :1], rest], 1) + self.decoder_pos_embed
            for block in self.decoder_blocks:
                x = block(x)
            pixels = self.decoder_pred(self.decoder_norm(x))[:, 1:]
            target = images.reshape(len(images), 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(len(images), GRID * GRID, -1)
            masked = gather(pixels - target, order[:, keep:])
            return (masked**2).mean(), gather(pixels, order[:, keep:])

    torch.manual_seed(0)
    model = Reference().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle: pip install torch")


@pytest.fixture(scope="module")
def model(timm, torch):
    return reference(timm, torch)


def tensors_of(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def run_ours(found, images, order, keep, **form):
    m = found.model
    network = MAE(
        m["width"], m["depth"], m["heads"], m["decoder_width"], m["decoder_depth"], m["decoder_heads"], patch=m["patch"],
        form=Form(positions=m["positions"], grid=m.get("position_grid", 0), qkv_bias=m["qkv_bias"], **form),
    )  # fmt: skip
    masking = Masking(order=jnp.asarray(order, jnp.int32), keep=keep)
    pixels, _ = jax.jit(network.apply)({"params": found.params}, jnp.asarray(images), masking)
    target = gather_patches(patchify(jnp.asarray(images), m["patch"]), masking.masked)
    return float(((pixels - target) ** 2).mean()), np.asarray(pixels)


def batch(seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(3, SIDE, SIDE, 3)).astype(np.float32), np.argsort(draw.random((3, GRID * GRID)), axis=1), 2


def test_loss_and_pixels_are_those_of_the_published_autoencoder(model, torch):
    images, order, keep = batch()
    with torch.no_grad():
        loss, pixels = model(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(order), keep)
    found = mae_to_params({f"module.{name}": value for name, value in tensors_of(model).items()}, heads=2, decoder_heads=2)
    assert found.model["positions"] == "sincos" and not found.left and not found.guessed
    ours, ours_pixels = run_ours(found, images, order, keep)
    assert abs(ours - float(loss)) < 1e-5 * float(loss)
    np.testing.assert_allclose(ours_pixels, pixels.numpy(), atol=1e-4)
    swapped, _ = run_ours(found, images.transpose(0, 2, 1, 3), order, keep)
    assert abs(swapped - float(loss)) > 1e-3  # so that the order of pixels is seen at all


def test_the_way_back_gives_the_same_tensors(model):
    tensors = tensors_of(model)
    back = params_to_mae(mae_to_params(tensors, 2, 2).params, GRID)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_allclose(back[name], value, atol=1e-6, err_msg=name)
    encoder = params_to_mae({"encoder": mae_to_params(tensors, 2, 2).params["encoder"]}, GRID)
    assert encoder.keys() == {name for name in tensors if "decoder" not in name and name != "mask_token"}


def test_another_table_of_positions_is_kept(model, torch):
    """That of the encoder becomes a learned one, the class token's row a part of the token; the outputs are those of the reference with it."""
    images, order, keep = batch(1)
    saved = model.pos_embed.data.clone()
    try:
        model.pos_embed.data += 0.3 * torch.randn_like(model.pos_embed)
        with torch.no_grad():
            loss, _ = model(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(order), keep)
        found = mae_to_params(tensors_of(model), 2, 2)
    finally:
        model.pos_embed.data = saved
    assert (found.model["positions"], found.model["position_grid"]) == ("learned", GRID)
    assert abs(run_ours(found, images, order, keep)[0] - float(loss)) < 1e-5 * float(loss)
    back = params_to_mae(found.params, GRID)["pos_embed"]
    np.testing.assert_allclose(back[:, 1:], found.params["encoder"]["pos_embed"])
    assert params_to_mae(found.params, 2 * GRID)["pos_embed"].shape == (1, 1 + 4 * GRID * GRID, D)


def test_half_precision_tables_are_still_the_fixed_ones(model):
    halves = {name: value.astype(np.float16) for name, value in tensors_of(model).items()}
    found = mae_to_params(halves, 2, 2)
    assert found.model["positions"] == "sincos" and found.params["encoder"]["cls_token"].dtype == np.float32


def test_sizes_that_the_tensors_do_not_show_are_said(model):
    tensors = tensors_of(model) | {"extra": np.ones(2)}
    found = mae_to_params(tensors)
    assert found.guessed == ["1 heads for a width of 32", "1 heads for a decoder width of 16"] and found.left == ["extra"]
    assert {name: found.model[name] for name in ("width", "depth", "patch", "image_size", "decoder_width", "decoder_depth", "mlp_hidden")} == {
        "width": D, "depth": 2, "patch": PATCH, "image_size": SIDE, "decoder_width": E, "decoder_depth": 1, "mlp_hidden": 0,
    }  # fmt: skip


def test_names_of_an_encoder_alone_are_no_autoencoder(model):
    names = tensors_of(model)
    assert is_mae(names) and is_mae(f"module.{name}" for name in names)
    assert not is_mae(name for name in names if "decoder" not in name and name != "mask_token")


def changed(tensors, name, value):
    return {key: held for key, held in (tensors | {name: value}).items() if held is not None}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.1.attn.qkv.weight", lambda x: None, "blocks.1.attn.qkv.weight is missing"),
        ("decoder_blocks.0.mlp.fc2.bias", lambda x: x[1:], r"decoder_blocks.0.mlp.fc2.bias is \(15,\) instead of \(16,\)"),
        ("norm.weight", lambda x: x * np.nan, "norm.weight is not finite"), ("decoder_pos_embed", lambda x: x * 0, "--encoder-only"),
        ("patch_embed.proj.weight", lambda x: None, "patch_embed.proj.weight of 4 axes"), ("mask_token", lambda x: None, "not those of a masked"),
        ("patch_embed.proj.weight", lambda x: x[:, :1], "takes 1 channels"), ("pos_embed", lambda x: x[:, :3], "pos_embed"),
        ("cls_token", lambda x: np.full(x.shape, "x"), "none of a masked autoencoder"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(model, name, change, message):
    tensors = tensors_of(model)
    with pytest.raises(DatasetError, match=message) as error:
        mae_to_params(changed(tensors, name, change(tensors[name])), 2, 2)
    assert "\n" not in str(error.value)


def test_heads_must_divide(model):
    with pytest.raises(DatasetError, match="3 and 2 heads do not divide the widths 32 and 16"):
        mae_to_params(tensors_of(model), heads=3, decoder_heads=2)
