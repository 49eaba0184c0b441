import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.tasks.accumulate import value_and_grad


def loss(params, batch):
    each = (jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2
    return each.mean(), {"loss": (each.sum(), jnp.asarray(each.size, each.dtype))}


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_give_the_value_sums_and_gradient_of_the_whole(parts):
    batch = {"x": jax.random.normal(jax.random.key(0), (12, 4)), "y": jax.random.normal(jax.random.key(1), (12,))}
    params = {"w": jax.random.normal(jax.random.key(2), (4,))}
    (want, want_sums), want_grad = jax.value_and_grad(loss, has_aux=True)(params, batch)
    value, sums, grad = jax.jit(lambda p, b: value_and_grad(loss, p, b, parts))(params, batch)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], want_sums["loss"], rtol=1e-6)
    np.testing.assert_allclose(grad["w"], want_grad["w"], rtol=1e-5, atol=1e-7)


def test_parts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="12 examples"):
        value_and_grad(loss, {"w": jnp.zeros(4)}, {"x": jnp.zeros((12, 4)), "y": jnp.zeros(12)}, 5)
