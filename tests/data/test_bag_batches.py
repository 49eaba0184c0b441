"""Bags to batches: few sizes, nothing but position and seed, the same for any number of hosts."""

import numpy as np
import pytest

from wavepath.data.bag_batches import batches, bucket, drawn_tiles, eval_batches
from wavepath.data.bags import feature_bags
from wavepath.data.synthetic_bags import make_bags
from wavepath.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    features, labels = make_bags(tmp_path_factory.mktemp("bags"), 10, width=4, tiles=(3, 60))
    return feature_bags(features, labels=labels)


def first(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        assert one[name].dtype == other[name].dtype


def test_buckets():
    assert [bucket(tiles) for tiles in (1, 16, 17, 24, 25, 32, 33, 49, 96, 97, 1000)] == [16, 16, 24, 24, 32, 32, 48, 64, 96, 128, 1024]
    sizes = [bucket(1)]
    while sizes[-1] < 200_000:
        sizes.append(bucket(sizes[-1] + 1))
    assert len(sizes) == 29 and [bucket(size) for size in sizes] == sizes == sorted(set(sizes)) and sizes[-1] == 2**18
    assert all(bucket(tiles) < 1.5 * tiles + 1 for tiles in range(16, 5000))
    assert [bucket(tiles, (10, 100)) for tiles in (1, 10, 11, 100, 101, 250)] == [10, 10, 100, 100, 200, 300]
    with pytest.raises(ConfigError, match="at least 1"):
        bucket(5, (0, 4))


def test_a_batch_holds_the_bags_of_its_positions(source):
    for number, batch in enumerate(first(batches(source, batch_size=3, seed=1), 7)):
        ids = batch["example_id"]
        assert batch["features"].shape == (3, bucket(int(source.lengths[ids].max())), 4) and batch["features"].dtype == np.float32
        positions = list(range(3 * number, 3 * number + 3))
        assert batch["position"].tolist() == positions and batch["epoch"].tolist() == [position // 10 for position in positions]
        np.testing.assert_array_equal(batch["label"], source.labels[ids])
        np.testing.assert_array_equal(batch["tiles"].sum(1), source.lengths[ids])
        for row, index in enumerate(ids):
            np.testing.assert_array_equal(batch["features"][row, : source.lengths[index]], source.bag(int(index)))
            assert not batch["features"][row, source.lengths[index] :].any()


def test_every_epoch_has_every_bag_once_and_in_another_order(source):
    ids = np.concatenate([batch["example_id"] for batch in first(batches(source, batch_size=5, seed=0), 4)]).reshape(2, 10)
    assert [sorted(epoch) for epoch in ids.tolist()] == [list(range(10))] * 2 and ids[0].tolist() != ids[1].tolist()


def test_a_resume_continues_with_what_comes_next(source):
    whole = first(batches(source, batch_size=4, seed=3), 6)
    for one, other in zip(whole[2:], first(batches(source, batch_size=4, seed=3, start_position=8), 4), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("most", [0, 7])
def test_hosts_agree_on_the_size_and_share_the_rows(source, most):
    source = source.part(range(10))
    source.max_tiles = most
    for given, read in ((dict(batch_size=4, seed=3), batches), (dict(batch_size=4), eval_batches)):
        whole = read(source, **given)
        shares = [read(source, **given, host=(host, 2)) for host in range(2)]
        for _ in range(3):
            halves = [next(share) for share in shares]
            assert_same(next(whole), {name: np.concatenate([half[name] for half in halves]) for name in halves[0]})


def test_at_most_so_many_tiles_in_training_anew_each_epoch_and_all_in_evaluation(source):
    long = np.flatnonzero(source.lengths > 20)
    part = source.part(long)
    part.max_tiles = 9
    seen = {}
    for batch in first(batches(part, batch_size=1, seed=0), 2 * len(part)):
        index, epoch = int(batch["example_id"][0]), int(batch["epoch"][0])
        assert batch["features"].shape[1] == 16 and batch["tiles"].sum() == 9
        picked = drawn_tiles(int(part.lengths[index]), 9, 0, index, epoch)
        assert len(set(picked.tolist())) == 9 and (np.diff(picked) > 0).all()
        np.testing.assert_array_equal(batch["features"][0, :9], part.bag(index)[picked])
        seen.setdefault(index, []).append(picked.tolist())
    assert all(one != other for one, other in seen.values())
    assert [int(batch["tiles"].sum()) for batch in eval_batches(part, 1)] == part.lengths.tolist()
    assert drawn_tiles(5, 9, 0, 0, 0).tolist() == drawn_tiles(5, 0, 0, 0, 0).tolist() == [0, 1, 2, 3, 4]


def test_draws_of_tiles_are_even():
    counts = np.bincount(np.concatenate([drawn_tiles(20, 5, 0, example, 0) for example in range(2000)]), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_an_evaluation_is_one_pass_whose_last_batch_is_filled_up(source):
    passes = list(eval_batches(source, 4))
    assert np.concatenate([batch["mask"] for batch in passes]).tolist() == [1] * 10 + [0] * 2
    assert np.concatenate([batch["example_id"] for batch in passes]).tolist() == [*range(10), 9, 9]
    chosen = list(eval_batches(source, 2, ids=[7, 3, 5]))
    assert [batch["example_id"].tolist() for batch in chosen] == [[7, 3], [5, 5]] and len(list(eval_batches(source, 1, limit=4))) == 4


def test_what_cannot_be(source):
    with pytest.raises(ConfigError, match="batch_size=3 does not divide over 2 hosts"):
        batches(source, batch_size=3, seed=0, host=(0, 2))
    with pytest.raises(ConfigError, match="on_corrupt='replace'"):
        eval_batches(source, 1, on_corrupt="replace")
    with pytest.raises(DatasetError, match="no slide to read"):
        eval_batches(source.part([]), 1)
    stream = batches(source, batch_size=1, seed=0)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
