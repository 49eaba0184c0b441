"""Augmentation on the device, one key for each example: crops with antialiased resizing, flips, quarter turns, stain jitter.

Batches arrive as uint8; what leaves is float32 in [0, 1]. What an example becomes depends on its own key alone, so it does not change with
the cut of the batch or the number of devices.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key, Shaped, UInt8

from wavepath.ops.random import named
from wavepath.ops.stain import jitter_stain

_TRIES = 10  # candidate crops, as torchvision draws them


def augment_batch(
    images: UInt8[Array, "b h w 3"], keys: Key[Array, "b"], settings: Any, size: int, dtype: Any = jnp.float32
) -> Float[Array, "b s s 3"]:
    """Random views of a batch.

    Args:
        images: [b, h, w, 3].
        keys: one for each example.
        settings: mapping of `crop_scale` (range of the crop's share of the area), `crop_ratio` (range of width / height), `hflip`, `vflip`, `rot90`
            (bools: each flip, and each of the four turns, with even odds) and `stain_jitter` (strength, 0 is off).
        size: side of the views, in pixels.
        dtype: of the result; float64 serves comparisons that rounding must not disturb.

    Returns:
        [b, size, size, 3] in [0, 1].

    Source: METHODS 5.1 (crop 0.2 to 1, bicubic), 1.4 (flips and turns: tissue has no upright).
    """
    x = images.astype(dtype) / 255
    scale = tuple(float(value) for value in settings["crop_scale"])
    ratio = tuple(float(value) for value in settings["crop_ratio"])
    if scale != (1.0, 1.0):
        box = jax.vmap(lambda key: crop_box(key, images.shape[1], images.shape[2], scale, ratio))(named(keys, "crop"))
        x = jax.vmap(lambda image, where: resize_box(image, where, size))(x, box)
    else:
        x = _square(x, size)
    x = flips_and_turns(x, keys, settings)
    if float(settings["stain_jitter"]) > 0:
        strength = float(settings["stain_jitter"])
        x = jax.vmap(lambda image, key: jitter_stain(image, key, strength))(x, named(keys, "stain"))
    return x


def flips_and_turns(x: Shaped[Array, "b s s c"], keys: Key[Array, "b"], settings: Any) -> Shaped[Array, "b s s c"]:
    """Each square image flipped and turned as its own key says: images of several sizes under the same keys stay aligned.

    Args:
        x: [b, s, s, c].
        keys: one for each example.
        settings: mapping of `hflip`, `vflip`, `rot90` (see `augment_batch`).
    """
    if settings["hflip"]:
        x = jnp.where(_coins(keys, "hflip"), x[:, :, ::-1], x)
    if settings["vflip"]:
        x = jnp.where(_coins(keys, "vflip"), x[:, ::-1], x)
    if settings["rot90"]:
        turned = jnp.swapaxes(x, 1, 2)[:, ::-1]
        x = jnp.where(_coins(keys, "rot90"), turned, x)
        x = jnp.where(_coins(keys, "rot180"), x[:, ::-1, ::-1], x)
    return x


def aligned_windows(
    images: Mapping[str, UInt8[Array, "b _h _w 3"]], keys: Key[Array, "b"] | None, side: int, settings: Any,
    factors: Mapping[str, int] = MappingProxyType({}), dtype: Any = jnp.float32,
) -> dict[str, Float[Array, "b _s _s 3"]]:
    """One place of several images of the same tissue: random, flipped and turned by the examples' keys, or central without keys.

    Args:
        images: by name, [b, f h, f w, 3], where f is the image's factor.
        keys: one for each example, for all of its images; None: the middle, as it is.
        side: of the window at factor 1, in px.
        settings: mapping of `hflip`, `vflip`, `rot90` (see `augment_batch`).
        factors: how many times as fine an image is as those without a factor (1).
        dtype: of the result.

    Returns:
        By name [b, f side, f side, 3] in [0, 1].

    Raises:
        ValueError: images that are smaller than the window, or not of one size but for their factors.
    """
    scaled = {name: int(factors.get(name, 1)) for name in images}
    sizes = {(image.shape[1] / scaled[name], image.shape[2] / scaled[name]) for name, image in images.items()}
    count = len(next(iter(images.values())))
    if len(sizes) != 1 or min(min(size) for size in sizes) < side:
        listed = ", ".join(f"{name} {image.shape[2]} x {image.shape[1]} px" for name, image in images.items())
        raise ValueError(f"windows of {side} px cannot be cut at one place of {listed}")
    free = np.asarray(next(iter(sizes)), np.int32) - side
    if keys is None:
        corner = jnp.broadcast_to(jnp.asarray(free // 2), (count, 2))
    else:
        corner = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, free + 1, jnp.int32))(named(keys, "crop"))

    def view(image: Array, factor: int) -> Array:
        cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (factor * at[0], factor * at[1], np.int32(0)), (factor * side, factor * side, 3)))
        x = cut(image, corner)
        return (x if keys is None else flips_and_turns(x, keys, settings)).astype(dtype) / 255

    return {name: view(image, scaled[name]) for name, image in images.items()}


def center(images: UInt8[Array, "b h w 3"], size: int, dtype: Any = jnp.float32) -> Float[Array, "b s s 3"]:
    """The largest central square of each image, resized to `size`, in [0, 1]: what evaluation and embedding see.

    A square tile is seen whole, so that a feature stands for the tile at its coordinates.
    """
    return _square(images.astype(dtype) / 255, size)


def crop_box(
    key: Key[Array, ""], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Float32[Array, "4"]:
    """A random crop (top, left, height, width) in pixels, not rounded: area share uniform, ratio log-uniform, place uniform.

    The first of ten candidates that fits is taken; where none does, the largest central crop of an allowed ratio.

    Source: torchvision's RandomResizedCrop, as METHODS 5.1 uses it.
    """
    area_key, ratio_key, place_key = (named(key, name) for name in ("area", "ratio", "place"))
    area = height * width * jax.random.uniform(area_key, (_TRIES,), minval=scale[0], maxval=scale[1])
    aspect = jnp.exp(jax.random.uniform(ratio_key, (_TRIES,), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1])))
    w, h = jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)
    fits = (w <= width) & (h <= height)
    first = jnp.argmax(fits)
    whole_w = min(float(width), height * ratio[1])
    whole_h = min(float(height), width / ratio[0])
    w = jnp.where(fits[first], w[first], whole_w)
    h = jnp.where(fits[first], h[first], whole_h)
    free = jnp.where(fits[first], jax.random.uniform(place_key, (2,)), 0.5)
    return jnp.stack([free[0] * (height - h), free[1] * (width - w), h, w]).astype(jnp.float32)


def resize_box(image: Float[Array, "h w c"], box: Float32[Array, "4"], size: int, method: str = "cubic") -> Float[Array, "s s c"]:
    """Cuts a box (top, left, height, width) in pixels, whole or not, and resizes it to `size`, antialiased; values stay within [0, 1].

    Pixels beyond the box's edge take part in the interpolation where the image has them.
    """
    box = box.astype(image.dtype)
    zoom = size / box[2:]
    out = jax.image.scale_and_translate(
        image, (size, size, image.shape[2]), (0, 1), zoom, -box[:2] * zoom, method=method, antialias=True
    )
    return jnp.clip(out, 0.0, 1.0)  # the cubic kernel overshoots at edges


def _square(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    b, h, w, c = x.shape
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    x = x[:, top : top + side, left : left + side]
    if side == size:
        return x
    return jnp.clip(jax.image.resize(x, (b, size, size, c), "cubic", antialias=True), 0.0, 1.0)


def _coins(keys: Key[Array, "b"], name: str) -> Bool[Array, "b 1 1 1"]:
    return jax.vmap(jax.random.bernoulli)(named(keys, name))[:, None, None, None]
