"""Files of LPIPS weights: recognised, or refused in one line that names what is wrong."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from wavepath.errors import DatasetError
from wavepath.evaluation.lpips import read_lpips
from wavepath.models.lpips import parameters


def arrays(network="alex"):
    rng = np.random.default_rng(0)
    return {name: np.abs(0.05 * rng.normal(size=shape)).astype(np.float32) for name, shape in parameters(network).items()}


def test_both_formats_give_one_distance(tmp_path):
    weights = {**arrays(), "classifier.1.weight": np.zeros((2, 2), np.float32)}  # the rest of a checkpoint is left alone
    save_file(weights, tmp_path / "alex.safetensors")
    np.savez(tmp_path / "alex.npz", **weights)
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(2))
    (one,), (other,) = (read_lpips([tmp_path / f"alex.{kind}"]) for kind in ("safetensors", "npz"))
    assert one.name == "lpips_alex" and one(a, b) == other(a, b) > 1e-3 and one(a, a) < 1e-9
    with pytest.raises(DatasetError, match="needs images of 63 px, not 64 x 40"):
        one(a[:40], b[:40])
    with pytest.raises(DatasetError, match="second set"):
        read_lpips([tmp_path / "alex.npz", tmp_path / "alex.safetensors"])


def test_what_does_not_fit_is_named(tmp_path):
    weights = arrays()
    del weights["lin3.model.1.weight"]
    weights["features.6.bias"] = np.zeros(7, np.float32)
    np.savez(tmp_path / "a.npz", **weights)
    with pytest.raises(DatasetError, match=r"lin3.model.1.weight is missing; features.6.bias is \(7,\) instead of \(384,\)"):
        read_lpips([tmp_path / "a.npz"])
    np.savez(tmp_path / "b.npz", conv1=np.zeros(3))
    (tmp_path / "c.npz").write_bytes(b"PK\3\4 cut")
    (tmp_path / "d.pth").write_bytes(b"")
    for name, words in (("b.npz", "no features.0.weight"), ("c.npz", "cannot be read"), ("d.pth", "neither"), ("e.npz", "does not exist")):
        with pytest.raises(DatasetError, match=words):
            read_lpips([tmp_path / name])
