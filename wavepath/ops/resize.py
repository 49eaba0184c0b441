"""Bicubic resizing as super-resolution papers mean it: MATLAB's `imresize` and Pillow, Keys' kernel with a = -1/2, antialiased when it shrinks."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["cubic_matrix", "resample", "resize_bicubic"]

_A = -0.5


def cubic_matrix(source: int, target: int, antialias: bool = True) -> np.ndarray:
    """The weights of one axis, float64[target, source]: each row sums to 1 and has at most 4 entries (4 source / target where it shrinks).

    Pixel centres lie at i + 1/2. Taps beyond the border are dropped and the rest divided by their sum, as in Pillow (MATLAB mirrors them).
    """
    ratio = source / target
    width = max(ratio, 1.0) if antialias else 1.0
    centre = (np.arange(target) + 0.5) * ratio - 0.5
    x = np.abs(np.arange(source)[None, :] - centre[:, None]) / width
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = _A * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def resample(x: Float[Array, "b h w c"], rows: np.ndarray, columns: np.ndarray) -> Float[Array, "b i j c"]:
    """Weights [i, h] along the rows and [j, w] along the columns of every image; nothing is clipped."""
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=jax.lax.Precision.HIGHEST)


def resize_bicubic(x: Float[Array, "b h w c"], height: int, width: int, antialias: bool = True) -> Float[Array, "b i j c"]:
    """Images in [0, 1] at another size, clipped to [0, 1].

    Args:
        x: [b, h, w, c] in [0, 1].
        height, width: of the result in px.
        antialias: widen the kernel when an axis shrinks; without it a reduction drops pixels.

    Returns:
        [b, height, width, c]; differentiable but where it clips. Equal to Pillow's `resize(..., BICUBIC)` of 8-bit images to its rounding.

    Source: METHODS 4.7; Keys 1981.
    """
    h, w = x.shape[1:3]
    return jnp.clip(resample(x, cubic_matrix(h, height, antialias), cubic_matrix(w, width, antialias)), 0.0, 1.0)
