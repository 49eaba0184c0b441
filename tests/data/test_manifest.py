"""Manifest, fingerprints and timings by themselves; what `prepare` does with them is in test_prepare.py."""

import os

import pytest

from wavepath.data import manifest as mf
from wavepath.errors import DatasetError


def test_manifest_round_trip(tmp_path):
    rows = [
        mf.SlideRow("a, b/ü", "a, b/ü.svs", mf.OK, mpp=0.1 + 0.2, width=3, height=4, tiles=7, energy_tissue=1e-12, shard="x", label='say "yes"'),
        mf.SlideRow("c", "c.svs", reason="no mpp"),
    ]
    (tmp_path / mf.MANIFEST).write_text(mf.manifest_text(rows), encoding="utf-8")
    assert mf.read_manifest(tmp_path) == rows
    assert rows[1].status == mf.FAILED and rows[1].mpp is None


def test_manifest_that_is_not_one(tmp_path):
    with pytest.raises(DatasetError, match="no manifest.csv"):
        mf.read_manifest(tmp_path)
    (tmp_path / mf.MANIFEST).write_text("slide_id,path\na,b\n")
    with pytest.raises(DatasetError, match="no column status"):
        mf.read_manifest(tmp_path)


def test_fingerprint_sees_what_matters(tmp_path):
    path = tmp_path / "s.svs"
    path.write_bytes(b"pixels")
    base = mf.fingerprint(path, {"top": 0.2, "mean": (1, 2)}, None)
    assert base == mf.fingerprint(path, {"mean": (1, 2), "top": 0.2}, None)
    assert len({base, mf.fingerprint(path, {"top": 0.3, "mean": (1, 2)}, None), mf.fingerprint(path, {"top": 0.2, "mean": (1, 2)}, 0.5)}) == 3
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert mf.fingerprint(path, {"top": 0.2, "mean": (1, 2)}, None) != base


def test_files_of_a_slide(tmp_path):
    for name in ("m.mrxs", "m/Data0001.dat", "m/Slidedat.ini", "d/1.dcm", "d/2.dcm", "d/notes.txt", "v.vms", "v(0,1).jpg", "w.jpg", "s.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(name):
        return [path.relative_to(tmp_path).as_posix() for path in mf.slide_files(tmp_path / name)]

    assert names("m.mrxs") == ["m/Data0001.dat", "m/Slidedat.ini", "m.mrxs"]
    assert names("d/2.dcm") == ["d/1.dcm", "d/2.dcm"]
    assert names("v.vms") == ["v(0,1).jpg", "v.vms"]
    assert names("s.svs") == ["s.svs"]


def test_timings_survive_a_line_cut_short(tmp_path):
    timings = mf.Timings(tmp_path)
    timings.add("b, b", dict(read=1.5, total=2.0), 10)
    timings.add("a", dict(read=0.25), 3)
    with open(timings.path, "a") as file:
        file.write("c,0.1,0")
    again = mf.Timings(tmp_path)
    assert list(again.rows) == ["b, b", "a"] and again.total("read", ["a", "b, b", "gone"]) == 1.75
    assert again.path.read_text().splitlines()[1].startswith("a,0.000,0.000,0.250")


def test_names_that_are_not_text():
    name = os.fsdecode(b"sl\xffide")
    assert mf.printable(name) == "sl\\udcffide" and mf.printable("ü  x") == "ü  x"
    assert mf.one_line(f"{name}\n is\tbad") == "sl\\udcffide is bad"


def test_a_damaged_closing_file_is_no_closing_file(tmp_path):
    assert mf.read_stage(tmp_path / "info.json") is None
    (tmp_path / "info.json").write_text('{"fingerprint": ')
    assert mf.read_stage(tmp_path / "info.json") is None
    (tmp_path / "info.json").write_text("[]")
    assert mf.read_stage(tmp_path / "info.json") is None
