"""The command line: what is imported, what is said, and the exit codes."""

import errno
import os
import subprocess
import sys
import types

import pytest

from wavepath import __version__, cli
from wavepath.errors import DatasetError, WavepathError

HEAVY = ("jax", "flax", "tensorflow", "orbax", "openslide", "tifffile", "sklearn", "skimage", "matplotlib", "h5py", "rich")


@pytest.fixture
def toy(monkeypatch):
    """A command `toy` whose run is set by the test."""
    module = types.ModuleType("wavepath.commands.toy", "A toy.")
    module.uses_config = True

    def add_arguments(parser):
        parser.add_argument("--out", required=True)
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("rest", nargs="*")

    module.add_arguments, module.run = add_arguments, lambda args: 0
    monkeypatch.setitem(sys.modules, "wavepath.commands.toy", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", ("toy", "a toy", "wavepath toy --out X"))
    return module


def complaint(capsys, argv, code=1) -> str:
    assert cli.main(argv) == code
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("wavepath: error: ") and streams.err.count("\n") == 1
    return streams.err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_imports_nothing_heavy(name):
    code = f"import sys; from wavepath.cli import main; rc = main([{name!r}, '--help']); print(rc, [m for m in {HEAVY} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr == ""
    assert process.stdout.splitlines()[-1] == "0 []"
    assert "example" in process.stdout and cli.ORDER in process.stdout and f"usage: wavepath {name}" in process.stdout


def test_overview_lists_every_command(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wavepath {__version__}\n"


def test_python_dash_m():
    process = subprocess.run([sys.executable, "-m", "wavepath", "--version"], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, f"wavepath {__version__}\n")


def test_typos_propose_the_nearest(capsys, toy):
    assert "did you mean train?" in complaint(capsys, ["trian"])
    assert "did you mean --workers?" in complaint(capsys, ["toy", "--out", "x", "--wokers", "3"])
    assert "--config.FIELD=VALUE" in complaint(capsys, ["toy", "--out", "x", "--lr=3"])
    assert "required: --out" in complaint(capsys, ["toy"])
    assert "invalid int value: 'many'" in complaint(capsys, ["toy", "--out", "x", "--workers", "many"])
    # No abbreviations: `--work` would change its meaning when a flag is added.
    assert "did you mean --workers?" in complaint(capsys, ["toy", "--out", "x", "--work=2"])


def test_config_overrides_are_collected(toy):
    args, _ = cli.parse("toy", ["--config.lr=3e-4", "--out", "x", "--config.data.dir", "a b", "rest", "--config.shift", "-1"])
    assert args.config_overrides == ["lr=3e-4", "data.dir=a b", "shift=-1"]
    assert (args.out, args.rest) == ("x", ["rest"])
    args, _ = cli.parse("toy", ["--out", "x", "--", "--config.lr=1"])
    assert (args.config_overrides, args.rest) == ([], ["--config.lr=1"])


def test_config_override_errors(capsys, toy):
    assert "--config.lr needs a value" in complaint(capsys, ["toy", "--config.lr", "--out", "x"])
    toy.uses_config = False
    assert "has no config" in complaint(capsys, ["toy", "--out", "x", "--config.lr=1"])


@pytest.mark.parametrize(("raised", "code", "words"), [
    (WavepathError("no\nslides"), 1, "no slides"), (DatasetError("x"), 1, "x"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "full", "a/b"), 1, "no space left on the disk of a/b"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "a/b: Permission denied; change its permissions"),
])
def test_exit_codes(capsys, toy, raised, code, words):
    def run(args):
        raise raised

    toy.run = run
    assert words in complaint(capsys, ["toy", "--out", "x"], code)


def test_codes_of_commands_pass_through_and_defects_keep_their_traceback(toy):
    toy.run = lambda args: 85
    assert cli.main(["toy", "--out", "x"]) == 85
    toy.run = lambda args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["toy", "--out", "x"])


def test_traceback_on_request(toy, monkeypatch):
    def run(args):
        raise DatasetError("x")

    toy.run = run
    monkeypatch.setenv("WAVEPATH_TRACEBACK", "1")
    with pytest.raises(DatasetError):
        cli.main(["toy", "--out", "x"])


def test_broken_pipe_is_silent():
    code = (
        "import sys, types; from wavepath import cli; m = types.ModuleType('wavepath.commands.toy'); m.add_arguments = lambda p: None\n"
        "m.run = lambda a: [print('x' * 1000) for _ in range(1000)] and 0\n"
        "sys.modules[m.__name__] = m; cli.COMMANDS['toy'] = ('toy', '', ''); sys.exit(cli.main(['toy']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == cli.EXIT_BROKEN_PIPE


def test_environment_respects_the_user(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WAVEPATH_CACHE", str(tmp_path))
    cli.prepare_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jax") and os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    cli.prepare_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
