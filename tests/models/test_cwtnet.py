"""CWT-Net: sizes of the paper, one set of parameters for both modes, and a `wr` mode that cannot see the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.cwtnet import CWTNet, up_and_down, wavelet_depths, wavelet_target
from wavepath.models.superres_layers import fresh_convolutions
from wavepath.ops.resize import resize_bicubic


def count(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def images(side, seed=0):
    return jax.random.uniform(jax.random.key(seed), (2, side, side, 3))


def fresh(model, lr):
    return {"params": fresh_convolutions(model, jax.random.key(0), lr)}


def small(**settings):
    return CWTNet(**{"channels": 8, "blocks": 1, "sr_blocks": 1, "wavelet_blocks": 1, "wr_blocks": 1, **settings})


@pytest.mark.parametrize(("scale", "two", "four"), [(2, 5.0, 6.8), (4, 6.2, 8.0), (8, 7.4, 9.2)])
def test_parameters_are_those_of_the_table(scale, two, four):
    """METHODS 4.1, millions with 2 and 4 residual blocks in an SR block; from one and two cross-scale blocks, each of which is like the next."""
    one, more, wide = (count(CWTNet(scale=scale, blocks=blocks, sr_blocks=number)) for blocks, number in [(1, 2), (2, 2), (1, 4)])
    whole = one + 11 * (more - one)
    assert round(whole / 1e6, 1) == two and round((whole + 12 * (wide - one)) / 1e6, 1) == four


@pytest.mark.slow
def test_the_whole_network_has_its_parameters():
    assert count(CWTNet()) == 5_036_393


def test_depths_by_scale():
    assert [wavelet_depths(scale) for scale in (2, 4, 8)] == [(2, 4), (3, 6), (4, 8)]
    assert [wavelet_depths(scale, "unit") for scale in (2, 4, 8)] == [(2, 4), (4, 8), (8, 16)]
    assert wavelet_depths(8, "unit", 5, 7) == (5, 7)
    for arguments, said in [((3,), "scale"), ((2, "linear"), "growth")]:
        with pytest.raises(ConfigError, match=said):
            wavelet_depths(*arguments)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_shapes(scale):
    model = CWTNet(scale=scale, blocks=1)
    lr, reference = (jax.ShapeDtypeStruct((2, side, side, 3), np.float32) for side in (64, 128))
    params = jax.eval_shape(model.init, jax.random.key(0), lr)
    sr, out = jax.eval_shape(lambda *x: model.apply(*x, True), params, lr, reference)
    assert sr.shape == (2, 64 * scale, 64 * scale, 3) and {k: v.shape[1] for k, v in out.items()} == {"wavelet": 64}
    sr, out = jax.eval_shape(model.apply, params, lr)
    assert {k: v.shape[1] for k, v in out.items()} == {"wavelet": 64, "estimate": 128}


@pytest.mark.slow
def test_wr_mode_cannot_read_the_reference():
    model, lr, reference = small(reduction=2), images(8), images(16, 1)
    params = fresh(model, lr)

    def loss(params, lr, reference, use):
        sr, out = model.apply(params, lr, reference, use)
        return jnp.square(sr).sum() + jnp.square(out["wavelet"]).sum(), (sr, out["estimate"])

    step = jax.jit(jax.grad(loss, has_aux=True))
    by_wr, (poisoned, estimate) = step(params, lr, jnp.full_like(reference, jnp.nan), np.bool_(False))
    np.testing.assert_allclose(poisoned, jax.jit(model.apply)(params, lr)[0], atol=1e-6)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(by_wr)) and estimate.shape == reference.shape
    # Such a step teaches all of the network, one in ref mode all but WR.
    by_ref, (used, _) = step(params, lr, reference, np.bool_(True))
    for gradient, still in ((by_wr, set()), (by_ref, {"wr"})):
        moved = {name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) for name, tree in gradient["params"].items()}
        assert {name for name, most in moved.items() if most == 0} == still
    assert float(jnp.abs(used - poisoned).max()) > 1e-4


def test_the_wavelet_target_is_haar_hh():
    x = images(8)
    expected = (x[:, ::2, ::2] - x[:, ::2, 1::2] - x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 2
    np.testing.assert_allclose(wavelet_target(x), expected, atol=1e-6)
    means = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(small(dwt=False).wavelet_target(x), means, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "names"),
    [(dict(wavelet_branch=False), set()), (dict(dwt=False, remat=True), {"wavelet", "estimate"}), (dict(wr=False), {"wavelet"})],
)
def test_ablations(settings, names):
    lr, reference, model = images(8), images(16, 1), small(**settings)
    params, apply = fresh(model, lr), jax.jit(model.apply)
    sr, out = apply(params, lr)
    assert set(out) == names and sr.shape == reference.shape and ("wr" in params["params"]) == ("estimate" in names)
    assert (float(jnp.abs(apply(params, lr, reference)[0] - sr).max()) > 0) == model.wavelet_branch


def test_a_network_of_zeros_gives_its_skip():
    lr = images(8)
    model = small(skip="bicubic", mean=(0.7, 0.4, 0.6), scale=4)
    params = jax.tree.map(jnp.zeros_like, fresh(model, lr))
    sr, out = jax.jit(model.apply)(params, lr)
    np.testing.assert_allclose(sr, resize_bicubic(lr, 32, 32), atol=1e-6)
    np.testing.assert_allclose(out["estimate"], resize_bicubic(lr, 16, 16), atol=1e-6)
    # Without a skip it gives the mean RGB.
    sr, _ = jax.jit(model.clone(skip="none").apply)(params, lr)
    np.testing.assert_allclose(sr, np.broadcast_to(np.float32([0.7, 0.4, 0.6]), sr.shape), atol=1e-6)


def test_up_and_down_is_two_resizings():
    x = images(10) / 2 + 0.25  # nothing is clipped
    np.testing.assert_allclose(up_and_down(x), resize_bicubic(resize_bicubic(x, 20, 20), 10, 10), atol=1e-5)
