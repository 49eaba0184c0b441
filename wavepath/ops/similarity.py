"""How alike two things are: PSNR and structural similarity of images, contrastive similarity of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from wavepath.errors import WavepathError
from wavepath.ops import collectives

_SMALL = 512  # pixels; up to here window means are matrix products


class SimilarityError(WavepathError, ValueError):
    """Images or windows that do not fit; the message names what does."""


def unit(x: Float[Array, "*b d"], eps: float = 1e-12) -> Float[Array, "*b d"]:
    """Vectors of length 1; a zero vector stays zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps))


def info_nce(
    query: Float[Array, "b d"], key: Float[Array, "b d"], temperature: float, symmetric: bool = False
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """InfoNCE of each example against all keys of the global batch, row i of `query` belonging to row i of `key`.

    `-log( exp(q_i.k_i / t) / sum_j exp(q_i.k_j / t) )` with unit vectors; j runs over the whole batch, also where it lies on several devices.

    Args:
        query: [b, d], this shard's rows, of any length.
        key: [b, d], their partners.
        temperature: t.
        symmetric: the mean of this loss and the same with the roles exchanged.

    Returns:
        Loss [b], and [b] whether the partner was the nearest key (1 or 0). Their means over shards are those over the batch.

    Source: METHODS 1.5 and 3.2.
    """
    query, key = unit(query), unit(key)
    loss, hit = _one_way(query, key, temperature)
    if symmetric:
        back, back_hit = _one_way(key, query, temperature)
        loss, hit = (loss + back) / 2, (hit + back_hit) / 2
    return loss, hit


def _one_way(query: Float[Array, "b d"], key: Float[Array, "b d"], temperature: float) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    everyone = collectives.all_gather(key)
    # Float32 products: on accelerators the default precision would round similarities that are then divided by a small temperature.
    logits = jnp.matmul(query, everyone.T, precision=jax.lax.Precision.HIGHEST) / temperature
    own = jnp.arange(query.shape[0]) + collectives.index() * query.shape[0]
    positive = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    hit = (jnp.argmax(logits, axis=1) == own).astype(logits.dtype)
    return jax.nn.logsumexp(logits, axis=1) - positive, hit


def psnr(a: Shaped[Array, "*b h w c"], b: Shaped[Array, "*b h w c"], value_range: float | int = 1.0) -> Float[Array, "*b"]:
    """Peak signal-to-noise ratio of each pair of images in dB: `10 log10(r^2 / mse)`, one mean over pixels and channels; infinite for equal ones.

    Args:
        a, b: floating-point [..., h, w, c] of one shape, values within a span of `value_range`.
        value_range: r, the largest minus the smallest possible value.

    Raises:
        TypeError: integers, whose differences would wrap round. SimilarityError: images of two shapes.

    Half precision is computed, and returned, in float32. Source: METHODS 4.7; equal to `skimage.metrics.peak_signal_noise_ratio`.
    """
    a, b = _pair(a, b, "psnr")
    mse = jnp.square(a - b).mean(axis=(-3, -2, -1))
    return 20 * jnp.log10(jnp.asarray(value_range, mse.dtype)) - 10 * jnp.log10(mse)


def luma(x: Shaped[Array, "*b h w 3"]) -> Float[Array, "*b h w 1"]:
    """The Y of YCbCr as super-resolution scores it: BT.601 in studio swing, 16/255 for black to 235/255 for white.

    Args:
        x: RGB in [0, 1], floating-point.

    The differences of two lumas span 219/255, and the field nevertheless divides by a range of 1 (255): so do published numbers "in Y".

    Raises:
        TypeError: integers.

    Source: ITU-R BT.601; equal to MATLAB's `rgb2ycbcr` and to `skimage.color.rgb2ycbcr` / 255.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"luma takes floating-point values in [0, 1] and got {x.dtype}: convert first, with wavepath.ops.stain.to_float(image)")
    # Elementwise: a product with a vector is several times slower on CPUs, and rounded on accelerators.
    return (16 + 65.481 * x[..., 0:1] + 128.553 * x[..., 1:2] + 24.966 * x[..., 2:3]) / 255


def _pair(a: Shaped[Array, "..."], b: Shaped[Array, "..."], name: str) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Two images to compare, in float32 at least."""
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b)):
        raise TypeError(
            f"{name} takes floating-point values and got {a.dtype} and {b.dtype}: convert first, with wavepath.ops.stain.to_float(image) for uint8"
            " images in [0, 1], or with .astype('float32') and value_range=255"
        )
    if a.shape != b.shape:
        raise SimilarityError(f"{name} compares images of one shape and got {a.shape} and {b.shape}")
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def ssim(
    a: Shaped[Array, "..."],
    b: Shaped[Array, "..."],
    *,
    value_range: float | int,
    window: str = "gaussian",
    size: int | None = None,
    sigma: float = 1.5,
    sample_covariance: bool = False,
) -> Float[Array, "..."]:
    """Structural similarity of each pair of images: the mean over channels and over all places where the window lies inside; 1 for equal images.

    Args:
        a, b: floating-point [..., h, w, c], values within a span of `value_range`.
        value_range: largest minus smallest possible value; it scales the constants (0.01 r)^2 and (0.03 r)^2.
        window: `gaussian` (of `sigma`) or `uniform`.
        size: odd side of the window in pixels; None: 11 for gaussian (which is `sigma` 1.5 cut at 3.5 sigma), 7 for uniform.
        sigma: standard deviation of the Gaussian in pixels.
        sample_covariance: variances divided by n - 1 instead of n, n being the pixels of the window.

    Returns:
        [...], differentiable.

    Raises:
        TypeError: integers, whose products would wrap round.
        SimilarityError: images of two shapes, an unknown window, or one that is even or larger than the image.

    Half precision is computed, and returned, in float32: variances are small differences of large means.

    Source: Wang et al., IEEE TIP 13, 2004. Equal to `skimage.metrics.structural_similarity` with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`, and for `uniform` with `sample_covariance=True` to its defaults. The loss of METHODS 2.3 uses the Gaussian window.
    """
    a, b = _pair(a, b, "ssim")
    weights = _window(window, size, sigma)
    n = len(weights)
    if n > min(a.shape[-3], a.shape[-2]):
        raise SimilarityError(f"an SSIM window of {n} pixels does not fit into {a.shape[-3]} x {a.shape[-2]}; give a smaller size")
    mean_a, mean_b, aa, bb, ab = (_blur(x, weights) for x in (a, b, a * a, b * b, a * b))
    unbias = n * n / (n * n - 1) if sample_covariance else 1.0
    var_a, var_b, cov = ((x - y) * unbias for x, y in ((aa, mean_a * mean_a), (bb, mean_b * mean_b), (ab, mean_a * mean_b)))
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    quality = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return quality.mean(axis=(-3, -2, -1))


def _window(kind: str, size: int | None, sigma: float) -> np.ndarray:
    """Weights of a window along one axis; they sum to 1."""
    if kind not in ("gaussian", "uniform"):
        raise SimilarityError(f"SSIM window {kind!r} is unknown; choose gaussian or uniform")
    if size is None:
        size = 11 if kind == "gaussian" else 7
    if size < 3 or size % 2 == 0:
        raise SimilarityError(f"an SSIM window has an odd size of at least 3, not {size}")
    offset = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offset / sigma) ** 2) if kind == "gaussian" else np.ones(size)
    return weights / weights.sum()


def _blur(x: Float[Array, "*b h w c"], weights: np.ndarray) -> Float[Array, "*b i j c"]:
    """Separable window means at the places where the window lies inside."""
    h, w, c = x.shape[-3:]
    if max(h, w) <= _SMALL:
        # Patches: one product with a banded matrix for each axis. Its gradient is a product too, where that of eleven slices is eleven pads.
        rows, columns = (jnp.asarray(_band(side, weights), x.dtype) for side in (h, w))
        x = jnp.einsum("ih,...hwc->...iwc", rows, x, precision=jax.lax.Precision.HIGHEST)
        return jnp.einsum("jw,...iwc->...ijc", columns, x, precision=jax.lax.Precision.HIGHEST)
    for axis, side in ((-3, h), (-2, w)):
        places = side - len(weights) + 1
        x = sum(jax.lax.slice_in_dim(x, k, k + places, axis=axis % x.ndim) * float(weight) for k, weight in enumerate(weights))
    return x


def _band(side: int, weights: np.ndarray) -> np.ndarray:
    """[side - n + 1, side]: row i holds the weights from column i on."""
    band = np.zeros((side - len(weights) + 1, side))
    for row in range(len(band)):
        band[row, row : row + len(weights)] = weights
    return band
