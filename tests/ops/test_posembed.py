import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops.posembed import resize_table, sincos_2d


@pytest.mark.parametrize("rows, columns", [(3, 3), (7, 7), (16, 16), (4, 9)])
def test_a_table_is_resized_bicubically_and_antialiased(rows, columns):
    """jax's own `cubic` resize: the same kernel and the same rule at the border."""
    table = jax.random.normal(jax.random.key(0), (36, 5))
    want = jax.image.resize(table.reshape(6, 6, 5), (rows, columns, 5), "cubic", antialias=True).reshape(rows * columns, 5)
    np.testing.assert_allclose(resize_table(table, rows, columns), want, atol=2e-6)


def test_a_table_of_its_own_size_is_itself_and_one_without_a_square_is_refused():
    table = jnp.asarray(sincos_2d(8, 3, 3))
    assert resize_table(table, 3, 3) is table
    with pytest.raises(ValueError, match="8 positions is not that of a square grid"):
        resize_table(table[:8], 3, 3)
