"""Stronger augmentation for fine-tuning, on the device: RandAugment-like operations and random erasing, one key for each example.

Each view gets `ops` draws from twelve operations whose strength grows with one magnitude from 0 (no change, to the bit) to 10, and each draw
happens with a probability. Colours change in the order of the draws, then all turns, shears and shifts are one resampling: drawn twice,
a picture is interpolated once. The operations without a strength (autocontrast, equalise, invert) are left out: on stained tissue they
take away what the label depends on.

Source: METHODS 2.5 (`rand-m9-mstd0.5-inc1`, erasing 0.25); ranges of RandAugment's increasing set, posterise from 8 down to 4 bits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from wavepath.ops.random import named

OPS = (
    "brightness", "contrast", "saturation", "sharpness", "posterise", "solarise", "solarise_add", "rotate", "shear_x", "shear_y", "translate_x",
    "translate_y",
)
MAX = 10.0
_TRIES = 10  # candidate boxes
_ENHANCE, _DEGREES, _SHEAR, _SHIFT, _ADD, _BITS = 0.9, 30.0, 0.3, 0.45, 110 / 255, 4.0


Number = float | Float[Array, ""]


def rand_augment(
    images: Float[Array, "b h w 3"], keys: Key[Array, "b"], *, ops: int = 2, magnitude: Number = 9.0, std: Number = 0.5, probability: Number = 0.5,
    fill: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> Float[Array, "b h w 3"]:
    """Random operations on every image.

    Args:
        images: [b, h, w, 3] in [0, 1].
        keys: one for each example; a view depends on its own key alone.
        ops: draws for each image; 0 changes nothing.
        magnitude: strength of 0 to 10, with normal deviation `std` for each draw, clipped to that range.
        probability: of each draw to happen.
        fill: colour of what a turn or shift brings in from outside.

    Returns:
        [b, h, w, 3] in [0, 1]; at magnitude 0 with `std` 0 the images themselves.
    """
    if ops == 0:
        return images

    def one(image: Array, key: Array) -> Array:
        # One draw for all: every further one costs most of a second of compilation on a CPU.
        op, level, happens, sign = jax.random.uniform(key, (4, ops), minval=jnp.finfo(jnp.float32).tiny)
        which = jnp.minimum((op * len(OPS)).astype(jnp.int32), len(OPS) - 1)
        level = jnp.clip(magnitude + std * jax.scipy.special.ndtri(level), 0.0, MAX)
        return apply_ops(image, which, jnp.where(happens < probability, level, 0.0), jnp.where(sign < 0.5, -1.0, 1.0), fill)

    return jax.vmap(one)(images, named(keys, "rand_augment"))


def apply_ops(
    image: Float[Array, "h w 3"], which: Int[Array, "n"], level: Float[Array, "n"], sign: Float[Array, "n"],
    fill: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> Float[Array, "h w 3"]:
    """Given operations on one image: colours in their order, then one resampling for all that moves pixels.

    Args:
        image: [h, w, 3] in [0, 1].
        which: places in `OPS`.
        level: strength of each, 0 to 10; 0 changes nothing.
        sign: 1 or -1: brighter or darker, left or right.
    """
    size = image.shape[:2]
    matrix = jnp.eye(3)
    for number in range(which.shape[0]):
        share = level[number] / MAX
        image = _colour(image, which[number], share, sign[number])
        matrix = jnp.matmul(_motion(which[number], share, sign[number], size), matrix, precision="highest")
    return _warp(image, matrix, jnp.asarray(fill, image.dtype))


def _is(which: Array, name: str) -> Bool[Array, ""]:
    return which == OPS.index(name)


def _colour(x: Array, which: Array, share: Array, sign: Array) -> Array:
    """One colour operation; the image itself where `which` is a motion."""
    share, sign = share.astype(x.dtype), sign.astype(x.dtype)
    grey = (0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2])[..., None]
    # Four operations are blends away from a poorer image: black, the mean grey, the grey image, a smoothed one.
    poorer = jnp.where(_is(which, "saturation"), grey, jnp.zeros_like(x))
    poorer = jnp.where(_is(which, "contrast"), grey.mean(), poorer)
    poorer = jnp.where(_is(which, "sharpness"), _smooth(x), poorer)
    blended = jnp.clip(x + jnp.maximum(sign * _ENHANCE * share, -_ENHANCE) * (x - poorer), 0.0, 1.0)
    # Posterise: the lowest bits of eight are dropped.
    step = 2.0 ** jnp.floor(_BITS * share + 0.5)
    posterised = jnp.where(step > 1, jnp.floor(jnp.floor(x * 255 + 0.5) / step) * step / 255, x)
    solarised = jnp.where(x >= (256 / 255) * (1 - share), 1 - x, x)
    added = jnp.where(x < 128 / 255, jnp.minimum(x + _ADD * share, 1.0), x)
    out = jnp.where(which <= OPS.index("sharpness"), blended, x)
    for name, changed in (("posterise", posterised), ("solarise", solarised), ("solarise_add", added)):
        out = jnp.where(_is(which, name), changed, out)
    return jnp.where(share > 0, out, x)


def _smooth(x: Array) -> Array:
    """A 3 x 3 mean whose centre counts five times (of thirteen); the rim stays."""
    rows = x[:-2] + x[1:-1] + x[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return x.at[1:-1, 1:-1].set((box + 4 * x[1:-1, 1:-1]) / 13)


def _motion(which: Array, share: Array, sign: Array, size: tuple[int, int]) -> Float[Array, "3 3"]:
    """Where the result's pixels come from, as a matrix on (row, column, 1) about the centre; the identity where `which` is a colour."""

    def amount(name: str, most: float) -> Array:
        return jnp.where(_is(which, name), sign * share * most, 0.0)

    turn = jnp.deg2rad(amount("rotate", _DEGREES))
    cos, sin, zero, one = jnp.cos(turn), jnp.sin(turn), jnp.zeros(()), jnp.ones(())
    # One operation alone differs from the identity, so that the sums below are that operation.
    return jnp.stack([
        jnp.stack([cos, sin + amount("shear_y", _SHEAR), amount("translate_y", _SHIFT * size[0])]),
        jnp.stack([amount("shear_x", _SHEAR) - sin, cos, amount("translate_x", _SHIFT * size[1])]),
        jnp.stack([zero, zero, one]),
    ])


def _warp(image: Array, matrix: Array, fill: Array) -> Array:
    """Bilinear resampling; whole positions give the pixels themselves, what lies outside is `fill`."""
    h, w, _ = image.shape
    middle = jnp.array([(h - 1) / 2, (w - 1) / 2])
    row, column = jnp.arange(h) - middle[0], jnp.arange(w) - middle[1]
    y = matrix[0, 0] * row[:, None] + matrix[0, 1] * column + matrix[0, 2] + middle[0]
    x = matrix[1, 0] * row[:, None] + matrix[1, 1] * column + matrix[1, 2] + middle[1]
    top, left = jnp.floor(y), jnp.floor(x)
    dy, dx = (y - top).astype(image.dtype)[..., None], (x - left).astype(image.dtype)[..., None]
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)

    def pixel(down: int, right: int) -> Array:
        r, c = top + down, left + right
        inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)
        return jnp.where(inside[..., None], image[jnp.clip(r, 0, h - 1), jnp.clip(c, 0, w - 1)], fill)

    above = pixel(0, 0) * (1 - dx) + pixel(0, 1) * dx
    below = pixel(1, 0) * (1 - dx) + pixel(1, 1) * dx
    return above * (1 - dy) + below * dy


def random_erasing(
    images: Float[Array, "b h w c"], keys: Key[Array, "b"], probability: float, *, area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "b h w c"]:
    """Replaces a random box of some images by noise of mean 0 and deviation 1: give normalised images.

    Args:
        images: [b, h, w, c], normalised.
        keys: one for each example.
        probability: share of the images that lose a box.
        area: range of the box's share of the area.
        ratio: range of its width over its height.

    Source: METHODS 2.5 (erasing 0.25, mode pixel).
    """
    if probability == 0:
        return images
    _, h, w, _ = images.shape

    def one(image: Array, box_key: Array, noise_key: Array) -> Array:
        draws = jax.random.uniform(box_key, (2 * _TRIES + 3,))
        top, left, height, width = _box(draws[: 2 * _TRIES], draws[-3:-1], (h, w), area, ratio)
        row, column = jnp.arange(h)[:, None] + 0.5, jnp.arange(w) + 0.5
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        erased = inside & (draws[-1] < probability)
        return jnp.where(erased[..., None], jax.random.normal(noise_key, image.shape, image.dtype), image)

    return jax.vmap(one)(images, named(keys, "erasing"), named(keys, "erasing_noise"))


def _box(shape: Array, place: Array, size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float]) -> tuple[Array, ...]:
    """(top, left, height, width) from uniform draws: the first of the candidates that fits; of none that does, as much as fits of the first."""
    h, w = size
    share = h * w * (area[0] + (area[1] - area[0]) * shape[:_TRIES])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape[_TRIES:]
    heights, widths = jnp.sqrt(share / aspect), jnp.sqrt(share * aspect)
    first = jnp.argmax((heights <= h) & (widths <= w))
    height, width = jnp.minimum(heights[first], h), jnp.minimum(widths[first], w)
    return place[0] * (h - height), place[1] * (w - width), height, width
