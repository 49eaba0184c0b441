"""The table of chips: whole, of sane sizes, found by the names that JAX gives its devices."""

import pytest

from wavepath.planning.chips import CHIPS, GIGA, chip_of


def test_the_names():
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e", "a100-40", "a100-80", "h100-sxm", "h100-pcie", "h200"}
    assert all(CHIPS[name].name == name for name in CHIPS)
    assert len({chip.kind for chip in CHIPS.values()}) == len(CHIPS)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
def test_sizes_are_those_of_accelerators(chip):
    assert 1e14 <= chip.peak["bfloat16"] < 2e15
    assert chip.peak["float32"] <= chip.peak["bfloat16"]
    assert ("float16" in chip.peak) == chip.kind.startswith("NVIDIA")
    assert 16 * GIGA <= chip.hbm < 200 * GIGA
    assert 0.95 * chip.hbm < chip.usable < 1.01 * chip.hbm
    assert 5e11 < chip.hbm_bandwidth < 1e13
    assert chip.hbm_bandwidth > chip.link_bandwidth
    assert chip.links in (4, 6, 12, 18)
    # One link in one direction: 25 to 100 GB/s.
    assert 25 * GIGA <= chip.link_bandwidth / chip.links <= 100 * GIGA
    assert ("Cloud TPU documentation" if chip.kind.startswith("TPU") else "datasheet") in chip.source


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
    ],
)  # fmt: skip
def test_found_by_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v9", "", "NVIDIA GeForce RTX 4090"])
def test_others_are_not_in_the_table(kind):
    assert chip_of(kind) is None
