"""Progress and tables as a log file sees them."""

import wavepath.console as console


def test_durations_read_well():
    assert [console.duration(s) for s in (4.21, 65, 59.9, 3725)] == ["4.2s", "1m05s", "1m00s", "1h02m"]


def test_progress_in_a_log_is_plain_lines_with_eta(capsys, monkeypatch):
    monkeypatch.setattr(console, "_LOG_EVERY_SECONDS", 0.0)
    with console.progress("slides", 4, "slides") as bar:
        bar.advance(1, "a.svs")
    line = capsys.readouterr().err
    assert line.startswith("slides: 1/4 slides, ") and "ETA" in line and "a.svs" in line and "\x1b" not in line


def test_table_aligns():
    assert console.table(["a", "bb"], [["xyz", 1]]) == "a    bb\n---  --\nxyz  1"
