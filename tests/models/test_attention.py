import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.attention import Attention, attend, choose


def qkv(b=2, n=13, h=3, d=8, dtype=jnp.float32):
    return [jax.random.normal(jax.random.key(i), (b, n, h, d), dtype) for i in range(3)]


def plain(q, k, v):
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("form", ["cpu", "xla", "auto"])
def test_forms_equal_the_definition(form):
    arrays = qkv()
    want = plain(*(np.asarray(a, np.float64) for a in arrays))
    np.testing.assert_allclose(attend(*arrays, form), want, atol=1e-5)


def test_forms_agree_in_gradients_also_under_remat_and_with_large_scores():
    arrays = [a * 5 for a in qkv()]
    weight = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def grads(form, wrap=lambda f: f):
        return jax.grad(lambda a: jnp.sum(wrap(lambda *x: attend(*x, form))(*a) * weight))(arrays)

    for got in (grads("cpu"), grads("cpu", jax.checkpoint)):
        for one, other in zip(got, grads("xla"), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_sixteen_bit_input_keeps_its_type_and_a_wide_softmax():
    arrays = qkv(dtype=jnp.bfloat16)
    want = plain(*(np.asarray(a, np.float64) for a in arrays))
    out = attend(*arrays, "cpu")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.01)


def test_choice_by_backend():
    assert choose("auto", "cpu", 197, 64, jnp.float32) == "cpu"
    assert choose("auto", "tpu", 197, 64, jnp.bfloat16) == "xla"
    assert choose("auto", "gpu", 197, 64, jnp.bfloat16) == "cudnn"
    assert choose("auto", "gpu", 50, 64, jnp.bfloat16) == "xla"
    assert choose("auto", "gpu", 197, 64, jnp.float32) == "xla"
    assert choose("xla", "cpu", 197, 64, jnp.float32) == "xla"
    with pytest.raises(ConfigError, match="attention=auto"):
        choose("cudnn", "cpu", 197, 64, jnp.bfloat16)
    with pytest.raises(ConfigError, match="flash"):
        choose("flash", "cpu", 197, 64, jnp.bfloat16)


def test_the_module_refuses_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match="3 heads"):
        Attention(heads=3).init(jax.random.key(0), jnp.zeros((1, 4, 8)))
