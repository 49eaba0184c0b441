"""Colour of stained tissue: [0, 1] values, luminance, optical density, stain separation after Ruifrok and Johnston, and stain jitter.

Stain separation follows scikit-image's `rgb2hed` to the digit: values are clipped at 1e-6 from below, densities are natural logarithms
divided by ln(1e6), so that full absorption is 1, and negative amounts are set to 0 (Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23,
2001). All functions are elementwise over pixels: a product with a 3-vector or 3x3 matrix over the last axis is several times slower in XLA
on the CPU (DESIGN 5) and would round to bfloat16 or TF32 on an accelerator.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key, Num, Shaped, UInt

# Rec. 601, as Pillow and OpenCV convert to grey; rounded so that they sum to exactly 1 in float32, which makes white exactly 1.
LUMA = (0.299, 0.587, 0.114)

# Rows: optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok & Johnston), and the inverse.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_UNMIX = np.linalg.inv(STAINS)
_FLOOR = 1e-6
_LOG_FLOOR = float(np.log(_FLOOR))


def to_float(image: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """uint8 values to float32 in [0, 1].

    Raises:
        TypeError: for any other type, whose scale is not known.
    """
    if image.dtype != jnp.uint8:
        raise TypeError(f"to_float takes uint8 and got {image.dtype}; floating-point images are expected in [0, 1] already")
    return jnp.asarray(image).astype(jnp.float32) * jnp.float32(1 / 255)


def weighted(rgb: Float[Array, "*b 3"], weights: Float[Array, "3"] | np.ndarray | tuple[float, float, float]) -> Float[Array, "*b"]:
    """Weighted sum over the channels, elementwise, in the type of the image; the weights may be traced."""
    first, second, third = weights if isinstance(weights, Array) else map(float, weights)
    return rgb[..., 0] * first + rgb[..., 1] * second + rgb[..., 2] * third


def luminance(rgb: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    """Rec. 601 luma of an RGB image, in the image's own scale."""
    return weighted(rgb, LUMA)


def optical_density(rgb: Float[Array, "*b 3"], floor: float = 1 / 255) -> Float[Array, "*b 3"]:
    """`-log10` of each channel of an image in [0, 1], after clipping at `floor` from below: 0 is glass, 1 a tenth of the light."""
    return -jnp.log10(jnp.clip(rgb, floor, 1.0))


def separate_stains(rgb: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Amounts of haematoxylin, eosin and DAB at each pixel of an image in [0, 1]; equal to `skimage.color.rgb2hed`."""
    density = jnp.log(jnp.maximum(rgb, _FLOOR)) / _LOG_FLOOR
    return jnp.maximum(jnp.stack([weighted(density, _UNMIX[:, stain]) for stain in range(3)], -1), 0)


def hematoxylin_od(rgb: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    """Amount of haematoxylin alone: channel 0 of `separate_stains`, without computing the others."""
    density = jnp.log(jnp.maximum(rgb, _FLOOR)) / _LOG_FLOOR
    return jnp.maximum(weighted(density, _UNMIX[:, 0]), 0)


def combine_stains(hed: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """RGB in [0, 1] from amounts of haematoxylin, eosin and DAB; equal to `skimage.color.hed2rgb`."""
    return jnp.clip(jnp.stack([jnp.exp(_LOG_FLOOR * weighted(hed, STAINS[:, channel])) for channel in range(3)], -1), 0, 1)


def jitter_stain(
    rgb: Float[Array, "h w 3"],
    key: Key[Array, ""] | UInt[Array, "2"],
    strength: Num[Array, ""] | float,
    shift: float = 0.05,
) -> Float[Array, "h w 3"]:
    """Random change of the stains of one image: each amount is scaled and shifted in HED space, the same everywhere in the image.

    The scale is drawn from [1 - strength, 1 + strength] and the shift from [-strength, strength] times `shift` (0.05: about the density of
    faint eosin; 1 is full absorption, 6 in decadic density), for each of the three stains. One sigma for the scale and for a shift in
    decadic density (Tellez et al., IEEE Transactions on Medical Imaging 37, 2018, and Medical Image Analysis 58, 2019; light 0.05, strong
    0.2) is that `strength` with a `shift` of 1/6. Amounts are not clipped at zero, so that
    strength 0 gives the image back to 1e-5 (values below 1/255 apart) and the change stays smooth. Under `vmap` each image
    takes its own key.
    """
    scale_key, shift_key = jax.random.split(key)
    scale = 1 + strength * jax.random.uniform(scale_key, (3,), minval=-1.0)
    shifts = shift * strength * jax.random.uniform(shift_key, (3,), minval=-1.0)
    density = jnp.log(jnp.clip(rgb.astype(jnp.float32), 1 / 255, 1.0)) / _LOG_FLOOR
    amounts = [weighted(density, _UNMIX[:, stain]) * scale[stain] + shifts[stain] for stain in range(3)]
    channels = [sum(amounts[stain] * float(STAINS[stain, channel]) for stain in range(3)) for channel in range(3)]
    return jnp.clip(jnp.exp(_LOG_FLOOR * jnp.stack(channels, -1)), 0, 1).astype(rgb.dtype)
