"""Stain normalisation after Macenko and after Reinhard.

Functions take one image in [0, 1], as `ops.stain.jitter_stain` does; batches go through `jax.vmap`. Every shape is static: pixels that do not
count are masked, never cut out, so that everything runs under `jax.jit`. Products with 3-vectors are elementwise, for the reasons given in
`ops.stain`.

    target = macenko_stains(reference)
    normalised = jax.jit(jax.vmap(macenko_normalise, (0, None)))(images, target)

**Images without tissue** come back as they are, to the bit: where less than a twentieth of the pixels is tissue, or a stain cannot be told
from the other, there is nothing to estimate stains from, and glass and the dirt on it would be painted with the target's. The same
holds for a target without tissue. `valid` of the estimates says which it was.

Sources: Macenko et al., ISBI 2009; Reinhard et al., IEEE Computer Graphics and Applications 21(5), 2001.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from wavepath.ops.stain import STAINS, optical_density, weighted

BETA = 0.15  # length of a tissue pixel's optical density, decadic: Macenko's threshold
# Share of tissue below which an image counts as glass. The 99th percentile of the concentrations, over all pixels, must fall well within
# tissue; glass with dirt or a pen's line on it has up to 0.02, adipose tissue 0.2.
_LEAST_TISSUE = 0.05
_LEAST_SINE = 0.02  # between two stains: noise on one colour spreads its angles about this far
_LEAST_MAXIMUM = 0.005  # of a concentration, decadic: one grey level in glass
_LEAST_SPREAD = 1e-2  # standard deviation of a Lab channel: far below one of 256 levels, above float32 rounding

# Linear RGB (sRGB primaries, D65) to CIE XYZ. White is the row sums, which gives every grey a = b = 0.
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = _XYZ.sum(1)
_RGB = np.linalg.inv(_XYZ)
_DELTA = 6 / 29  # where the cube root of CIE Lab goes over into a straight line


class MacenkoStains(NamedTuple):
    """Stains of one image (or, with leading axes, of several)."""

    matrix: Float[Array, "*b 2 3"]  # unit vectors of optical density in red, green, blue: haematoxylin, eosin
    maxima: Float[Array, "*b 2"]  # 99th percentile of the concentrations, decadic optical density
    valid: Bool[Array, "*b"]  # False: too little tissue, or but one colour


class ReinhardStatistics(NamedTuple):
    """Colours of one image (or, with leading axes, of several) in CIE Lab."""

    mean: Float[Array, "*b 3"]
    std: Float[Array, "*b 3"]  # of the population (divided by the number of pixels)
    valid: Bool[Array, "*b"]  # False: too little tissue


def masked_percentiles(values: Float[Array, "n"], mask: Bool[Array, "n"], percents: tuple[float, ...]) -> Float[Array, "q"]:
    """Percentiles (0 to 100) of the values under the mask, linear between ranks as NumPy's; 0 where the mask is empty.

    The shape is static: values outside the mask are sorted to the end, and ranks are counted within it.
    """
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    last = jnp.maximum(mask.sum() - 1, 0)
    rank = jnp.asarray(percents, values.dtype) / 100 * last
    low = jnp.floor(rank).astype(last.dtype)
    below, above = ordered[low], ordered[jnp.minimum(low + 1, last)]
    return jnp.where(mask.any(), below + (above - below) * (rank - low), 0)


def macenko_stains(
    rgb: Float[Array, "h w 3"], *, beta: float = BETA, alpha: float = 1.0, luminosity: float | None = None, mask: Bool[Array, "h w"] | None = None
) -> MacenkoStains:
    """Stain vectors and maximum concentrations of an image.

    Optical densities of tissue are projected on the plane of their covariance's two largest eigenvectors; the stains are the robust
    extremes of the angles there. The one that absorbs more red is haematoxylin. Maxima are over all pixels, glass included.

    Args:
        rgb: [h, w, 3] in [0, 1]; values below 1/255 count as 1/255.
        beta: tissue is what has an optical density (decadic, length of the vector) of at least this. Implementations that ask it of each
            channel drop pale eosin, whose red hardly absorbs.
        alpha: percentile of the angles taken as extreme, from either end.
        luminosity: tissue is instead what has a CIE lightness below 100 times this, as StainTools and TIAToolbox have it (there 0.8).
        mask: [h, w], pixels that take part at all; None: all.

    Returns:
        The stains; those of an image without tissue are Ruifrok and Johnston's with maxima 1, and not `valid`.

    Source: Macenko et al. 2009, section 2.
    """
    density = optical_density(rgb.astype(jnp.float32))
    tissue = _length(density) >= beta if luminosity is None else rgb_to_lab(rgb.astype(jnp.float32))[..., 0] < 100 * luminosity
    inside = jnp.ones(tissue.shape, bool) if mask is None else mask
    tissue = tissue & inside
    mean = _masked_mean(density, tissue)
    centred = density - mean
    products = [centred[..., i] * centred[..., j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))]
    covariance = _masked_mean(jnp.stack(products, -1), tissue)[jnp.array([[0, 1, 2], [1, 3, 4], [2, 4, 5]])]
    normal = jnp.linalg.eigh(covariance)[1][:, 0]  # of the plane; ascending order
    # Angles are counted from the mean colour, not from an eigenvector: eigenvectors have no sign, and tissue lies around its mean, far from
    # the cut at half a turn. The extremes are the same colours.
    ahead = _unit(mean - (mean * normal).sum() * normal)
    aside = jnp.cross(normal, ahead)
    angle = jnp.arctan2(weighted(density, aside), weighted(density, ahead))
    extremes = masked_percentiles(angle.ravel(), tissue.ravel(), (alpha, 100 - alpha))
    vectors = _unit(jnp.cos(extremes)[:, None] * ahead + jnp.sin(extremes)[:, None] * aside)
    matrix = jnp.where(vectors[0, 0] > vectors[1, 0], vectors, vectors[::-1])
    concentrations = _concentrations(density, matrix)
    maxima = jnp.stack([masked_percentiles(amount.ravel(), inside.ravel(), (99.0,))[0] for amount in concentrations])
    sine = _length(jnp.cross(matrix[0], matrix[1]))
    valid = _enough(tissue, inside) & (sine > _LEAST_SINE) & (maxima > _LEAST_MAXIMUM).all()
    known = _unit(jnp.asarray(STAINS[:2], jnp.float32))
    return MacenkoStains(jnp.where(valid, matrix, known), jnp.where(valid, maxima, 1.0), valid)


def macenko_normalise(
    rgb: Float[Array, "h w 3"], target: MacenkoStains, *, beta: float = BETA, alpha: float = 1.0, luminosity: float | None = None,
    mask: Bool[Array, "h w"] | None = None,
) -> Float[Array, "h w 3"]:
    """The image with the target's stains: its concentrations, brought to the target's maxima, times the target's stain vectors.

    What the two stains do not explain of a colour is lost, in an image normalised to itself too.

    Args:
        rgb: [h, w, 3] in [0, 1].
        target: from `macenko_stains` of one image.
        beta, alpha, luminosity, mask: of the estimate from `rgb`, as in `macenko_stains`. Pixels outside the mask are normalised all the same.

    Returns:
        [h, w, 3] in [0, 1], of the type of `rgb`; `rgb` itself where it or the target holds no tissue.

    Source: Macenko et al. 2009, section 2.
    """
    source = macenko_stains(rgb, beta=beta, alpha=alpha, luminosity=luminosity, mask=mask)
    haematoxylin, eosin = _concentrations(optical_density(rgb.astype(jnp.float32)), source.matrix)
    scale = target.maxima / source.maxima
    density = (haematoxylin * scale[0])[..., None] * target.matrix[0] + (eosin * scale[1])[..., None] * target.matrix[1]
    normalised = jnp.clip(10.0**-density, 0, 1).astype(rgb.dtype)
    return jnp.where(source.valid & target.valid, normalised, rgb)


def reinhard_statistics(rgb: Float[Array, "h w 3"], *, beta: float = BETA, mask: Bool[Array, "h w"] | None = None) -> ReinhardStatistics:
    """Mean and standard deviation of each Lab channel over the whole image, glass included.

    Args:
        rgb: [h, w, 3] in [0, 1].
        beta: as in `macenko_stains`; here it decides on `valid` alone.
        mask: [h, w], pixels that take part; None: all.
    """
    rgb = rgb.astype(jnp.float32)
    lab = rgb_to_lab(rgb)
    inside = jnp.ones(lab.shape[:2], bool) if mask is None else mask
    mean = _masked_mean(lab, inside)
    std = jnp.sqrt(_masked_mean((lab - mean) ** 2, inside))
    return ReinhardStatistics(mean, std, _enough((_length(optical_density(rgb)) >= beta) & inside, inside))


def reinhard_normalise(
    rgb: Float[Array, "h w 3"], target: ReinhardStatistics, *, beta: float = BETA, mask: Bool[Array, "h w"] | None = None
) -> Float[Array, "h w 3"]:
    """The image with the target's mean and standard deviation in each Lab channel.

    The space is CIE Lab (D65), as in StainTools and TIAToolbox; the paper's own is Ruderman's l alpha beta. Those packages round
    to 8 bits in Lab on the way in and cut to 8 bits on the way out, which this does not. A channel without any spread is moved, not scaled.

    Args:
        rgb: [h, w, 3] in [0, 1].
        target: from `reinhard_statistics` of one image.
        beta, mask: as in `reinhard_statistics`. Pixels outside the mask are normalised all the same.

    Returns:
        [h, w, 3] in [0, 1], of the type of `rgb`; `rgb` itself where it or the target holds no tissue.

    Source: Reinhard et al. 2001, equations 10 and 11.
    """
    source = reinhard_statistics(rgb, beta=beta, mask=mask)
    scale = jnp.where(source.std > _LEAST_SPREAD, target.std / jnp.maximum(source.std, _LEAST_SPREAD), 1.0)
    moved = (rgb_to_lab(rgb.astype(jnp.float32)) - source.mean) * scale + target.mean
    return jnp.where(source.valid & target.valid, lab_to_rgb(moved).astype(rgb.dtype), rgb)


def rgb_to_lab(rgb: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """CIE Lab (D65; L from 0 to 100) of sRGB values in [0, 1]."""
    linear = jnp.where(rgb > 0.04045, ((jnp.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    ratio = [weighted(linear, _XYZ[i] / _WHITE[i]) for i in range(3)]
    x, y, z = (jnp.where(t > _DELTA**3, jnp.cbrt(t), t / (3 * _DELTA**2) + 4 / 29) for t in ratio)
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def lab_to_rgb(lab: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """sRGB in [0, 1] of CIE Lab (D65); colours outside are clipped in each channel."""
    y = (lab[..., 0] + 16) / 116
    roots = jnp.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    ratio = jnp.where(roots > _DELTA, roots**3, 3 * _DELTA**2 * (roots - 4 / 29))
    linear = jnp.clip(jnp.stack([weighted(ratio, _RGB[i] * _WHITE) for i in range(3)], -1), 0, 1)
    return jnp.clip(jnp.where(linear > 0.0031308, 1.055 * jnp.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear), 0, 1)


def _length(vectors: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    return jnp.sqrt(vectors[..., 0] ** 2 + vectors[..., 1] ** 2 + vectors[..., 2] ** 2)


def _unit(vectors: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """To length 1; a vector of length 0 stays (an image of pure glass has them, and is not `valid`)."""
    return vectors / jnp.maximum(_length(vectors), 1e-12)[..., None]


def _masked_mean(values: Float[Array, "h w c"], mask: Bool[Array, "h w"]) -> Float[Array, "c"]:
    """Mean over the pixels under the mask; 0 where it is empty."""
    return jnp.where(mask[..., None], values, 0).sum((0, 1)) / jnp.maximum(mask.sum(), 1)


def _concentrations(density: Float[Array, "h w 3"], matrix: Float[Array, "2 3"]) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    """Least squares amounts of two stains with unit vectors: the 2 x 2 normal equations in closed form."""
    cosine = (matrix[0] * matrix[1]).sum()
    sine2 = jnp.maximum(1 - cosine**2, 1e-6)
    return weighted(density, (matrix[0] - cosine * matrix[1]) / sine2), weighted(density, (matrix[1] - cosine * matrix[0]) / sine2)


def _enough(tissue: Bool[Array, "h w"], inside: Bool[Array, "h w"]) -> Bool[Array, ""]:
    return (tissue.sum() >= _LEAST_TISSUE * inside.sum()) & tissue.any()
