"""RandAugment-like operations and erasing: identities, ranges, and each operation against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.ops.randaugment import OPS, apply_ops, rand_augment, random_erasing
from wavepath.ops.random import example_keys

MOTIONS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 256, (6, 20, 24, 3)) / np.float32(255), jnp.float32)


@pytest.fixture(scope="module")
def keys():
    return example_keys(0, jnp.arange(6), jnp.zeros(6, jnp.int32))


@jax.jit
def _one(image, which, level, sign):
    return apply_ops(image, which[None], level[None], sign[None], (0.0, 0.0, 0.0))


@jax.jit
def _augmented(images, keys, magnitude, std, probability):
    return rand_augment(images, keys, magnitude=magnitude, std=std, probability=probability)


def one(image, name, level, sign=1.0):
    return np.asarray(_one(image, jnp.asarray(OPS.index(name)), jnp.asarray(level), jnp.asarray(sign)))


def test_magnitude_zero_is_the_identity(images, keys):
    np.testing.assert_array_equal(_augmented(images, keys, 0.0, 0.0, 1.0), images)
    assert rand_augment(images, keys, ops=0) is images
    np.testing.assert_array_equal(_augmented(images, keys, 9.0, 0.5, 0.0), images)


@pytest.mark.parametrize("name", OPS)
def test_each_operation_grows_from_the_identity_and_stays_in_range(images, name):
    image = images[0]
    for sign in (1.0, -1.0):
        np.testing.assert_array_equal(one(image, name, 0.0, sign), image)
        weak, strong = one(image, name, 3.0, sign), one(image, name, 10.0, sign)
        assert strong.min() >= 0 and strong.max() <= 1
        assert np.abs(strong - image).mean() > np.abs(weak - image).mean() * 0.99 > 0
        assert np.abs(strong - image).max() > 0.05


def test_a_view_depends_on_its_own_key_alone(images, keys):
    many = _augmented(images, keys, 9.0, 0.5, 1.0)
    np.testing.assert_allclose(_augmented(images[::-1], keys[::-1], 9.0, 0.5, 1.0)[::-1], many, atol=1e-6)
    same = _augmented(jnp.broadcast_to(images[:1], images.shape), keys, 9.0, 0.5, 1.0)
    assert len({np.asarray(view).tobytes() for view in same}) == 6, "other keys, other views"
    assert many.min() >= 0 and many.max() <= 1 and many.dtype == images.dtype


def test_colours_by_their_definition(images):
    x = np.asarray(images[0])
    grey = (x @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    np.testing.assert_allclose(one(images[0], "brightness", 5.0), np.clip(x * 1.45, 0, 1), atol=1e-6)
    np.testing.assert_allclose(one(images[0], "saturation", 10.0, -1.0), grey + 0.1 * (x - grey), atol=1e-6)
    np.testing.assert_allclose(one(images[0], "contrast", 10.0, -1.0), grey.mean() + 0.1 * (x - grey.mean()), atol=1e-6)
    levels = np.unique(np.round(one(images[0], "posterise", 10.0) * 255).astype(int))
    assert set(levels) <= set(range(0, 256, 16)) and len(levels) > 10
    solarised = one(images[0], "solarise", 5.0)
    np.testing.assert_allclose(solarised, np.where(x >= 128 / 255, 1 - x, x), atol=1e-6)
    added = one(images[0], "solarise_add", 10.0)
    np.testing.assert_allclose(added, np.where(x < 128 / 255, np.minimum(x + 110 / 255, 1), x), atol=1e-6)


def test_motions_by_their_definition(images):
    image = images[0][:, :20]  # 20 x 20: a shift of 0.45 * 20 = 9 pixels at full strength
    shifted = one(image, "translate_x", 10.0)
    np.testing.assert_allclose(shifted[:, :11], image[:, 9:], atol=1e-5)
    assert not shifted[:, 11:].any(), "what comes in from outside is the fill"
    np.testing.assert_allclose(one(image, "translate_y", 10.0, -1.0)[9:], image[:11], atol=1e-5)
    hill = jnp.asarray(np.exp(-(np.hypot(*np.mgrid[-9.5:10:1, -9.5:10:1]) ** 2) / 20), jnp.float32)[..., None] * jnp.ones(3)
    assert np.abs(one(hill, "rotate", 10.0) - hill).max() < 0.03, "a round hill looks the same from all sides"
    for name in MOTIONS:
        sign = [one(image, name, 9.0, s) for s in (1.0, -1.0)]
        assert np.abs(sign[0] - sign[1]).mean() > 0.05


def test_motions_are_one_resampling(images):
    there_and_back = jax.jit(apply_ops)(images[0], jnp.asarray([OPS.index("rotate")] * 2), jnp.full(2, 4.0), jnp.asarray([1.0, -1.0]))
    np.testing.assert_allclose(there_and_back, images[0], atol=1e-4)


def test_erasing_takes_boxes_of_the_asked_share(images):
    many = jnp.full((400, 32, 32, 3), 7.0)
    erase = jax.jit(lambda images, keys: random_erasing(images, keys, 0.25))
    keys = example_keys(0, jnp.arange(400), jnp.zeros(400, jnp.int32))
    out = np.asarray(erase(many, keys))
    gone = (out != 7.0).all(-1)
    share = gone.any((1, 2)).mean()
    assert 0.18 < share < 0.32
    boxes = gone[gone.any((1, 2))]
    for box in boxes:
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "a box, and nothing else"
        assert box.sum() == len(rows) * len(columns)
    areas = boxes.mean((1, 2))
    assert 0.01 < areas.min() and areas.max() < 0.38 and areas.std() > 0.05
    noise = out[gone]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(erase(many, keys[::-1])[::-1], out)
    assert random_erasing(images, keys[:6], 0.0) is images
