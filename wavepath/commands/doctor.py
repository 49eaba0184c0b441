"""Checks this machine: what would stop a run, before it is started.

Looks at the versions of python and of every dependency, the devices that JAX sees, TensorFlow (used for input only, so it must leave the
GPU alone), OpenSlide and the image codecs, memory, disk and the cache folder, and runs a tiny compiled step and a record file there and
back. One line for each: ok, warn or FAIL, and the fix. The exit code is 0 without a FAIL, else 1.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "FAIL"
_MIN_MEMORY_GB = 4.0  # `prepare` is held under 2.5 GB, a small training run beside it
_MIN_DISK_GB = 5.0


class Check(NamedTuple):
    """One line of the table. `fix` says what to do where the status is not ok."""

    name: str
    status: str
    found: str
    fix: str = ""


def check_python(requires: str | None = None) -> Iterator[Check]:
    """The interpreter against `requires-python` of the installed package."""
    from packaging.specifiers import SpecifierSet

    if requires is None:
        requires = importlib.metadata.metadata("wavepath").get("Requires-Python") or ""
    version = platform.python_version()
    found = f"{version} ({sys.executable})"
    if SpecifierSet(requires).contains(version, prereleases=True):
        yield Check("python", OK, found)
    else:
        yield Check("python", FAIL, found, f"use a python {requires}")


def check_dependencies(requirements: list[str] | None = None) -> Iterator[Check]:
    """Every requirement of the installed package; of the extras only those that are installed in a wrong version."""
    from packaging.requirements import Requirement

    if requirements is None:
        requirements = importlib.metadata.requires("wavepath") or []
    good = []
    for text in requirements:
        requirement = Requirement(text)
        # "extra" is set in the marker of optional requirements alone, which are false without it.
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                yield Check(requirement.name, FAIL, "not installed", f"pip install '{wanted}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
        else:
            yield Check(requirement.name, WARN if optional else FAIL, f"{version}, wanted {requirement.specifier}", f"pip install '{wanted}'")
    chief = [name for name in good if name.split()[0] in ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu")]
    yield Check("dependencies", OK, f"{len(good)} as required; {', '.join(sorted(set(chief)))}")


def check_constraints(path: Path | None = None) -> Iterator[Check]:
    """The versions that this release was tested with (`constraints.txt` of a checkout); others may work."""
    path = path or Path(__file__).resolve().parents[2] / "constraints.txt"
    if not path.is_file():
        return
    different, count = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, wanted = line.partition("#")[0].strip().partition("==")
        if not equals:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the constraints cover every extra, and nobody has them all
        count += 1
        if version != wanted:
            different.append(f"{name} {version} (tested: {wanted})")
    if different:
        shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
        yield Check("constraints", WARN, shown, f"pip install -c {path.name} -e .")
    else:
        yield Check("constraints", OK, f"{count} packages in the tested versions")


def check_jax() -> Iterator[Check]:
    """The devices JAX sees, and whether the machine has an accelerator that it does not see."""
    import jax

    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    yield Check("devices", OK, f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()}), jax {jax.__version__}")
    if jax.default_backend() == "cpu":
        if shutil.which("nvidia-smi"):
            yield Check("accelerator", WARN, "an NVIDIA driver is here, JAX runs on the CPU", "pip install 'wavepath[cuda]', or unset JAX_PLATFORMS")
        elif list(Path("/dev").glob("accel[0-9]*")):
            yield Check("accelerator", WARN, "TPU chips are here, JAX runs on the CPU", "pip install 'wavepath[tpu]', or unset JAX_PLATFORMS")


def check_step() -> Iterator[Check]:
    """A tiny compiled step with a known result."""
    import time

    import jax
    import jax.numpy as jnp

    start = time.monotonic()
    value = float(jax.jit(jax.grad(lambda x: jnp.sum(x @ x)))(jnp.ones((8, 8)))[0, 0])
    if value == 16.0:
        yield Check("compiled step", OK, f"right, {time.monotonic() - start:.1f} s")
    else:
        yield Check("compiled step", FAIL, f"a gradient of 16 came out as {value}", "update the driver, or run with JAX_PLATFORMS=cpu")


def check_tensorflow(python: str = sys.executable) -> Iterator[Check]:
    """Imports TensorFlow in a process of its own: a build for another CPU dies there, not here."""
    code = "import tensorflow as tf; print(tf.__version__, len(tf.config.list_physical_devices('GPU')))"
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"died with code {process.returncode}"])[-1]
        yield Check("tensorflow", FAIL, reason, "pip install --force-reinstall tensorflow-cpu")
        return
    version, gpus = process.stdout.split()[-2:]
    if int(gpus):
        fix = "pip uninstall tensorflow; pip install tensorflow-cpu"
        yield Check("tensorflow", WARN, f"{version} sees {gpus} GPU and may take memory from JAX", fix)
    else:
        yield Check("tensorflow", OK, f"{version}, on the CPU only")


def check_openslide() -> Iterator[Check]:
    """OpenSlide's C library."""
    import openslide

    yield Check("openslide", OK, f"library {openslide.__library_version__}, python {openslide.__version__}")


def check_codecs() -> Iterator[Check]:
    """The codecs that slides use, each by a picture there and back."""
    import imagecodecs
    import numpy as np

    picture = np.full((32, 32, 3), 128, np.uint8)
    for name, label in (("jpeg8", "jpeg"), ("jpeg2k", "jpeg2k"), ("png", "png")):
        try:
            encoded = getattr(imagecodecs, f"{name}_encode")(picture)
            decoded = getattr(imagecodecs, f"{name}_decode")(encoded)
            if abs(int(decoded.mean()) - 128) > 2:
                raise ValueError(f"a grey of 128 came back as {decoded.mean():.0f}")
        except Exception as error:
            yield Check(f"codec {label}", FAIL, f"{type(error).__name__}: {error}", "pip install --force-reinstall imagecodecs")
        else:
            yield Check(f"codec {label}", OK, f"imagecodecs {imagecodecs.__version__}")


def check_records() -> Iterator[Check]:
    """An array_record file there and back."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "probe.array_record")
        writer = ArrayRecordWriter(path, "group_size:1")
        for index in range(3):
            writer.write(b"tile %d" % index)
        writer.close()
        reader = ArrayRecordReader(path)
        records = reader.read([2, 0])
        reader.close()
    if records == [b"tile 2", b"tile 0"]:
        yield Check("array_record", OK, "written and read back")
    else:
        yield Check("array_record", FAIL, f"wrote three records, read {records}", "pip install --force-reinstall array_record")


def check_memory(needed_gb: float = _MIN_MEMORY_GB) -> Iterator[Check]:
    """Free memory and cores."""
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    found = f"{free:.1f} of {total:.1f} GB free, {os.cpu_count()} cores"
    if free >= needed_gb:
        yield Check("memory", OK, found)
    else:
        yield Check("memory", WARN, found, f"close other programs; {needed_gb:g} GB are enough for small runs")


def check_disk(folder: Path | None = None, needed_gb: float = _MIN_DISK_GB) -> Iterator[Check]:
    """Free disk space where one stands."""
    folder = folder or Path.cwd()
    free = shutil.disk_usage(folder).free / 2**30
    found = f"{free:.1f} GB free in {folder}"
    if free >= needed_gb:
        yield Check("disk", OK, found)
    else:
        yield Check("disk", WARN, found, "write to another disk with --out and --workdir; a slide's tiles take about 0.1 to 1 GB")


def check_cache(folder: str | None = None) -> Iterator[Check]:
    """The folder of compiled programs. Without it a run works, but compiles anew each time."""
    folder = folder if folder is not None else os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder:
        yield Check("cache", WARN, "off: every run compiles anew", "set JAX_COMPILATION_CACHE_DIR or WAVEPATH_CACHE to a folder")
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Check("cache", WARN, f"{folder}: {error.strerror}", "set WAVEPATH_CACHE to a folder that you may write")
    else:
        yield Check("cache", OK, folder)


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": check_python, "dependencies": check_dependencies, "constraints": check_constraints,
    "memory": check_memory, "disk": check_disk, "cache": check_cache,
    "openslide": check_openslide, "codecs": check_codecs, "array_record": check_records,
    "devices": check_jax, "compiled step": check_step, "tensorflow": check_tensorflow,
}  # fmt: skip


def examine(checks: dict[str, Callable[[], Iterator[Check]]] | None = None) -> list[Check]:
    """Runs every check. One that raises is a FAIL with its reason, and the others go on."""
    from wavepath.console import progress

    checks = CHECKS if checks is None else checks
    lines: list[Check] = []
    with progress("checking", len(checks), "checks") as bar:
        for name, check in checks.items():
            try:
                lines.extend(check())
            except importlib.metadata.PackageNotFoundError:
                lines.append(Check(name, FAIL, "wavepath is not installed, only on the path", "pip install -e . in the checkout"))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                lines.append(Check(name, FAIL, reason[:200], "reinstall with the constraints file: pip install -c constraints.txt wavepath"))
            bar.advance(1, name)
    return lines


def add_arguments(parser) -> None:
    """The flags of `wavepath doctor`."""
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args) -> int:
    """Prints the table; 1 where a check failed."""
    from wavepath.console import say, table
    from wavepath.errors import EXIT_NOTHING, EXIT_OK

    lines = examine()
    if args.json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        print(table(("check", "status", "found", "fix"), lines))
    failed = [line.name for line in lines if line.status == FAIL]
    warned = [line.name for line in lines if line.status == WARN]
    say(f"{len(failed)} failed{': ' + ', '.join(failed) if failed else ''}; {len(warned)} warnings{': ' + ', '.join(warned) if warned else ''}")
    return EXIT_NOTHING if failed else EXIT_OK
