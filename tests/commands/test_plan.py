"""`wavepath plan` from outside: what it prints and writes, its exit codes, and its errors of one line."""

import json
import os

import pytest

from wavepath import cli
from wavepath.commands import plan as command
from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL
from wavepath.planning import plan as planning
from wavepath.planning.compile import Compiled, CompilerError, Memory
from wavepath.planning.hlo import Collective, Program

SMOKE = "--config=configs/wise_mae.py:smoke"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Steps of at most 16 examples fit; nothing is compiled."""

    def compile_it(config, topology, *, cache=None):
        if config.batch_size == 40:
            raise CompilerError("the compiler failed")
        if config.batch_size > 16:
            return Compiled(False, None, None, config.batch_size << 30, 20 << 30, "RESOURCE_EXHAUSTED")
        program = Program((Collective("all-reduce", 4e6, 4, 1, 1, "x", "f32"),), 1e9, 1e8, {"bf16": 1e9})
        return Compiled(True, Memory(1, 1, 1, 1, 3), program, None, 20 << 30)

    monkeypatch.setattr(planning, "compile_step", compile_it)
    monkeypatch.setattr(os, "environ", {**os.environ, "WAVEPATH_CACHE": str(tmp_path / "cache")})


def test_one_plan(fake, capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert cli.main(["plan", SMOKE, "--topology=cpu:8", "--json", str(out), "--config.model.remat=full"]) == EXIT_OK
    printed = capsys.readouterr()
    for part in ("jit on 8 cpu devices", "fits", "all-reduce", "20 steps", "jaxlib"):
        assert part in printed.out
    assert "compile 1: wise_mae:smoke for cpu:8" in printed.err
    found = json.loads(out.read_text())
    assert found["fits"] is True and found["topology"] == "cpu:8" and found["collectives"]["all-reduce"]["bytes"] == 4e6


def test_one_that_does_not_fit_says_what_does(fake, capsys):
    assert cli.main(["plan", SMOKE, "--topology=cpu:8", "--batch=32"]) == command.EXIT_NO_FIT == 4
    printed = capsys.readouterr().out
    assert "no: 32 GiB needed, 20 GiB there" in printed and "it fits with --config.model.remat=full --config.batch_size=16" in printed
    assert cli.main(["plan", SMOKE, "--topology=cpu:8", "--batch=32", "--no-advice"]) == command.EXIT_NO_FIT
    assert "it fits with" not in capsys.readouterr().out


def test_a_table(fake, capsys, tmp_path):
    out, table = tmp_path / "plans.json", tmp_path / "table.md"
    code = cli.main(["plan", SMOKE, "--sweep=topology=cpu:2,cpu:8", "--sweep", "batch=8,16,32", "--json", str(out), "--markdown", str(table)])
    assert code == command.EXIT_NO_FIT
    assert [(one["topology"], one["batch"], one["fits"]) for one in json.loads(out.read_text())] == [
        (topology, batch, batch < 32) for topology in ("cpu:2", "cpu:8") for batch in (8, 16, 32)
    ]
    lines = table.read_text().splitlines()
    assert lines[0].startswith("| config | topology |") and sum(line.startswith("| wise_mae") for line in lines) == 6 + 2
    assert "--config.batch_size=16" in capsys.readouterr().out


def test_one_bad_row_does_not_spoil_the_table(fake, capsys):
    assert cli.main(["plan", SMOKE, "--sweep", "topology=cpu:8,cpu:64"]) == EXIT_PARTIAL
    assert "cpu:64" in capsys.readouterr().err
    # Nor does one at which the compiler fails; that some are missing says more than that others do not fit.
    assert cli.main(["plan", SMOKE, "--topology=cpu:8", "--sweep", "batch=40,16,32", "--no-advice"]) == EXIT_PARTIAL == 3
    said = capsys.readouterr()
    assert "on cpu:8: the compiler failed" in said.err and len([line for line in said.out.splitlines() if line.startswith("wise_mae")]) == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([SMOKE], "--topology v5e:4x4"), ([SMOKE, "--topology=v5e:5x5"], "give even sizes"), ([SMOKE, "--topology=tpu"], "is unknown"),
        ([SMOKE, "--topology=cpu:8", "--backend=pmapp"], "--backend"), ([SMOKE, "--topology=cpu:8", "--batch=-1"], "above 0"),
        ([SMOKE, "--topology=cpu:8", "--efficiency=2"], "share of 0 to 1"), (["--config=wise_mea.py", "--topology=cpu:8"], "did you mean"),
        ([SMOKE, "--topology=cpu:8", "--config.model.remt=full"], "remat"), ([SMOKE, "--topology=cpu:8", "--sweep=batch"], "name and values"),
        ([SMOKE, "--topology=cpu:8", "--config.model.mask_ratio=2"], "mask_ratio"),
        ([SMOKE, "--weak-scaling=v5e", "--examples=9"], "leave out --examples"), ([SMOKE, "--weak-scaling=v5e", "--no-advice"], "--no-advice"),
    ],
)  # fmt: skip
def test_errors_are_one_line(fake, capsys, argv, says):
    assert cli.main(["plan", *argv]) == EXIT_NOTHING
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("wavepath: error:") and says in err[-1]


def test_help_documents_the_exit_codes(capsys):
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "4 it, or a row of the table, does not fit" in text and "--sweep" in text and "v5e:16x16" in text
