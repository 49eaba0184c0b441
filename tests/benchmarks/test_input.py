"""The input rate is that of the source behind the pipeline; contenders take turns; the decode bound and torch's DataLoader do work."""

import argparse
import threading
import time

import numpy as np
import pytest

from wavepath.benchmarks import input as bench
from wavepath.benchmarks.input_peers import Bound, TorchLoader, Turn, _reason, decoder_costs, decoders
from wavepath.data.sources import Source, Span
from wavepath.data.tiles import decode_tile, encode_tile
from wavepath.errors import ConfigError, WavepathError

TILES = [encode_tile(np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8), "jpeg", 90) for k in range(5)]


class Slow(Source):
    """Two batches never at once, each at least 20 ms: five images a batch are at most 250 images a second. `rows_read` counts them all."""

    lock, rows_read = threading.Lock(), 0

    def __init__(self):
        self.name, self.image_shape = "slow", (4, 4, 3)
        self.spans, self.blocks = [Span("s", 0, 23, 0.25)], np.array([23])

    def images(self, example_ids):
        with self.lock:
            time.sleep(0.02)
            self.rows_read += len(example_ids)
        return np.zeros((len(example_ids), 4, 4, 3), np.uint8)


def test_the_rate_is_that_of_the_source():
    source = Slow()
    one = bench.turn(source, batch_size=5, seconds=0.5)
    # However slow the machine is, no batch is counted that was not read, and none faster than the source gives it.
    assert one.images % 10 == 0 and 0 < one.images <= source.rows_read and 0 < one.rate < 290 and one.seconds >= 0.5
    assert 0 < bench.measure(Slow(), batch_size=5, seconds=0.2) < 290


def test_contenders_take_turns_and_the_first_round_does_not_count():
    called = []
    contenders = {name: lambda name=name: (called.append(name), Turn(len(called), 1.0, 0.5))[1] for name in ("wavepath", "bound", "uint8")}
    turns = bench.rotate(contenders, 3)
    assert called == ["wavepath", "bound", "uint8"] * 2 + ["bound", "uint8", "wavepath"] + ["uint8", "wavepath", "bound"]
    assert [one.images for one in turns["wavepath"]] == [4, 9, 11] and [len(some) for some in turns.values()] == [3, 3, 3]


def test_ratios_are_taken_round_by_round():
    """The load doubles in the second round: the ratio does not notice."""
    turns = {"wavepath": [Turn(90, 1.0, 2.0), Turn(45, 1.0, 2.0)], "bound": [Turn(100, 1.0, 2.0), Turn(50, 1.0, 2.0)]}
    turns["tensor"] = [Turn(30, 1.0, 0.0)] * 2
    found = bench.results(turns)
    assert found["bound"]["wavepath_rate_over"] == pytest.approx((0.9, 0.9, 0.9))
    assert found["bound"]["cost_over_wavepath"] == pytest.approx((0.9, 0.9, 0.9))
    assert found["tensor"]["wavepath_rate_over"] == pytest.approx((2.25, 1.5, 3.0)) and found["tensor"]["median"] == 30
    lines = bench.rows(found)
    assert lines[1] == ["decode bound", "75", "50..100", "30000", "0.90 (0.90..0.90)", "0.90 (0.90..0.90)"]
    assert lines[0][4:] == ["", ""] and all(len(line) == len(bench.HEADER) for line in lines)


def test_the_bound_decodes_what_the_pipeline_decodes():
    for name, decode in decoders().items():
        if name == "tf.io":
            continue  # its default transform is another one
        out = np.zeros((16, 16, 3), np.uint8)
        decode(TILES[2], out)
        assert np.array_equal(out, decode_tile(TILES[2])), name
    assert set(decoder_costs(TILES, (16, 16, 3), runs=1)) == set(decoders())
    bound = Bound(TILES, (16, 16, 3), 2)
    one = bound.turn(0.05)
    bound.close()
    assert one.images >= 2 * 64 and one.images % 64 == 0 and one.seconds >= 0.05
    shown = {decode_tile(tile).tobytes() for tile in TILES}
    for page in bound._out.reshape(2, -1, 16 * 16 * 3):  # of each thread: every tile, and no place left empty
        assert {row.tobytes() for row in page} == shown


def test_only_jpeg_of_the_sources_own_size_has_a_bound():
    class Stored(Slow):
        kind, first = "prepared", TILES[0]

        def read(self, example_ids):
            return [self.first, *(TILES[int(index) % 5] for index in list(example_ids)[1:])]

    source = Stored()
    assert bench.jpeg_tiles(source) is None, "of another size"
    source.image_shape = (16, 16, 3)
    assert len(bench.jpeg_tiles(source, 7)) == 7 and len(bench.jpeg_tiles(source)) == 23
    source.first = b"\x89PNG"
    assert bench.jpeg_tiles(source) is None
    source.kind = "stream"
    assert bench.jpeg_tiles(source) is None


@pytest.mark.parametrize("flags", [["--runs", "0"], ["--threads", "-1"], ["--seconds", "0"], ["--batch-size", "0"]])
def test_numbers_that_mean_nothing_are_refused(flags):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(ConfigError, match="at least"):
        bench.run(parser.parse_args(["--data", "x", *flags]))


def test_why_the_loader_ended():
    died = "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of shared memory."
    assert "--shm-size" in _reason(f"Traceback\n  line\n{died}\n") and "--threads" in _reason(died)
    assert _reason("Traceback\n  line\nImportError: no torch\n\n") == "ImportError: no torch" and _reason("") == "it said nothing"


def test_a_loader_that_ends_is_one_line(tmp_path, monkeypatch):
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho 'OSError: no space in shm' >&2\nexit 7\n")
    dead.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(dead))
    with pytest.raises(WavepathError, match="ended with code 7: OSError: no space in shm; .* --shm-size"):
        TorchLoader(tmp_path, 4, 1)


@pytest.mark.slow
def test_torch_loads_the_tiles_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("torch")
    for number, tile in enumerate(TILES):
        (tmp_path / f"{number}.jpg").write_bytes(tile)
    with TorchLoader(tmp_path, batch_size=4, workers=1) as loader:
        turns = [loader.turn(mode, 0.1) for mode in ("tensor", "uint8", "tensor")]
        child = loader._child
    assert child.returncode == 0
    assert all(one.images >= 4 and one.images % 4 == 0 and one.seconds > 0 for one in turns)
