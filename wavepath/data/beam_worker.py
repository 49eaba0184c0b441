"""What a worker of a Beam pipeline does: one slide at a time, each by one worker alone, and what came of it in a file that all can read.

Runners start work twice: a bundle whose worker seems lost, or a slow one at its end. Two at one slide would take each other's files away, so a worker
claims its slide first by a file in the folder of the run, and renews the claim while it works. Whoever finds the claim of another waits for that
one's outcome; a claim that is renewed no more is taken over, by one successor. The folder is new for every run, so no claim outlives its run.

As a program this file is a worker process of the local runner: Beam's own, without its messages on the terminal, and left to its parent by Ctrl-C.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavepath.data import manifest as mf
from wavepath.data.prepare import TilesJob
from wavepath.data.slide_runs import refusal, storage_errors
from wavepath.errors import WavepathError
from wavepath.files import write_json

STOP = "stop"  # in the folder of the run: no further slide is begun
BEAT_SECONDS = 5.0  # between two renewals of a claim
LOST_SECONDS = 60.0  # without any: its worker is gone
Task = tuple[int, bytes, bytes, float | None]  # number in the run, id and path as the file system has them, given mpp


class PrepareSlide:
    """Does one slide on a worker and writes down what came of it; holds plain values alone, since Beam sends it there.

    Raises (so that the runner tries again, and in the end gives up):
        WavepathError: the folder of the run is not to be seen from this worker; or what went wrong could not even be written down.
    """

    def __init__(self, job: TilesJob, work: Path, strict: bool):
        self.root, self.out, self.work = (str(path.absolute()) for path in (job.root, job.folder.out, work))
        self.config, self.threads, self.strict = job.config.to_dict(), job.workers, strict
        self.coords = None if job.coords is None else {slide_id: str(path.absolute()) for slide_id, path in job.coords.items()}

    def __call__(self, task: Task) -> str:
        """The slide's status, for the runner's own display; `outcome_path` tells the rest."""
        index, slide_id, path, mpp = task
        work = Path(self.work)
        place = outcome_path(work, index)
        with contextlib.closing(claimed(place)) as tries:
            for mine in tries:
                if not work.is_dir():
                    raise WavepathError(
                        f"{self.out} on {socket.gethostname()} is not the folder that the run was started with, or the run is over; --slides and "
                        "--out lie on a file system that all workers and the starting machine share"
                    )
                outcome = mf.read_stage(place)  # the runner may repeat what is done
                if outcome is None and (work / STOP).exists():
                    return "stopped"
                if outcome is None and mine:
                    outcome = {**self._outcome(os.fsdecode(slide_id), Path(os.fsdecode(path)), mpp), "worker": worker_name()}
                    if "stop" in outcome:
                        (work / STOP).touch()
                    write_json(place, outcome)
                    _count(outcome)
                if outcome is not None:
                    return outcome["row"]["status"] if "row" in outcome else "stopped"
        raise AssertionError("claims are tried for as long as the run lasts")

    def _outcome(self, slide_id: str, path: Path, mpp: float | None) -> dict[str, Any]:
        from wavepath.data.slides import SlideRef

        ref = SlideRef(path, slide_id)
        folder = mf.SlideFolder(Path(self.out), slide_id)
        coords = None if self.coords is None else {slide_id: Path(self.coords[slide_id])}
        job = TilesJob(Path(self.root), ConfigDict(self.config), self.threads, folder, {slide_id: mpp}, coords)
        with contextlib.suppress(OSError):  # a slide that cannot be looked at: its own turn tells why
            row, _ = job.folder.kept(slide_id, job.fingerprint(ref))
            if row is not None:
                return dict(row=_fields(row), seconds={})
        try:
            with storage_errors(job.folder.out):
                row, seconds = job.one_slide(ref, lambda share, note: None)
        except WavepathError as error:  # of the settings or of the storage: the next slide would fail in the same way
            return dict(stop=mf.one_line(error))
        if self.strict and row.status != mf.OK:
            return dict(stop=refusal(row))
        return dict(row=_fields(row), seconds=seconds)


def _fields(row: mf.SlideRow) -> dict[str, Any]:
    return dict(vars(row))


def outcome_path(work: Path, index: int) -> Path:
    """The file that tells what came of slide `index`: `row` and `seconds`, or `stop`, the message that ends the run; and which `worker` did it."""
    return work / f"{index:07d}.json"


def worker_name() -> str:
    """Host and process number of this worker."""
    return f"{socket.gethostname()} {os.getpid()}"


def _count(outcome: dict[str, Any]) -> None:
    """Counters for the runner's own display."""
    from apache_beam.metrics import Metrics

    row = outcome.get("row")
    Metrics.counter("wavepath", f"slides_{row['status'] if row else 'stopped'}").inc()
    if row:
        Metrics.counter("wavepath", "tiles").inc(row["tiles"])


# Claims -------------------------------------------------------------------------------------------------------------------------------------


def claims(place: Path) -> list[Path]:
    """The claims of the slide whose outcome is to be `place`, the one that holds last. Their text names the worker."""
    named = {int(match[1]): path for path in place.parent.glob(f"{place.stem}.claim*") if (match := re.fullmatch(r".*\.claim(\d+)", path.name))}
    return [named[number] for number in sorted(named)]


def claimed(place: Path) -> Iterator[bool]:
    """Tries to claim the slide whose outcome is to be `place`, again and again: True (once, renewed until the generator is closed), or False.

    A successor makes the claim of the next number, which only one can: removing a dead worker's claim could remove that of who was faster. A worker
    that leaves no outcome gives its claim up by the time 0.
    """
    seen: tuple[Path | None, int] = None, 0
    since = time.monotonic()
    while True:
        try:
            held = claims(place)
            last = held[-1] if held else None
            renewed = _renewed(last) if last else 0
            if (last, renewed) != seen:
                seen, since = (last, renewed), time.monotonic()
            if not renewed or time.monotonic() - since > LOST_SECONDS:
                mine = place.with_suffix(f".claim{len(held)}")
                with open(mine, "x", encoding="utf-8") as file:
                    file.write(worker_name())
                with _renewing(mine, place):
                    yield True
                return
        except (FileExistsError, FileNotFoundError):  # another was faster; the folder is gone, which the caller says
            pass
        yield False
        time.sleep(min(1.0, BEAT_SECONDS))


def _renewed(claim: Path) -> int:
    """When it was renewed last; opened for it, since only that asks a network file system anew."""
    with open(claim, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


@contextlib.contextmanager
def _renewing(claim: Path, place: Path) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # the run is over
            while not done.wait(BEAT_SECONDS):
                os.utime(claim)

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if not place.exists():
            with contextlib.suppress(OSError):
                os.utime(claim, (0, 0))


def main() -> None:
    """A worker process of the local runner."""
    import logging
    import signal
    import sys

    # Ctrl-C reaches the whole group: the process that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    from apache_beam.runners.worker import sdk_worker_main

    logging.disable(logging.NOTSET)
    # What an import warned of has set up the terminal as a place for everything; the runner has its own.
    logging.getLogger().handlers.clear()
    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
