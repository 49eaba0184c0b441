"""Co-occurrence matrices against scikit-image (values, offsets, statistics), memberships, formulations, masks, derivatives, types and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from skimage.feature import graycomatrix, graycoprops

from wavepath.ops import glcm
from wavepath.ops import glcm_membership as members

OFFSETS = ((0, 1), (1, 0), (1, -1), (-2, 1))
IMPLS = tuple(glcm.FORMULATIONS)


def image(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).random(shape).astype(dtype))


def integers(levels, seed=0):
    return np.random.default_rng(seed).integers(0, levels, (11, 9)).astype(np.uint8)


def counted(pixels, levels, offsets):
    """Pairs counted one by one."""
    out = np.zeros((len(offsets), levels, levels))
    for k, (drow, dcol) in enumerate(offsets):
        for r, c in np.ndindex(pixels.shape):
            if 0 <= r + drow < pixels.shape[0] and 0 <= c + dcol < pixels.shape[1]:
                out[k, pixels[r, c], pixels[r + drow, c + dcol]] += 1
    return out


def weights(v, kind, levels, sharpness=None, window=None):
    """Dense and windowed memberships of level coordinates, the latter filled in."""
    m = members.make_membership(kind, levels, sharpness, window)
    start, some = members.windowed(jnp.asarray(v), m)
    filled = np.zeros((len(v), levels))
    for row, first, w in zip(filled, np.asarray(start), np.asarray(some), strict=True):
        row[first : first + m.count] = w
    return np.asarray(members.dense(jnp.asarray(v), m)), filled, m


@pytest.mark.parametrize("symmetric", [False, True])
def test_hard_counts_equal_scikit_image(symmetric):
    distances, angles = [1, 2, 3], [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    pixels = integers(8)
    expected = graycomatrix(pixels, distances, angles, levels=8, symmetric=symmetric)
    options = dict(value_range=(0.0, 8.0), membership="hard", symmetric=symmetric)
    offsets = glcm.offsets_from(distances, angles)
    got = np.asarray(glcm.cooccurrence(jnp.asarray(pixels, jnp.float32), 8, offsets, **options))
    np.testing.assert_array_equal(got, expected.transpose(2, 3, 0, 1).reshape(-1, 8, 8))
    normed = graycomatrix(pixels, distances, angles, levels=8, symmetric=symmetric, normed=True).transpose(2, 3, 0, 1).reshape(-1, 8, 8)
    np.testing.assert_allclose(glcm.cooccurrence(jnp.asarray(pixels, jnp.float32), 8, offsets, normalize=True, **options), normed, atol=1e-7)


def test_offsets_follow_scikit_image():
    assert glcm.offsets_from([1], [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]) == ((0, 1), (1, 1), (1, 0), (1, -1))
    assert glcm.offsets_from([2], [np.pi / 4]) == ((1, 1),)
    assert glcm.offsets_from([1, 3], [0]) == ((0, 1), (0, 3))


@pytest.mark.parametrize("kind,sharpness", [("triangular", None), ("triangular", 7.0), ("sigmoid", 40.0)])
def test_integer_images_are_exact_as_sharpness_grows(kind, sharpness):
    """Integer values at the centres of their levels; a sigmoid comes as near as its tail, exp(-sharpness / 2)."""
    pixels = integers(16)
    got = glcm.cooccurrence(jnp.asarray(pixels, jnp.float32), 16, OFFSETS, value_range=(-0.5, 15.5), membership=kind, sharpness=sharpness)
    np.testing.assert_allclose(got, counted(pixels, 16, OFFSETS), atol=1e-6)


@pytest.mark.parametrize("kind", ["triangular", "sigmoid"])
def test_soft_counts_approach_hard_ones(kind):
    x = image(24, 24)
    hard = glcm.cooccurrence(x, 8, value_range=(0.0, 1.0), membership="hard")
    far = [
        float(jnp.abs(glcm.cooccurrence(x, 8, value_range=(0.0, 1.0), membership=kind, sharpness=s, window=4) - hard).sum()) for s in (4, 40, 4000)
    ]
    assert far[0] > 3 * far[1] > 9 * far[2]


@pytest.mark.parametrize(
    "kind,sharpness", [("triangular", None), ("triangular", 5.0), ("sigmoid", 30.0), ("sigmoid", 5.0), ("sigmoid", 1.5), ("hard", None)]
)
def test_memberships_sum_to_one(kind, sharpness):
    """At both ends of the range too, and the kept window holds all but a millionth."""
    v = np.concatenate([np.linspace(0, 12, 241), [0.0, 1e-4, 12 - 1e-4, 12.0]])
    with jax.enable_x64(True):
        dense, filled, m = weights(v, kind, 12, sharpness)
    np.testing.assert_allclose(dense.sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(filled, dense, atol=1e-6)
    assert np.abs(filled.sum(-1) - 1).max() < members.TRUNCATED_MASS
    assert dense.min() >= 0
    if kind == "sigmoid":
        assert m.count == {30.0: 2, 5.0: 7, 1.5: 12}[sharpness]


def test_sigmoid_memberships_are_the_published_ones():
    """METHODS 2.2, written out with its mirror terms in intensities."""
    lo, hi, levels, x = -2.0, 2.5, 10, np.linspace(-2.0, 2.5, 57)
    step = (hi - lo) / levels
    centres, width = lo + (np.arange(levels) + 0.5) * step, step / 5.0

    def s(z):
        return 1 / (1 + np.exp(-z / width))

    expected = sum(s(y[:, None] - centres + step / 2) - s(y[:, None] - centres - step / 2) for y in (x, 2 * lo - x, 2 * hi - x))
    with jax.enable_x64(True):
        v = members.level_coordinate(jnp.asarray(x), levels, lo, hi)
        np.testing.assert_allclose(weights(np.asarray(v), "sigmoid", levels, 5.0)[0], expected, atol=1e-12)


@pytest.mark.parametrize("kind,sharpness", [("triangular", None), ("sigmoid", 5.0), ("sigmoid", 2.0), ("hard", None)])
def test_formulations_agree(kind, sharpness):
    x, mask = np.asarray(image(2, 13, 10)), image(2, 13, 10, seed=1) > 0.3

    def both(x, impl):
        def f(x):
            p = glcm.cooccurrence(x, 9, OFFSETS, value_range=(0.1, 0.9), membership=kind, sharpness=sharpness, mask=mask, impl=impl)
            return jnp.sum(p * jnp.cos(jnp.arange(p.size).reshape(p.shape))), p

        return jax.value_and_grad(f, has_aux=True)(x)

    with jax.enable_x64(True):
        results = [jax.jit(both, static_argnums=1)(jnp.asarray(x, jnp.float64), impl) for impl in IMPLS]
    for (_, p), slope in results[1:]:
        np.testing.assert_allclose(p, results[0][0][1], atol=2e-5 if kind == "sigmoid" else 1e-10)
        np.testing.assert_allclose(slope, results[0][1], atol=1e-3 if kind == "sigmoid" else 1e-9)
    assert float(np.abs(results[0][1]).max()) > 1 or kind == "hard"


def test_scan_in_several_blocks(monkeypatch):
    from wavepath.ops import glcm_matrices

    x = image(2, 23, 12)
    whole = glcm.cooccurrence(x, 8, OFFSETS, value_range=(0.0, 1.0), impl="matmul")
    monkeypatch.setattr(glcm_matrices, "_SCAN_BYTES", 2 * 12 * 8 * 4 * 7)
    np.testing.assert_allclose(glcm.cooccurrence(x, 8, OFFSETS, value_range=(0.0, 1.0), impl="scan"), whole, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_count_pairs_inside(impl):
    pixels, mask = integers(6), image(11, 9, seed=3) > 0.4
    expected = np.zeros((2, 6, 6))
    for k, (drow, dcol) in enumerate(((0, 1), (1, -1))):
        for r, c in np.argwhere(mask):
            if r + drow < 11 and 0 <= c + dcol < 9 and mask[r + drow, c + dcol]:
                expected[k, pixels[r, c], pixels[r + drow, c + dcol]] += 1
    x = jnp.asarray(pixels, jnp.float32)
    options = dict(value_range=(0.0, 6.0), membership="hard", impl=impl)
    np.testing.assert_array_equal(glcm.cooccurrence(x, 6, ((0, 1), (1, -1)), mask=mask, **options), expected)
    assert not np.asarray(glcm.cooccurrence(x, 6, mask=jnp.zeros_like(mask), normalize=True, **options)).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind,sharpness", [("triangular", 1.0), ("sigmoid", 3.0)])
def test_finite_differences(kind, sharpness, impl):
    """Values a little off the kinks of the triangular membership."""
    with jax.enable_x64(True):
        x = jnp.asarray((np.random.default_rng(0).integers(0, 7, (5, 6)) + np.random.default_rng(1).uniform(0.6, 1.4, (5, 6))) / 8)
        pattern = jnp.asarray(image(2, 8, 8, dtype=np.float64))

        def f(x):
            return jnp.sum(pattern * glcm.cooccurrence(x, 8, value_range=(0.0, 1.0), membership=kind, sharpness=sharpness, window=8, impl=impl) ** 2)

        check_grads(jax.jit(f), (x,), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["triangular", "sigmoid"])
def test_gradients_are_finite_at_the_ends(kind):
    x = jnp.asarray([[0.0, 1.0, 0.0], [1.0, 0.5, -3.0], [0.25, 7.0, 1.0]])
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(glcm.cooccurrence(x, 4, value_range=(0.0, 1.0), membership=kind)))))(x)
    assert np.isfinite(slope).all()
    assert float(slope[1, 2]) == float(slope[2, 1]) == 0


def test_transformations_and_types():
    x = image(3, 2, 8, 8)
    f = jax.jit(lambda x: glcm.cooccurrence(x, 8, value_range=(0.0, 1.0)))
    p = f(x)
    assert p.shape == (3, 2, 2, 8, 8) and p.dtype == jnp.float32
    np.testing.assert_allclose(p.sum((-2, -1)), 56, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.jit(f))(x), p, atol=1e-5)
    _, change = jax.jvp(f, (x,), (jnp.ones_like(x),))
    forward = jax.jacfwd(f)(x[0, 0])
    np.testing.assert_allclose(forward.sum((-2, -1)), change[0, 0], atol=1e-3)
    half = f(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, f(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)))
    # The ends of the range and the sharpness may be traced.
    traced = jax.jit(lambda lo, hi, s: glcm.cooccurrence(x, 8, value_range=(lo, hi), membership="sigmoid", sharpness=s, window=3))
    fixed = glcm.cooccurrence(x, 8, value_range=(0.1, 0.8), membership="sigmoid", sharpness=6.0)
    np.testing.assert_allclose(traced(0.1, 0.8, 6.0), fixed, atol=2e-4)


@pytest.mark.multidevice
@pytest.mark.parametrize("impl", IMPLS)
def test_a_sharded_batch(impl):
    x = image(8, 6, 6)
    f = jax.jit(lambda x: glcm.cooccurrence(x, 4, value_range=(0.0, 1.0), impl=impl))
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(f(placed), f(x), atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_statistics_equal_scikit_image(symmetric):
    flat = np.full((6, 6), 3, np.uint8)
    for pixels in (integers(8), flat):
        p = graycomatrix(pixels, [1], [0, np.pi / 2], levels=8, symmetric=symmetric)
        got = glcm.haralick(jnp.asarray(p[:, :, 0].transpose(2, 0, 1), jnp.float32))
        for name in glcm.Haralick._fields:
            np.testing.assert_allclose(getattr(got, name), graycoprops(p, name)[0], rtol=1e-5, atol=1e-6, err_msg=name)


def test_statistics_have_finite_gradients():
    """Flat, half flat, empty and ordinary images."""
    images = np.stack([np.full((6, 6), 0.4), np.full((6, 6), 0.0), np.kron([[0.2, 0.9]], np.ones((6, 3))), image(6, 6)]).astype(np.float32)
    images = jnp.asarray(images)
    for kind in ("triangular", "sigmoid"):

        def f(x):
            return sum(part.sum() for part in jax.jit(glcm.haralick)(glcm.cooccurrence(x, 8, value_range=(0.0, 1.0), membership=kind)))  # noqa: B023

        assert np.isfinite(jax.jit(jax.grad(f))(images)).all()
    assert all(np.isfinite(part).all() for part in jax.jit(jax.jacrev(glcm.haralick))(jnp.zeros((1, 4, 4))))
    with jax.enable_x64(True):
        check_grads(
            jax.jit(glcm.haralick), (jnp.asarray(image(1, 5, 5, dtype=np.float64) + 0.1),), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(membership="triangle"), "did you mean 'triangular'"),
        (dict(impl="scater"), "did you mean 'scatter'"),
        (dict(levels=1), "at least 2"),
        (dict(offsets=((0, 8),)), "smaller distance"),
        (dict(offsets=()), "at least one"),
        (dict(offsets=(1, 2)), "pairs"),
        (dict(value_range=(1.0, 1.0)), "the first below the second"),
        (dict(value_range=(0.0, float("inf"))), "finite"),
        (dict(membership="sigmoid", sharpness=2.0, window=1), "loses mass"),
        (dict(value_range=3.0), "pair"),
        (dict(sharpness=0.5), "use sigmoid"),
        (dict(membership="sigmoid", sharpness=-1.0), "positive"),
        (dict(window=0), "window"),
        (dict(mask=jnp.ones((4, 4), bool)), "broadcast the mask"),
    ],
)
def test_errors_name_the_remedy(options, message):
    options = {"levels": 8, "offsets": ((0, 1),), "value_range": (0.0, 1.0)} | options
    levels, offsets = options.pop("levels"), options.pop("offsets")
    # The function itself: its shape checks, on in tests alone, would speak first about masks and ranges.
    plain = getattr(glcm.cooccurrence, "__wrapped__", glcm.cooccurrence)
    with pytest.raises(glcm.GlcmError, match=message):
        plain(image(8, 8), levels, offsets, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="to_float"):
        getattr(glcm.cooccurrence, "__wrapped__", glcm.cooccurrence)(integers(8), 8, value_range=(0.0, 8.0))
    with pytest.raises(glcm.GlcmError, match="window="):
        jax.jit(lambda s: glcm.cooccurrence(image(8, 8), 8, value_range=(0.0, 1.0), membership="sigmoid", sharpness=s))(3.0)


def test_defaults_by_backend():
    narrow, wide = (members.make_membership("sigmoid", 32, s, None) for s in (30.0, 1.0))
    assert [glcm.default_formulation(m, 1, 10**5, 2, "cpu") for m in (narrow, wide)] == ["scatter", "scan"]
    assert [glcm.default_formulation(narrow, n, 10**5, 2, "cpu") for n in (1, 200)] == ["scatter", "scan"], "working memory"
    hard = members.make_membership("hard", 2, None, None)
    assert [glcm.default_formulation(hard, 1, n, 1, "cpu") for n in (2**24, 2**24 + 1)] == ["scatter", "scan"], "float32 counts to 2^24"
    assert [glcm.default_formulation(narrow, n, 10**5, 2, "gpu") for n in (1, 1000)] == ["matmul", "scan"]


def test_colours_and_lists_are_refused():
    with pytest.raises(glcm.GlcmError, match="grey planes"):
        glcm.cooccurrence(jnp.zeros((2, 8, 8, 3)), 8, value_range=(0.0, 1.0))
