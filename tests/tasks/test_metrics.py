import jax.numpy as jnp
import numpy as np

from wavepath.tasks import metrics


def test_a_mean_over_ragged_batches_is_exact_and_padding_counts_nothing():
    first = {"loss": metrics.pair(jnp.asarray([1.0, 2.0, 3.0]))}
    second = {"loss": metrics.pair(jnp.asarray([10.0, jnp.nan, jnp.inf]), jnp.asarray([1.0, 0.0, 0.0]))}
    assert metrics.compute(metrics.merge([first, second])) == {"loss": 4.0}


def test_constants_survive_merging_and_no_examples_give_nan():
    merged = metrics.merge([{"lr": metrics.constant(0.1)}, {"lr": metrics.constant(0.1)}])
    np.testing.assert_allclose(metrics.compute(merged)["lr"], 0.1, rtol=1e-6)
    assert np.isnan(metrics.compute({"loss": metrics.pair(jnp.ones(2), jnp.zeros(2))})["loss"])


def test_reduce_is_the_identity_outside_a_mapped_axis():
    one = {"loss": metrics.pair(jnp.ones(3))}
    assert metrics.compute(metrics.reduce(one)) == {"loss": 1.0}
