"""What operators ask of their inputs."""

import jax.numpy as jnp
from jax import Array


def check_float(x, function: str) -> Array:
    """Integers are refused rather than promoted: whether 255 means 255 or 1 is the caller's to say.

    Raises:
        TypeError: naming the remedy.
    """
    if not hasattr(x, "dtype"):
        raise TypeError(f"{function} takes an array and got a {type(x).__name__}: give jnp.asarray(x, 'float32')")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{function} takes floating-point values and got {x.dtype}: convert first, with wavepath.ops.stain.to_float(image) "
            "for uint8 images in [0, 1] or with .astype('float32') to keep the values"
        )
    return jnp.asarray(x)
