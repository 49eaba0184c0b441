"""The order of examples: golden values, bijections of every size, even spread, and windows of blocks."""

import itertools
import math

import numpy as np
import pytest

from wavepath.data import order
from wavepath.errors import DatasetError

# Taken once from this scheme; they may never change, since a resumed run relies on them.
PERMUTE_10 = [9, 1, 5, 2, 0, 4, 8, 7, 6, 3]
GLOBAL_7_SEED_3 = [3, 2, 5, 0, 6, 1, 4, 3, 2, 6, 5, 0, 1, 4]
BIG = [131913, 831073, 472317, 882536]
BLOCKS = [5, 9, 8, 6, 7, 2, 4, 3, 0, 1, 6, 5, 7, 9, 8, 1, 2, 0, 4, 3]
SUBSET = [58, 356, 456, 558, 804, 877, 923, 958]


def chi_square(counts, expected):
    """Pearson's statistic over its degrees of freedom: near 1 for an even spread."""
    return float(((counts - expected) ** 2 / expected).sum() / (len(counts) - 1))


def test_golden_values():
    assert order.permute(np.arange(10), 10, order.order_key(0)).tolist() == PERMUTE_10
    assert order.GlobalOrder(7, 3).example(np.arange(14))[0].tolist() == GLOBAL_7_SEED_3
    assert order.GlobalOrder(1_000_003, 42).example(np.array([0, 1, 999_999, 1_000_003 * 1000]))[0].tolist() == BIG
    assert order.BlockOrder([3, 2, 4, 1], 5, 2).example(np.arange(20))[0].tolist() == BLOCKS
    assert order.subset(1000, 8).tolist() == SUBSET


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1024, 1025, 10007])
def test_every_epoch_is_a_bijection(n):
    ids, epochs = order.GlobalOrder(n, 11).example(np.arange(3 * n))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(n)]
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_epochs_and_seeds_differ():
    n = 50
    ids = order.GlobalOrder(n, 0).example(np.arange(4 * n))[0].reshape(4, n)
    other = order.GlobalOrder(n, 1).example(np.arange(n))[0]
    rows = [tuple(row) for row in (*ids, other, np.arange(n))]
    assert len(set(rows)) == len(rows)
    for one, two in itertools.combinations(rows, 2):
        assert np.mean(np.array(one) == np.array(two)) < 0.2


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_permutations_are_even(n):
    epochs = 24_000
    drawn = order.permute(np.arange(n)[None], n, order.order_key(7, 1, np.arange(epochs))[:, None])
    codes, counts = np.unique(drawn @ (n ** np.arange(n)), return_counts=True)
    assert len(codes) == math.factorial(n)
    # 99.99 % of fair draws stay below: 15.1 on 1 degree of freedom, 5.1 on 5, 2.4 on 23.
    assert chi_square(counts, epochs / len(codes)) < {2: 15.2, 3: 5.2, 4: 2.5}[n]


@pytest.mark.parametrize("n", [10, 100])
def test_places_and_neighbours_are_even(n):
    """Each element comes first equally often, and the step from first to second takes each value equally often."""
    epochs = 20_000
    drawn = order.permute(np.array([[0, 1]]), n, order.order_key(7, 1, np.arange(epochs))[:, None])
    first = np.bincount(drawn[:, 0], minlength=n)
    step = np.bincount((drawn[:, 1] - drawn[:, 0]) % n, minlength=n)[1:]
    bound = {10: 4.0, 100: 1.7}[n]
    assert chi_square(first, epochs / n) < bound
    assert chi_square(step, epochs / (n - 1)) < bound


def test_any_positions_in_any_grouping():
    positions = np.array([900, 3, 3, 70, 10**12])
    whole = order.GlobalOrder(60, 9)
    ids, epochs = whole.example(positions)
    single = [whole.example(np.array([position])) for position in positions]
    assert ids.tolist() == [int(one[0][0]) for one in single]
    assert epochs.tolist() == [int(one[1][0]) for one in single] == (positions // 60).tolist()


def test_mixed_sizes_and_bad_indices():
    sizes = np.array([3, 3, 3, 5, 5, 5, 5, 5, 1])
    index = np.array([0, 1, 2, 0, 1, 2, 3, 4, 0])
    images = order.permute(index, sizes, order.order_key(1))
    assert sorted(images[:3]) == [0, 1, 2] and sorted(images[3:8]) == [0, 1, 2, 3, 4] and images[8] == 0
    with pytest.raises(ValueError, match="outside"):
        order.permute(np.array([3]), 3, order.order_key(0))


def test_subsets_are_nested_and_sorted():
    small, large = order.subset(500, 20), order.subset(500, 60)
    assert set(small) <= set(large) and len(set(large)) == 60
    assert np.array_equal(small, np.sort(small)) and large.min() >= 0 and large.max() < 500
    assert order.subset(5, 99).tolist() == [0, 1, 2, 3, 4]


BLOCK_CASES = [([5, 1, 8, 3, 2, 9], 2), ([4, 4, 4], 8), ([7], 1), ([1], 3), ([0, 3, 0, 0, 2, 6, 0], 2), ([1] * 9, 4)]


@pytest.mark.parametrize("sizes,window", BLOCK_CASES)
def test_blocks_are_bijections(sizes, window):
    blocks = order.BlockOrder(sizes, 13, window)
    n = sum(sizes)
    ids, epochs = blocks.example(np.arange(4 * n))
    assert np.array_equal(epochs, np.arange(4 * n) // n)
    for epoch in range(4):
        assert np.array_equal(np.sort(ids[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_a_window_holds_whole_blocks_and_mixes_them():
    rng = np.random.default_rng(0)
    sizes, window = rng.integers(10, 40, 30), 5
    blocks = order.BlockOrder(sizes, 2, window)
    owner = np.repeat(np.arange(30), sizes)
    position, seen, starts = 0, [], []
    while position < blocks.n:
        end = blocks._window_end(position)
        ids, _ = blocks.example(np.arange(position, end))
        inside = np.unique(owner[ids])
        assert len(inside) == window and len(ids) == sizes[inside].sum()
        # Interleaved: the first quarter of a window already draws from several blocks.
        starts.append(len(np.unique(owner[ids[: len(ids) // 4]])))
        seen += inside.tolist()
        position = end
    assert sorted(seen) == list(range(30)) and min(starts) >= 3
    following = owner[blocks.example(np.arange(blocks.n, 2 * blocks.n))[0]]
    assert not np.array_equal(following[:50], owner[blocks.example(np.arange(50))[0]])


def test_blocks_are_pure_in_position():
    blocks = order.BlockOrder([6, 3, 8, 2, 7], 4, 2)
    n = blocks.n
    whole, _ = blocks.example(np.arange(6 * n))
    shuffled = np.random.default_rng(1).permutation(6 * n)
    fresh = order.BlockOrder([6, 3, 8, 2, 7], 4, 2)
    assert np.array_equal(fresh.example(shuffled)[0], whole[shuffled])
    assert len(fresh._epochs) <= 2


def test_horizon_reaches_one_window_further():
    blocks = order.BlockOrder([4, 4, 4, 4, 4, 4], 0, 2)
    assert [blocks.horizon(position) for position in (0, 7, 8, 15, 16, 23, 24)] == [16, 16, 24, 24, 32, 32, 40]
    assert order.GlobalOrder(10, 0).horizon(5) == 5


def test_bad_arguments_are_said():
    with pytest.raises(DatasetError, match="no examples"):
        order.GlobalOrder(0, 0)
    with pytest.raises(DatasetError, match="int32"):
        order.GlobalOrder(2**31, 0)
    with pytest.raises(DatasetError, match="no examples"):
        order.BlockOrder([0, 0], 0, 2)
    with pytest.raises(DatasetError, match=r"data\.window"):
        order.BlockOrder([3], 0, 0)
    with pytest.raises(DatasetError, match="'global' or 'blocks'"):
        order.make_order("random", n=3, blocks=[3], seed=0, window=1)
