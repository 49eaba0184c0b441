import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from wavepath.ops.augment import aligned_windows, augment_batch, center, crop_box, resize_box
from wavepath.ops.random import example_keys

OFF = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=False, vflip=False, rot90=False, stain_jitter=0.0)
FULL = dict(crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3), hflip=True, vflip=True, rot90=True, stain_jitter=0.0)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((40, 40), Image.BICUBIC)) for x in coarse])


def keys(ids, epoch=0):
    ids = np.asarray(ids, np.int32)
    return example_keys(0, ids, np.full_like(ids, epoch))


def test_everything_off_is_the_plain_conversion(images):
    out = augment_batch(jnp.asarray(images), keys(range(8)), OFF, 40)
    np.testing.assert_allclose(out, images / np.float32(255), atol=1e-7)


def test_an_example_depends_on_its_key_alone(images):
    run = jax.jit(lambda x, k: augment_batch(x, k, FULL, 24))
    whole = run(jnp.asarray(images), keys(range(8)))
    order = [5, 0, 7]
    part = run(jnp.asarray(images[order]), keys(order))
    np.testing.assert_allclose(part, np.asarray(whole)[order], atol=1e-6)
    assert np.abs(np.asarray(whole) - run(jnp.asarray(images), keys(range(8), epoch=1))).max() > 0.05
    assert whole.dtype == jnp.float32 and float(whole.min()) >= 0 and float(whole.max()) <= 1


def test_flips_and_turns_reach_all_eight_orientations_and_nothing_else():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(1, 4, 4, 3)
    settings = {**OFF, "hflip": True, "vflip": True, "rot90": True}
    out = np.asarray(augment_batch(jnp.asarray(np.repeat(image, 200, 0)), keys(range(200)), settings, 4) * 255).round().astype(np.uint8)
    want = {np.rot90(flip, k).tobytes() for flip in (image[0], image[0][:, ::-1]) for k in range(4)}
    assert {x.tobytes() for x in out} == want
    turns = np.asarray(augment_batch(jnp.asarray(np.repeat(image, 200, 0)), keys(range(200)), {**OFF, "rot90": True}, 4) * 255)
    assert {x.round().astype(np.uint8).tobytes() for x in turns} == {np.rot90(image[0], k).tobytes() for k in range(4)}


def test_stain_jitter_is_by_example_and_off_at_strength_0(images):
    x, settings = jnp.asarray(images), {**OFF, "stain_jitter": 0.3}
    whole = np.asarray(augment_batch(x, keys(range(8)), settings, 40))
    assert (np.abs(whole - images / 255).max((1, 2, 3)) > 0.01).all()
    np.testing.assert_allclose(augment_batch(x[2:4], keys([2, 3]), settings, 40), whole[2:4], atol=1e-6)


def test_crop_boxes_keep_scale_ratio_and_the_image():
    boxes = np.asarray(jax.vmap(lambda k: crop_box(k, 40, 60, (0.2, 1.0), (0.75, 4 / 3)))(keys(range(500))))
    top, left, h, w = boxes.T
    assert (top >= -1e-4).all() and (left >= -1e-4).all() and (top + h <= 40 + 1e-3).all() and (left + w <= 60 + 1e-3).all()
    area, ratio = h * w / 2400, w / h
    assert area.min() > 0.19 and area.max() > 0.8 and ratio.min() > 0.74 and ratio.max() < 1.34
    assert left.std() > 3 and top.std() > 2


def test_a_crop_that_never_fits_falls_back_to_the_largest_central_one():
    box = crop_box(jax.random.key(0), 10, 100, (0.9, 1.0), (0.75, 4 / 3))
    np.testing.assert_allclose(box, [0, 50 - 10 * (4 / 3) / 2, 10, 10 * 4 / 3], rtol=1e-5)


@pytest.mark.parametrize("size", [16, 64])
def test_resizing_agrees_with_pillow(images, size):
    """Bicubic and antialiased; Pillow rounds to whole levels after each axis."""
    ours = resize_box(jnp.asarray(images[0] / np.float32(255)), jnp.asarray([0.0, 0.0, 40.0, 40.0]), size)
    theirs = np.asarray(Image.fromarray(images[0]).resize((size, size), Image.BICUBIC)) / 255
    assert np.abs(np.asarray(ours) - theirs).max() < 2.5 / 255


def test_a_crop_is_the_stated_part_of_the_image(images):
    image = jnp.asarray(images[0] / np.float32(255))
    np.testing.assert_allclose(resize_box(image, jnp.asarray([4.0, 10.0, 20.0, 20.0]), 20), image[4:24, 10:30], atol=1e-6)


def test_center_sees_the_whole_square(images):
    np.testing.assert_allclose(center(jnp.asarray(images), 40), images / np.float32(255), atol=1e-7)
    wide = np.concatenate([images, images], axis=2)
    np.testing.assert_allclose(center(jnp.asarray(wide), 40), wide[:, :, 20:60] / np.float32(255), atol=1e-7)
    small = center(jnp.asarray(images), 20)
    assert small.shape == (8, 20, 20, 3)
    np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)) / 255, atol=0.01)


def test_windows_of_several_images_show_one_place(images):
    pair = {"he": jnp.asarray(images), "ihc": jnp.asarray(255 - images), "fine": jnp.asarray(images.repeat(2, 1).repeat(2, 2))}
    seen = aligned_windows(pair, keys(range(8)), 16, FULL, {"fine": 2})
    np.testing.assert_allclose(seen["he"] + seen["ihc"], 1, atol=1e-6)
    np.testing.assert_array_equal(seen["fine"][:, ::2, ::2], seen["he"])
    assert len({np.asarray(x).tobytes() for x in seen["he"]}) == 8
    central = aligned_windows(pair, None, 16, FULL, {"fine": 2})
    np.testing.assert_allclose(central["he"], images[:, 12:28, 12:28] / np.float32(255), atol=1e-7)
    with pytest.raises(ValueError, match="cannot be cut at one place"):
        aligned_windows(pair, None, 16, FULL)
