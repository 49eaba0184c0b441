"""Slides to tiles by Apache Beam: the slides of one `prepare` fan out over workers, on this machine or on a cluster.

    Create(slides) -> Reshuffle -> PrepareSlide

A worker does to a slide what the local path does (`SlideJob.one_slide`), and writes it to the same place, so the dataset is the same to the byte.
Manifest, order of the shards and metadata are the last step, once all slides are done, and are taken by the process that started the pipeline.
Slides, output and that process share one file system: a PCollection of tiles would send every pixel through the runner, and the output of a slide
would not be whole or absent.

Runners repeat work: after a failure, or at once where a worker seems lost. What a worker has finished it finds again (its outcome, or the slide's
closing file) and does not repeat; everything else appears by a rename of equal bytes. All workers report into one folder of the run,
`OUT/.work.<name>.tmp`: one file a slide, which is the progress and the result. When that folder is gone, the run is over, and late workers end.
"""

import contextlib
import logging
import os
import shlex
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from wavepath import console
from wavepath.data import manifest as mf
from wavepath.data.prepare import RunSlides, TilesJob
from wavepath.data.slide_runs import complaint, refusal, storage_errors
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.files import write_json

if TYPE_CHECKING:
    from wavepath.data.slides import SlideRef

LOCAL = "DirectRunner"
_STOP = "stop"  # in the folder of the run: no further slide is begun
_POLL_SECONDS = 2.0
_WORKER = "apache_beam.runners.worker.sdk_worker_main"  # of the local runner's worker processes
Task = tuple[int, bytes, bytes, float | None]  # number in the run, id and path as the file system has them, given mpp


def on_runner(runner: str, options: str | Sequence[str] = ()) -> RunSlides:
    """What `prepare(..., run=...)` takes: does the slides by a Beam pipeline on `runner`.

    Args:
        runner: Beam's name of it: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, PortableRunner, ...
        options: Beam's own flags, as a list or as one line of a shell.

    Raises:
        WavepathError: Apache Beam is not installed.
        ConfigError: no such runner, an option that Beam does not know or whose value it refuses.
    """
    logging.disable(logging.WARNING)  # Beam's import warns of clients that it can do without
    try:
        import apache_beam  # noqa: F401 - the first of all: what lies in it may be loaded without it being there
        from apache_beam.runners.runner import create_runner
    except ModuleNotFoundError:
        raise WavepathError('--runner needs Apache Beam; pip install "wavepath[beam]"') from None
    finally:
        logging.disable(logging.NOTSET)
    flags = _split(options)
    if named := [flag for flag in flags if flag.partition("=")[0] == "--runner"]:
        raise ConfigError(f"{named[0]} among the options of Beam: name the runner by --runner alone")
    pipeline_options = _parsed(runner, flags)
    try:
        chosen = _local_runner(pipeline_options) if runner == LOCAL else create_runner(runner)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"no runner {runner!r} here ({mf.one_line(error)}); {_RUNNERS}") from None

    def run(job: TilesJob, refs: "Sequence[SlideRef]", timings: mf.Timings, strict: bool) -> dict[str, mf.SlideRow]:
        return _run(chosen, pipeline_options, job, refs, timings, strict)

    return run


def _local_runner(options: Any) -> Any:
    """The DirectRunner. By its name Beam would first look for a newer one, a program that it fetches from the network."""
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    # Worker processes tell every step of theirs to the terminal; what goes wrong with a slide is in its outcome.
    encoded = JobServiceHandle.encode_pipeline_options({"default_sdk_harness_log_level": "ERROR", **options.get_all_options(drop_default=True)})
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)))


_RUNNERS = "choose from DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, PortableRunner"


def _split(options: str | Sequence[str]) -> list[str]:
    if not isinstance(options, str):
        return list(options)
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ConfigError(f"the options of Beam {options!r} cannot be split as a shell would ({error}); close the quotes") from None


def _parsed(runner: str, flags: Sequence[str]) -> Any:
    """Beam's options. It ignores what it does not know: here that is an error, or a warning where the runner may know more than Beam."""
    from apache_beam.options.pipeline_options import PipelineOptions

    if loose := [flag for position, flag in enumerate(flags) if not flag.startswith("-") and (not position or "=" in flags[position - 1])]:
        raise ConfigError(f"{loose[0]!r} among the options of Beam is no flag; write them as --name=value")
    options = PipelineOptions([f"--runner={runner}", *flags])
    logging.disable(logging.WARNING)  # that it ignores something is said below
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            known = options.get_all_options()
            every = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        raise ConfigError(f"Beam refuses its options {shlex.join(flags)}; `python -m apache_beam.examples.wordcount --help` lists them") from None
    finally:
        logging.disable(logging.NOTSET)
    if unknown := sorted(every.keys() - known.keys()):
        message = f"Beam knows no option --{unknown[0]}"
        if runner == LOCAL:
            raise ConfigError(f"{message}; it runs by --direct_num_workers=N --direct_running_mode=multi_processing")
        console.warn(f"{message}; it is left to the {runner}")
    return options


class PrepareSlide:
    """Does one slide on a worker and writes down what came of it; holds plain values alone, since Beam sends it there.

    Raises (so that the runner tries again, and in the end gives up):
        WavepathError: the folder of the run is not to be seen from this worker; or what went wrong could not even be written down.
    """

    def __init__(self, job: TilesJob, work: Path, strict: bool):
        self.root, self.out, self.work = (str(path.absolute()) for path in (job.root, job.folder.out, work))
        self.config, self.threads, self.strict = job.config.to_dict(), job.workers, strict

    def __call__(self, task: Task) -> str:
        """The slide's status, for the runner's own display; `outcome` tells the rest."""
        index, slide_id, path, mpp = task
        work = Path(self.work)
        if not work.is_dir():
            raise WavepathError(
                f"{self.out} on {socket.gethostname()} is not the folder that the run was started with, or the run is over; --slides and "
                "--out lie on a file system that all workers and the starting machine share"
            )
        place = outcome_path(work, index)
        outcome = mf.read_stage(place)  # the runner may repeat what is done
        if outcome is None:
            if (work / _STOP).exists():
                return "stopped"
            outcome = self._outcome(os.fsdecode(slide_id), Path(os.fsdecode(path)), mpp)
            if "stop" in outcome:
                (work / _STOP).touch()
            write_json(place, outcome)
            _count(outcome)
        return outcome["row"]["status"] if "row" in outcome else "stopped"

    def _outcome(self, slide_id: str, path: Path, mpp: float | None) -> dict[str, Any]:
        from wavepath.data.slides import SlideRef

        ref = SlideRef(path, slide_id)
        job = TilesJob(Path(self.root), ConfigDict(self.config), self.threads, mf.SlideFolder(Path(self.out), slide_id), {slide_id: mpp})
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
    """The file that tells what came of slide `index`: `row` and `seconds`, or `stop`, the message that ends the run."""
    return work / f"{index:07d}.json"


def _count(outcome: dict[str, Any]) -> None:
    """Counters for the runner's own display."""
    from apache_beam.metrics import Metrics

    row = outcome.get("row")
    Metrics.counter("wavepath", f"slides_{row['status'] if row else 'stopped'}").inc()
    if row:
        Metrics.counter("wavepath", "tiles").inc(row["tiles"])


class _Watch:
    """Shows the slides as they are done."""

    def __init__(self, work: Path, bar: console.Progress, product: str):
        self.work, self.bar, self.product = work, bar, product
        self.seen: set[str] = set()

    def look(self) -> None:
        """Takes notice of the outcomes that have come since."""
        for name in sorted({path.name for path in self.work.glob("*.json")} - self.seen):
            outcome = mf.read_stage(self.work / name) or {}
            self.seen.add(name)
            if "row" in outcome:
                row = mf.SlideRow(**outcome["row"])
                if row.status != mf.OK:
                    console.warn(complaint(row))
                self.bar.advance(1, f"{row.slide_id}: {row.tiles} {self.product}")


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f".{mf.WORK}.", suffix=".tmp", dir=out, ignore_cleanup_errors=True) as name:
        # mkdtemp makes it private to its owner; workers in containers are others.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o777 & ~umask)
        yield Path(name)


def _run(
    runner: Any, options: Any, job: TilesJob, refs: "Sequence[SlideRef]", timings: mf.Timings, strict: bool
) -> dict[str, mf.SlideRow]:
    if not refs:
        return {}
    # Workers see their own slide's folder alone, and outdated shards lie at the top of it all.
    for ref in refs:
        job.folder.forget(ref.id, job.folder.layout.files)
    with _work_folder(job.folder.out) as work:
        tasks: list[Task] = [(index, os.fsencode(ref.id), os.fsencode(ref.path.absolute()), job.mpp[ref.id]) for index, ref in enumerate(refs)]
        with console.progress(job.title, len(refs), f"{job.unit}s") as bar:
            watch = _Watch(work, bar, job.product)
            _pipeline(runner, options, tasks, PrepareSlide(job, work, strict), watch.look)
        outcomes = [mf.read_stage(outcome_path(work, index)) for index in range(len(refs))]
    for outcome in outcomes:
        if outcome is not None and "stop" in outcome:
            raise WavepathError(outcome["stop"])
    rows = {ref.id: _taken(job, ref, outcome) for ref, outcome in zip(refs, outcomes, strict=True)}
    for row, outcome in zip(rows.values(), outcomes, strict=True):
        timings.add(row.slide_id, outcome["seconds"], row.tiles)
    return rows


class _Pipeline(threading.Thread):
    """The pipeline, in a thread of its own: some runners only return when all is done, and the local one never when a worker process dies."""

    def __init__(self, runner: Any, options: Any, tasks: Sequence[Task], prepare_slide: PrepareSlide):
        super().__init__(daemon=True)
        self.runner, self.options, self.tasks, self.prepare_slide = runner, options, tasks, prepare_slide
        self.result: Any = None
        self.state = ""
        self.error: BaseException | None = None

    def run(self) -> None:
        import apache_beam as beam

        try:
            pipeline = beam.Pipeline(runner=self.runner, options=self.options)
            # Reshuffled, so that the slides are spread over the workers and each is on its own when something is done again.
            slides = pipeline | "slides" >> beam.Create(self.tasks, reshuffle=False) | "spread" >> beam.Reshuffle()
            slides | "prepare slide" >> beam.Map(self.prepare_slide).with_output_types(str)
            self.result = pipeline.run()
            self.state = str(self.result.wait_until_finish() or self.result.state)
        except (Exception, SystemExit) as error:
            self.error = error

    def cancel(self) -> None:
        """Ends what it has started, as far as the runner can."""
        import psutil

        if self.result is not None:
            with contextlib.suppress(Exception):
                self.result.cancel()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _WORKER in child.cmdline():
                    child.kill()


@contextlib.contextmanager
def _lost_workers() -> Iterator[list[str]]:
    """Notes the worker processes of the local runner that die: it waits for their answers forever."""
    lost: list[str] = []
    before = threading.excepthook

    def note(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, RuntimeError) and "Worker subprocess exited" in str(args.exc_value):
            lost.append(str(args.exc_value))
        else:
            before(args)

    threading.excepthook = note
    try:
        yield lost
    finally:
        threading.excepthook = before


def _pipeline(
    runner: Any, options: Any, tasks: Sequence[Task], prepare_slide: PrepareSlide, look: Callable[[], None], seconds: float = _POLL_SECONDS
) -> None:
    """Runs the pipeline to its end; `look` is called every few seconds, and at last."""
    from apache_beam.runners.runner import PipelineState

    pipeline = _Pipeline(runner, options, tasks, prepare_slide)
    with _lost_workers() as lost:
        pipeline.start()
        try:
            while pipeline.is_alive() and not lost:
                pipeline.join(seconds)
                look()
        except BaseException:
            pipeline.cancel()
            raise
    again = "run this again, finished slides are kept"
    if lost:
        pipeline.cancel()
        raise WavepathError(f"a worker process of the {LOCAL} died ({lost[0]}; 137 is a lack of memory: take fewer workers); {again}")
    if isinstance(pipeline.error, WavepathError):
        raise pipeline.error
    if pipeline.error is not None:
        raise WavepathError(f"the Beam pipeline failed ({_cause(pipeline.error)}); {again}") from pipeline.error
    if pipeline.state != PipelineState.DONE:
        raise WavepathError(f"the Beam pipeline ended as {pipeline.state}, see its log; {again}")


def _cause(error: BaseException) -> str:
    """The last line of what a worker or the runner said; Beam hands over a whole traceback as one message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return mf.printable(lines[-1][:400])


def _taken(job: TilesJob, ref: "SlideRef", outcome: dict[str, Any] | None) -> mf.SlideRow:
    """The row of a slide, once it is sure that what a worker wrote is whole here too."""
    shared = f"--out {job.folder.out} must be one folder for all workers and this machine (NFS, Lustre, ...); run this again, whole slides are kept"
    if outcome is None:
        raise DatasetError(f"{mf.printable(ref.id)}: no worker has said what came of it; {shared}")
    row = mf.SlideRow(**outcome["row"])
    if row.status == mf.FAILED:
        # Workers know the slide by its whole path: the manifest names it as it was given.
        return mf.SlideRow(**{**vars(row), "reason": row.reason.replace(*(mf.printable(str(path)) for path in (ref.path.absolute(), ref.path)))})
    job.folder.adopt(ref.id)
    kept, reason = job.folder.kept(ref.id, job.fingerprint(ref))
    if kept != row:
        raise DatasetError(f"{ref.id}: a worker has finished it, but seen from here {reason or 'its files are not there'}; {shared}")
    return row
