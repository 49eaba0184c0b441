"""Batches: exact resume, host-count independence, corrupt records, padding, and errors without a TensorFlow traceback."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from wavepath.data import order, pipeline
from wavepath.data.decode import BatchArrays
from wavepath.data.sources import Source, Span
from wavepath.errors import ConfigError, DatasetError


class Numbers(Source):
    """A source whose images tell their id; some ids cannot be read."""

    def __init__(self, count=23, bad=(), block=4):
        self.name, self.image_shape = "numbers", (4, 4, 3)
        self.spans = [Span("s", 0, count, 0.25)] if count else []
        self.blocks = np.array([block] * (count // block) + [count % block] * (count % block > 0), np.int64)
        self.bad, self.calls, self.announced, self.forgotten = set(bad), [], [], 0
        self.threads_seen = set()

    def images(self, example_ids):
        self.calls.append([int(index) for index in example_ids])
        self.threads_seen.add(threading.get_ident())
        for index in example_ids:
            if int(index) in self.bad:
                raise DatasetError(f"shard-00000-of-00001: record {int(index)} (example {int(index)}) is damaged")
        return np.broadcast_to(np.asarray(example_ids, np.uint8)[:, None, None, None], (len(example_ids), 4, 4, 3)).copy()

    def prefetch(self, example_ids):
        self.announced.append([int(index) for index in example_ids])

    def forget(self):
        self.forgotten += 1


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(one, two):
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]), name


def test_a_batch_is_what_the_contract_says():
    with pipeline.batches(Numbers(), batch_size=6, seed=1) as stream:
        batch = next(stream)
    kinds = {name: (value.dtype, value.shape) for name, value in batch.items()}
    assert kinds == {
        "image": (np.uint8, (6, 4, 4, 3)), "example_id": (np.int32, (6,)), "epoch": (np.int32, (6,)), "position": (np.uint32, (6,)),
    }
    assert np.array_equal(batch["image"][:, 0, 0, 0], batch["example_id"])
    assert np.array_equal(batch["example_id"], order.GlobalOrder(23, 1).example(np.arange(6))[0])


def test_epochs_follow_one_another():
    with pipeline.batches(Numbers(10), batch_size=4, seed=0) as stream:
        rows = take(stream, 5)
    ids = np.concatenate([batch["example_id"] for batch in rows])
    epochs = np.concatenate([batch["epoch"] for batch in rows])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10)) and ids[:10].tolist() != ids[10:].tolist()
    assert epochs.tolist() == [0] * 10 + [1] * 10
    assert np.concatenate([batch["position"] for batch in rows]).tolist() == list(range(20))


@pytest.mark.parametrize("name", ["global", "blocks"])
def test_resume_is_exact(name):
    options = dict(batch_size=6, seed=5, order=name, window=2)
    with pipeline.batches(Numbers(), **options) as stream:
        whole = take(stream, 10)
    for skipped in (1, 4, 9):
        with pipeline.batches(Numbers(), start_position=6 * skipped, **options) as stream:
            assert_equal(take(stream, 10 - skipped), whole[skipped:])
    # Another batch size from any position sees the same examples.
    with pipeline.batches(Numbers(), batch_size=5, seed=5, order=name, window=2, start_position=13) as stream:
        ids = np.concatenate([batch["example_id"] for batch in take(stream, 3)])
    assert np.array_equal(ids, np.concatenate([batch["example_id"] for batch in whole])[13:28])


@pytest.mark.parametrize("name", ["global", "blocks"])
def test_hosts_share_one_global_order(name):
    with pipeline.batches(Numbers(), batch_size=6, seed=3, order=name, window=2) as stream:
        whole = take(stream, 6)
    for count in (2, 3, 6):
        shards = []
        for index in range(count):
            with pipeline.batches(Numbers(), batch_size=6, seed=3, order=name, window=2, host=(index, count)) as stream:
                shards.append(take(stream, 6))
        joined = [{key: np.concatenate([shard[step][key] for shard in shards]) for key in whole[0]} for step in range(6)]
        assert_equal(joined, whole)
    with pytest.raises(ConfigError, match="choose a multiple of 4"):
        pipeline.batches(Numbers(), batch_size=6, seed=0, host=(0, 4))
    with pytest.raises(ConfigError, match="does not exist"):
        pipeline.batches(Numbers(), batch_size=6, seed=0, host=(2, 2))


def test_positions_past_32_bits_wrap_and_go_on():
    start = 2**32 - 6
    with pipeline.batches(Numbers(), batch_size=6, seed=0, start_position=start) as stream:
        first, second = take(stream, 2)
    assert first["position"].tolist() == list(range(start, 2**32)) and second["position"].tolist() == list(range(6))
    assert second["epoch"][0] == 2**32 // 23
    assert np.array_equal(second["example_id"], order.GlobalOrder(23, 0).example(np.arange(2**32, 2**32 + 6))[0])


def test_a_corrupt_record_stops_with_our_message_at_its_batch():
    ids = order.GlobalOrder(23, 0).example(np.arange(23))[0]
    stream = pipeline.batches(Numbers(bad=[ids[13]]), batch_size=6, seed=0, prefetch=3)
    assert np.array_equal(take(stream, 2)[1]["example_id"], ids[6:12])
    with pytest.raises(DatasetError) as caught:
        next(stream)
    assert str(caught.value) == f"shard-00000-of-00001: record {ids[13]} (example {ids[13]}) is damaged"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    with pytest.raises(StopIteration):
        next(stream)


def test_the_first_of_several_errors_is_the_one_raised():
    ids = order.GlobalOrder(23, 0).example(np.arange(23))[0]
    for _ in range(3):
        stream = pipeline.batches(Numbers(bad=[ids[3], ids[9]]), batch_size=6, seed=0, prefetch=3)
        time.sleep(0.05)
        with pytest.raises(DatasetError, match=f"example {ids[3]}\\)"):
            next(stream)


def test_defects_of_ours_keep_their_own_type():
    class Broken(Numbers):
        def images(self, example_ids):
            raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        next(pipeline.batches(Broken(), batch_size=2, seed=0))


def test_replace_takes_the_next_readable_example_and_counts(capsys):
    bad = [4, 5, 22]
    with pipeline.batches(Numbers(), batch_size=6, seed=2) as stream:
        clean = take(stream, 8)
    source = Numbers(bad=bad)
    with pipeline.batches(source, batch_size=6, seed=2, on_corrupt="replace", prefetch=1) as stream:
        rows = take(stream, 8)
        ids = np.concatenate([batch["example_id"] for batch in clean])
        wanted = np.where(np.isin(ids, [4, 5]), 6, np.where(ids == 22, 0, ids))
        assert np.array_equal(np.concatenate([batch["example_id"] for batch in rows]), wanted)
        assert all(np.array_equal(batch["image"][:, 0, 0, 0], batch["example_id"]) for batch in rows)
        assert stream.corrupt_count == int(np.isin(ids, bad).sum()) > 0  # not those in batches that are only read ahead
    err = capsys.readouterr().err
    assert "record 22" in err and err.count("record 22") == 1
    # A resumed run makes the same replacements.
    with pipeline.batches(Numbers(bad=bad), batch_size=6, seed=2, on_corrupt="replace", start_position=24) as stream:
        assert_equal(take(stream, 4), rows[4:])


def test_nothing_readable_is_an_error():
    stream = pipeline.batches(Numbers(8, bad=range(8)), batch_size=4, seed=0, on_corrupt="replace")
    with pytest.raises(DatasetError, match="8 examples in a row"):
        next(stream)
    with pytest.raises(ConfigError, match="'error' or 'replace'"):
        pipeline.batches(Numbers(), batch_size=4, seed=0, on_corrupt="skip")


def test_eval_pads_the_last_batch():
    with pipeline.eval_batches(Numbers(10), 4) as stream:
        rows = list(stream)
    assert [batch["example_id"].tolist() for batch in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch["mask"].tolist() for batch in rows] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert rows[0]["mask"].dtype == np.float32 and rows[2]["image"].shape == (4, 4, 4, 3)
    assert sum(batch["mask"].sum() for batch in rows) == 10


def test_eval_on_hosts_has_equal_numbers_of_batches():
    shards = [list(pipeline.eval_batches(Numbers(9), 4, host=(index, 2))) for index in range(2)]
    assert [len(shard) for shard in shards] == [3, 3]
    seen = [int(index) for shard in shards for batch in shard for index, mask in zip(batch["example_id"], batch["mask"], strict=True) if mask]
    assert sorted(seen) == list(range(9))


def test_eval_of_chosen_examples():
    rows = list(pipeline.eval_batches(Numbers(20), 2, ids=[7, 3, 11]))
    assert [batch["example_id"].tolist() for batch in rows] == [[7, 3], [11, 11]]
    drawn = np.concatenate([batch["example_id"] for batch in pipeline.eval_batches(Numbers(20), 3, limit=6)])
    assert np.array_equal(drawn, order.subset(20, 6)) and drawn.max() > 9
    assert len(list(pipeline.eval_batches(Numbers(5), 3, limit=100))) == 2
    with pytest.raises(DatasetError, match="no examples"):
        pipeline.eval_batches(Numbers(5), 3, ids=[])
    with pytest.raises(DatasetError, match="no examples"):
        pipeline.batches(Numbers(0), batch_size=3, seed=0)


def test_blocks_are_announced_once_and_ahead_of_use():
    source = Numbers(24, block=4)
    with pipeline.batches(source, batch_size=3, seed=0, order="blocks", window=2, prefetch=1) as stream:
        rows = take(stream, 16)
    announced = [index for part in source.announced for index in part]
    used = np.concatenate([batch["example_id"] for batch in rows])
    ahead = order.BlockOrder(source.blocks, 0, 2).example(np.arange(len(announced)))[0]
    assert np.array_equal(announced, ahead) and len(announced) >= len(used) and np.array_equal(announced[: len(used)], used)
    assert [len(part) for part in source.announced[:3]] == [16, 8, 8]  # this window and the next, then a window at a time
    assert source.forgotten == 1
    # One host of two announces its own rows alone.
    source = Numbers(24, block=4)
    with pipeline.batches(source, batch_size=6, seed=0, order="blocks", window=2, host=(1, 2)) as stream:
        mine = np.concatenate([batch["example_id"] for batch in take(stream, 8)])
    announced = [index for part in source.announced for index in part]
    assert np.array_equal(announced[: len(mine)], mine)


def test_reading_runs_ahead_in_other_threads():
    source = Numbers()
    stream = pipeline.batches(source, batch_size=2, seed=0, prefetch=4)
    next(stream)
    deadline = time.monotonic() + 5
    while len(source.calls) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(source.calls) >= 5 and threading.get_ident() not in source.threads_seen
    stream.close()
    time.sleep(0.2)
    count = len(source.calls)
    time.sleep(0.2)
    assert len(source.calls) == count
    with pytest.raises(StopIteration):
        next(stream)


class Leased(Numbers):
    """The same images in memory that is used again, too large for TensorFlow to copy unseen."""

    def __init__(self):
        super().__init__()
        self.arrays, self.addresses = BatchArrays(), set()

    def images(self, example_ids):
        out = self.arrays.get(len(example_ids), (4, 4, 3))
        out[:] = super().images(example_ids)
        self.addresses.add(out.ctypes.data)
        return out


def test_batches_are_handed_over_without_a_copy_and_stay_what_they_were():
    """Neither TensorFlow nor JAX on the CPU copies an aligned array: whoever holds one keeps its memory out of use."""
    import jax

    source, device = Leased(), jax.devices("cpu")[0]
    with pipeline.batches(source, batch_size=6, seed=3) as stream:
        held = []
        for _ in range(12):
            batch = next(stream)
            assert batch["image"].ctypes.data in source.addresses
            held.append((jax.device_put(batch["image"], device), batch["image"][2:3, 1:], batch["example_id"]))
            del batch
            if len(held) > 3:
                pixels, view, ids = held.pop(0)
                assert (np.asarray(pixels)[:, 0, 0, 0] == ids).all() and (view == ids[2]).all()
    assert len(source.addresses) < 12, "memory is used again"


def test_no_accelerator_is_visible_to_tensorflow():
    assert pipeline.tensorflow().config.get_visible_devices("GPU") == []


@pytest.mark.slow
def test_import_is_light_and_a_process_ends_with_batches_under_way():
    """TensorFlow comes with the first batch, not with the import; an interpreter that leaves in mid-iteration does not hang."""
    program = (
        "import sys\n"
        "from wavepath.data import pipeline\n"
        "assert 'tensorflow' not in sys.modules\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pipeline import Numbers\n"
        "stream = pipeline.batches(Numbers(), batch_size=2, seed=0, prefetch=4)\n"
        "next(stream)\n"
        "assert 'tensorflow' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
