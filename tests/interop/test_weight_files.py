"""Files and folders of weights: read whole, without running anything, or refused in one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from wavepath.errors import DatasetError
from wavepath.interop.torch_file import write_torch
from wavepath.interop.weight_files import preprocessing, read_arrays, read_weight_files, sha256

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)


def test_every_format_gives_the_same_arrays(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", a=A, b=B)
    write_torch(tmp_path / "x.pth", {"a": A, "b": B})
    for path in (tmp_path / "x.safetensors", tmp_path / "x.npz", tmp_path / "x.pth"):
        found = read_weight_files(path)
        assert found.files == (path,) and sorted(found.tensors) == ["a", "b"]
        np.testing.assert_array_equal(found.tensors["a"], A)


@pytest.mark.parametrize("stem, write", [("model.safetensors", save_file), ("pytorch_model.bin", lambda tree, path: write_torch(path, tree))])
def test_a_folder_with_an_index_is_read_whole_or_not_at_all(tmp_path, stem, write):
    name, kind = stem.split(".")
    parts = [f"{name}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    write({"a": A, "c": A}, tmp_path / parts[0])
    write({"b": B, "d": B}, tmp_path / parts[1])
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": parts[0], "c": parts[0], "b": parts[1], "d": parts[1]}}))
    found = read_weight_files(tmp_path)
    assert sorted(found.tensors) == ["a", "b", "c", "d"] and len(found.files) == 2
    (tmp_path / parts[1]).unlink()
    with pytest.raises(DatasetError, match=r"names files that are not there \(.*00002-of-00002"):
        read_weight_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(DatasetError, match="does not map arrays to files beside it"):
        read_weight_files(tmp_path)


def test_the_model_inside_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "x.pth"
    write_torch(path, {"model": {"a": A, "b": B}, "optimizer": {"state": {"a": B, "b": B}}, "epoch": 3, "args": {"norm_pix_loss": True, "lr": 0.1}})
    found = read_weight_files(path)
    np.testing.assert_array_equal(found.tensors["a"], A)
    assert found.arguments == {"norm_pix_loss": True, "lr": 0.1} and found.notes == ("read model of x.pth",)
    write_torch(path, {"student": {"a": B, "b": B}, "teacher": {"a": A, "b": B}, "model": {"a": B, "b": B}})
    found = read_weight_files(path)
    np.testing.assert_array_equal(found.tensors["a"], A)
    assert "has teacher, model: teacher is taken; --key names another" in found.notes[0]
    np.testing.assert_array_equal(read_weight_files(path, "student").tensors["a"], B)
    with pytest.raises(DatasetError, match="--key pupil is not in .*; it has student, teacher, model"):
        read_weight_files(path, "pupil")


def test_what_cannot_be_read_says_so(tmp_path):
    save_file({"a": A}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-5])
    np.savez(tmp_path / "objects.npz", a=np.array([{"run": "me"}], dtype=object))
    (tmp_path / "x.onnx").write_bytes(b"")
    write_torch(tmp_path / "one.pt", {"a": {"b": 3}})
    for name, words in (
        ("cut.safetensors", "cannot be read .*copy it again"), ("objects.npz", "holds Python objects, which can run code and were not read"),
        ("x.onnx", "neither .safetensors nor .npz"), ("absent.npz", "does not exist"), ("", "several files of weights: cut.safetensors, objects.npz"),
        ("one.pt", "no dictionary of arrays|holds no array"),
    ):
        with pytest.raises(DatasetError, match=words):
            read_weight_files(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no file of weights"):
        read_weight_files(tmp_path / "empty")
    with pytest.raises(DatasetError, match="neither"):
        read_arrays(tmp_path / "one.pt")


def test_an_npz_packed_as_no_weights_can_be_is_refused(monkeypatch, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1 << 18, np.float32))
    assert read_arrays(tmp_path / "a.npz")["a"].shape == (1 << 18,)  # small enough
    monkeypatch.setattr("wavepath.interop.weight_files._MOST_UNPACKED", 1 << 10)
    with pytest.raises(DatasetError, match="1 MiB packed as no weights can be"):
        read_arrays(tmp_path / "a.npz")


def test_a_config_nested_without_end_is_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="is not valid JSON"):
        read_weight_files(tmp_path)


def test_a_config_that_is_not_of_timm_or_transformers_says_nothing(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"task": "mae", "image_size": 7}))
    assert read_weight_files(tmp_path).config == {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 7}))
    assert read_weight_files(tmp_path / "model.safetensors").config["image_size"] == 7
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DatasetError, match="config.json is not valid JSON"):
        read_weight_files(tmp_path)


@pytest.mark.parametrize("config, preprocessor, want", [
    ({"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "input_size": [3, 96, 96]}}, {},
     dict(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), image_size=96)),
    ({"architecture": "vit", "mean": [0.1, 0.2, 0.3], "input_size": [3, 64, 64]}, {}, dict(mean=(0.1, 0.2, 0.3), image_size=64)),
    ({"image_size": 518},
     {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
     dict(mean=(0, 0, 0), std=(1, 1, 1), image_size=224)),
    ({"image_size": 518}, {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": False}, dict(image_size=256)),
    ({"image_size": "large", "mean": [1, 2]}, {}, {}),
])  # fmt: skip
def test_what_the_files_say_of_images(config, preprocessor, want):
    assert preprocessing(config, preprocessor) == want


def test_checksum_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")
