"""Weights of others as a run folder: what is written, what later commands find there, and that nothing half is left."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from wavepath import cli
from wavepath.errors import CheckpointError, ConfigError, DatasetError, WavepathError
from wavepath.interop.mae_names import params_to_mae
from wavepath.interop.torch_file import write_torch
from wavepath.interop.vit_names import params_to_vit
from wavepath.models.layers import Form
from wavepath.models.mae import MAE
from wavepath.models.vit import VARIANTS, Variant, ViT
from wavepath.ops.patches import Masking
from wavepath.training.checkpoint import restore_run
from wavepath.training.import_run import import_weights

FORM = Form(layer_scale=0.5, registers=2, positions="learned", grid=4)
TILES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)


def filled(module, *args, seed=1):
    """Random parameters of the right shapes, without compiling the network's own start."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def vit():
    """A ViT, its parameters, and the arrays of a timm file of it."""
    model = ViT(16, 2, 2, 4, form=FORM)
    params = filled(model, np.zeros((1, 16, 16, 3), np.float32))
    return model, params, {**params_to_vit(params), "pos_embed": np.asarray(params["pos_embed"]), "head.weight": np.zeros((2, 16), np.float32)}


@pytest.fixture
def folder(vit, tmp_path):
    (tmp_path / "vit").mkdir()
    save_file(vit[2], tmp_path / "vit" / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 2, "no_embed_class": True},
        "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 16, 16]},
    }  # fmt: skip
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    return tmp_path / "vit"


def test_the_command_writes_a_run_that_gives_the_same_features(vit, folder, tmp_path, capsys):
    model, params, _ = vit
    run = tmp_path / "runs" / "run"
    assert cli.main(["import", str(folder), "--out", str(run), "--mpp", "0.5"]) == 0
    said = capsys.readouterr()
    assert "left out: head.weight" in said.err + said.out and "--config.model.register_tokens=2" in said.err + said.out
    config, task, state = restore_run(run)
    assert config.task == "encoder" and config.prepare.tiles.mpp == 0.5 and config.prepare.tiles.size == 16 and task.embeds
    assert config.model.variant == "custom" and config.model.mean == MEAN
    got = jax.jit(task.predict)(state, {"image": TILES})
    x = (TILES.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    _, want = jax.jit(model.apply)({"params": params}, x)
    for name in ("cls", "mean"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    origin = json.loads((run / "import.json").read_text())
    weights = folder / "model.safetensors"
    assert origin["files"] == [
        {"name": weights.name, "bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    ] and origin["left_out"] == ["head.weight"]  # fmt: skip
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert cli.main(["import", str(folder), "--out", str(run)]) == 1
    assert "exists and is not empty; give a new folder with --out" in capsys.readouterr().err


def test_a_named_size_gets_its_name(monkeypatch, folder, tmp_path):
    monkeypatch.setitem(VARIANTS, "tiny", Variant(16, 2, 2))
    config = import_weights(folder, tmp_path / "run", image_size=24, mean=(0.1, 0.2, 0.3)).config
    assert (config.model.variant, config.model.width, config.model.image_size) == ("tiny", 0, 24)
    assert config.model.mean == (0.1, 0.2, 0.3) and config.model.std == STD and config.model.position_grid == 4


def test_what_no_file_says_is_assumed_and_said(vit, tmp_path):
    write_torch(tmp_path / "x.pth", {"state_dict": {f"module.{name}": value for name, value in vit[2].items()}})
    result = import_weights(tmp_path / "x.pth", tmp_path / "run", heads=2)
    assert result.config.model.image_size == 16 and result.left_out == ("module.head.weight",)
    assert any("ImageNet assumed" in note for note in result.notes) and any("read state_dict" in note for note in result.notes)


@pytest.mark.parametrize("settings, kind, words", [
    (dict(image_size=18), ConfigError, "--image-size 18 is not a multiple of the encoder's patch of 4 px"),
    (dict(heads=3), DatasetError, "3 heads do not divide a width of 16"),
    (dict(mean=(1, 2)), ConfigError, "--mean takes three numbers"),
    (dict(std=(1, 0, 1)), ConfigError, "--std takes three numbers"),
    (dict(std=(1, float("nan"), 1)), ConfigError, "--std takes three numbers"),
    (dict(prefix="encoder"), DatasetError, "--prefix encoder. has no encoder"),
])  # fmt: skip
def test_what_does_not_fit_leaves_nothing_behind(folder, tmp_path, settings, kind, words):
    with pytest.raises(kind, match=words):
        import_weights(folder, tmp_path / "run", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_a_file_or_a_full_folder_is_not_written_over(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for name in ("file", "full"):
        with pytest.raises(WavepathError, match="exists and is not empty"):
            import_weights(folder, tmp_path / name)
    (tmp_path / "empty").mkdir()
    import_weights(folder, tmp_path / "empty")
    restore_run(tmp_path / "empty")


def test_an_autoencoder_becomes_a_run_of_its_task_or_an_encoder_alone(tmp_path):
    model = MAE(16, 2, 2, 32, 1, 1, patch=4)
    masking = Masking(order=np.arange(16, dtype=np.int32)[None], keep=4)
    params = filled(model, np.zeros((1, 16, 16, 3), np.float32), masking)
    tensors = params_to_mae(params, 4)
    write_torch(tmp_path / "mae.pth", {"model": tensors, "args": {"norm_pix_loss": False}})
    result = import_weights(tmp_path / "mae.pth", tmp_path / "run", heads=2, decoder_heads=1)
    config, task, state = restore_run(tmp_path / "run")
    assert config.task == "mae" and config.model.decoder_width == 32 and config.loss.norm_pix is False and not result.left_out
    for one, other in zip(jax.tree.leaves(state.params["mae"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    result = import_weights(tmp_path / "mae.pth", tmp_path / "encoder", heads=2, encoder_only=True)
    config, _, state = restore_run(tmp_path / "encoder")
    assert config.task == "encoder" and config.model.positions == "sincos" and "decoder_pred.bias" in result.left_out
    np.testing.assert_array_equal(state.params["encoder"]["encoder"]["norm"]["scale"], params["encoder"]["norm"]["scale"])


def test_a_damaged_checkpoint_of_an_import_is_noticed(folder, tmp_path):
    import_weights(folder, tmp_path / "run")
    sizes = json.loads((tmp_path / "run" / "checkpoints.json").read_text())["0"]
    largest = tmp_path / "run" / "checkpoints" / "0" / max(sizes, key=sizes.get)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        restore_run(tmp_path / "run")
