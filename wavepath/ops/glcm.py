"""Grey-level co-occurrence matrices: differentiable, for whole images or patches, with masks; Haralick's statistics and a loss on them.

`cooccurrence(x, levels, offsets, value_range=...)` counts how often level i has level j at an offset. With `membership="hard"` it equals
`skimage.feature.graycomatrix`; with the default `triangular` and the published `sigmoid` memberships (`wavepath.ops.glcm_membership`) each
pixel shares itself among near levels and the matrix has a gradient. `glcm_loss` compares patches without holding their matrices.

    p = cooccurrence(image, 32, offsets_from([1, 2], [0, np.pi / 2]), value_range=(0.0, 1.0), normalize=True)   # [*b, 4, 32, 32]
    haralick(p).contrast                                                                                       # [*b, 4]
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from wavepath.ops.glcm_loss import LOSS_FORMULATIONS, glcm_loss
from wavepath.ops.glcm_matrices import FORMULATIONS, check_offsets
from wavepath.ops.glcm_membership import (
    MEMBERSHIPS,
    GlcmError,
    Membership,
    check_float,
    check_range,
    choose,
    level_coordinate,
    make_membership,
)
from wavepath.ops.platform import platform

__all__ = [
    "FORMULATIONS", "LOSS_FORMULATIONS", "MEMBERSHIPS", "GlcmError", "Haralick", "cooccurrence", "default_formulation", "glcm_loss", "haralick",
    "offsets_from",
]  # fmt: skip

# Bytes of memberships or windows above which the product goes block by block.
_WORKING_BYTES = 512 * 2**20
# Levels a pixel touches up to which a window for each pair is the cheaper one on a CPU (docs/glcm.md).
_NARROW = 8


def offsets_from(distances: Iterable, angles: Iterable) -> tuple[tuple[int, int], ...]:
    """Offsets (drow, dcol) for distances in pixels and angles in radians, distances outermost, in scikit-image's convention.

    Rows go down, and components are rounded half away from zero: `(round(sin(angle) * d), round(cos(angle) * d))`. So distance 2 at 45 degrees
    is (1, 1), the same as distance 1.
    """

    def nearest(value: float) -> int:
        return int(math.copysign(math.floor(abs(value) + 0.5), value))

    angles = tuple(angles)
    return tuple((nearest(math.sin(angle) * distance), nearest(math.cos(angle) * distance)) for distance in distances for angle in angles)


def default_formulation(m: Membership, images: int, pixels: int, offsets: int, backend: str | None = None) -> str:
    """The formulation for `cooccurrence` of `images` of `pixels` where none is named. Measured on a CPU, by reasoning elsewhere:

    | backend | narrow window | wide window | working memory above 512 MB |
    |---------|---------------|-------------|-----------------------------|
    | cpu     | scatter       | scan        | scan                        |
    | others  | matmul        | matmul      | scan                        |

    Images of more than 2^24 pixels take `scan` on a CPU: a scatter adds ones, and float32 cannot count beyond that.

    A scatter's cost does not depend on the number of levels but on the square of the window; accelerators serialise colliding updates and
    have matrix units.
    """
    if (backend or platform()) == "cpu":
        narrow = m.count <= _NARROW and m.count < m.levels or m.count <= 2
        windows = images * pixels * offsets * (m.count**2 + 3) * 4  # a window and its place for each pair
        return "scatter" if narrow and windows <= _WORKING_BYTES and pixels <= 2**24 else "scan"
    return "matmul" if images * pixels * m.levels * 4 <= _WORKING_BYTES else "scan"


def cooccurrence(
    x: Float[Array, "*b h w"],
    levels: int,
    offsets: Sequence = ((0, 1), (1, 0)),
    *,
    value_range: tuple | list,
    membership: str = "triangular",
    sharpness: float | int | Array | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    mask: Bool[Array, "*b h w"] | None = None,
    window: int | None = None,
    impl: str | None = None,
) -> Float[Array, "*b o l l"]:
    """Co-occurrence matrices: entry [..., k, i, j] counts the pixels of level i whose neighbour at `offsets[k]` is of level j.

    x: grey images, any leading dimensions. levels: 2 or more, of equal width over `value_range` (lo, hi), whose ends may be traced; values
    outside are clamped, and have no gradient. offsets: (drow, dcol), rows going down, either sign; see `offsets_from`.
    membership, sharpness (widths in a level; default 1 for triangular, 30 for sigmoid; none for hard): `wavepath.ops.glcm_membership`. The
    sharpness may be traced, and a sigmoid then needs `window`, the levels kept on each side of a value (default: what keeps the loss of mass
    under 1e-6); the other memberships know their own.
    symmetric: adds the transpose. normalize: each matrix sums to one (a matrix without pairs stays zero). mask: a pair counts where both of
    its pixels are in. impl: `scatter`, `matmul` or `scan`, equal to rounding; default by `default_formulation`.
    Half precision is computed, and returned, in float32: bfloat16 cannot count beyond 256 (float32 beyond 2^24: see there). NaN counts
    for nothing certain: mask it. Works under jit, vmap, grad and forward mode.
    Raises TypeError for integers and GlcmError, naming the remedy, for anything that does not fit. Source: METHODS 2.2; Haralick 1973.
    """
    x = check_float(x, "cooccurrence")
    if x.ndim < 2:
        raise GlcmError(f"cooccurrence takes images [..., height, width] and got the shape {x.shape}")
    if x.ndim > 3 and x.shape[-1] in (1, 3, 4):
        raise GlcmError(f"cooccurrence takes grey planes [..., height, width] and got channels last, {x.shape}: give x[..., 0], or move the channels")
    lo, hi = check_range(value_range)
    m = make_membership(membership, levels, sharpness, window)
    *lead, height, width = x.shape
    pairs = check_offsets(offsets, height, width)
    if mask is not None and mask.shape != x.shape:
        raise GlcmError(f"the mask has the shape {mask.shape} and the image {x.shape}; they must be equal, broadcast the mask first")
    usual = default_formulation(m, math.prod(lead), height * width, len(pairs))
    impl = choose(impl or usual, tuple(FORMULATIONS), "formulation")
    flat = None if mask is None else mask.reshape(-1, height, width)
    matrices = FORMULATIONS[impl](level_coordinate(x, levels, lo, hi).reshape(-1, height, width), m, pairs, flat)
    if symmetric:
        matrices = matrices + matrices.mT
    if normalize:
        matrices = _to_one(matrices)
    return matrices.reshape(*lead, len(pairs), levels, levels)


def _to_one(p: Array) -> Array:
    total = p.sum((-2, -1), keepdims=True)
    return p / jnp.where(total > 0, total, 1)


class Haralick(NamedTuple):
    """Statistics of co-occurrence matrices, one value a matrix, named as in `skimage.feature.graycoprops`."""

    contrast: Array
    dissimilarity: Array
    homogeneity: Array
    energy: Array
    correlation: Array
    ASM: Array
    entropy: Array


def haralick(p: Float[Array, "*b l l"]) -> Haralick:
    """Contrast, dissimilarity, homogeneity, energy, correlation, angular second moment and entropy (nats) of matrices [..., L, L].

    Matrices are normalised inside. Equal to `skimage.feature.graycoprops`, with finite gradients everywhere: where all mass is on one level
    the correlation is 1 as there, and its gradient zero. Source: Haralick 1973.
    """
    p = _to_one(check_float(p, "haralick"))
    levels = p.shape[-1]
    index = jnp.arange(levels, dtype=p.dtype)
    apart = index[:, None] - index
    energy2 = jnp.square(p).sum((-2, -1))
    positive = energy2 > 0
    rows, cols = p.sum(-1), p.sum(-2)
    row = index - (rows * index).sum(-1, keepdims=True)
    col = index - (cols * index).sum(-1, keepdims=True)
    spread = (rows * row**2).sum(-1) * (cols * col**2).sum(-1)
    shared = (p * row[..., :, None] * col[..., None, :]).sum((-2, -1))
    # Rounding leaves a flat image a spread of this order; a true one of a single pair among thousands is far above.
    varied = spread > (16 * levels * jnp.finfo(p.dtype).eps) ** 4
    filled = p > 0
    return Haralick(
        contrast=(p * apart**2).sum((-2, -1)),
        dissimilarity=(p * jnp.abs(apart)).sum((-2, -1)),
        homogeneity=(p / (1 + apart**2)).sum((-2, -1)),
        energy=jnp.where(positive, jnp.sqrt(jnp.where(positive, energy2, 1)), 0),
        correlation=jnp.where(varied, shared / jnp.sqrt(jnp.where(varied, spread, 1)), 1),
        ASM=energy2,
        entropy=-(p * jnp.log(jnp.where(filled, p, 1))).sum((-2, -1)),
    )
