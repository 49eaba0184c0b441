"""Topologies: their names, what is refused, and the devices behind them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from wavepath.errors import ConfigError
from wavepath.planning import topology
from wavepath.planning.chips import CHIPS
from wavepath.planning.topology import describe, find, parse, prepare_environment, torus_bandwidth

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed (pip install "wavepath[tpu]")')


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("v5e:4x4", ("v5e", (4, 4))), ("V5E:16x16", ("v5e", (16, 16))), (" v5p:4x4x4 ", ("v5p", (4, 4, 4))), ("v4:2x2x1", ("v4", (2, 2, 1))),
        ("v5e:1x1", ("v5e", (1, 1))), ("v6e:1x2", ("v6e", (1, 2))), ("cpu:8", ("cpu", (8,))), ("local", ("local", ())),
    ],
)  # fmt: skip
def test_names(text, found):
    assert parse(text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is unknown; give one such as v5e:4x4"), ("v9:4x4", "is unknown"), ("v5e", "has no size"), ("v5e:0x4", "has no size"),
        ("v5e:4x", "has no size"), ("cpu:-1", "has no size"), ("cpu:2x2", "as in cpu:8"), ("cpu:99999", "at most 4096"),
        ("v5e:4x4x4", "has 2 axes; give one such as v5e:4x4"), ("v5p:4x4", "has 3 axes; give one such as v5p:4x4x4"),
        ("v5e:3x3", "give even sizes"), ("v5e:32x16", "at most 16 chips"), ("h100-sxm:8", "GPUs are planned for on a machine that has one, as local"),
        ("local:2", "is unknown"),
    ],
)  # fmt: skip
def test_what_is_refused(text, says):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_environment_is_set_for_what_is_asked(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_environment(["local"])
    assert "JAX_PLATFORMS" not in os.environ and "XLA_FLAGS" not in os.environ
    prepare_environment(["cpu:3", "v5e:4x4", "cpu:6"])
    assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=6"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --other"
    prepare_environment(["cpu:6"])  # what the user has set stays
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2 --other"
    with pytest.raises(ConfigError, match="is unknown"):
        prepare_environment(["v5e:4x4", "nothing"])


def test_cpu_devices():
    found = find("cpu:4")
    assert (found.family, found.shape, len(found.devices), found.chip, found.hosts, found.bandwidth) == ("cpu", (4,), 4, None, 1, None)
    assert describe(found) == "cpu:4: 4 cpu devices"
    with pytest.raises(ConfigError, match="xla_force_host_platform_device_count=64"):
        find("cpu:64")


def test_local_devices_are_all_of_them():
    import jax

    assert list(find("local").devices) == jax.local_devices()


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "wavepath\[tpu\]"'):
        find("v5e:4x4")


@pytest.mark.parametrize(
    ("chip", "shape", "gigabytes"),
    [
        ("v5e", (1, 1), 0), ("v5e", (1, 2), 50), ("v5e", (4, 4), 100), ("v5e", (16, 16), 200), ("v5e", (8, 16), 150),
        ("v5p", (4, 4, 4), 600), ("v5p", (2, 2, 1), 200), ("v4", (2, 2, 4), 150), ("v5p", (2, 2, 4), 300),
        ("v5p", (2, 4, 4), 300), ("v5p", (4, 4, 8), 600), ("v4", (4, 4, 4), 300), ("v6e", (16, 16), 400), ("h100-sxm", (8,), 450),
    ],
)  # fmt: skip
def test_bandwidth_of_a_slice(chip, shape, gigabytes):
    """v5e has 200 GB/s over four links: 100 for each axis that is a ring (16), half of it for a line. Three axes are rings together, or none is."""
    assert torus_bandwidth(CHIPS[chip], shape) == pytest.approx(gigabytes * 1e9)


@pytest.mark.slow
@needs_libtpu
def test_tpu_slices_have_a_device_for_each_chip():
    """In a process of its own: the environment has to be set before libtpu starts."""
    want = {"v5e:4x4": (16, 4), "v5e:1x1": (1, 1), "v5p:2x2x4": (16, 4), "v4:2x2x2": (8, 2), "v6e:2x4": (8, 2)}
    program = (
        "import sys; from wavepath.planning.topology import find, prepare_environment; prepare_environment(sys.argv[1:])\n"
        "for name in sys.argv[1:]:\n  found = find(name)\n"
        "  print(name, len(found.devices), found.hosts, found.devices[0].device_kind == found.chip.kind)"
    )
    done = subprocess.run([sys.executable, "-c", program, *want], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} {chips} {hosts} True" for name, (chips, hosts) in want.items()]
