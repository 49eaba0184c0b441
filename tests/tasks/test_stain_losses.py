"""Losses of virtual staining against direct references: closed forms in numpy, scipy's filters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from wavepath.ops import collectives
from wavepath.tasks.stain_losses import GANS, adaptive_l1, discriminator_gan, fixed_l1, generator_gan, pyramid_l1


def images(seed=0, batch=2, side=16):
    rng = np.random.default_rng(seed)
    return rng.random((2, batch, side, side, 3), dtype=np.float32)


adaptive = jax.jit(partial(adaptive_l1, embed=lambda parts: colours(parts)), static_argnames="grid")


def colours(parts):
    """An embedding that a reference computes in a line: the mean colour, off centre."""
    return parts.mean(axis=(1, 2)) - 0.4


@pytest.mark.parametrize("kind", GANS)
def test_adversarial_losses_in_closed_form(kind):
    real, fake = np.random.default_rng(1).normal(0, 2, (2, 3, 4, 5)).astype(np.float32)

    def of(logit, true):
        """The loss of a logit that is to say `true`."""
        if kind == "vanilla":  # cross-entropy
            chance = 1 / (1 + np.exp(-logit.astype(np.float64)))
            return -np.log(chance if true else 1 - chance)
        return np.maximum(0, 1 - (logit if true else -logit)) if kind == "hinge" else (logit - true) ** 2

    judged, pleased = jax.jit(lambda: (discriminator_gan(real, fake, kind), generator_gan(fake, kind)))()
    np.testing.assert_allclose(judged.loss, (of(real, True) + of(fake, False)).mean((1, 2)) / 2, rtol=1e-5)
    np.testing.assert_allclose(pleased, (-fake if kind == "hinge" else of(fake, True)).mean((1, 2)), rtol=1e-5)
    border = 0.5 if kind == "lsgan" else 0
    np.testing.assert_allclose(judged.real, (real > border).mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(judged.fake, (fake <= border).mean((1, 2)), rtol=1e-6)


def test_an_unknown_adversarial_loss_is_refused():
    for loss in (lambda: generator_gan(jnp.zeros((1, 2, 2)), "wgan"), lambda: discriminator_gan(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)), "wgan")):
        with pytest.raises(ValueError, match="choose one of vanilla, hinge, lsgan"):
            loss()


@pytest.mark.parametrize("grid", [1, 4])
def test_adaptive_l1_in_closed_form(grid):
    fake, real = images()
    found = adaptive(fake, real, grid=grid)
    side = 16 // grid
    loss, weights, alike = np.zeros(2), [], np.zeros(2)
    for row in range(grid):
        for column in range(grid):
            cut = np.s_[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            a, b = (np.asarray(x, np.float64)[cut].mean((1, 2)) - 0.4 for x in (fake, real))
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            weights.append(50 + 50 * cosine.mean())
            alike += cosine / grid**2
            # In [-1, 1], in which the published weights count.
            loss += weights[-1] * np.abs((2 * fake[cut] - 1) - (2 * real[cut] - 1)).mean((1, 2, 3)) / grid**2
    np.testing.assert_allclose(found.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-4)
    np.testing.assert_allclose(found.similarity, alike, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.l1, 2 * np.abs(fake - real).mean((1, 2, 3)), rtol=1e-5)


def test_equal_images_cost_nothing_at_full_weight():
    image = images()[0]
    found = adaptive(image, image)
    assert found.weights.shape == (4,) and (np.asarray(found.loss) == 0).all()
    np.testing.assert_allclose(found.weights, 100, rtol=1e-6)
    np.testing.assert_allclose(found.similarity, 1, rtol=1e-6)


def test_weights_are_constants_to_the_gradient():
    fake, real = images()
    gradient = jax.jit(jax.grad(lambda x: adaptive(x, real).loss.sum()))(fake)
    weights = np.asarray(adaptive(fake, real).weights).reshape(1, 2, 2, 1).repeat(8, 1).repeat(8, 2)
    np.testing.assert_allclose(gradient, 2 * np.sign(fake - real) * weights / fake[0].size, rtol=1e-4)


@pytest.mark.multidevice
def test_weights_are_means_over_all_shards():
    fake, real = images(batch=8)
    whole = adaptive(fake, real)

    def shard(fake, real):
        with collectives.axis("data"):
            return adaptive_l1(fake, real, colours)

    parts = jax.pmap(shard, axis_name="data")(fake[:, None], real[:, None])
    np.testing.assert_allclose(parts.weights, np.broadcast_to(whole.weights, (8, 4)), rtol=1e-5)
    np.testing.assert_allclose(parts.loss[:, 0], whole.loss, rtol=1e-5)


def test_fixed_l1_counts_in_minus_one_to_one():
    black, white = jnp.zeros((1, 4, 4, 3)), jnp.ones((1, 4, 4, 3))
    found = fixed_l1(black, white, 100.0)
    assert (float(found.loss[0]), float(found.l1[0]), found.weights.tolist(), found.similarity) == (200.0, 2.0, [100.0], None)


def test_the_pyramid_is_that_of_scipy():
    fake, real = images(side=20)
    kernel = np.exp(-0.5 * np.square(np.arange(-1, 2)))
    kernel = np.outer(kernel, kernel)[None, :, :, None] / kernel.sum() ** 2
    a, b = (np.asarray(x, np.float64) for x in (fake, real))
    each = [2 * np.abs(a - b).mean((1, 2, 3))]
    for _ in range(3):
        for _ in range(4):
            a, b = (ndimage.correlate(x, kernel, mode="mirror") for x in (a, b))  # reflected about the outermost pixel
        a, b = a[:, ::2, ::2], b[:, ::2, ::2]
        each.append(2 * np.abs(a - b).mean((1, 2, 3)))
    found = jax.jit(pyramid_l1)(fake, real)
    np.testing.assert_allclose(found.loss, 25 * sum(each), rtol=1e-5)
    np.testing.assert_allclose(found.l1, each[0], rtol=1e-5)
    assert found.weights.tolist() == [25.0] * 4
