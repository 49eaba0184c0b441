"""The losses of virtual staining: three forms of the adversarial one, three of L1.

Images lie in [0, 1] here. The published weights of L1 count differences of values in [-1, 1], which are twice as large, so differences are doubled:
`l1_weight` 100 means what it means in the paper.

Source: METHODS 3.4 and 3.9.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wavepath.models.stain_layers import split_grid
from wavepath.ops import collectives
from wavepath.ops.resize import resample
from wavepath.ops.similarity import unit

GANS = ("vanilla", "hinge", "lsgan")
L1S = ("adaptive", "fixed", "pyramid")
_BLURS = 4  # ahead of each reduction
_SIGMA = 1.0


# Adversarial --------------------------------------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What a discriminator made of a batch, each [b]: its loss, and the shares of patches that it judged rightly."""

    loss: Float[Array, "b"]
    real: Float[Array, "b"]
    fake: Float[Array, "b"]


def discriminator_gan(real: Float[Array, "b h w"], fake: Float[Array, "b h w"], kind: str = "vanilla") -> Judged:
    """The discriminator's loss, half that of true images plus half that of made ones.

    `vanilla`: cross-entropy of the logits; `hinge`: max(0, 1 - real), max(0, 1 + fake); `lsgan`: (real - 1)^2, fake^2.

    Args:
        real, fake: logits of true and of made images.
        kind: one of `GANS`.

    Source: METHODS 3.4.
    """
    if kind == "vanilla":
        parts, threshold = (jax.nn.softplus(-real), jax.nn.softplus(fake)), 0.0
    elif kind == "hinge":
        parts, threshold = (jax.nn.relu(1 - real), jax.nn.relu(1 + fake)), 0.0
    else:
        parts, threshold = (jnp.square(_known(real, kind) - 1), jnp.square(fake)), 0.5
    true, made = (part.mean(axis=(1, 2)) for part in parts)
    right = (x.astype(real.dtype).mean(axis=(1, 2)) for x in (real > threshold, fake <= threshold))
    return Judged((true + made) / 2, *right)


def generator_gan(fake: Float[Array, "b h w"], kind: str = "vanilla") -> Float[Array, "b"]:
    """The generator's adversarial loss, by the discriminator's logits of what it made: that they are taken for true (`hinge`: minus the logit)."""
    if kind == "vanilla":
        each = jax.nn.softplus(-fake)
    elif kind == "hinge":
        each = -fake
    else:
        each = jnp.square(_known(fake, kind) - 1)
    return each.mean(axis=(1, 2))


def _known(x: Array, kind: str) -> Array:
    if kind not in GANS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(GANS)}")
    return x


# L1 ---------------------------------------------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """How far made images are from true ones.

    Attributes:
        loss: [b], weighted.
        l1: [b], mean absolute difference of values in [-1, 1], not weighted.
        weights: [p], of each part (octave), equal on all shards.
        similarity: [b], mean cosine of the parts' embeddings; None where nothing was embedded.
    """

    loss: Float[Array, "b"]
    l1: Float[Array, "b"]
    weights: Float[Array, "p"]
    similarity: Float[Array, "b"] | None = None


def adaptive_l1(
    fake: Float[Array, "b h w 3"], real: Float[Array, "b h w 3"], embed: Callable[[Array], Array], grid: int = 2, weight: float = 100.0
) -> Compared:
    """L1 of each of grid x grid parts p with a weight of its own: `mean over p of weight (1 + s_p) / 2 |fake_p - real_p|`.

    s_p is the cosine of the embeddings of the two images' part p, a mean over the whole batch on all shards, and a constant to the gradient: where
    the made part looks to the encoder like another tissue than the true one (which may be shifted or cut elsewhere), pixels count less. Equal images
    have weights of `weight`, to rounding.

    Args:
        fake, real: [b, h, w, 3] in [0, 1].
        embed: images [n, h / grid, w / grid, 3] to embeddings [n, d] of any length; the frozen IHC encoder with running statistics.
        grid: parts on a side.
        weight: of a part whose embeddings agree; 100 = 50 + 50 s_p as published.

    Source: METHODS 3.4.
    """
    parts = [split_grid(x, grid) for x in (fake, real)]
    embedded = unit(jax.lax.stop_gradient(embed(jax.lax.stop_gradient(jnp.concatenate(parts)))))
    made, true = jnp.split(embedded, 2)
    similarity = (made * true).sum(axis=-1).reshape(-1, grid**2)
    weights = weight * (1 + collectives.pmean(similarity.mean(axis=0))) / 2
    each = _l1(parts[0] - parts[1]).reshape(-1, grid**2)
    return Compared((weights * each).mean(axis=1), each.mean(axis=1), weights, similarity.mean(axis=1))


def fixed_l1(fake: Float[Array, "b h w 3"], real: Float[Array, "b h w 3"], weight: float = 100.0) -> Compared:
    """pix2pix's: `weight |fake - real|`, images in [0, 1]."""
    each = _l1(fake - real)
    return Compared(weight * each, each, jnp.full((1,), weight, each.dtype))


def pyramid_l1(fake: Float[Array, "b h w 3"], real: Float[Array, "b h w 3"], octaves: int = 4, weight: float = 25.0) -> Compared:
    """Pyramid pix2pix's: the sum over octaves s of `weight |G_s(fake) - G_s(real)|`, so that shifts of few pixels cost less.

    The first octave is the image; each next one the octave before, blurred four times (3 x 3 Gaussian of sigma 1, the image reflected at its border),
    of which every second row and column is kept.

    Args:
        fake, real: [b, h, w, 3] in [0, 1].
        octaves: 1 is plain L1.
        weight: of each octave.

    Source: METHODS 3.9.
    """
    difference, each = fake - real, []
    for octave in range(octaves):
        if octave:
            # Blurring is linear, so the difference is what is blurred; both axes in one product each.
            difference = resample(difference, *map(_octave, difference.shape[1:3]))
        each.append(_l1(difference))
    return Compared(weight * sum(each), each[0], jnp.full((octaves,), weight, each[0].dtype))


def _octave(side: int) -> np.ndarray:
    """[side / 2, side]: the blurs and the reduction along one axis."""
    tap = np.exp(-0.5 / _SIGMA**2)
    blur = np.eye(side)
    for step in (-1, 1):
        for row in range(side):
            # Reflected about the outermost pixel, which is not repeated.
            blur[row, row + step if 0 <= row + step < side else row - step] += tap
    blur /= 1 + 2 * tap
    return np.linalg.matrix_power(blur, _BLURS)[::2]


def _l1(difference: Float[Array, "n h w c"]) -> Float[Array, "n"]:
    """Mean absolute difference of values in [-1, 1], of differences in [0, 1]."""
    return 2 * jnp.abs(difference).mean(axis=(1, 2, 3))
