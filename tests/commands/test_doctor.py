"""`wavepath doctor`: each check passes here, each can fail, and a failure says what to do."""

import json
import sys

import pytest

from wavepath import cli
from wavepath.commands import doctor
from wavepath.commands.doctor import FAIL, OK, WARN, Check


def statuses(lines):
    return [line.status for line in lines]


def test_this_machine_passes():
    quick = {name: check for name, check in doctor.CHECKS.items() if name not in ("tensorflow", "devices", "compiled step")}
    lines = doctor.examine(quick)
    assert not [line for line in lines if line.status == FAIL], lines
    assert {"python", "dependencies", "memory", "openslide", "codec jpeg", "codec jpeg2k", "array_record"} <= {line.name for line in lines}


def test_devices_and_compiled_step():
    assert statuses(doctor.check_step()) == [OK]
    assert "8 x cpu" in next(doctor.check_jax()).found


def test_old_python():
    (line,) = doctor.check_python(">=9.0")
    assert line.status == FAIL and ">=9.0" in line.fix


def test_dependencies():
    wanted = ["numpy>=1", "nosuchthing>=2", "pillow>=99", 'nosuchextra; extra == "bench"', 'pytest>=99; extra == "test"']
    lines = list(doctor.check_dependencies(wanted))
    assert [(line.name, line.status) for line in lines] == [("nosuchthing", FAIL), ("pillow", FAIL), ("pytest", WARN), ("dependencies", OK)]
    assert lines[0].fix == "pip install 'nosuchthing>=2'" and "numpy" in lines[-1].found


def test_constraints(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# tested\nnumpy==0.1\nnosuchthing==3  # elsewhere\n")
    (line,) = doctor.check_constraints(path)
    assert line.status == WARN and "(tested: 0.1)" in line.found and "nosuchthing" not in line.found
    assert list(doctor.check_constraints(tmp_path / "none.txt")) == []


def test_tensorflow_that_dies(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Illegal instruction' >&2; exit 132\n")
    python.chmod(0o755)
    (line,) = doctor.check_tensorflow(str(python))
    assert (line.status, line.found) == (FAIL, "Illegal instruction")
    python.write_text("#!/bin/sh\necho 2.21.0 1\n")
    assert statuses(doctor.check_tensorflow(str(python))) == [WARN]
    python.write_text("#!/bin/sh\necho 2.21.0 0\n")
    assert statuses(doctor.check_tensorflow(str(python))) == [OK]


def test_little_memory_and_disk(tmp_path):
    assert statuses(doctor.check_memory(needed_gb=1e9)) == [WARN] and statuses(doctor.check_memory(needed_gb=0)) == [OK]
    assert statuses(doctor.check_disk(tmp_path, needed_gb=1e9)) == [WARN] and statuses(doctor.check_disk(tmp_path, needed_gb=0)) == [OK]


def test_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert statuses(doctor.check_cache(str(tmp_path / "new"))) == [OK]
    assert statuses(doctor.check_cache(str(tmp_path / "file" / "below"))) == [WARN]
    assert statuses(doctor.check_cache("")) == [WARN]


def test_a_check_that_raises_fails_and_the_others_go_on():
    def broken():
        raise ImportError("libopenslide.so\nis missing")

    lines = doctor.examine({"openslide": broken, "disk": doctor.check_disk})
    assert lines[0].status == FAIL and lines[0].found == "ImportError: libopenslide.so is missing" and lines[0].fix
    assert lines[1].name == "disk"


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_exit_code_and_json(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "CHECKS", {"x": lambda: iter([Check("x", status, "found", "fix it")])})
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [{"name": "x", "status": status, "found": "found", "fix": "fix it"}]
    assert cli.main(["doctor"]) == code
    assert "fix it" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorflow_here():
    assert statuses(doctor.check_tensorflow(sys.executable)) == [OK]
