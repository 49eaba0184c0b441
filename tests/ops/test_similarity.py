import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath.ops import collectives
from wavepath.ops.similarity import info_nce, luma, psnr, ssim, unit

SHARDS = 8


def reference(q, k, t):
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    logits = q @ k.T / t
    return np.log(np.exp(logits).sum(1)) - np.diag(logits), logits.argmax(1) == np.arange(len(q))


@pytest.fixture
def views():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(16, 6))
    return q.astype(np.float32), (q + rng.normal(size=q.shape)).astype(np.float32)


def test_equals_the_definition(views):
    loss, hit = info_nce(*map(jnp.asarray, views), 0.2)
    want, want_hit = reference(*(v.astype(np.float64) for v in views), 0.2)
    np.testing.assert_allclose(loss, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(hit, want_hit)
    both, _ = info_nce(*map(jnp.asarray, views), 0.2, symmetric=True)
    np.testing.assert_allclose(both, (want + reference(*views[::-1], 0.2)[0]) / 2, rtol=2e-5, atol=2e-5)


def test_length_does_not_matter_and_equal_embeddings_cost_the_log_of_the_batch(views):
    q, k = map(jnp.asarray, views)
    np.testing.assert_allclose(info_nce(q * 3, k * 0.1, 0.2)[0], info_nce(q, k, 0.2)[0], rtol=1e-5)
    same = jnp.ones((16, 6))
    np.testing.assert_allclose(info_nce(same, same, 0.2)[0], np.log(16), rtol=1e-6)
    np.testing.assert_array_equal(unit(jnp.zeros((1, 3))), 0)


@pytest.mark.multidevice
@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_and_gradient_on_eight_devices_are_those_on_one(views, symmetric):
    q, k = map(jnp.asarray, views)
    w = jax.random.normal(jax.random.key(0), (6, 4)) * 0.5

    def loss(w, q, k):
        each, hit = info_nce(q @ w, k @ w, 0.2, symmetric)
        return each.mean(), (each, hit)

    (_, (each, hit)), grad = jax.value_and_grad(loss, has_aux=True)(w, q, k)

    def body(w, q, k):
        with collectives.axis("data"):
            (_, (each, hit)), grad = jax.value_and_grad(loss, has_aux=True)(w, q, k)
            return each, hit, collectives.pmean(grad)

    split = [np.asarray(x).reshape(SHARDS, 2, -1) for x in (q, k)]
    run = jax.pmap(body, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices("cpu")[:SHARDS])
    each_8, hit_8, grad_8 = run(w, *split)
    np.testing.assert_allclose(each_8.reshape(-1), each, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hit_8.reshape(-1), hit)
    for one in grad_8:
        np.testing.assert_allclose(one, grad, rtol=1e-4, atol=1e-6)


def images(side, seed=0, channels=3):
    rng = np.random.default_rng(seed)
    a = rng.random((2, side, side, channels))
    return a, np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1)


@pytest.mark.parametrize("side", [16, 80])  # matrix products, slices
@pytest.mark.parametrize("window, options", [
    ("gaussian", {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    ("uniform", {}),
])
def test_ssim_equals_scikit_image(side, window, options, monkeypatch):
    monkeypatch.setattr("wavepath.ops.similarity._SMALL", 64)
    a, b = images(side)
    want = [structural_similarity(x, y, channel_axis=-1, data_range=1.0, **options) for x, y in zip(a, b, strict=True)]
    with jax.enable_x64(True):
        got = ssim(jnp.asarray(a), jnp.asarray(b), value_range=1.0, window=window, sample_covariance=window == "uniform")
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_ssim_scale_size_and_sigma():
    a, b = images(32)
    small = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    want = [structural_similarity(255 * x, 255 * y, channel_axis=-1, data_range=255, win_size=5) for x, y in zip(a, b, strict=True)]
    got = ssim(255 * small[0], 255 * small[1], value_range=255.0, window="uniform", size=5, sample_covariance=True)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    gaussian = {"gaussian_weights": True, "sigma": 0.8, "use_sample_covariance": False}  # scikit-image's size: 2 * int(3.5 * 0.8 + 0.5) + 1
    want = [structural_similarity(x, y, channel_axis=-1, data_range=1.0, **gaussian) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(*small, value_range=1.0, sigma=0.8, size=7), want, rtol=2e-5)


@pytest.mark.parametrize("side", [16, pytest.param(80, marks=pytest.mark.slow)])
def test_ssim_gradient(side, monkeypatch):
    monkeypatch.setattr("wavepath.ops.similarity._SMALL", 64)
    with jax.enable_x64(True):
        a, b = (jnp.asarray(x[:1, :, :, :1]) for x in images(side))
        check_grads(lambda x: ssim(jnp.asarray(x), b, value_range=1.0), (a,), order=1, modes=("fwd", "rev"))
        flat = jnp.full_like(a, 0.5)
        assert jnp.isfinite(jax.grad(lambda x: ssim(x, flat, value_range=1.0).sum())(flat)).all()
        np.testing.assert_allclose(ssim(a, a, value_range=1.0), 1.0)


def test_ssim_computes_half_precision_in_float32_and_refuses_what_it_cannot_compare():
    a, b = (jnp.asarray(0.5 + 0.01 * x, jnp.bfloat16) for x in images(16))
    np.testing.assert_allclose(ssim(a, b, value_range=1), ssim(a.astype(jnp.float32), b.astype(jnp.float32), value_range=1), rtol=1e-6)
    pixels = jnp.zeros((16, 16, 3), jnp.uint8)
    with pytest.raises(TypeError, match="to_float"):
        ssim(pixels, pixels, value_range=255)
    with pytest.raises(ValueError, match="one shape"):
        ssim(a, b[..., :1], value_range=1)


@pytest.mark.parametrize("options, message", [
    ({"size": 0}, "not 0"), ({"size": 10}, "odd"), ({"size": 17}, "does not fit into 16 x 16"), ({"window": "box"}, "choose gaussian or uniform"),
])
def test_ssim_refuses(options, message):
    a, b = images(16)
    with pytest.raises(ValueError, match=message):
        ssim(jnp.asarray(a), jnp.asarray(b), value_range=1.0, **options)


def test_psnr_and_luma_equal_scikit_image():
    a, b = (x.astype(np.float32) for x in images(16))
    want = [peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(jnp.asarray(a), jnp.asarray(b)), want, atol=1e-4)
    np.testing.assert_allclose(psnr(jnp.asarray(255 * a, jnp.float32), jnp.asarray(255 * b, jnp.float32), 255), want, atol=1e-4)
    assert jnp.isposinf(psnr(jnp.asarray(a), jnp.asarray(a))).all()
    np.testing.assert_allclose(luma(jnp.asarray(a))[..., 0], rgb2ycbcr(a)[..., 0] / 255, atol=1e-6)
    pixels = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    for call in (lambda: psnr(pixels, pixels), lambda: luma(pixels)):
        with pytest.raises(TypeError, match="to_float"):
            call()
