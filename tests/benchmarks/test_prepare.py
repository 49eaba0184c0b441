"""`wavepath bench prepare`: its table, and that datasets which differ are an error. The commands themselves are stand-ins here."""

import json

import pytest

from wavepath.benchmarks import prepare as module
from wavepath.cli import main
from wavepath.data import manifest as mf
from wavepath.errors import WavepathError


@pytest.fixture
def commands(monkeypatch):
    """Stands for `wavepath prepare`: writes a dataset of two slides at once, and takes as long as it says here."""
    seconds = {"--workers=2": 30.0, "--workers=1": 20.0}
    given, content = [], {}

    def once(slides, out, flags):
        given.append(flags)
        out.mkdir(exist_ok=True)
        rows = [mf.SlideRow(slide_id=name, path=f"{name}.tiff", status=mf.OK, tiles=150) for name in "ab"]
        (out / mf.MANIFEST).write_text(mf.manifest_text(rows))
        (out / mf.TIMINGS).write_text(f"another each time: {len(given)}")
        (out / "shard").write_text(content.get(flags[0], "tiles"))
        return {"seconds": seconds[flags[0]], "cpu_seconds": 40.0 + len(flags)}

    monkeypatch.setattr(module, "once", once)
    return given, content


def test_the_table(commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "apache_beam")
    out = tmp_path / "out.json", tmp_path / "out.md"
    flags = ["--runs=2", "--flags=--select all", f"--json={out[0]}", f"--markdown={out[1]}"]
    assert main(["bench", "prepare", f"--slides={tmp_path}", *flags]) == 0
    first, second = (line for line in out[1].read_text().splitlines() if " 2 threads |" in line or "DirectRunner," in line)
    # 2 slides with 300 tiles in 30 and 20 seconds.
    assert "| 30.0 (30.0 to 30.0) | 43.0 | 4.0 | 10 | 1.00 | 1.00 |" in first and "| 20.0 (20.0 to 20.0) | 45.0 | 6.0 | 15 | 1.50 | 1.05 |" in second
    report = json.loads(out[0].read_text())
    assert report["kind"] == "prepare" and report["command"].startswith("wavepath bench prepare --slides=") and report["facts"]["tiles"] == 300
    assert report["facts"]["slides"] == 2 and "--flags=--select all" in capsys.readouterr().out
    given, _ = commands
    beam = ["--workers=1", "--runner=DirectRunner", "--beam-options=--direct_num_workers=2 --direct_running_mode=multi_processing", "--select", "all"]
    local = ["--workers=2", "--select", "all"]
    assert given == [local, local, beam, beam, local]  # once to compile, then in turns


def test_datasets_that_differ_are_an_error(commands, tmp_path):
    _, content = commands
    content["--workers=1"] = "other tiles"
    with pytest.raises(WavepathError, match="DirectRunner.* gave another dataset than one process"):
        module.measure(tmp_path, module.contenders(2, True), 1)


def test_without_beam_there_is_one_row_and_the_extra_is_named(commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "prepare", f"--slides={tmp_path}", "--runs=1"]) == 0
    said = capsys.readouterr().out
    assert 'pip install "wavepath[beam]"' in said and "DirectRunner" not in said.partition("Apache Beam is not")[0]


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path):
    with pytest.raises(WavepathError, match="prepare .* ended with code 1: no slides at"):
        module.once(tmp_path / "nowhere", tmp_path / "out", ["--workers=1"])
