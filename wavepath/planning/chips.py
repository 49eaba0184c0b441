"""What accelerators can do at most: one table, with its sources. Everything that speaks of a peak, a roofline or MFU takes its numbers here.

The numbers are the vendors' maxima of one chip for dense matrices. No CPU is in the table: what one reaches is a matter of measurement.
"""

from dataclasses import dataclass

GIB, TERA, GIGA = 2**30, 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: what it is called here and on the command line.
        kind: its `device_kind` as JAX gives it.
        peak: floating-point operations a second (a multiplication and an addition are two) by the dtype of a matrix product's operands, multiplied
            as JAX does by default: float32 in one bfloat16 pass on TPUs, in TF32 on GPUs.
        hbm: bytes of its memory.
        usable: bytes of them that a program may have: what the TPU compiler (libtpu 0.0.42) says where it refuses one; of a GPU its driver tells.
        hbm_bandwidth: bytes a second between the chip and its memory.
        link_bandwidth: bytes a second that it can send to its neighbours, all links together, in one direction.
        links: how many links that are: neighbours in a torus, or NVLink links.
        source: where the numbers come from.
    """

    name: str
    kind: str
    peak: dict[str, float]
    hbm: int
    usable: int
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    source: str


def _tpu(name: str, kind: str, tera: float, gib: int, usable: float, hbm: float, link: float, links: int, source: str) -> Chip:
    # float16 is left out: the matrix units do not know it.
    peak = {"bfloat16": tera * TERA, "float32": tera * TERA}
    return Chip(name, kind, peak, gib * GIB, int(usable * GIB), hbm * GIGA, link * GIGA, links, source)


def _gpu(name: str, kind: str, half: float, single: float, gb: int, hbm: float, link: float, links: int, source: str) -> Chip:
    peak = {"bfloat16": half * TERA, "float16": half * TERA, "float32": single * TERA}
    return Chip(name, kind, peak, gb * 10**9, gb * 10**9, hbm * GIGA, link * GIGA, links, source)


# Of a TPU the documentation gives the links' bandwidth in both directions or in Gbit/s in one; here it is half the former, an eighth of the latter.
_TABLE = (
    _tpu("v4", "TPU v4", 275, 32, 30.75, 1228, 300, 6, "Cloud TPU documentation, v4: 275 TFLOP/s, 32 GiB, 1200 GB/s (1228), 2400 Gbit/s of links"),
    _tpu("v5e", "TPU v5 lite", 197, 16, 15.75, 819, 200, 4,
         "Cloud TPU documentation, v5e: 197 TFLOP/s, 16 GB, 819 GB/s, links 400 GB/s both ways"),
    _tpu("v5p", "TPU v5", 459, 95, 95.74, 2765, 600, 6,
         "Cloud TPU documentation, v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, links 1200 GB/s both ways"),
    _tpu("v6e", "TPU v6 lite", 918, 32, 31.25, 1640, 400, 4,
         "Cloud TPU documentation, v6e: 918 TFLOP/s, 32 GB, 1640 GB/s, links 3200 Gbit/s (once 3584)"),
    _gpu("a100-40", "NVIDIA A100-SXM4-40GB", 312, 156, 40, 1555, 300, 12,
         "NVIDIA A100 datasheet, SXM 40 GB, without sparsity"),
    _gpu("a100-80", "NVIDIA A100-SXM4-80GB", 312, 156, 80, 2039, 300, 12,
         "NVIDIA A100 datasheet, SXM 80 GB, without sparsity"),
    _gpu("h100-sxm", "NVIDIA H100 80GB HBM3", 989.4, 494.7, 80, 3350, 450, 18,
         "NVIDIA H100 datasheet, SXM, without sparsity"),
    _gpu("h100-pcie", "NVIDIA H100 PCIe", 756, 378, 80, 2039, 300, 12,
         "NVIDIA H100 datasheet and product brief, PCIe, without sparsity; NVLink bridge between two cards"),
    _gpu("h200", "NVIDIA H200", 989.4, 494.7, 141, 4800, 450, 18,
         "NVIDIA H200 datasheet, SXM, without sparsity"),
)  # fmt: skip

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}

# Other names that drivers and earlier versions of JAX have for the same chips.
_OTHER_KINDS = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device.

    Args:
        device_kind: `jax.Device.device_kind`.

    Returns:
        None for a chip that the table does not have; a CPU always.
    """
    if device_kind in _OTHER_KINDS:
        return CHIPS[_OTHER_KINDS[device_kind]]
    return next((chip for chip in _TABLE if chip.kind == device_kind), None)
