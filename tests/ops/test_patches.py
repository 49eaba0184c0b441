import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops.patches import (
    Masking,
    assemble,
    gather_patches,
    normalise_patches,
    patchify,
    random_masking,
    repeat_groups,
    unpatchify,
)
from wavepath.ops.posembed import sincos_2d


def test_patchify_orders_rows_of_patches_then_pixels_and_comes_back():
    images = jnp.arange(2 * 8 * 12 * 3, dtype=jnp.float32).reshape(2, 8, 12, 3)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(patches[1, 4].reshape(4, 4, 3), images[1, 4:8, 4:8])
    np.testing.assert_array_equal(unpatchify(patches, 4, 12), images)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="10 x 8"):
        patchify(jnp.zeros((1, 8, 10, 3)), 4)
    with pytest.raises(ValueError, match="5 patches"):
        unpatchify(jnp.zeros((1, 5, 48)), 4, 8)
    with pytest.raises(ValueError, match="3 groups"):
        gather_patches(jnp.zeros((4, 6, 2)), jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(6, 2, 2)


@pytest.mark.parametrize("ratio, keep", [(0.75, 49), (0.5, 98), (0.9, 19), (0.0, 196)])
def test_masks_are_permutations_with_the_stated_share_visible(ratio, keep):
    masking = random_masking(jax.random.split(jax.random.key(0), 4), 196, ratio)
    assert masking.visible.shape == (4, keep) and masking.masked.shape == (4, 196 - keep)
    np.testing.assert_array_equal(np.sort(masking.order, axis=1), np.tile(np.arange(196), (4, 1)))
    assert len(np.unique(masking.order, axis=0)) == 4


def test_every_patch_is_visible_equally_often():
    masking = random_masking(jax.random.split(jax.random.key(1), 4000), 16, 0.75)
    share = np.bincount(np.asarray(masking.visible).ravel(), minlength=16) / 4000
    np.testing.assert_allclose(share, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gathering_by_groups_equals_gathering_each(groups):
    x = jax.random.normal(jax.random.key(0), (4, 9, 5))
    ids = random_masking(jax.random.split(jax.random.key(1), groups), 9, 0.5).visible
    each = np.stack([np.asarray(x)[i, np.asarray(ids)[i * groups // 4]] for i in range(4)])
    np.testing.assert_array_equal(gather_patches(x, ids), each)
    np.testing.assert_array_equal(repeat_groups(ids, 4), np.repeat(np.asarray(ids), 4 // groups, axis=0))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_assemble_undoes_the_shuffle(groups):
    x = jax.random.normal(jax.random.key(0), (4, 9, 5))
    masking = random_masking(jax.random.split(jax.random.key(2), groups), 9, 0.6)
    parts = gather_patches(x, masking.visible), gather_patches(x, masking.masked)
    np.testing.assert_array_equal(assemble(*parts, masking), x)


def test_normalised_patches_have_unit_unbiased_variance_and_flat_ones_stay_finite():
    x = jax.random.normal(jax.random.key(0), (2, 3, 48)) * 7 + 3
    out = normalise_patches(x.at[0, 0].set(5.0))
    np.testing.assert_allclose(out[1].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.var(np.asarray(out[1]), axis=-1, ddof=1), 1, atol=1e-4)
    np.testing.assert_array_equal(out[0, 0], 0)


def test_positions_put_the_column_first_and_sine_before_cosine():
    table = sincos_2d(8, 2, 3)
    assert table.shape == (6, 8)
    np.testing.assert_array_equal(table[0], [0, 0, 1, 1, 0, 0, 1, 1])
    one = np.array([np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)], np.float32)
    np.testing.assert_allclose(table[1], [*one, 0, 0, 1, 1], atol=1e-7)  # patch (row 0, column 1)
    np.testing.assert_allclose(table[3], [0, 0, 1, 1, *one], atol=1e-7)  # patch (row 1, column 0)


def test_masking_passes_through_jit_with_its_static_count():
    masking = Masking(order=jnp.arange(6, dtype=jnp.int32)[None], keep=2)
    np.testing.assert_array_equal(jax.jit(lambda m: m.masked)(masking), [[2, 3, 4, 5]])
