"""Slides to tiles by Apache Beam: the slides of one `prepare` fan out over workers, on this machine or on a cluster.

    Create(slides) -> Reshuffle -> PrepareSlide

A worker does to a slide what the local path does (`SlideJob.one_slide`), and writes it to the same place, so the dataset is the same to the byte.
Manifest, order of the shards and metadata are the last step, once all slides are done, and are taken by the process that started the pipeline.
Slides, output and that process share one file system: a PCollection of tiles would send every pixel through the runner, and the output of a slide
would not be whole or absent.

Runners repeat work: after a failure, or at once where a worker seems lost. What a worker has finished it finds again (its outcome, or the slide's
closing file) and does not repeat; what another is at it leaves to that one (`wavepath.data.beam_worker`). All workers report into one folder of the
run, `OUT/.work.<name>.tmp`: one file a slide, which is the progress and the result. When that folder is gone, the run is over, and late workers end.
"""

import contextlib
import functools
import logging
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wavepath import console
from wavepath.data import beam_worker
from wavepath.data import manifest as mf
from wavepath.data.beam_worker import PrepareSlide, Task, outcome_path
from wavepath.data.prepare import RunSlides, TilesJob
from wavepath.data.slide_runs import complaint
from wavepath.errors import ConfigError, DatasetError, WavepathError

if TYPE_CHECKING:
    from wavepath.data.slides import SlideRef

LOCAL = "DirectRunner"
_POLL_SECONDS = 2.0
_LATE_SECONDS = 90.0  # NFS may hold on to "no such file" for a minute
_WORKER = beam_worker.__name__  # of the local runner's worker processes
_WATCHERS = ("run_worker", "beam_control_read", "read_grpc_client_inputs")  # threads of Beam's in the process of the local runner
_Found = TypeVar("_Found")


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
    from apache_beam.portability import python_urns
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    class Runner(fn_runner.FnApiRunner):
        """Its worker processes are ours."""

        in_this_process = True

        def run_via_runner_api(self, pipeline_proto: Any, options: Any) -> Any:
            command = shlex.join([sys.executable, "-m", _WORKER])  # in place of the shell that Beam gives it to, which would tell of its death
            for environment in pipeline_proto.components.environments.values():
                if environment.urn == python_urns.SUBPROCESS_SDK:
                    environment.payload = f"{'exec ' if os.name == 'posix' else ''}{command}".encode()
            return super().run_via_runner_api(pipeline_proto, options)

    # Worker processes tell every step of theirs to the terminal; what goes wrong with a slide is in its outcome.
    encoded = JobServiceHandle.encode_pipeline_options({"default_sdk_harness_log_level": "ERROR", **options.get_all_options(drop_default=True)})
    return Runner(provision_info=fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)))


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
        late = _Late()
        places = [outcome_path(work, index) for index in range(len(refs))]
        for outcome in map(mf.read_stage, places):
            if outcome is not None and "stop" in outcome:
                raise WavepathError(outcome["stop"])
        outcomes = [late.wait(work, functools.partial(mf.read_stage, place)) for place in places]
        rows = {ref.id: _taken(job, ref, outcome, late) for ref, outcome in zip(refs, outcomes, strict=True)}
    for row, outcome in zip(rows.values(), outcomes, strict=True):
        timings.add(row.slide_id, outcome["seconds"], row.tiles)
    workers = len({outcome["worker"] for outcome in outcomes})
    console.say(f"{len(rows)} {job.unit}{'s' * (len(rows) != 1)} by {workers} worker process{'es' * (workers != 1)}")
    return rows


class _Late:
    """Patience with a network file system that does not show yet what another machine has written; a little for the whole run, not for each slide."""

    def __init__(self) -> None:
        self.until: float | None = None

    def wait(self, folder: Path, look: Callable[[], _Found | None]) -> _Found | None:
        """What `look` finds, as soon as it finds something; None when the time is up. `folder` is listed in between: NFS then asks the server."""
        while True:
            with contextlib.suppress(OSError):
                os.listdir(folder)
            if (found := look()) is not None:
                return found
            if self.until is None:
                self.until = time.monotonic() + _LATE_SECONDS
                console.say(f"what workers wrote is not all to be seen here yet; waiting up to {_LATE_SECONDS:.0f} s for the file system")
            if time.monotonic() >= self.until:
                return None
            time.sleep(min(1.0, _LATE_SECONDS / 10))


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
        # Beam's threads that watch over them complain of it, once each.
        for thread in threading.enumerate():
            if thread.name in _WATCHERS:
                thread.join(_POLL_SECONDS)


@contextlib.contextmanager
def _lost_workers(runner: Any) -> Iterator[list[str]]:
    """Notes the worker processes of the local runner that die: it waits for their answers forever. What its threads and its log have to say of
    broken lines to them is left out; of a cluster's pipeline nothing is.
    """
    lost: list[str] = []
    if not getattr(runner, "in_this_process", False):
        yield lost
        return
    import grpc

    before, log = threading.excepthook, logging.getLogger("apache_beam")
    level = log.level

    def note(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, RuntimeError) and "Worker subprocess exited" in str(args.exc_value):
            lost.append(str(args.exc_value))
        elif not isinstance(args.exc_value, grpc.RpcError):
            before(args)

    threading.excepthook = note
    log.setLevel(logging.CRITICAL)
    try:
        yield lost
    finally:
        threading.excepthook = before
        log.setLevel(level)


def _pipeline(
    runner: Any, options: Any, tasks: Sequence[Task], prepare_slide: PrepareSlide, look: Callable[[], None], seconds: float = _POLL_SECONDS
) -> None:
    """Runs the pipeline to its end; `look` is called every few seconds, and at last."""
    from apache_beam.runners.runner import PipelineState

    pipeline = _Pipeline(runner, options, tasks, prepare_slide)
    with _lost_workers(runner) as lost:
        pipeline.start()
        try:
            while pipeline.is_alive() and not lost:
                pipeline.join(seconds)
                look()
        except BaseException:
            pipeline.cancel()
            raise
        first = lost[0] if lost else ""
        if first:
            pipeline.cancel()
    again = "run this again, finished slides are kept"
    if first:
        raise WavepathError(f"a worker process of the {LOCAL} died ({first}{_why_lost(first)}); {again}")
    if isinstance(pipeline.error, WavepathError):
        raise pipeline.error
    if pipeline.error is not None:
        raise WavepathError(f"the Beam pipeline failed ({_cause(pipeline.error)}); {again}") from pipeline.error
    if pipeline.state != PipelineState.DONE:
        raise WavepathError(f"the Beam pipeline ended as {pipeline.state}, see its log; {again}")


def _why_lost(message: str) -> str:
    """What the code means that a worker process ended with: a shell says 128 more than the signal, Python the signal's negative."""
    code = message.split()[-1]
    return ": killed, most often for lack of memory; take fewer workers" if code in ("137", "-9") else ""


def _cause(error: BaseException) -> str:
    """The last line of what a worker or the runner said; Beam hands over a whole traceback as one message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return mf.printable(lines[-1][:400])


def _taken(job: TilesJob, ref: "SlideRef", outcome: dict[str, Any] | None, late: _Late) -> mf.SlideRow:
    """The row of a slide, once it is sure that what a worker wrote is whole here too."""
    shared = f"--out {job.folder.out} must be one folder for all workers and this machine (NFS, Lustre, ...); run this again, whole slides are kept"
    if outcome is None:
        raise DatasetError(f"{mf.printable(ref.id)}: no worker has said what came of it; {shared}")
    row = mf.SlideRow(**outcome["row"])
    if row.status == mf.FAILED:
        # Workers know the slide by its whole path: the manifest names it as it was given.
        return mf.SlideRow(**{**vars(row), "reason": row.reason.replace(*(mf.printable(str(path)) for path in (ref.path.absolute(), ref.path)))})
    reason, expected = "", job.fingerprint(ref)

    def whole() -> bool | None:
        nonlocal reason
        job.folder.adopt(ref.id)
        kept, reason = job.folder.kept(ref.id, expected)
        return True if kept == row else None

    if not late.wait(job.folder.slide(ref.id), whole):
        raise DatasetError(f"{ref.id}: a worker has finished it, but seen from here {reason or 'its files are not there'}; {shared}")
    return row
