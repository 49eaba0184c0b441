"""Tiles by Apache Beam: its options, what a worker does with one slide, and (slow) whole pipelines beside the local path."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_prepare import settings, texture, tree

from wavepath.cli import main
from wavepath.commands import prepare as command
from wavepath.data import beam, beam_worker
from wavepath.data import manifest as mf
from wavepath.data.beam import on_runner
from wavepath.data.beam_worker import PrepareSlide, outcome_path
from wavepath.data.prepare import TilesJob, prepare
from wavepath.data.slide_runs import SlideJob
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.interop.tiff import write_pyramid

TWO = "--direct_num_workers=2 --direct_running_mode=multi_processing"
DOCUMENT = Path(__file__).parents[2] / "docs" / "beam.md"


@pytest.fixture
def bad(tmp_path):
    """A folder of two files that are no slides: neither takes any time."""
    folder = tmp_path / "bad slides"
    folder.mkdir()
    (folder / "text.svs").write_text("not a slide")
    (folder / "zero.tiff").touch()
    return folder


def worker(folder, out, strict=False):
    """What a pipeline over `folder` sends to its workers, and the slides as its tasks."""
    out.mkdir()
    job = TilesJob(folder, settings(), 1, mf.PreparedFolder(out), {})
    work = out / ".work.x.tmp"
    work.mkdir()
    tasks = [(index, os.fsencode(path.stem), os.fsencode(path), None) for index, path in enumerate(sorted(folder.iterdir()))]
    return PrepareSlide(job, work, strict), work, tasks


def outcome(work, index):
    return json.loads(outcome_path(work, index).read_text())


# ---- flags and options


def test_without_beam_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(WavepathError, match=r'pip install "wavepath\[beam\]"'):
        on_runner("DirectRunner")


@pytest.mark.parametrize(("flags", "said"), [
    (["--beam-options=--direct_num_workers=2"], "--beam-options needs --runner"),
    (["--runner=DirectRunner", "--out=gs://bucket/tiles"], "--out is a gs:// address"),
])
def test_flags_that_cannot_be(bad, tmp_path, capsys, flags, said):
    assert main(["prepare", f"--slides={bad}", f"--out={tmp_path / 'out'}", *flags]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("runner", "options", "said"), [
    ("DirectRunner", "--direct_num_worker=2", "knows no option --direct_num_worker; it runs by"),
    ("DirectRunner", "--direct_running_mode=threads", "refuses its options"),
    ("DirectRunner", "two --direct_num_workers=2", "'two' among the options of Beam is no flag"),
    ("DirectRunner", "--direct_num_workers='2", "close the quotes"),
    ("DirectRunner", "--runner=FlinkRunner", "name the runner by --runner alone"),
    ("CloudRunner", "", "no runner 'CloudRunner'"),
])
def test_options_that_cannot_be(runner, options, said):
    pytest.importorskip("apache_beam")
    with pytest.raises(ConfigError, match=said):
        on_runner(runner, options)


def test_options_of_a_runner_are_left_to_it(capsys):
    pytest.importorskip("apache_beam")
    on_runner("PortableRunner", ["--job_endpoint=localhost:8099", "--of_the_cluster=1"])
    assert "Beam knows no option --of_the_cluster; it is left to the PortableRunner" in capsys.readouterr().err


@pytest.mark.parametrize("text", [command.EPILOG, DOCUMENT.read_text(encoding="utf-8")], ids=["help", "docs"])
def test_the_documented_flags_are_beams(text, capsys):
    pytest.importorskip("apache_beam")
    from wavepath.data.beam import _parsed, _split

    shown = re.findall(r'--runner ([A-Z][a-z]\w+)[\s\\]+--beam-options="([^"]+)"', text)
    assert {runner for runner, _ in shown} >= {"DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner"}
    for runner, options in shown:
        _parsed(runner, _split(options.replace("\\\n", " ")))
    assert not capsys.readouterr().err


# ---- one slide on a worker


def test_a_bad_slide_is_an_outcome_and_is_not_done_twice(bad, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    send, work, tasks = worker(bad, tmp_path / "out")
    assert [send(task) for task in tasks] == ["failed", "failed"]
    assert "is no slide or image" in outcome(work, 0)["row"]["reason"] and "0 bytes" in outcome(work, 1)["row"]["reason"]
    # A runner repeats a bundle whose answer was lost.
    monkeypatch.setattr(SlideJob, "one_slide", None)
    assert send(tasks[1]) == "failed"


def test_strict_and_full_disks_stop_all_workers(bad, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    send, work, tasks = worker(bad, tmp_path / "out", strict=True)
    assert [send(task) for task in tasks] == ["stopped", "stopped"]
    assert "leave out --strict" in outcome(work, 0)["stop"] and not outcome_path(work, 1).exists()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "selection.csv")

    monkeypatch.setattr(SlideJob, "one_slide", full)
    send, work, tasks = worker(bad, tmp_path / "other")
    assert [send(task) for task in tasks] == ["stopped", "stopped"] and "cannot write selection.csv: No space" in outcome(work, 0)["stop"]


def test_a_worker_that_does_not_see_the_run_does_nothing(bad, tmp_path):
    """Another machine's disk, or a run that is over: its folder is not there."""
    send, work, tasks = worker(bad, tmp_path / "out")
    work.rmdir()
    with pytest.raises(WavepathError, match="on a file system that all workers and the starting machine share"):
        send(tasks[0])
    assert not any((tmp_path / "out").rglob("*.json"))


def test_a_slide_is_done_by_one_worker_alone(bad, tmp_path, monkeypatch):
    """A second attempt that starts while the first works waits for its outcome."""
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(beam_worker, "BEAT_SECONDS", 0.02)
    send, work, tasks = worker(bad, tmp_path / "out")
    real, begun, go_on, calls, said = SlideJob.one_slide, threading.Event(), threading.Event(), [], []

    def slow(self, ref, report):
        calls.append(ref.id)
        begun.set()
        assert go_on.wait(60)
        return real(self, ref, report)

    monkeypatch.setattr(SlideJob, "one_slide", slow)
    first, second = (threading.Thread(target=lambda: said.append(send(tasks[0]))) for _ in range(2))
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.2)
    assert second.is_alive() and not said
    go_on.set()
    first.join(60)
    second.join(60)
    assert said == ["failed", "failed"] and calls == ["text"] and outcome(work, 0)["worker"] == beam_worker.worker_name()
    assert len(beam_worker.claims(outcome_path(work, 0))) == 1


def test_the_claim_of_a_dead_worker_is_taken_over(bad, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(beam_worker, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(beam_worker, "LOST_SECONDS", 0.1)
    send, work, tasks = worker(bad, tmp_path / "out")
    place = outcome_path(work, 0)
    place.with_suffix(".claim0").write_text("elsewhere 7")
    assert send(tasks[0]) == "failed" and [claim.read_text() for claim in beam_worker.claims(place)] == ["elsewhere 7", beam_worker.worker_name()]
    # Whoever ends without an outcome gives its claim up, and the next need not wait for it.
    monkeypatch.setattr(beam_worker, "LOST_SECONDS", 1000.0)
    real = SlideJob.one_slide
    monkeypatch.setattr(SlideJob, "one_slide", None)
    with pytest.raises(TypeError):
        send(tasks[1])
    monkeypatch.setattr(SlideJob, "one_slide", real)
    assert send(tasks[1]) == "failed" and len(beam_worker.claims(outcome_path(work, 1))) == 2
    place = outcome_path(work, 2)
    with contextlib.closing(beam_worker.claimed(place)) as mine, contextlib.closing(beam_worker.claimed(place)) as other:
        assert next(mine) and not next(other)


def test_what_a_file_system_shows_late_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beam, "_LATE_SECONDS", 0.2)
    late, answers = beam._Late(), iter([None, None, "there"])
    assert late.wait(tmp_path, lambda: "at once") == "at once" and not capsys.readouterr().err
    assert late.wait(tmp_path / "not there either", lambda: next(answers)) == "there" and "waiting up to" in capsys.readouterr().err
    assert late.wait(tmp_path, lambda: None) is None
    looks = []
    assert late.wait(tmp_path, lambda: looks.append(1)) is None and len(looks) == 1, "the patience is that of the whole run"


def test_why_a_worker_process_died():
    said = "Worker subprocess exited with return code"
    assert "memory" in beam._why_lost(f"{said} 137") and "memory" in beam._why_lost(f"{said} -9") and not beam._why_lost(f"{said} 1")


def test_a_worker_touches_nothing_but_its_slide(tmp_path):
    """What other workers write under temporary names, and what is published, stays."""
    for name in ("slides/b/.tiles.array_record.x.tmp", "slides/a/tiles.array_record", "dataset_info.json", "manifest.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = tree(tmp_path)
    folder = mf.SlideFolder(tmp_path, "a")
    assert folder.shards == {"a": {"train": tmp_path / "slides/a/tiles.array_record"}} and tree(tmp_path) == before
    folder.forget("a", mf.TILE_FILES)
    assert tree(tmp_path).keys() == before.keys() - {"slides/a/tiles.array_record"}


def test_a_pipeline_in_this_process(bad, tmp_path, monkeypatch, capsys):
    """With a relative path: manifests name the slides as they were given."""
    pytest.importorskip("apache_beam")
    monkeypatch.chdir(bad.parent)
    bad = Path(bad.name)
    local = prepare(bad, tmp_path / "local", settings())
    result = prepare(bad, tmp_path / "beam", settings(), run=on_runner("DirectRunner"))
    assert (result.failed, result.exit_code) == (local.failed, local.exit_code) == (2, 1)
    assert result.rows == local.rows and tree(tmp_path / "beam") == tree(tmp_path / "local")
    assert capsys.readouterr().err.count("warning: text: failed") == 2  # once each
    with pytest.raises(WavepathError, match="failed, .*leave out --strict"):
        prepare(bad, tmp_path / "beam", settings(), run=on_runner("DirectRunner"), strict=True)
    assert not list((tmp_path / "beam").glob(".*")) and not (tmp_path / "beam/prepare.lock").exists()


# ---- whole pipelines


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three slides, one in a folder with a space and an umlaut, and one damaged file."""
    folder = tmp_path_factory.mktemp("beam slides")
    for seed, name in enumerate(("a.tiff", "b ü/case.tiff", "c.tiff")):
        (folder / name).parent.mkdir(exist_ok=True)
        write_pyramid(folder / name, texture(seed), 1.0, codec="deflate")
    whole = (folder / "a.tiff").read_bytes()
    (folder / "cut.tiff").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_the_local_path_and_resume(slides, tmp_path):
    pytest.importorskip("apache_beam")
    local, out = tmp_path / "local", tmp_path / "out"
    prepare(slides, local, settings())
    flags = ["--mpp=1.0", "--top=0.3", "--config.tiles.size=32", "--config.screen.region_um=128", "--config.screen.min_region_um=128"]
    flags += ["--config.screen.mpp=2.0", f"--slides={os.path.relpath(slides)}", f"--out={out}", "--workers=1"]
    program = [sys.executable, "-m", "wavepath", "prepare", *flags, "--runner=DirectRunner", f"--beam-options={TWO}"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    assert "3 of 4 gave tiles" in done.stderr and "warning: cut: failed" in done.stderr
    assert "4 slides by 2 worker processes" in done.stderr and "INFO" not in done.stderr and "apitools" not in done.stderr
    ours, theirs = tree(out), tree(local)
    given = str(os.path.relpath(slides)).encode()
    # The reason of the damaged slide names its path as it was given.
    assert ours.pop("manifest.csv").replace(given, str(slides).encode()) == theirs.pop("manifest.csv") and ours == theirs
    with open(out / "timings.csv", encoding="utf-8") as file:
        assert [line.split(",")[0] for line in file][1:] == ["a", "b ü/case", "c", "cut"]
    # A slide whose shard is lost is made again, the others are kept; to the byte.
    before = (out / "slides/a/info.json").stat().st_mtime_ns
    (out / mf.read_manifest(out)[1].shard).unlink()
    assert prepare(slides, out, settings(), run=on_runner("DirectRunner")).reused == 2
    assert tree(out) == tree(local)
    assert (out / "slides/a/info.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("end", ["a worker is killed", "Ctrl-C"])
def test_an_end_in_the_middle_is_said_in_one_line(slides, tmp_path, end):
    """And nothing is published."""
    pytest.importorskip("apache_beam")
    out = tmp_path / "out"
    flags = ["--mpp=1.0", "--top=1.0", "--config.tiles.size=32", f"--slides={slides}", f"--out={out}", "--workers=1"]
    program = [sys.executable, "-m", "wavepath", "prepare", *flags, "--runner=DirectRunner", f"--beam-options={TWO}"]
    with open(tmp_path / "said", "w+") as said:
        run = subprocess.Popen(program, stdout=said, stderr=said, start_new_session=True)
        try:
            until = time.monotonic() + 200
            # Two workers hold a slide each.
            while len(pids := {int(path.read_text().split()[1]) for path in out.glob(".work.*/*.claim0") if path.read_text()}) < 2:
                assert run.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
                time.sleep(0.02)
            if end == "Ctrl-C":
                os.killpg(run.pid, signal.SIGINT)
            else:
                os.kill(min(pids), signal.SIGKILL)
            code = run.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
        said.seek(0)
        text = said.read()
    assert "Traceback" not in text and "Exception in thread" not in text, text
    assert not out.joinpath("manifest.csv").exists() and not list(out.glob(".work*")) and not (out / "prepare.lock").exists()
    if end == "Ctrl-C":
        assert code == 130, text
    else:
        assert code == 1 and "a worker process of the DirectRunner died" in text and "lack of memory" in text and "run this again" in text, text


@pytest.fixture
def cluster():
    """Beam's own job server and a worker pool, two processes beside this one: the flags of a job for them."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(2):
            held = stack.enter_context(socket.socket())
            held.bind(("localhost", 0))
            ports.append(held.getsockname()[1])
    server = ["apache_beam.runners.portability.local_job_service_main", f"--port={ports[0]}"]
    pool = ["apache_beam.runners.worker.worker_pool_main", f"--service_port={ports[1]}"]
    # The pool starts its workers by the name `python`.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    quiet = dict(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    started = [subprocess.Popen([sys.executable, "-m", *words], **quiet) for words in (server, pool)]
    yield [f"--job_endpoint=localhost:{ports[0]}", "--environment_type=EXTERNAL", f"--environment_config=localhost:{ports[1]}"]
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers
        process.wait()


@pytest.mark.slow
def test_a_job_server_and_a_worker_pool(slides, cluster, tmp_path):
    """How Flink and Spark are reached: the pipeline goes to a server, workers that know nothing of this process do the slides."""
    pytest.importorskip("apache_beam")
    prepare(slides, tmp_path / "local", settings())
    result = prepare(slides, tmp_path / "out", settings(), run=on_runner("PortableRunner", cluster))
    assert (result.ok, result.failed) == (3, 1) and tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.mark.slow
def test_other_settings_and_what_is_not_shared(slides, tmp_path, monkeypatch):
    """In this process: shards of an earlier run are replaced; a worker's slide that is not to be seen here is an error, and nothing is published."""
    pytest.importorskip("apache_beam")
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    run = on_runner("DirectRunner")
    prepare(slides, out, settings())
    prepare(slides, fresh, settings(tiles__size=64))
    assert prepare(slides, out, settings(tiles__size=64), run=run).reused == 0 and tree(out) == tree(fresh)
    real = SlideJob.one_slide

    def elsewhere(self, ref, report):
        row, seconds = real(self, ref, report)
        if ref.id == "c":
            shutil.rmtree(self.folder.slide("c"))
        return row, seconds

    monkeypatch.setattr(SlideJob, "one_slide", elsewhere)
    monkeypatch.setattr(beam, "_LATE_SECONDS", 0.2)
    with pytest.raises(DatasetError, match="c: a worker has finished it, but .* must be one folder for all workers"):
        prepare(slides, out, settings(), run=run)
    assert not (out / "dataset_info.json").exists()
    monkeypatch.undo()
    assert prepare(slides, out, settings(), run=run).reused == 2
    prepare(slides, fresh, settings())
    assert tree(out) == tree(fresh)
