"""`wavepath export`: every format by the command line, from small runs; what it writes is what `wavepath embed` would compute."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from wavepath.cli import main
from wavepath.config import load_config, save_json
from wavepath.errors import DatasetError
from wavepath.inference.export import FORMATS
from wavepath.inference.stablehlo import load_stablehlo
from wavepath.interop.weight_files import sha256
from wavepath.tasks.base import build
from wavepath.training import durations, parallel
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder

SIDE, PATCH = 16, 8


def saved(run, task="mae", step=3, **changes):
    """A run folder of untrained parameters, its averages others; returns its config, task and State."""
    name = "wise_mae:smoke" if task == "mae" else "finetune:smoke"
    config = load_config(name)
    config.task = task
    settings = dict(
        variant="custom", width=32, depth=2, heads=2, patch=PATCH, image_size=SIDE, decoder_width=16, decoder_depth=1, decoder_heads=2,
        dtype="float32",
    )  # fmt: skip
    with config.unlocked():
        for field, value in {**settings, **changes}.items():
            if field in config.model:
                config.model[field] = value
            else:
                config[field] = value
    config.prepare.tiles.size, config.batch_size, config.train.steps = SIDE, 4, 10
    if task == "finetune":
        config.finetune.classes = 3
    config = durations.resolve(config, 40)
    made, draw = build(config), np.random.default_rng(0)

    def drawn(leaf):
        # Every parameter away from where it starts, norms and biases too; numpy's, since a compiled draw for each shape takes seconds.
        return (draw.normal(size=leaf.shape) * 0.3).astype(leaf.dtype) if leaf.dtype.kind == "f" else np.zeros(leaf.shape, leaf.dtype)

    state = jax.tree.map(drawn, jax.eval_shape(made.init, jax.random.key(0))).replace(step=np.asarray(step, np.int32))
    RunFolder(run).write_configs(config, config, {"examples": 0, "image_shape": [], "places": []})
    checkpoints = Checkpointer(run)
    checkpoints.save(step, parallel.Parallel("jit", jax.local_devices()[:1]).place(state), {"version": {}})
    checkpoints.close()
    return config, made, state


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    run = tmp_path_factory.mktemp("mae") / "run"
    return run, *saved(run, ema=0.9, scan=True)


def pictures(count=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def export(run, kind, out, *flags):
    return main(["export", str(run), "--format", kind, "--out", str(out), *flags])


def expected(task, state, images):
    return jax.jit(lambda *given: task.predict(*given, ("cls", "mean")))(state, {"image": jnp.asarray(images)})


@pytest.fixture(scope="module")
def exported(mae, tmp_path_factory):
    """The folder of the program."""
    out = tmp_path_factory.mktemp("exported") / "program"
    assert export(mae[0], "stablehlo", out) == 0
    return out


def test_the_program_gives_the_features_of_embed_in_a_fresh_process(mae, exported, tmp_path):
    """At two sizes of batch, reloaded by JAX alone, and the averaged parameters at that."""
    _, _, task, state = mae
    out = exported
    program = load_stablehlo(out)
    for count in (1, 5):
        wanted, here = expected(task, state, pictures(count)), program(pictures(count))
        np.save(tmp_path / f"{count}.npy", pictures(count))
        for name in ("cls", "mean"):
            np.testing.assert_allclose(here[name], wanted[name], atol=1e-5)
            np.save(tmp_path / f"{name}_{count}.npy", here[name])
    trained = expected(task, state.replace(ema={}), pictures(5))["cls"]
    assert np.abs(trained - here["cls"]).max() > 1e-2  # so that averages and parameters are told apart
    script = """
import sys, numpy as np, jax
from jax import export
from safetensors.numpy import load_file
exported = export.deserialize(open("program/encoder.stablehlo", "rb").read())
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}, exported.platforms
call, weights = jax.jit(exported.call), load_file("program/weights.safetensors")
for count in (1, 5):
    found = call(weights, np.load(f"{sys.argv[1]}/{count}.npy"))
    for name in ("cls", "mean"):
        np.testing.assert_allclose(found[name], np.load(f"{sys.argv[1]}/{name}_{count}.npy"), atol=1e-6)
assert "wavepath" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {name.split("/")[0] for name in load_file(out / "weights.safetensors")}
    assert names == {"encoder"}  # no decoder


def test_a_program_says_what_it_cannot_take(exported, tmp_path):
    program = load_stablehlo(exported / "encoder.stablehlo")
    assert program.about["outputs"]["cls"]["shape"] == ["b", 32] and program.side == SIDE
    for images in (pictures().astype(np.float32), pictures()[0], pictures()[:, :8], pictures()[:0]):
        with pytest.raises(DatasetError, match=f"takes uint8 images .b, {SIDE}, {SIDE}, 3., not"):
            program(images)
    with pytest.raises(DatasetError, match="has no encoder.stablehlo, .* export CKPT --format stablehlo"):
        load_stablehlo(tmp_path)
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    (damaged / "encoder.stablehlo").write_bytes(b"\0" * 64)
    with pytest.raises(DatasetError, match="cannot be loaded .* export it again"):
        load_stablehlo(damaged)


def test_plain_arrays_are_every_parameter_by_its_path(mae, tmp_path):
    run, _, task, state = mae
    assert export(run, "npz", tmp_path / "all", "--step", "3") == 0
    with np.load(tmp_path / "all" / "weights.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert "encoder/blocks/1/attn/qkv/kernel" in arrays and "decoder_pred/kernel" in arrays
    scanned = state.ema["mae"]["encoder"]["blocks"]["scanned"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(arrays["encoder/blocks/1/attn/qkv/kernel"], scanned[1])
    params = traverse_util.unflatten_dict(arrays, sep="/")
    assert set(params) == set(state.ema["mae"]) and params["encoder"]["cls_token"].shape == (1, 1, 32)
    assert export(run, "npz", tmp_path / "encoder", "--encoder-only") == 0
    with np.load(tmp_path / "encoder" / "weights.npz", allow_pickle=False) as file:
        assert {name.split("/")[0] for name in file.files} == {"encoder"}
    first = sha256(tmp_path / "all" / "weights.npz")
    assert export(run, "npz", tmp_path / "again") == 0 and sha256(tmp_path / "again" / "weights.npz") == first


@pytest.mark.slow
def test_transformers_loads_the_folder_and_gives_the_same(mae, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle: pip install torch")
    transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")
    run, config, task, state = mae
    assert export(run, "hf-vitmae", tmp_path / "hf") == 0
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()) and model.config.norm_pix_loss == config.loss.norm_pix and model.config.layer_norm_eps == 1e-6
    alone = transformers.ViTMAEModel.from_pretrained(tmp_path / "hf", mask_ratio=0.0).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "hf")
    images = pictures()
    inputs = processor(list(images), return_tensors="pt")
    with torch.no_grad():
        tokens = alone(**inputs).last_hidden_state.numpy()
    wanted = expected(task, state, images)
    np.testing.assert_allclose(tokens[:, 0], wanted["cls"], atol=1e-4)
    np.testing.assert_allclose(tokens[:, 1:].mean(1), wanted["mean"], atol=1e-4)
    assert export(run, "hf-vitmae", tmp_path / "alone", "--encoder-only") == 0
    _, info = transformers.ViTMAEModel.from_pretrained(tmp_path / "alone", output_loading_info=True)
    assert not any(info.values())


def test_what_is_beside_the_weights_says_what_they_are(mae, tmp_path):
    run, *_ = mae
    assert export(run, "timm", tmp_path / "out") == 0
    folder = tmp_path / "out"
    record, text = json.loads((folder / "export.json").read_text()), (folder / "README.md").read_text()
    assert record["step"] == 3 and record["task"] == "mae" and record["width"] == 32 and record["model"]["patch"] == PATCH
    assert record["sha256"] == {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}
    for wanted in ("timm.create_model", f"{SIDE} x {SIDE} px", record["sha256"]["model.safetensors"], "Trained for 3 steps", "0.485"):
        assert wanted in text
    assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_code_in_the_readme_compiles(kind, mae, exported, tmp_path):
    folder = exported if kind == "stablehlo" else tmp_path / "out"
    assert kind == "stablehlo" or export(mae[0], kind, folder) == 0
    compile((folder / "README.md").read_text().split("```python")[1].split("```")[0], "README", "exec")


@pytest.mark.slow
def test_a_fine_tuned_run_gives_its_own_features(tmp_path):
    _, task, state = saved(tmp_path / "run", "finetune")
    assert export(tmp_path / "run", "stablehlo", tmp_path / "out") == 0
    found, wanted = load_stablehlo(tmp_path / "out")(pictures()), expected(task, state, pictures())
    for name in ("cls", "mean"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)


def error(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told and "\n" not in told.strip().splitlines()[-1]
    return told.strip().splitlines()[-1]


def test_errors_name_the_fix_and_leave_nothing(mae, tmp_path, capsys):
    run, *_ = mae
    out = tmp_path / "out"
    assert "no run folder" in error(capsys, tmp_path, "--format", "npz", "--out", out)
    assert "has no step 7; it has 3" in error(capsys, run, "--format", "npz", "--out", out, "--step", "7")
    assert "--format" in error(capsys, run, "--format", "onnx", "--out", out)
    other = tmp_path / "other"
    other.mkdir()
    save_json(load_config("cwt_net:smoke"), other / "config.json")
    assert "a run of task 'superres', which has no encoder to export" in error(capsys, other, "--format", "timm", "--out", out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("kept")
    assert "exists already; give --out a new folder" in error(capsys, run, "--format", "npz", "--out", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_encoder_that_a_format_cannot_hold_is_refused_whole(tmp_path, capsys):
    saved(tmp_path / "run", register_tokens=2, layer_scale=0.1)
    told = error(capsys, tmp_path / "run", "--format", "hf-vitmae", "--out", tmp_path / "out")
    assert "no register tokens and no layer scale" in told and "--format timm" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
