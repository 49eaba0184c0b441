"""Images to patches and back, and the random masks of a masked autoencoder.

A mask is a shuffled order of patch numbers: the first `keep` are visible, the rest are masked. The network works in that order from end to
end (a transformer does not care about the order of its tokens), so the visible are a slice and the masked are a slice, and nothing is ever
scattered back except in pictures.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int32, Key, Shaped


@struct.dataclass
class Masking:
    """Which patches are visible.

    Attributes:
        order: int32 [g, n], a permutation of the patch numbers for each of g groups of consecutive examples; g divides the batch.
        keep: how many patches, from the front of `order`, are visible.
    """

    order: Any  # not typed by shape: JAX rebuilds the class around placeholders
    keep: int = struct.field(pytree_node=False)

    @property
    def visible(self) -> Int32[Array, "g k"]:
        """Numbers of the visible patches."""
        return self.order[:, : self.keep]

    @property
    def masked(self) -> Int32[Array, "g m"]:
        """Numbers of the masked patches."""
        return self.order[:, self.keep :]


def patchify(images: Shaped[Array, "b h w c"], patch: int) -> Shaped[Array, "b n p"]:
    """Cuts images into patches: `[b, h, w, c] -> [b, (h/patch)*(w/patch), patch*patch*c]`, rows of patches first, pixels as (y, x, channel).

    Raises:
        ValueError: a side that `patch` does not divide.

    Source: METHODS 5.1.
    """
    b, h, w, c = images.shape
    if h % patch or w % patch:
        raise ValueError(f"a {w} x {h} image cannot be cut into patches of {patch} pixels")
    cut = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Shaped[Array, "b n p"], patch: int, width: int) -> Shaped[Array, "b h w c"]:
    """Puts patches back together; `width` is the image's width in pixels.

    Raises:
        ValueError: sizes that do not fit.
    """
    b, n, p = patches.shape
    columns = width // patch
    if width % patch or n % columns or p % (patch * patch):
        raise ValueError(f"{n} patches of {p} values do not make an image {width} pixels wide with patches of {patch}")
    rows, c = n // columns, p // (patch * patch)
    return patches.reshape(b, rows, columns, patch, patch, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * patch, columns * patch, c)


def random_masking(keys: Key[Array, "g"], patches: int, ratio: float) -> Masking:
    """Uniform random masks, one for each key: `floor(patches * (1 - ratio))` patches stay visible (49 of 196 at 0.75).

    Args:
        keys: one for each example, or one for each group of consecutive examples.
        patches: number of patches of an image.
        ratio: share of patches masked, in [0, 1).

    Source: METHODS 5.1: uniform noise, sorted.
    """
    # The small term keeps a ratio such as 0.9, whose complement is just below a tenth in binary, from losing a patch.
    keep = int(patches * (1.0 - ratio) + 1e-6)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    return Masking(order=jnp.argsort(noise, axis=1).astype(jnp.int32), keep=keep)


def gather_patches(x: Shaped[Array, "b n d"], ids: Int32[Array, "g k"]) -> Shaped[Array, "b k d"]:
    """Takes rows by number, per group of consecutive examples: `[b, n, d], [g, k] -> [b, k, d]`.

    With one group this is a plain selection of rows, several times cheaper than a selection for each example.

    Raises:
        ValueError: the number of groups does not divide the batch.
    """
    (b, n, d), (g, k) = x.shape, ids.shape
    if b % g:
        raise ValueError(f"{g} groups do not divide a batch of {b}")
    if g == 1:
        return x[:, ids[0]]
    if g == b:
        return jnp.take_along_axis(x, ids[:, :, None], axis=1)
    return jax.vmap(lambda part, rows: part[:, rows])(x.reshape(g, b // g, n, d), ids).reshape(b, k, d)


def repeat_groups(x: Shaped[Array, "g ..."], batch: int) -> Shaped[Array, "b ..."]:
    """Repeats each group's value for its consecutive examples: `[g, ...] -> [b, ...]`.

    Raises:
        ValueError: the number of groups does not divide the batch.
    """
    g = x.shape[0]
    if batch % g:
        raise ValueError(f"{g} groups do not divide a batch of {batch}")
    return x if g == batch else jnp.repeat(x, batch // g, axis=0, total_repeat_length=batch)


def assemble(visible: Shaped[Array, "b k p"], masked: Shaped[Array, "b m p"], masking: Masking) -> Shaped[Array, "b n p"]:
    """Visible and masked patches back in image order, for pictures."""
    both = jnp.concatenate([visible, masked], axis=1)
    return gather_patches(both, jnp.argsort(masking.order, axis=1).astype(jnp.int32))


def normalise_patches(patches: Float[Array, "b n p"], eps: float = 1e-6) -> Float[Array, "b n p"]:
    """Each patch to mean 0 and variance 1 (unbiased) over its values: the targets of `norm_pix_loss`.

    Source: METHODS 5.1.
    """
    mean, std = patch_statistics(patches, eps)
    return (patches - mean) / std


def patch_statistics(patches: Float[Array, "b n p"], eps: float = 1e-6) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """Mean and `sqrt(unbiased variance + eps)` of each patch."""
    return patches.mean(axis=-1, keepdims=True), jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + eps)
