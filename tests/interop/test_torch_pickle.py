"""A torch file whose pickle does anything but describe tensors is refused, and nothing of it runs: a canary tells."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.evaluation.weights import read_weights
from wavepath.interop.torch_file import read_torch, write_torch
from wavepath.interop.torch_pickle import NAMES, Refused, interpret
from wavepath.interop.weight_files import read_weight_files


class Evil:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def text(value) -> bytes:
    return b"X" + struct.pack("<I", len(str(value).encode())) + str(value).encode()


def archive(path, data, entries=(), compression=zipfile.ZIP_STORED, folder="archive"):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{folder}/data.pkl", data)
        for name, content in dict(entries).items():
            file.writestr(name, content)
        file.writestr(f"{folder}/version", b"3\n")
    return path


def evil(canary) -> dict[str, tuple[bytes, str]]:
    """Pickles that make the canary (or would, with the right class at hand), and what the error says of each."""
    c, tensor = text(canary), b"ctorch._utils\n_rebuild_tensor_v2\n"
    return {
        "reduce": (pickle.dumps({"model": Evil(canary)}, 2), "names posix.mkdir"),
        "stack_global": (pickle.dumps([Evil(canary)], 4), "names posix.mkdir"),
        "eval": (b"\x80\x02cbuiltins\neval\n(" + text(f"__import__('os').mkdir({str(canary)!r})") + b"tR.", "names builtins.eval"),
        "exec": (b"\x80\x02c__builtin__\nexec\n(" + text("1") + b"tR.", "names __builtin__.exec"),
        "inst": (b"(" + c + b"ios\nmkdir\n.", "the pickle opcode INST"),
        "obj": (b"(cos\nmkdir\n" + c + b"o.", "names os.mkdir"),
        "newobj": (b"\x80\x02cpathlib\nPath\n(" + c + b"t\x81.", "names pathlib.Path"),
        "newobj_of_a_known_name": (b"\x80\x02" + tensor + b")\x81.", "makes an object of torch._utils._rebuild_tensor_v2"),
        "newobj_ex": (b"\x80\x04" + tensor + b")}\x92.", "the pickle opcode NEWOBJ_EX"),
        "build": (b"\x80\x02]}b.", "sets the state of a value of type list"),
        "build_of_slots": (b"\x80\x02cargparse\nNamespace\n)\x81N}" + text("__class__") + c + b"s\x86b.", "sets the state of"),
        "setstate": (b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}" + text("x") + c + b"sb.", "names torch.nn.modules.module.Module"),
        "ext1": (b"\x80\x02\x82\x01.", "the pickle opcode EXT1"),
        "ext4": (b"\x80\x02\x84\x01\x00\x00\x00.", "the pickle opcode EXT4"),
        "persid": (b"Pposix\n.", "the pickle opcode PERSID"),
        "persistent_module": (b"\x80\x02(" + text("module") + c + c + b"tQ.", "refers to something outside"),
        "persistent_class": (b"\x80\x02(" + text("storage") + tensor + c + text("cpu") + b"K\x01tQ.", "refers to something outside"),
        "attribute_of_a_known_name": (
            b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.", "names torch._utils._rebuild_tensor_v2.__glo"
        ),
        "getattr": (b"\x80\x02cbuiltins\ngetattr\n(cos\n" + text("mkdir") + b"tR.", "names builtins.getattr"),
        "call_of_a_text": (b"\x80\x02" + text("os.mkdir") + b"(" + c + b"tR.", "calls a value of type str"),
        "call_of_a_storage": (b"\x80\x02ctorch\nFloatStorage\n(" + c + b"tR.", "calls torch.FloatStorage"),
        "torch_load": (b"\x80\x02ctorch\nload\n(" + c + b"tR.", "names torch.load"),
        "import": (b"\x80\x02cimportlib\nimport_module\n(" + text("antigravity") + b"tR.", "names importlib.import_module"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", sorted(evil("x")))
@pytest.mark.parametrize("wrapped", ["whole", "legacy"])
def test_what_is_not_a_tensor_is_refused_and_does_not_run(kind, wrapped, tmp_path):
    canary = tmp_path / "canary"
    data, message = evil(canary)[kind]
    path = tmp_path / "model.pth"
    if wrapped == "whole":
        archive(path, data)
    else:
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + data + pickle.dumps([], 2))
    with pytest.raises(DatasetError) as error:
        read_torch(path)
    assert message in str(error.value) and "nothing of it was run" in str(error.value) and "state_dict" in str(error.value)
    assert "\n" not in str(error.value) and not canary.exists()


def test_the_canary_can_sing(tmp_path):
    """What is refused above is no blank: Python's own reader runs it."""
    for kind in ("reduce", "stack_global", "eval", "inst", "obj"):
        canary = tmp_path / kind
        pickle.loads(evil(canary)[kind][0])
        assert canary.exists()


@pytest.mark.parametrize("read", [read_torch, read_weight_files])
def test_a_good_file_with_one_bad_value_is_refused_as_a_whole(read, tmp_path):
    canary = tmp_path / "canary"
    torch = pytest.importorskip("torch", reason="the oracle: pip install torch")
    torch.save({"model": {"weight": torch.ones(2)}, "hook": Evil(canary)}, tmp_path / "model.pth")
    with pytest.raises(DatasetError, match="names posix.mkdir"):
        read(tmp_path / "model.pth")
    assert not canary.exists()


@pytest.mark.parametrize("read", [lambda path: read_weights(path, ""), read_weight_files])
def test_objects_in_an_npz_are_refused_and_do_not_run(read, tmp_path):
    canary = tmp_path / "canary"
    np.savez(tmp_path / "weights.npz", good=np.ones(3), bad=np.array([Evil(canary)], dtype=object))
    with pytest.raises(DatasetError, match="can run code and were not read"):
        read(tmp_path / "weights.npz")
    assert not canary.exists()
    np.load(tmp_path / "weights.npz", allow_pickle=True)["bad"]
    assert canary.exists()


GOOD = pickle.dumps({"a": 1}, 2)


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ({"archive/../../evil": b"x"}, {}, "has an entry archive/../../evil"), ({"/etc/evil": b"x"}, {}, "has an entry /etc/evil"),
        ({"archive\\..\\evil": b"x"}, {}, "has an entry"), ({"evil": b"x"}, {}, "has an entry evil"),
        ({"other/data.pkl": b"x"}, {}, "has an entry other/data.pkl"), ({"other/x": b"x"}, {}, "several folders"),
        ({"archive/code/model.py": b"x"}, {}, "TorchScript"), ({}, {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    ],
)  # fmt: skip
def test_archives_that_torch_does_not_write_are_refused(entries, options, message, tmp_path):
    archive(tmp_path / "a.pt", GOOD, entries, **options)
    with pytest.raises(DatasetError) as error:
        read_torch(tmp_path / "a.pt")
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert read_torch(archive(tmp_path / "good.pt", GOOD)) == {"a": 1}


def test_a_bomb_of_overlapping_entries_is_refused(tmp_path):
    """Entries that name the same bytes many times over."""
    write_torch(tmp_path / "a.pt", {"a": np.zeros(1 << 14, np.float32)})
    data = bytearray((tmp_path / "a.pt").read_bytes())
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    central, first = data[start:end], data.index(b"archive/data/0", start) - 46
    entry = data[first : data.index(b"PK", first + 4)]
    copies = b"".join(bytes(entry).replace(b"archive/data/0", b"archive/data/%d" % number) for number in range(1, 10))
    tail = bytearray(data[end:])
    for place, kind, value in ((8, "<H", 13), (10, "<H", 13), (12, "<I", len(central) + len(copies))):
        tail[place : place + struct.calcsize(kind)] = struct.pack(kind, value)
    (tmp_path / "bomb.pt").write_bytes(bytes(data[:end]) + copies + bytes(tail))
    with pytest.raises(DatasetError, match="overlap|damaged"):
        read_torch(tmp_path / "bomb.pt")


def loop() -> bytes:
    value = []
    value.append(value)
    return pickle.dumps(value, 2)


def deep(levels) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (loop(), "contains itself"), (deep(70), "more than 64 levels deep"), (deep(100_000), "more than 64 levels deep"),
        (b"\x80\x02}(" + b"K\x01K\x02\x86" + b"K\x03u.", "as the key of a dictionary"), (b"\x80\x02.", "damaged"), (b"\x80\x02K\x01", "damaged"),
        (b"\x80\x02h\x07.", "damaged"), (b"\x80\x02K\x01K\x02s.", "damaged"), (b"\x80\x02}K\x01ta.", "damaged"), (b"", "damaged"),
        (b"\x80\x02}(K\x01u.", "damaged"), (b"\x80\x02K\x01K\x02a.", "uses a value of type int as a list"), (b"\xff", "damaged"),
    ],
)  # fmt: skip
def test_damaged_and_malformed_pickles_are_one_line(data, message, tmp_path):
    archive(tmp_path / "a.pt", data)
    with pytest.raises(DatasetError) as error:
        read_torch(tmp_path / "a.pt")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_shared_values_do_not_multiply(tmp_path):
    """Forty levels of a pair of the level below: a million million leaves, were each copied."""
    data = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (level, level - 1, level - 1) for level in range(1, 41)) + b"."
    archive(tmp_path / "a.pt", data)
    value = read_torch(archive(tmp_path / "a.pt", data))
    assert value[0] is value[1] and value[0][0] is value[1][1]


def test_a_large_value_is_not_copied_again_and_again(tmp_path):
    """A text of a megabyte, encoded by six bytes a hundred times: a gigabyte in a larger file."""
    data = b"\x80\x02c_codecs\nencode\nq\x00" + text("a" * (1 << 20)) + text("latin1") + b"\x86q\x01" + b"h\x00h\x01R" * 100 + b"."
    with pytest.raises(DatasetError, match="copies values again and again"):
        read_torch(archive(tmp_path / "a.pt", data))


@pytest.mark.parametrize(
    "again", [b"c__builtin__\nset\n" + b"h\x00\x85R", b"cargparse\nNamespace\n)\x81h\x01b"], ids=["a set", "the state of a namespace"]
)
def test_what_holds_many_values_is_not_copied_again_and_again(again, tmp_path):
    numbers = [b"M" + struct.pack("<H", number) for number in range(1 << 16)]
    held = b"\x8f(" + b"".join(numbers) + b"\x90q\x00}(" + b"".join(number + b"N" for number in numbers) + b"uq\x01"
    with pytest.raises(DatasetError, match="copies values again and again"):
        read_torch(archive(tmp_path / "a.pt", b"\x80\x04]" + held + again * 300 + b"."))


def test_sizes_of_a_million_digits_are_not_multiplied(tmp_path):
    """Thirty-two sizes of a megabyte each, from a file of one."""
    size = b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"q\x00"
    place = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    data = b"\x80\x02" + size + b"0ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"K\x00("
    data += b"h\x00" * 32 + b"t(" + b"K\x00" * 32 + b"t"
    with pytest.raises(DatasetError, match="no list of whole numbers"):
        read_torch(archive(tmp_path / "a.pt", data + b"\x89}tR.", {"archive/data/0": bytes(16)}))


def old_file(keys: bytes) -> bytes:
    """A file of the format before torch 1.6 without storages, whose last pickle is `keys`."""
    machine = b"\x80\x02}" + text("little_endian") + b"\x88s."
    return b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"." + b"\x80\x02M\xe9\x03." + machine + b"\x80\x02}." + keys


def test_keys_of_the_older_format_are_texts(tmp_path):
    """Hashing forty levels of pairs would take a million million steps."""
    nested = b"".join(b"q%c0h%ch%c\x86" % (level, level, level) for level in range(1, 41))
    (tmp_path / "a.pt").write_bytes(old_file(b"\x80\x02]N" + nested + b"a."))
    with pytest.raises(DatasetError, match="the storages are not those of the tensors"):
        read_torch(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(old_file(b"\x80\x02]."))
    assert read_torch(tmp_path / "a.pt") == {}


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_longer_than_any_is_refused(old, monkeypatch, tmp_path):
    """One byte makes an empty set of two hundred."""
    monkeypatch.setattr("wavepath.interop.torch_pickle._MOST_BYTES", 1 << 10)
    long = b"\x80\x04" + b"\x8f" * (1 << 11) + b"."
    if old:
        (tmp_path / "a.pt").write_bytes(old_file(long))
    else:
        archive(tmp_path / "a.pt", long)
    with pytest.raises(DatasetError, match="a pickle of more than 1024 bytes"):
        read_torch(tmp_path / "a.pt")


def test_no_name_of_the_list_is_anything_of_pythons():
    """Every value that a name stands for is made here or plain."""
    for name in NAMES.values():
        for function in (name.call, name.new):
            assert function is None or function.__module__ == "wavepath.interop.torch_pickle"
    with pytest.raises(Refused):
        interpret(io.BytesIO(pickle.dumps(np.float64(1.0), 2)), {})
