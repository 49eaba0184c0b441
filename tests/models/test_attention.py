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
    np.testing.assert_allclose(attend(jnp.stack(arrays, 2), form), want, atol=1e-5)


def test_forms_agree_in_gradients_also_under_remat_and_with_large_scores():
    arrays = [a * 5 for a in qkv()]
    weight = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def grads(form, wrap=lambda f: f):
        return jax.grad(lambda a: jnp.sum(wrap(lambda *x: attend(jnp.stack(x, 2), form))(*a) * weight))(arrays)

    for got in (grads("cpu"), grads("cpu", jax.checkpoint)):
        for one, other in zip(got, grads("xla"), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_the_gradient_by_hand_is_that_of_the_definition_in_double_precision():
    def definition(x):
        q, k, v = (x[:, :, i] for i in range(3))
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 2.0), v)

    with jax.enable_x64(True):  # JAX's own form takes the softmax in float32 even here
        packed = jax.random.normal(jax.random.key(3), (2, 7, 3, 2, 4), jnp.float64)
        weight = jax.random.normal(jax.random.key(4), (2, 7, 2, 4), jnp.float64)
        own, want = (
            jax.jit(jax.value_and_grad(lambda x, form=form: jnp.sum(form(x) * weight)))(packed)
            for form in (lambda x: attend(x, "cpu"), definition)
        )
    assert own[1].dtype == np.float64
    np.testing.assert_allclose(own[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(own[1], want[1], atol=1e-12 * float(np.abs(want[1]).max()))


def test_sixteen_bit_input_keeps_its_type_and_a_wide_softmax():
    arrays = qkv(dtype=jnp.bfloat16)
    want = plain(*(np.asarray(a, np.float64) for a in arrays))
    out = attend(jnp.stack(arrays, 2), "cpu")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.01)
    assert jax.grad(lambda x: attend(x, "cpu").sum().astype(jnp.float32))(jnp.stack(arrays, 2)).dtype == jnp.bfloat16


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
