"""The co-occurrence loss: against the matrices written out, between formulations and blocks, derivatives, memory, the official code's numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from scipy.spatial.distance import jensenshannon

from wavepath.ops import glcm
from wavepath.ops import glcm_loss as module

RANGE = (-1.0, 1.5)
OFFSETS = ((0, 1), (1, -1), (2, 0))
IMPLS = glcm.LOSS_FORMULATIONS
RECORD = Path(__file__).with_name("glcm_official.json")


def patches(n, size=7, seed=0, dtype=np.float32):
    return [jnp.asarray(np.random.default_rng(seed + k).uniform(-1.1, 1.6, (n, size, size)), dtype) for k in range(2)]


def written_out(prediction, target, levels, offsets, reweight, normalize, distance, **membership):
    """METHODS 2.2 and 2.8 in NumPy, on the matrices of `cooccurrence`."""
    matrices = [np.asarray(glcm.cooccurrence(x, levels, offsets, value_range=RANGE, **membership), np.float64) for x in (prediction, target)]
    total = [m.sum((-2, -1), keepdims=True) for m in matrices]
    if distance == "jensen_shannon":
        p, q = (m / t for m, t in zip(matrices, total, strict=True))
        return np.mean(jensenshannon(p.reshape(*p.shape[:2], -1), q.reshape(*q.shape[:2], -1), axis=-1) ** 2, -1)
    p, q = (m * (1 - m / t) if reweight else m for m, t in zip(matrices, total, strict=True))
    if normalize:
        p, q = p / total[0] * levels**2, q / total[1] * levels**2
    apart = np.square(p - q) if distance == "squared" else np.abs(p - q)
    return apart.mean((1, 2, 3))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        dict(distance="squared", reweight=True, normalize=False),
        dict(distance="squared", reweight=False, normalize=True),
        dict(distance="l1", reweight=True, normalize=True),
        dict(distance="l1", reweight=False, normalize=False),
        dict(distance="jensen_shannon", reweight=False, normalize=False),
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_values(options, impl):
    prediction, target = patches(5)
    membership = dict(membership="sigmoid", sharpness=6.0)
    got = jax.jit(lambda p, t: glcm.glcm_loss(p, t, 10, OFFSETS, value_range=RANGE, impl=impl, **options, **membership))(prediction, target)
    np.testing.assert_allclose(got, written_out(prediction, target, 10, OFFSETS, **options, **membership), rtol=2e-5)


@pytest.mark.parametrize("distance,reweight", [("squared", True), ("l1", True), ("jensen_shannon", True), ("jensen_shannon", False)])
@pytest.mark.parametrize("kind", [pytest.param("triangular", marks=pytest.mark.slow), "sigmoid"])
def test_formulations_agree(kind, distance, reweight, monkeypatch):
    """Values and both gradients, in several blocks with a ragged last one; `window` holds all levels, so that nothing is cut off."""
    monkeypatch.setattr(module, "_block_size", lambda settings, patches, pixels: 2)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in patches(5, dtype=np.float64)]
        results = []
        for impl in IMPLS:

            def f(p, t):
                options = dict(value_range=RANGE, membership=kind, sharpness=4.0, window=6, distance=distance, reweight=reweight)
                loss = glcm.glcm_loss(p, t, 12, OFFSETS, impl=impl, **options)  # noqa: B023
                return jnp.sum(loss * jnp.arange(1, 6)), loss

            (_, loss), slopes = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*arrays)
            results.append((loss, *slopes))
        for other in results[1:]:
            for got, expected in zip(other, results[0], strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-10 * float(jnp.abs(expected).max()))
                assert float(jnp.abs(expected).max()) > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_finite_differences(impl):
    with jax.enable_x64(True):
        prediction, target = (jnp.asarray(a) for a in patches(2, 4, dtype=np.float64))

        def f(p, t):
            return glcm.glcm_loss(p, t, 6, value_range=(-1.5, 2.0), sharpness=3.0, window=3, normalize=True, impl=impl)

        check_grads(jax.jit(f), (prediction, target), order=1, modes=["fwd", "rev"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives(impl):
    with jax.enable_x64(True):
        prediction, target = patches(2, 4, dtype=np.float64)
        f = jax.jit(lambda p: glcm.glcm_loss(p, target, 6, value_range=(-1.5, 2.0), sharpness=3.0, window=3, normalize=True, impl=impl))
        check_grads(f, (prediction,), order=2, modes=["rev"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "impl,distance",
    [("sparse", "squared"), ("scatter", "squared")]
    + [
        pytest.param(i, d, marks=pytest.mark.slow)
        for i in IMPLS
        for d in module.DISTANCES
        if (i, d) not in (("sparse", "squared"), ("scatter", "squared"))
    ],
)
def test_equal_and_flat_patches(impl, distance):
    """Equal patches have no loss and a finite gradient, flat ones and ends of the range too; a texture is far from a flat patch."""
    texture, flat = patches(2)[0], jnp.full((2, 7, 7), 0.3)
    ends = jnp.where(patches(2)[1] > 0.2, RANGE[1], RANGE[0])
    for levels in (8, 80) if impl == "sparse" else (8,):
        options = dict(value_range=RANGE, distance=distance, impl=impl)
        f = jax.jit(jax.value_and_grad(lambda p, t: glcm.glcm_loss(p, t, levels, **options).sum()))  # noqa: B023
        for p, t in ((texture, texture), (flat, flat), (flat, texture), (ends, flat), (ends, ends)):
            loss, slope = f(p, t)
            assert np.isfinite(slope).all()
            assert (float(loss) < 1e-6) == (p is t), (levels, loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_transformations_and_types(impl):
    prediction, target = patches(6)
    f = jax.jit(lambda p, t: glcm.glcm_loss(p, t, 8, value_range=RANGE, sharpness=8.0, impl=impl))
    loss = f(prediction, target)
    assert loss.shape == (6,) and loss.dtype == jnp.float32
    half = [jnp.asarray(a, jnp.bfloat16) for a in (prediction, target)]
    assert f(*half).dtype == jnp.float32
    np.testing.assert_allclose(f(*half), f(*(a.astype(jnp.float32) for a in half)), rtol=1e-6)
    assert jax.grad(lambda p: f(p, half[1]).sum())(half[0]).dtype == jnp.bfloat16
    # A curriculum's sharpness is traced.
    traced = jax.jit(lambda s: glcm.glcm_loss(prediction, target, 8, value_range=RANGE, sharpness=s, window=4, impl=impl))
    np.testing.assert_allclose(traced(8.0), loss, rtol=1e-4)


@pytest.mark.parametrize("impl", [pytest.param("sparse", marks=pytest.mark.slow), "scatter", pytest.param("matmul", marks=pytest.mark.slow)])
def test_vmap_and_rematerialisation(impl):
    prediction, target = patches(6)
    f = jax.jit(lambda p, t: glcm.glcm_loss(p, t, 8, value_range=RANGE, sharpness=8.0, impl=impl))
    folded = [jnp.asarray(a).reshape(2, 3, 7, 7) for a in (prediction, target)]
    np.testing.assert_allclose(jax.vmap(f)(*folded).reshape(-1), f(prediction, target), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda p: f(p, target).sum()))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(lambda p, t: f(p, t).sum())))(*folded).reshape(6, 7, 7), slope(prediction), rtol=1e-3, atol=1e-5
    )
    saved = jax.jit(jax.grad(lambda p: jax.checkpoint(f)(p, target).sum()))(prediction)
    np.testing.assert_allclose(saved, slope(prediction), rtol=1e-3, atol=1e-5)


@pytest.mark.multidevice
@pytest.mark.parametrize("impl", IMPLS)
def test_a_sharded_batch(impl):
    arrays = patches(8)
    f = jax.jit(lambda p, t: glcm.glcm_loss(p, t, 8, value_range=RANGE, impl=impl))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    np.testing.assert_allclose(f(*(jax.device_put(a, sharding) for a in arrays)), f(*arrays), rtol=1e-6)


@pytest.mark.multidevice
def test_devices_share_the_blocks_of_the_product():
    """1,024 patches at 32 levels are eight blocks: each device works on its share of each, and nothing is gathered."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((1024, 16, 16), jnp.float32, sharding=sharding)
    f = jax.jit(jax.grad(lambda p, t: glcm.glcm_loss(p, t, 32, value_range=RANGE, impl="matmul").sum()))
    text = f.lower(shape, shape).compile().as_text()
    assert "while(" in text and "all-gather" not in text and "all-to-all" not in text


def test_memory_does_not_grow_with_the_matrices():
    """The matrices of these patches, both maps, are 134 MB, and the dense memberships 245 MB."""
    prediction, target = patches(128, 16)
    f = jax.jit(jax.grad(lambda p: glcm.glcm_loss(p, target, 256, value_range=RANGE, impl="sparse").sum()))
    assert f.lower(prediction).compile().memory_analysis().temp_size_in_bytes < 4e6


def test_a_constant_target_costs_nothing():
    """No gradient is computed for what is not differentiated."""
    prediction, target = patches(4, 16)
    f = lambda p, t: glcm.glcm_loss(p, t, 16, value_range=RANGE).sum()  # noqa: E731
    sizes = [str(jax.make_jaxpr(jax.grad(f, which))(prediction, target)).count("gather") for which in (0, (0, 1))]
    assert sizes[0] < sizes[1]
    assert str(jax.make_jaxpr(f)(prediction, target)).count("gather") == 0


def test_the_official_code():
    """Losses and gradients of the official torch code (tests/peers/glcm_official.py) on the same patches, its settings: 256 levels, 1/30."""
    record = json.loads(RECORD.read_text())
    assert record["settings"] == {"levels": 256, "sharpness": 30, "offsets": [[0, 1], [1, 0]], "size": 16}
    for case in record["cases"]:
        rng = np.random.default_rng(case["seed"])
        lo, hi = case["value_range"]
        prediction, target = (rng.uniform(lo, hi, (case["patches"], 16, 16)).astype(np.float32) for _ in range(2))
        if case["kind"] == "near":
            prediction = np.clip(target + np.float32(case["noise"]) * (prediction - target), lo, hi).astype(np.float32)
        prediction, target = jnp.asarray(prediction), jnp.asarray(target)
        for impl in ("sparse", "matmul"):

            def both(p, t):
                loss = glcm.glcm_loss(p, t, value_range=(lo, hi), impl=impl)  # noqa: B023
                return loss.sum(), loss

            loss, slope = jax.jit(jax.value_and_grad(both, has_aux=True))(prediction, target)
            np.testing.assert_allclose(loss[1], case["loss"], rtol=1e-4)
            norms = np.sqrt(np.square(np.asarray(slope, np.float64)).sum((1, 2)))
            np.testing.assert_allclose(norms, case["gradient_norm"], rtol=1e-3)
            np.testing.assert_allclose(np.asarray(slope).reshape(-1)[:: case["stride"]], case["gradient"], atol=2e-3 * np.abs(slope).max())


def test_errors_name_the_remedy():
    prediction, target = patches(2)
    # The function itself: its shape checks, on in tests alone, would speak first.
    plain = getattr(glcm.glcm_loss, "__wrapped__", glcm.glcm_loss)
    for options, message in (
        (dict(distance="l2"), "did you mean|known"),
        (dict(impl="scan"), "known"),
        (dict(offsets=((7, 0),)), "smaller distance"),
    ):
        with pytest.raises(glcm.GlcmError, match=message):
            plain(prediction, target, 8, value_range=RANGE, **options)
    with pytest.raises(glcm.GlcmError, match="equal stacks"):
        plain(prediction, target[:1], 8, value_range=RANGE)
    with pytest.raises(TypeError, match="to_float"):
        plain(prediction.astype(jnp.uint8), target, 8, value_range=RANGE)


def test_defaults_by_backend():
    choice = module.default_loss_formulation
    assert [choice(levels, 2, "cpu") for levels in (8, 32, 64, 256)] == ["scatter", "scatter", "scatter", "sparse"]
    assert choice(8, 7, "cpu") == choice(32, 2, "gpu") == choice(256, 2, "tpu") == "matmul"
