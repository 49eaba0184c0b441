"""Torch's files without torch, held against torch itself: what it wrote is read alike, what we write it reads."""

import argparse
import collections
import hashlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wavepath.errors import DatasetError
from wavepath.interop.torch_file import read_torch, write_tensor, write_torch
from wavepath.interop.torch_pickle import Opaque

DTYPES = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle: pip install torch")


def array(tensor):
    """A torch tensor as the array that is expected for it."""
    import torch

    kinds = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    if tensor.dtype in kinds:
        return tensor.float().numpy().astype(kinds[tensor.dtype])
    return tensor.detach().numpy()


def same(found, expected):
    assert type(found) is np.ndarray and found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_a_checkpoint_of_torch_is_read_as_it_is(how, torch, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimiser.step()
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": x.t(), "strided": x[1:, ::2], "shared": x[0], "half": x.half(), "brain": x.bfloat16(), "truth": x > 3, "none": x[:0],
        "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(x), "expanded": torch.ones(1).expand(5), "complex": torch.ones(2) * 1j,
    }  # fmt: skip
    plain = {"epoch": 3, "big": 10**30, "text": "größe", "list": [1, (2.5, None, True)], "bytes": b"ab\xff", "set": {1, 2}, "empty": {}}
    args = argparse.Namespace(model="mae_vit_base", norm_pix_loss=True)
    path = tmp_path / "checkpoint.pth"
    beside = {"args": args, "best": np.float64(0.5), "numpy": np.ones(3), "counter": collections.Counter({3: 1})}
    saved = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), **beside}
    torch.save({**saved, **tensors, **plain}, path, **how)
    found = read_torch(path)
    for name, tensor in tensors.items():
        same(found[name], array(tensor))
    assert {name: found[name] for name in plain} == plain
    assert found["args"] == vars(args) and found["counter"] == {3: 1}
    assert isinstance(found["best"], Opaque) and isinstance(found["numpy"], Opaque)
    assert list(found["model"]) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        same(found["model"][name], array(tensor))
    same(found["optimizer"]["state"][0]["exp_avg"], array(optimiser.state_dict()["state"][0]["exp_avg"]))
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_views_share_what_torch_shared_and_cannot_be_written(torch, tmp_path):
    x = torch.arange(6.0)
    truth = x > 2
    torch.save([x, x[2:], x.float(), truth, truth[1:]], tmp_path / "a.pt")
    first, second, third, whole, part = read_torch(tmp_path / "a.pt")
    assert np.shares_memory(first, second) and first is third and np.shares_memory(whole, part)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_types_beside_the_old_storages_are_read(torch, tmp_path):
    tensors = [torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.uint16)]
    torch.save(tensors, tmp_path / "a.pt")
    assert [found.dtype for found in read_torch(tmp_path / "a.pt")] == [np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint16)]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(DTYPES).flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def plain(value, kind):
    """A nested value with its tensors or arrays replaced by (dtype, shape, bytes), for comparison."""
    if isinstance(value, dict):
        return {name: plain(item, kind) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item, kind) for item in value)
    if isinstance(value, kind):
        value = np.asarray(value)
        return ("tensor", value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes())
    return value


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)
@given(value=values)
def test_whatever_is_written_is_read_alike_by_torch_and_here(value, torch, tmp_path):
    path = tmp_path / "a.pt"
    write_torch(path, value)
    assert plain(read_torch(path), np.ndarray) == plain(value, np.ndarray)
    assert plain(torch.load(path, weights_only=True), torch.Tensor) == plain(value, np.ndarray)
    torch.save(torch.load(path), path)
    assert plain(read_torch(path), np.ndarray) == plain(value, np.ndarray)


def test_a_bag_of_features_is_what_clam_loads(torch, tmp_path):
    """CLAM: `torch.load(path)`, float32 [n, d]."""
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    write_tensor(tmp_path / "slide.pt", features)
    for options in ({}, {"weights_only": True}, {"mmap": True}, {"weights_only": False}):
        found = torch.load(tmp_path / "slide.pt", **options)
        assert found.dtype == torch.float32
        same(found.numpy(), features)
    same(read_torch(tmp_path / "slide.pt"), features)
    before = hashlib.sha256((tmp_path / "slide.pt").read_bytes()).hexdigest()
    write_tensor(tmp_path / "slide.pt", np.asfortranarray(features))
    assert hashlib.sha256((tmp_path / "slide.pt").read_bytes()).hexdigest() == before
    with zipfile.ZipFile(tmp_path / "slide.pt") as file:
        entry = file.getinfo("archive/data/0")
    data = (tmp_path / "slide.pt").read_bytes()
    place = entry.header_offset + 30 + sum(struct.unpack("<HH", data[entry.header_offset + 26 : entry.header_offset + 30]))
    assert place % 64 == 0 and data[place : place + 4] == features.tobytes()[:4]


def test_bfloat16_is_written_and_big_endian_is_turned_round(torch, tmp_path):
    write_torch(tmp_path / "a.pt", [np.array([1.5, -2], ml_dtypes.bfloat16), np.array([1, 2], ">i4")])
    brain, turned = torch.load(tmp_path / "a.pt", weights_only=True)
    assert brain.dtype == torch.bfloat16 and brain.tolist() == [1.5, -2] and turned.tolist() == [1, 2]


def test_a_file_of_a_big_endian_machine_is_read(tmp_path):
    write_torch(tmp_path / "a.pt", {"a": np.array([1.5, 2], np.float32).byteswap(), "b": np.array([True, False])})
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        for name, content in entries.items():
            file.writestr(name, b"big" if name.endswith("byteorder") else content)
    found = read_torch(tmp_path / "big.pt")
    assert found["a"].tolist() == [1.5, 2] and found["b"].tolist() == [True, False]


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, np.array(["x"]), np.array([None]), np.ones(2, np.longdouble)])
def test_what_torch_has_no_place_for_is_not_written(value, tmp_path):
    with pytest.raises(ValueError, match="no place|no storage"):
        write_torch(tmp_path / "a.pt", value)
    assert not list(tmp_path.iterdir())


def tensor(offset=0, shape=(2,), strides=(1,), count=4, key="0", kind="FloatStorage"):
    """The pickle of one tensor, with whatever numbers."""
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n" + kind.encode() + b"\nX\x01\0\0\0" + key.encode()
    numbers = [pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides, False, {})]
    return head + b"X\x03\0\0\0cpu" + pickle.dumps(count, 2)[2:-1] + b"tQ" + b"".join(numbers) + b"tR."


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"offset": 3}, "reaches to value 4 of a storage of 4"), ({"shape": (5,)}, "reaches to value"), ({"strides": (4,)}, "reaches to value"),
        ({"shape": (2, 2), "strides": (2, 2), "offset": 1}, "reaches to value"), ({"offset": -1}, "no list of whole numbers"),
        ({"strides": (-1,)}, "no list of whole numbers"), ({"shape": (2, 2)}, "differ in number"), ({"shape": (2.0,)}, "no list of whole numbers"),
        ({"shape": (1 << 40,), "strides": (0,)}, "values where 4 are stored"), ({"shape": (1 << 62, 1 << 62), "strides": (0, 0)}, "are stored"),
        ({"count": 5}, "has another size"), ({"count": -1}, "refers to something outside"), ({"key": "7"}, "is not there"),
        ({"kind": "DoubleStorage"}, "has another size"), ({"shape": (1,) * 40, "strides": (1,) * 40}, "no list of whole numbers"),
        ({"shape": (True,)}, "no list of whole numbers"), ({"kind": "UntypedStorage"}, "names torch.UntypedStorage"),
    ],
)  # fmt: skip
def test_sizes_are_held_against_the_bytes_that_are_there(numbers, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data.pkl", tensor(**numbers))
        file.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(DatasetError) as error:
        read_torch(tmp_path / "a.pt")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_sound_tensor_of_that_test_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data.pkl", tensor(offset=1, shape=(2,), strides=(2,)))
        file.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    assert read_torch(tmp_path / "a.pt").tolist() == [1, 3]


def test_files_cut_short_or_changed_are_damaged(torch, tmp_path):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pt")
    torch.save({"a": torch.arange(100.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
        with pytest.raises(DatasetError, match="damaged .*copy it again"):
            read_torch(tmp_path / "cut.pt")
    changed = bytearray((tmp_path / "a.pt").read_bytes())
    place = changed.index(struct.pack("<f", 42.0))
    changed[place] ^= 1
    (tmp_path / "flipped.pt").write_bytes(bytes(changed))
    with pytest.raises(DatasetError, match="damaged .*CRC"):
        read_torch(tmp_path / "flipped.pt")


@pytest.mark.parametrize(("content", "message"), [(b"hello", "not a file of torch"), (b"", "not a file of torch"), (b"PK\x05\x06", "not a file")])
def test_other_files_are_told_apart(content, message, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_torch(tmp_path / "a.pt")
    with pytest.raises(DatasetError, match="does not exist"):
        read_torch(tmp_path / "b.pt")
