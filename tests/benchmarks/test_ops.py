"""`wavepath bench ops`: turns rotate, wrong results are found, missing libraries are named, the dense forms are what the equations say."""

import argparse
import json
import os
import time

import numpy as np
import pytest
import pywt

from wavepath.benchmarks import glcm, ops, timing, wavelets
from wavepath.benchmarks.timing import Timed
from wavepath.benchmarks.wavelet_peers import OURS, PEERS, MissingPeer, Peer, _module
from wavepath.errors import ConfigError, WavepathError

SHAPE = (2, 14, 17, 2)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    return parser.parse_args(words)


# ---- timing


def test_turns_rotate_and_short_calls_repeat():
    seen = []
    calls = {name: lambda name=name: (seen.append(name), time.sleep(0.03)) for name in "abc"}
    timed = timing.take_turns(calls, runs=3, settle=0)
    assert seen == list("aabbcc" + "abc" + "bca" + "cab")
    assert [one.name for one in timed] == list("abc") and all(len(one.seconds) == 3 and 0.03 <= one.median for one in timed)
    seen.clear()
    timing.take_turns({"short": lambda: seen.append(1)}, runs=2, settle=0)
    assert len(seen) == 2 + 2 * 15


def test_the_ratio_is_the_median_of_the_rounds_own():
    # The second round is disturbed for both; the medians' ratio would be 5 / 2.
    slow, fast = Timed("slow", (4.0, 40.0, 5.0)), Timed("fast", (1.0, 10.0, 2.0))
    assert timing.ratios(slow, fast) == (4.0, 2.5, 4.0)


def test_the_allocator_is_named_and_set_once(monkeypatch):
    monkeypatch.setattr(timing.platform, "libc_ver", lambda: ("glibc", "2.36"))
    changed = timing.with_huge_pages({"PATH": "/bin"})
    assert changed == {"PATH": "/bin", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert timing.with_huge_pages(changed) is None
    assert timing.with_huge_pages({"GLIBC_TUNABLES": "glibc.cpu.x=1"})["GLIBC_TUNABLES"] == "glibc.cpu.x=1:glibc.malloc.hugetlb=1"
    assert timing.with_huge_pages({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}) is None
    assert timing.allocator({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}) == "libtcmalloc.so.4 (LD_PRELOAD)"
    assert timing.allocator(changed).startswith("glibc 2.36 malloc with glibc.malloc.hugetlb=1")
    assert timing.allocator({}) == "glibc 2.36 malloc, stock settings"
    monkeypatch.setattr(timing.platform, "libc_ver", lambda: ("", ""))
    assert timing.with_huge_pages({}) is None


def test_the_command_starts_again_with_its_own_words(monkeypatch):
    started = []
    monkeypatch.setattr(timing.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(timing.os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(timing.sys, "argv", ["wavepath", "bench", "ops", "--runs", "3"])
    monkeypatch.setattr(timing, "with_huge_pages", lambda: {"GLIBC_TUNABLES": timing.TUNABLE})
    timing.restart_with_huge_pages()
    (program, words, environment), = started
    assert words == [program, "-m", "wavepath", "bench", "ops", "--runs", "3"] and environment["GLIBC_TUNABLES"] == timing.TUNABLE


def test_more_cores_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="may use"):
        timing.limit_cores(100_000)
    assert timing.limit_cores(None) >= 1


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the kernel keeps no peak of resident memory here")
def test_peak_memory_sees_what_a_call_held():
    peak = timing.peak_memory(lambda: np.ones(64 << 20, np.uint8).sum())
    if peak is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 60e6 < peak < 160e6


# ---- wavelets


@pytest.mark.parametrize("wavelet", ["haar", "db4", "bior2.2"])
def test_the_exact_results_are_pywavelets_and_its_adjoint(wavelet):
    task, keep = wavelets.make_task(wavelet, SHAPE), (0, 1)
    *bands, gradient = wavelets.exact(task, "gradient", keep)
    ll, details = pywt.dwt2(task.image.astype(np.float64), wavelet, "symmetric", axes=(1, 2))
    for band, expected in zip(bands, [ll, *details], strict=True):
        np.testing.assert_allclose(band, expected, atol=1e-12)
    other = np.random.default_rng(1).standard_normal(SHAPE)
    ll, details = pywt.dwt2(other, wavelet, "symmetric", axes=(1, 2))
    forward = sum(np.vdot(band, cotangent) for band, cotangent in zip([ll, *details], task.cotangents, strict=True))
    assert np.vdot(other, gradient) == pytest.approx(forward, rel=1e-9)
    np.testing.assert_array_equal(wavelets.exact(task, "inverse", (1,))[0], task.image[1:])


def _twice(task, direction):
    """A library that computes, but something else."""
    call, unpack = PEERS["PyWavelets"].build(task, direction)
    return call, lambda result: [2 * array for array in unpack(result)]


def _absent(task, direction):
    _module("a_library_that_nobody_has", "pip install a-library")


@pytest.mark.parametrize("direction", ["forward", "inverse", "gradient"])
def test_a_cell_finds_the_wrong_and_names_the_missing(direction):
    peers = [PEERS[name] for name in (OURS, "jaxwt", "PyWavelets", "copy")]
    peers += [Peer("absent", "NCHW", "", _absent)] + ([Peer("twice", "NCHW", "", _twice)] if direction != "gradient" else [])
    missing: dict[str, str] = {}
    cell = wavelets.measure_cell(wavelets.make_task("db2", SHAPE), direction, 1, peers, missing)
    status = {name: entry["status"] for name, entry in cell["contenders"].items()}
    assert status.pop("twice", "WRONG") == "WRONG"
    assert status == {
        OURS: "right", "jaxwt": "right", "copy": "right", "absent": "missing", "PyWavelets": "none" if direction == "gradient" else "right",
    }  # fmt: skip
    assert missing["absent"].startswith("pip install a-library")
    header, (row,) = wavelets.rows({"cells": [cell]}, [peer.name for peer in peers])
    assert row[header.index("absent")] == "missing"
    if direction != "gradient":
        assert "WRONG by 1e+00" in row[header.index("twice")] and "twice" not in cell["fastest"]


@pytest.mark.parametrize("name", ["ptwt", "pytorch_wavelets"])
@pytest.mark.parametrize("direction", ["forward", "inverse", "gradient"])
def test_the_torch_libraries_are_called_rightly(name, direction):
    for module in ("torch", name):
        if module != "pytorch_wavelets":  # which needs its stand-in to be imported
            pytest.importorskip(module, reason=f"{module} is not installed: {PEERS[name].install}")
    peer, task = PEERS[name], wavelets.make_task("db2", (2, 40, 48, 2))
    try:
        call, unpack = peer.build(task, direction)
    except MissingPeer as missing:
        pytest.skip(str(missing))
    results, expected = peer.results(unpack(call()), (0, 1)), wavelets.exact(task, direction, (0, 1))
    # pytorch_wavelets' gradient leaves out the border's extension; every other result is exact.
    if (name, direction) == ("pytorch_wavelets", "gradient"):
        assert wavelets.difference(results[:-1], expected[:-1]) < 1e-5
        results, expected = ([wavelets._inside(arrays[-1])] for arrays in (results, expected))
    assert wavelets.difference(results, expected) < 1e-5


def test_another_shape_or_a_nan_is_a_difference():
    one = [np.ones((1, 4, 4, 1))]
    assert wavelets.difference(one, one) == 0
    assert wavelets.difference([np.ones((1, 4, 5, 1))], one) == wavelets.difference([], one) == np.inf
    assert wavelets.difference([np.full((1, 4, 4, 1), np.nan)], one) == np.inf


def test_verdicts_and_bounds():
    def contenders(**seconds):
        timed = {name: Timed(name, (value,)) for name, value in seconds.items()}
        return {name: {"status": "right", "ratio": [value / seconds[OURS]] * 3} for name, value in seconds.items()}, timed

    assert wavelets.verdict(*contenders(wavepath=1.0, jaxwt=2.0, copy=0.5)) == "yes"
    assert wavelets.verdict(*contenders(wavepath=1.0, jaxwt=0.97, ptwt=3.0)) == "tie: jaxwt 0.97"
    assert wavelets.verdict(*contenders(wavepath=1.0, jaxwt=0.5)) == "no: jaxwt 0.50"
    given, timed = contenders(wavepath=1.0, jaxwt=0.5)
    given["jaxwt"]["status"] = "WRONG"
    assert wavelets.verdict(given, timed) == "-"
    given[OURS]["status"] = "WRONG"
    assert wavelets.verdict(given, timed).startswith("no: wavepath")
    cell = {"wavelet": "haar", "direction": "forward", "shape": "s", "contenders": contenders(wavepath=1.0, jaxwt=9.0, copy=0.2)[0], "fastest": "yes"}
    bounds = wavelets.judge([cell])
    assert [(one["met"], round(one["reached"], 6)) for one in bounds] == [(True, 9.0), (False, 5.0)]
    lines = wavelets.bound_lines({"cells": [cell], "bounds": bounds})
    assert [line.split()[0] for line in lines] == ["met", "MISSED", "met"]


def test_shapes_and_names_are_checked_before_anything_runs(monkeypatch):
    monkeypatch.setattr(timing, "restart_with_huge_pages", lambda: pytest.fail("checked too late"))
    for words, said in [(["--shapes", "32x224"], "images x height x width x channels"), (["--runs", "0"], "--runs")]:
        with pytest.raises(ConfigError, match=said):
            ops.run(parse(*words))
    monkeypatch.setattr(timing, "restart_with_huge_pages", lambda: None)
    monkeypatch.setattr(ops, "measure", lambda *words: pytest.fail("checked too late"))
    with pytest.raises(WavepathError, match="db4"):
        ops.run(parse("--wavelets", "db44"))


def test_the_command_prints_and_writes_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "restart_with_huge_pages", lambda: None)
    words = ["--only", "wavelets", "--wavelets", "haar", "--shapes", "2x8x9x1", "--runs", "1", "--peers", OURS, "PyWavelets", "copy"]
    assert ops.run(parse(*words, "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md"))) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [cell["direction"] for cell in report["wavelets"]["cells"]] == ["forward", "inverse", "gradient"] and report["missing"] == {}
    assert all(cell["contenders"][OURS]["status"] == "right" for cell in report["wavelets"]["cells"])
    out = capsys.readouterr().out
    assert "allocator of every contender" in out and "fastest?" in out and "haar forward within 3.5 times a copy" in out
    lines = [line for line in (tmp_path / "out.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1


# ---- co-occurrence


def test_the_dense_form_is_the_equations():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    from wavepath.benchmarks.glcm_peers import _memberships, dense_value_and_gradient

    rng, levels, low, high, sharpness = np.random.default_rng(0), 6, -1.0, 2.0, 5.0
    edges = torch.tensor([[low, high, 0.3]], dtype=torch.float64)
    np.testing.assert_allclose(_memberships(edges, levels, low, high, sharpness).sum(-1), 1, atol=1e-9)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    def membership(x, k):
        width = (high - low) / levels
        centre, slope = low + (k + 0.5) * width, width / sharpness
        return sum(sigmoid((s - centre + width / 2) / slope) - sigmoid((s - centre - width / 2) / slope) for s in (x, 2 * low - x, 2 * high - x))

    def matrix(patch, down, right):
        p, (h, w) = np.zeros((levels, levels)), patch.shape
        for i in range(levels):
            for j in range(levels):
                for r in range(h - down):
                    for c in range(w - right):
                        p[i, j] += membership(patch[r, c], i) * membership(patch[r + down, c + right], j)
        return p * (1 - p / p.sum())

    def loss(a, b):
        return np.mean([(matrix(a, *offset) - matrix(b, *offset)) ** 2 for offset in glcm.OFFSETS])

    prediction, target = rng.uniform(low, high, (2, 1, 4, 4))
    value, gradient = dense_value_and_gradient(prediction, target, levels, glcm.OFFSETS, low, high, sharpness)
    assert value[0] == pytest.approx(loss(prediction[0], target[0]), rel=1e-9)
    step = np.zeros((4, 4))
    step[1, 2] = 1e-6
    numeric = (loss(prediction[0] + step, target[0]) - loss(prediction[0] - step, target[0])) / 2e-6
    assert gradient[0, 1, 2] == pytest.approx(numeric, rel=1e-4)


def test_wrong_losses_and_gradients_are_found():
    value, gradient = np.ones(3), np.ones((3, 4, 4))
    assert glcm.agreement((value, gradient), (value, gradient))["status"] == "right"
    assert glcm.agreement((value * 1.001, gradient), (value, gradient))["status"] == "WRONG"
    assert glcm.agreement((value, -gradient), (value, gradient))["status"] == "WRONG"


def test_the_loss_is_measured_beside_the_dense_form(monkeypatch):
    monkeypatch.setattr(glcm, "PATCHES", 6)
    pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    one = glcm.measure_loss(8, batch=1, runs=1, torch_missing=False)
    assert one["wavepath"]["status"] == one["dense"]["status"] == "right" and one["dense"]["images_at_once"] == 1
    assert len(one["times_faster"]) == 3
    report = {"loss": [one, {**one, "levels": 256, "times_faster": [31.0] * 3, "times_smaller": 400.0}], "counting": []}
    header, rows = glcm.rows(report)
    assert {len(row) for row in rows} == {len(header)}
    assert [line.split()[0] for line in glcm.bound_lines(report)] == ["met", "MISSED"]


def test_without_torch_the_loss_is_measured_alone(monkeypatch):
    monkeypatch.setattr(glcm, "PATCHES", 6)
    one = glcm.measure_loss(8, batch=1, runs=1, torch_missing=True)
    assert one["wavepath"]["median_ms"] > 0 and "dense" not in one
    assert "missing" in glcm.rows({"loss": [one]})[1][0]


def test_counts_equal_scikit_image():
    report = glcm.measure_counting(8, images=2, side=20, runs=1)
    assert report["equal"] and report["wavepath_mpairs"] > 0
    step = {"levels": 32, "masked_patches": 147, "batch": 4, "share_percent": 6.0, "loss_ms": 6.0, "step_ms": 100.0, "variant": "B"}
    lines = glcm.bound_lines({"loss": [], "counting": [report], "step": step})
    assert "6.00 %" in lines[0] and lines[0].startswith("MISSED") and "; equal" in lines[1]
