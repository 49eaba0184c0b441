"""WTConv: a depthwise convolution on the image and on a cascade of its wavelet bands (METHODS 3.3; Finder et al., ECCV 2024).

With `levels` l and filters of k x k the receptive field is k 2^l on a side, while parameters and products grow by 4 k^2 and k^2 4 / 4^i a level
and channel. The transforms are `ops.wavelets`, fixed; filters and scales are learnt.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.ops.depthwise import depthwise_conv
from wavepath.ops.wavelets import Subbands, dwt2, idwt2


class WTConv(nn.Module):
    """Depthwise wavelet convolution; as many channels go out as come in, at the same size.

    With X^0 = x, and for level i = 1..l:  X^i = dwt(LL of X^(i-1)),  Y^i = s_i * conv(X^i);  then upwards from Z^l = 0:
    Z^(i-1) = idwt(Y^i_LL + Z^i, Y^i_LH, Y^i_HL, Y^i_HH).  The output is  s_0 * (conv(x) + b) + Z^0.

    Parameters: `kernel` [k, k, 1, c], `bias` [c] and `scale` [c] (ones) on the image; on level i (from 1) `wavelet_kernel_<i>` [k, k, 1, 4c] and
    `wavelet_scale_<i>` [4c] (0.1), channels ordered by band: all of LL, then LH (PyWavelets cH), HL (cV), HH (cD).

    Attributes:
        features: number of channels, to be stated where a reader should see it; None takes the input's. Another number is an error.
        kernel: filter size k, the same at every level.
        levels: depth l of the cascade; 0 is a plain depthwise convolution with a scale.
        wavelet: a discrete wavelet; borders are periodic, which for Haar means nothing, as it sees none.
        use_bias: the bias b.
        impl: form of the depthwise convolution (`ops.depthwise`); `auto` is `shift` on a CPU, which has no forward mode, `conv` elsewhere.
        dtype: compute type.
        param_dtype: parameter type.

    A level whose image has an odd size gets a row or column of zeros at the bottom or right, which is cut off on the way back.
    """

    features: int | None = None
    kernel: int = 5
    levels: int = 1
    wavelet: str = "haar"
    use_bias: bool = True
    impl: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        if self.features not in (None, channels):
            raise ConfigError(f"WTConv is depthwise: features={self.features} must be the {channels} channels that come in, or None")
        if self.levels < 0 or self.kernel < 1:
            raise ConfigError(f"WTConv wants levels >= 0 and kernel >= 1, not {self.levels} and {self.kernel}")
        x = x.astype(self.dtype)
        # U(-1/k, 1/k), what a depthwise filter gets by default in torch.
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2), out_axis=3)

        def filtered(x: Array, name: tuple[str, str], scale: float, bias: bool) -> Array:
            shape = (self.kernel, self.kernel, 1, x.shape[-1])
            y = depthwise_conv(x, self.param(f"{name[0]}kernel{name[1]}", uniform, shape, self.param_dtype), self.impl)
            if bias:
                y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype).astype(self.dtype)
            factor = self.param(f"{name[0]}scale{name[1]}", nn.initializers.constant(scale), x.shape[-1:], self.param_dtype)
            return y * factor.astype(self.dtype)

        coarse, levels = x, []
        for level in range(1, self.levels + 1):
            height, width = coarse.shape[1:3]
            if height % 2 or width % 2:
                coarse = jnp.pad(coarse, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
            bands = dwt2(coarse, self.wavelet, "periodization")
            y = filtered(jnp.concatenate(bands, -1), ("wavelet_", f"_{level}"), 0.1, False)
            levels.append((Subbands(*jnp.split(y, 4, -1)), height, width))
            coarse = bands.ll
        z = None
        for bands, height, width in reversed(levels):
            if z is not None:
                bands = bands._replace(ll=bands.ll + z)
            z = idwt2(bands, self.wavelet, "periodization")[:, :height, :width]
        y = filtered(x, ("", ""), 1.0, self.use_bias)
        return y if z is None else y + z
