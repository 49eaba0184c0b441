"""Hard attention: chunked equals dense in values and gradients, and both equal the published unfold and fold in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops.hard_attention import hard_attention, hard_match

SHAPE = (2, 7, 6, 5)


def features(count, shape=SHAPE, seed=0):
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), count)]


def values_and_gradients(impl, chunk=0, size=3):
    query, key, value, by_feature = features(4)
    by_score = features(1, (*SHAPE[:3], 1), 1)[0]

    def total(*inputs):
        transferred, score = hard_attention(*inputs, impl=impl, chunk=chunk, size=size)
        return (transferred * by_feature).sum() + (score * by_score).sum(), (transferred, score)

    (_, found), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)
    return [*found, *gradients]


@pytest.mark.parametrize(
    ("impl", "chunk", "size"),
    [("shift", 3, 3), pytest.param("product", 2, 3, marks=pytest.mark.slow), pytest.param("shift", 0, 5, marks=pytest.mark.slow)],
)
def test_chunked_equals_dense(impl, chunk, size):
    for ours, dense in zip(values_and_gradients(impl, chunk, size), values_and_gradients("dense", 0, size), strict=True):
        assert np.abs(np.asarray(dense)).max() > 0.05
        np.testing.assert_allclose(ours, dense, atol=1e-5)


@pytest.mark.parametrize("impl", ["shift", "product", "dense"])
def test_a_map_finds_itself(impl):
    (x,) = features(1)
    np.testing.assert_array_equal(hard_match(x, x, impl=impl), np.tile(np.arange(42), (2, 1)))
    transferred, score = hard_attention(x, x, x, impl=impl)
    np.testing.assert_allclose(score, 1, atol=1e-6)
    # Inside, nine patches meet in a pixel; at the border fewer do, and the divisor stays.
    np.testing.assert_allclose(transferred[:, 1:-1, 1:-1], x[:, 1:-1, 1:-1], atol=1e-6)
    np.testing.assert_allclose(transferred[:, 0, 0], x[:, 0, 0] * 4 / 9, atol=1e-6)


def test_it_is_the_published_unfold_and_fold():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    from torch.nn import functional

    inputs = features(3)
    query, key, value = (torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).double().requires_grad_() for x in inputs)
    q, k = (functional.normalize(functional.unfold(x, 3, padding=1), dim=1) for x in (query, key))
    score, best = torch.bmm(k.permute(0, 2, 1), q).max(dim=1)
    found = functional.unfold(value, 3, padding=1)
    found = torch.gather(found, 2, best[:, None].expand(-1, found.shape[1], -1))
    transferred = functional.fold(found, SHAPE[1:3], 3, padding=1) / 9
    np.testing.assert_array_equal(hard_match(*inputs[:2]), best)
    ours, pull = jax.vjp(hard_attention, *inputs)
    np.testing.assert_allclose(ours[0], transferred.detach().permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(ours[1][..., 0], score.detach().reshape(SHAPE[:3]), atol=1e-6)
    weight, by_score = features(1, seed=3)[0], features(1, (*SHAPE[:3], 1), 4)[0]
    there = [torch.tensor(np.asarray(x)) for x in (weight, by_score)]
    ((transferred * there[0].permute(0, 3, 1, 2)).sum() + (score.flatten() * there[1].flatten()).sum()).backward()
    for one, other in zip(pull((weight, by_score)), (query, key, value), strict=True):
        np.testing.assert_allclose(one, other.grad.permute(0, 2, 3, 1), atol=1e-5)


def test_patches_of_zeros():
    (x,) = features(1)
    blank = x.at[:, :4].set(0)
    gradient = jax.grad(lambda q, k: hard_attention(q, k, x)[1].sum(), (0, 1))(blank, blank)
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) < 10 for g in gradient)
    assert float(hard_attention(blank, x, x)[1][0, 1, 2, 0]) == 0


def test_half_precision_and_bad_settings():
    query, key, value = (x.astype(jnp.bfloat16) for x in features(3))
    transferred, score = hard_attention(query, key, value)
    assert transferred.dtype == score.dtype == jnp.bfloat16
    for settings in (dict(impl="sparse"), dict(size=2), dict(chunk=-1)):
        with pytest.raises(ValueError, match="choose one of|odd size"):
            hard_attention(query, key, value, **settings)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_patch():
    """Twice the side is sixteen times the dense form's scratch memory, and for chunks of two rows less than eight times."""

    def scratch(impl, side):
        shape = jax.ShapeDtypeStruct((2, side, side, 4), np.float32)

        def total(*x):
            return sum(y.sum() for y in hard_attention(*x, impl=impl, chunk=2))

        return jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert scratch("dense", 64) > 12 * scratch("dense", 32)
    assert scratch("shift", 64) < 10 * scratch("shift", 32) and scratch("shift", 64) < scratch("dense", 64) / 12
