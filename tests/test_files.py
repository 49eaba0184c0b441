"""Whole or absent: atomic writes, the folder lock, clear errors."""

import json
import os
import subprocess
import sys

import pytest

from wavepath.errors import LockedError, WavepathError
from wavepath.files import atomic_path, folder_lock, read_json, writable_folder, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert json.loads(path.read_text()) == {"b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_outputs_are_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(WavepathError, match="a.json"):
        read_json(tmp_path / "a.json")


def test_lock_refuses_a_second_holder_and_frees_itself(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), folder_lock(tmp_path):
            pass
    with folder_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", f"from wavepath.files import folder_lock; import os\nwith folder_lock({str(tmp_path)!r}):\n    os._exit(9)"],
        check=False,
    )
    assert child.returncode == 9 and (tmp_path / "wavepath.lock").exists()
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / "wavepath.lock").read_text())["pid"] == os.getpid()


def test_unwritable_folder_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WavepathError, match="choose another folder"):
        writable_folder(tmp_path / "file" / "sub")


def test_lock_of_an_earlier_process_of_the_same_number_is_taken_over(tmp_path):
    with folder_lock(tmp_path):
        held = json.loads((tmp_path / "wavepath.lock").read_text())
    (tmp_path / "wavepath.lock").write_text(json.dumps({**held, "started": held["started"] - 100}))
    with folder_lock(tmp_path):
        pass
