"""Devices to plan for, which need not be here: slices of TPUs by libtpu alone, any number of CPU devices, or what this machine has.

    v5e:16x16    256 TPU v5e chips; likewise v4:2x2x2, v5p:4x4x4, v6e:4x4
    cpu:8        eight CPU devices of one host
    local        the devices of this machine

The TPU compiler comes with the package libtpu (extra `[tpu]`) and needs no TPU. One device is one chip throughout.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wavepath.errors import ConfigError
from wavepath.planning.chips import CHIPS, GIGA, Chip, chip_of

CPU, LOCAL = "cpu", "local"
EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:4x4, v4:2x2x4, cpu:8, local"
DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
# An axis of two closes to a ring at this length; three do where each is a multiple of it; others are lines (Cloud TPU documentation, architecture).
_RING = {"v4": 4, "v5p": 4, "v5e": 16, "v6e": 16}
_HOST = (2, 2, 1)  # chips of a host, along each axis
_LARGEST_CPU = 4096
_LARGEST_AXIS = {"v4": 16, "v5p": 24, "v5e": 16, "v6e": 16}


@dataclass(frozen=True)
class Topology:
    """Devices that a step is compiled for.

    Attributes:
        name: as on the command line.
        family: a name of `chips.CHIPS`, `cpu` or `local`.
        shape: chips along each axis; one number where there are no axes.
        devices: one for each chip, in order.
        chip: what one of them can do; None where the table does not have it.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    devices: tuple[Any, ...]
    chip: Chip | None

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that each chip can send in a collective over all of them, in one direction; None where that is not known."""
        return None if self.chip is None else torus_bandwidth(self.chip, self.shape)


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """The family and shape that a text names: `"v5e:4x4"` -> `("v5e", (4, 4))`, `"cpu:8"` -> `("cpu", (8,))`, `"local"` -> `("local", ())`.

    Raises:
        ConfigError: anything else, with examples.
    """
    family, _, rest = text.strip().lower().partition(":")
    if family == LOCAL and not rest:
        return LOCAL, ()
    if family not in (CPU, *DIMENSIONS):
        gpu = "; GPUs are planned for on a machine that has one, as local" if family in CHIPS else ""
        raise ConfigError(f"--topology {text!r} is unknown; give one such as {EXAMPLES}{gpu}")
    axes = rest.split("x")
    if not all(re.fullmatch("[1-9][0-9]{0,4}", axis) for axis in axes):
        raise ConfigError(f"--topology {text!r} has no size; give one such as {EXAMPLES}")
    shape = tuple(map(int, axes))
    if family == CPU:
        if len(shape) != 1 or shape[0] > _LARGEST_CPU:
            raise ConfigError(f"--topology {text!r}: CPUs are given by their number, as in cpu:8 (at most {_LARGEST_CPU})")
        return CPU, shape
    if len(shape) != DIMENSIONS[family]:
        axes = "x".join("4" * DIMENSIONS[family])
        raise ConfigError(f"--topology {text!r}: {family} has {DIMENSIONS[family]} axes; give one such as {family}:{axes}")
    if max(shape) > _LARGEST_AXIS[family]:
        raise ConfigError(f"--topology {text!r}: an axis of {family} has at most {_LARGEST_AXIS[family]} chips; give one such as {EXAMPLES}")
    host = _host(shape)
    if any(size % part for size, part in zip(shape, host, strict=False)):
        raise ConfigError(f"--topology {text!r}: a host has 2x2 chips, which do not fill it; give even sizes, or at most 2 chips as in 1x1 or 1x2")
    return family, shape


def _host(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips of one host along each axis; slices of one or two chips are parts of a host."""
    return (*shape, 1, 1)[:3] if math.prod(shape) <= 2 else _HOST


def prepare_environment(texts: Sequence[str]) -> None:
    """Sets what JAX and libtpu read when they start, for these topologies. Call it before the first use of JAX; what the user has set stays.

    Raises:
        ConfigError: a text that names no topology.
    """
    families = [parse(text) for text in texts]
    if LOCAL in [family for family, _ in families]:
        return
    # Nothing is computed: an accelerator that is here stays free, and libtpu does not look for one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("TPU_LOG_DIR", "disabled"),
        ("TPU_STDERR_LOG_LEVEL", "3"), ("TPU_MIN_LOG_LEVEL", "3"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    wanted = max((shape[0] for family, shape in families if family == CPU), default=0)
    flag = "--xla_force_host_platform_device_count"
    if wanted and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={wanted}".strip()


def find(text: str) -> Topology:
    """The devices that a text names.

    Raises:
        ConfigError: unknown, or one that libtpu does not know; libtpu is not installed; fewer CPU devices than asked for.
    """
    family, shape = parse(text)
    name = text.strip().lower()
    # Imported here: the environment is read when it starts.
    import jax

    if family == CPU:
        devices = jax.devices("cpu")
        if len(devices) < shape[0]:
            raise ConfigError(
                f"--topology {name}: JAX has started with {len(devices)} CPU device{'s' if len(devices) > 1 else ''}; set"
                f" XLA_FLAGS=--xla_force_host_platform_device_count={shape[0]} before it starts"
            )
        return Topology(name, CPU, shape, tuple(devices[: shape[0]]), None)
    if family == LOCAL:
        devices = jax.local_devices()
        return Topology(name, LOCAL, (len(devices),), tuple(devices), chip_of(devices[0].device_kind))
    devices = _tpu(name, family, shape)
    return Topology(name, family, shape, tuple(devices), CHIPS[family])


def _tpu(name: str, family: str, shape: tuple[int, ...]) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f'--topology {name} needs the TPU compiler (no TPU); install it with pip install "wavepath[tpu]", or plan for cpu:8')
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": _host(shape)}
    if family == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as Cloud TPUs start
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--topology {name}: the TPU compiler refuses it ({reason[:200]}); give one such as {EXAMPLES}") from None


def torus_bandwidth(chip: Chip, shape: Sequence[int]) -> float:
    """Bytes a second in one direction that a chip can use in a collective over a whole slice.

    Every axis longer than 1 adds its two links; one that is no ring, half of them, since what travels on a line passes its middle both ways. Chips
    that are not in a torus (GPUs) use all of their links.

    Args:
        chip: from the table.
        shape: chips along each axis.
    """
    if chip.name not in _RING:
        return chip.link_bandwidth
    axis = 2 * chip.link_bandwidth / chip.links
    ring = _RING[chip.name]
    torus = len(shape) == 3 and all(size % ring == 0 for size in shape)
    return sum(axis * (1.0 if torus or (len(shape) == 2 and size == ring) else 0.5) for size in shape if size > 1)


def describe(topology: Topology) -> str:
    """One line: chips, hosts, memory, links."""
    count = len(topology.devices)
    if topology.chip is None:
        return f"{topology.name}: {count} {topology.devices[0].device_kind} device{'s' if count > 1 else ''}"
    chip, hosts = topology.chip, topology.hosts
    return (
        f"{topology.name}: {count} chip{'s' if count > 1 else ''} {chip.name} ({chip.kind}) on {hosts} host{'s' if hosts > 1 else ''},"
        f" {chip.usable / 2**30:.4g} GiB usable at {chip.hbm_bandwidth / GIGA:.4g} GB/s, {topology.bandwidth / GIGA:.4g} GB/s between chips"
    )
