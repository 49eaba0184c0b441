"""The real training step of a config, compiled for a topology from shapes alone: its memory and its collectives, or what the compiler refused.

A compiled TPU program cannot be read back from JAX's persistent cache without a TPU, so what is wanted of it is kept instead: its sizes and its text,
by the hash of what went into the compiler. A plan that is asked for again only traces its step.
"""

import dataclasses
import gzip
import hashlib
import os
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavepath.errors import WavepathError
from wavepath.files import atomic_path, read_json, write_json
from wavepath.planning import hlo, standins
from wavepath.planning.topology import CPU, LOCAL, Topology

RECORD = 1  # form of a record; another one is not read
# Read by the compilers when they start. How many CPU devices there are is in the topology's name.
_FLAGS, _DEVICES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS"), "--xla_force_host_platform_device_count"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([0-9.]+)([KMGT]?)i?B?"


class CompilerError(WavepathError):
    """The compiler failed, and not for want of memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler plans them.

    Attributes:
        arguments: the state and the batch.
        outputs: the new state and the metrics.
        aliased: of the outputs, those that take the place of arguments.
        temporary: everything in between.
        peak: the most that is alive at any time, arguments included; as the compiler says, else the sum of the above. Temporary memory may be
            larger: it is reserved in one piece, gaps included.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    peak: int

    @property
    def reserved(self) -> int:
        """What the device must have: arguments, the outputs that are not among them, and temporary memory."""
        return max(self.peak, self.arguments + self.outputs - self.aliased + self.temporary)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that was compiled, or refused for want of memory.

    Attributes:
        fits: whether the devices have the memory; None where that is not known.
        memory: None where it was refused.
        program: what the compiled program does; None where it was refused.
        needed: bytes that the compiler asked for where it refused; None where it did not say.
        limit: bytes of a device that programs may use, where known.
        message: the compiler's, where it refused.
        lowering, compiling: seconds.
        kept: whether an earlier call had compiled the same program.
    """

    fits: bool | None
    memory: Memory | None
    program: hlo.Program | None
    needed: int | None = None
    limit: int | None = None
    message: str = ""
    lowering: float = 0.0
    compiling: float = 0.0
    kept: bool = False

    @property
    def used(self) -> int | None:
        """Bytes that the step reserves on a device, or what it would have taken (of some refusals temporary memory alone)."""
        return self.memory.reserved if self.memory else self.needed


def compile_step(config: ConfigDict, topology: Topology, *, cache: Path | None = None) -> Compiled:
    """Compiles `train_step` of a config for a topology. Neither its devices nor any data are needed.

    Args:
        config: durations are steps (`standins.resolved`); `config.parallel.devices` is 0.
        topology: the devices.
        cache: folder of records; None keeps none.

    Raises:
        ConfigError: settings that do not fit together or do not divide.
        CompilerError: whatever the compiler refuses for another reason than memory.
    """
    from jax.errors import JaxRuntimeError

    from wavepath.training import parallel

    devices = parallel.make(config.parallel, topology.devices)
    devices.check(int(config.batch_size), int(config.optim.accumulate))
    start = time.perf_counter()
    lowered = devices.lower_step(standins.build_task(config))
    lowering = time.perf_counter() - start
    record = None if cache is None else Record(cache, _key(lowered.as_text(), topology))
    if record is not None and (found := record.read()) is not None:
        return dataclasses.replace(found, limit=_limit(topology) or found.limit, lowering=lowering, kept=True)
    start, text = time.perf_counter(), ""
    try:
        compiled = _without_cache(lowered.compile)
    except JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise CompilerError(
                f"the compiler failed on the step of task {config.task} for {topology.name} ({' '.join(str(error).split())[:300]}); try another"
                " topology, or another program, as --config.model.scan=True or another recomputation is"
            ) from None
        needed, limit = refusal(str(error))
        result = Compiled(False, None, None, needed, _limit(topology) or limit, " ".join(str(error).split())[:400])
    else:
        memory, limit, text = memory_of(compiled.memory_analysis(), topology.family != CPU), _limit(topology), compiled.as_text()
        # The TPU compiler has refused what does not fit; of others the numbers tell.
        fits = True if _is_tpu(topology) else None if limit is None else memory.reserved <= limit
        result = Compiled(fits, memory, hlo.read(text), None, limit)
    result = dataclasses.replace(result, lowering=lowering, compiling=time.perf_counter() - start)
    if record is not None:
        record.write(result, text)
    return result


class Record:
    """What is kept of a compiled step: its sizes, and its text, which is read anew each time."""

    def __init__(self, folder: Path, key: str):
        self.sizes, self.text = folder / f"{key}.json", folder / f"{key}.hlo.gz"

    def read(self) -> Compiled | None:
        """None where there is none, or one of another form.

        Raises:
            WavepathError: it is damaged.
        """
        if not self.sizes.is_file():
            return None
        value = read_json(self.sizes)
        try:
            if value.pop("record") != RECORD:
                return None
            memory = Memory(**value.pop("memory")) if value["memory"] else value.pop("memory")
            program = hlo.read(gzip.decompress(self.text.read_bytes()).decode()) if memory else None
            return Compiled(memory=memory, program=program, **value)
        except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError, zlib.error) as error:
            raise WavepathError(f"{self.sizes}, kept of an earlier plan, is damaged ({error}); delete it and run the command again") from None

    def write(self, result: Compiled, text: str) -> None:
        self.sizes.parent.mkdir(parents=True, exist_ok=True)
        value = dataclasses.asdict(dataclasses.replace(result, program=None))
        del value["program"]
        if text:
            with atomic_path(self.text) as path:
                path.write_bytes(gzip.compress(text.encode(), compresslevel=5, mtime=0))
        write_json(self.sizes, {"record": RECORD, **value})


def _without_cache(compile_it: Callable[[], Any]) -> Any:
    # Writing to JAX's own cache costs seconds, and reading back fails where the devices are not here.
    import jax

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return compile_it()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _is_tpu(topology: Topology) -> bool:
    return topology.chip is not None and topology.chip.kind.startswith("TPU")


def _limit(topology: Topology) -> int | None:
    """Bytes of a device that a program may use: what a device that is here says, else the table; a CPU has no limit of its own."""
    stats = topology.devices[0].memory_stats() if topology.family == LOCAL else None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    return topology.chip.usable if topology.chip else None


def memory_of(stats: Any, has_peak: bool = True) -> Memory:
    """The numbers of `jax.stages.Compiled.memory_analysis()`.

    Args:
        stats: of any backend.
        has_peak: whether its peak is one. That of the CPU compiler leaves most temporary memory out.
    """
    arguments, outputs = int(stats.argument_size_in_bytes), int(stats.output_size_in_bytes)
    aliased, temporary = int(stats.alias_size_in_bytes), int(stats.temp_size_in_bytes)
    peak = int(getattr(stats, "peak_memory_in_bytes", 0) or 0) if has_peak else 0
    return Memory(arguments, outputs, aliased, temporary, peak or arguments + outputs - aliased + temporary)


def refusal(message: str) -> tuple[int | None, int | None]:
    """What a compiler asked for and what it had, in bytes, from its message; None for what it does not say.

    Known forms: `Used 20.1G of 15.75G hbm`, and `the total memory required for HLO temporaries (299.14G) exceeds available HBM (15.75G)`.
    """
    for pattern in (rf"[Uu]sed {_SIZE} of {_SIZE} hbm", rf"required[^()]*\({_SIZE}\) exceeds available HBM \({_SIZE}\)"):
        if found := re.search(pattern, message):
            used, unit, limit, other = found.groups()
            return int(float(used) * _UNITS[unit]), int(float(limit) * _UNITS[other])
    return None, None


def versions() -> dict[str, str]:
    """Of what decides about a compiled program."""
    import importlib.metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu", "wavepath"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _key(text: str, topology: Topology) -> str:
    parts = [str(RECORD), topology.name, *(f"{name} {version}" for name, version in versions().items())]
    if topology.family == LOCAL:  # another machine with the same folder, or the same with fewer devices
        parts.append(f"{topology.devices[0].device_kind} x {len(topology.devices)}, {_limit(topology)} bytes")
    for name in _FLAGS:
        words = [word for word in os.environ.get(name, "").split() if not word.startswith(_DEVICES)]
        parts += [f"{name}={' '.join(words)}"] if words else []
    parts.append(text)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
