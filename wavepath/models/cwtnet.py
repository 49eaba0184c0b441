"""CWT-Net: super-resolution in which each place of the low-resolution features takes over the diagonal wavelet detail that fits it best.

    lr ---- conv ----> [block 1] -> ... -> [block n] -- + --> sub-pixel enlargement -> conv -> sr
                        |   ^                 ^
    reference - HH - conv -> wavelet features, in each block refined, matched and transferred ... -> conv -> I_WT

The reference is the image one sampling level above the input (`ref` mode). In `wr` mode there is none, and a small network of channel-attention
blocks (WR) makes an estimate of it from the input: the honest setting, which reads nothing but the input.

Source: METHODS section 4 (arXiv 2409.07092v1), with the defaults chosen there for what the paper leaves open.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from wavepath.errors import ConfigError
from wavepath.models.superres_layers import RCAB, Conv, ResBlock, Upsampler, doublings, finish, mean_shift
from wavepath.ops.hard_attention import hard_attention
from wavepath.ops.resize import cubic_matrix, resample, resize_bicubic
from wavepath.ops.wavelets import dwt2

GROWTHS = ("doubling", "unit")


def wavelet_depths(scale: int, growth: str = "doubling", wavelet_blocks: int = 0, wr_blocks: int = 0) -> tuple[int, int]:
    """Residual blocks of the wavelet branch in each transformer block, and channel-attention blocks of WR.

    Args:
        scale: 2, 4 or 8.
        growth: how 2 and 4 grow with the scale: by 1 and 2 for each doubling (2 3 4 and 4 6 8), or for each `unit` of it (2 4 8 and 4 8 16).
        wavelet_blocks, wr_blocks: above 0 they are taken as they are.

    Raises:
        ConfigError: another scale or growth.

    Source: METHODS 4.1 (the paper's sentence can be read both ways).
    """
    if growth not in GROWTHS:
        raise ConfigError(f"config.superres.growth={growth!r} is unknown; choose one of {', '.join(GROWTHS)}")
    more = doublings(scale) - 1 if growth == "doubling" else scale - 2
    # One more for each +1 of S would be 4 and 8 at 4x, 8 and 16 at 8x.
    return wavelet_blocks or 2 + more, wr_blocks or 4 + 2 * more


def wavelet_target(reference: Float[Array, "b i j 3"], dwt: bool = True) -> Float[Array, "b h w 3"]:
    """What the wavelet branch has to put out: the Haar diagonal detail of the reference, at half its size.

    Args:
        reference: [b, 2h, 2w, 3] in [0, 1].
        dwt: False (the ablation without a transform): the means of 2 x 2 pixels instead, in [0, 1].

    Returns:
        [b, h, w, 3], in [-1, 1] with `dwt`: (x00 - x01 - x10 + x11) / 2, PyWavelets' cD with its sign.

    Source: METHODS 4.2 (Eq. 4).
    """
    bands = dwt2(reference, "haar", "periodization")
    return bands.hh if dwt else bands.ll / 2


class CrossScaleBlock(nn.Module):
    """One cross-scale wavelet transformer block: (SR features, wavelet features) to the same, refined.

    Q = RBs(f_sr), K = RBw(f_wt), V = K enlarged by 2 and reduced again (bicubic); (T, S) = hard attention; f_sr' = Q + conv([Q, T]) S, f_wt' = K.

    Attributes:
        sr_blocks, wavelet_blocks: residual blocks of either branch.
        res_scale: of the residual blocks.
        chunk: rows of queries whose scores are held at once; 0: chosen.
        attention: form of `hard_attention`; None: chosen.

    Source: METHODS 4.3 (Eq. 8, 9).
    """

    sr_blocks: int
    wavelet_blocks: int
    res_scale: float = 1.0
    chunk: int = 0
    attention: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w c"], detail: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        for number in range(self.sr_blocks):
            features = ResBlock(self.res_scale, **types, name=f"sr_{number}")(features)
        for number in range(self.wavelet_blocks):
            detail = ResBlock(self.res_scale, **types, name=f"wavelet_{number}")(detail)
        transferred, score = hard_attention(features, detail, up_and_down(detail), chunk=self.chunk, impl=self.attention)
        merged = Conv(features.shape[-1], **types, name="merge")(jnp.concatenate([features, transferred.astype(features.dtype)], -1))
        return features + merged * score.astype(merged.dtype), detail


def up_and_down(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Features enlarged by 2 and reduced by 2, both bicubic: two linear maps an axis, multiplied beforehand."""
    rows, columns = (cubic_matrix(2 * side, side) @ cubic_matrix(side, 2 * side) for side in x.shape[1:3])
    return resample(x, rows, columns)


class Reconstruction(nn.Module):
    """WR: an estimate of the image one level above `lr`, by channel-attention blocks and one sub-pixel enlargement.

    conv(enlarge(conv(f + RCAB_n(... RCAB_1(f))))) with f = conv(lr - mean). Source: METHODS 4.4 (Eq. 6, 7; always by 2).
    """

    channels: int
    blocks: int
    reduction: int = 8
    mean: tuple[float, ...] = ()
    skip: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, lr: Float[Array, "b h w 3"]) -> Float[Array, "b i j 3"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = head = Conv(self.channels, **types, name="head")(mean_shift(lr, self.mean))
        for number in range(self.blocks):
            x = RCAB(self.reduction, **types, name=f"block_{number}")(x)
        x = Upsampler(2, **types, name="up")(head + x)
        return finish(Conv(3, **types, name="tail")(x), lr, self.mean, self.skip)


class CWTNet(nn.Module):
    """The network of METHODS 4.1, for 2x, 4x and 8x.

    Attributes:
        scale: 2, 4 or 8.
        channels, blocks: width and number of the cross-scale blocks.
        sr_blocks, wavelet_blocks, wr_blocks, growth: residual blocks of either branch in each block, blocks of WR; 0 and growth: `wavelet_depths`.
        reduction: of WR's channel attention.
        res_scale: of the residual blocks.
        attention_chunk, attention: rows of queries at once, form of the attention; 0 and None: chosen.
        skip: `bicubic` adds the enlarged input to the output (and to WR's estimate); not in the paper, and it saves the first thousands of steps.
        wavelet_branch: False: the SR branch of residual blocks alone, with nothing to attend to.
        dwt: False: the branch sees the reference itself, through a convolution of stride 2.
        wr: False: without a reference the branch sees the input enlarged by 2 (bicubic) instead of an estimate.
        mean: RGB subtracted at the input and restored at the output; empty: none.
        remat: recompute each block in the backward pass.
        dtype, param_dtype: of computation, of parameters.
    """

    scale: int = 2
    channels: int = 64
    blocks: int = 12
    sr_blocks: int = 2
    wavelet_blocks: int = 0
    wr_blocks: int = 0
    growth: str = "doubling"
    reduction: int = 8
    res_scale: float = 1.0
    attention_chunk: int = 0
    attention: str | None = None
    skip: str = "none"
    wavelet_branch: bool = True
    dwt: bool = True
    wr: bool = True
    mean: tuple[float, ...] = ()
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def wavelet_target(self, reference: Float[Array, "b i j 3"]) -> Float[Array, "b h w 3"]:
        """The target of `out["wavelet"]`: `wavelet_target` with this network's `dwt`."""
        return wavelet_target(reference, self.dwt)

    @nn.compact
    def __call__(
        self,
        lr: Float[Array, "b h w 3"],
        reference: Float[Array, "b i j 3"] | None = None,
        use_reference: bool | np.bool_ | Bool[Array, ""] = True,
    ) -> tuple[Float[Array, "b y x 3"], dict[str, Array]]:
        """The image `scale` times as large, and by name what the network found on the way.

        Args:
            lr: [b, h, w, 3] in [0, 1].
            reference: [b, 2h, 2w, 3] in [0, 1], the same field one level above; None is `wr` mode, in which nothing but `lr` can be read.
            use_reference: whether a given reference is used. It may be traced: one compiled step for both modes.

        Returns:
            sr [b, h scale, w scale, 3], about [0, 1] and not clipped; `wavelet` [b, h, w, 3], the auxiliary output (with the wavelet branch);
            `estimate` [b, 2h, 2w, 3], WR's image where it was made.
        """
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        wavelet_blocks, wr_blocks = wavelet_depths(self.scale, self.growth, self.wavelet_blocks, self.wr_blocks)
        out: dict[str, Array] = {}
        x = head = Conv(self.channels, **types, name="head")(mean_shift(lr, self.mean))
        if self.wavelet_branch:
            above = self._above(lr, reference, use_reference, wr_blocks, out)
            if self.dwt:
                detail = Conv(self.channels, **types, name="wavelet_head")(wavelet_target(above))
            else:
                detail = Conv(self.channels, stride=2, **types, name="wavelet_head")(mean_shift(above, self.mean))
            block = nn.remat(CrossScaleBlock) if self.remat else CrossScaleBlock
            for number in range(self.blocks):
                x, detail = block(
                    self.sr_blocks, wavelet_blocks, self.res_scale, self.attention_chunk, self.attention, **types, name=f"block_{number}"
                )(x, detail)
            tail = Conv(3, **types, name="wavelet_tail")(detail)
            # Without the transform the target is an image, whose mean the branch need not learn.
            out["wavelet"] = tail.astype(jnp.promote_types(tail.dtype, jnp.float32)) if self.dwt else finish(tail, lr, self.mean, "none")
        else:
            block = nn.remat(ResBlock) if self.remat else ResBlock
            for number in range(self.blocks * self.sr_blocks):
                x = block(self.res_scale, **types, name=f"block_{number // self.sr_blocks}_sr_{number % self.sr_blocks}")(x)
        x = Upsampler(self.scale, **types, name="up")(x + head)
        return finish(Conv(3, **types, name="tail")(x), lr, self.mean, self.skip), out

    def _above(self, lr: Array, reference: Array | None, use: Any, wr_blocks: int, out: dict[str, Array]) -> Array:
        """The image one level above the input that the wavelet branch looks at; an estimate goes into `out`."""
        static = isinstance(use, bool | np.bool_)
        # A network is initialised without a reference, so WR's parameters exist whether or not a call needs them.
        if reference is not None and static and use:
            return reference
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.wr:
            made = Reconstruction(self.channels, wr_blocks, self.reduction, self.mean, self.skip, **types, name="wr")(lr)
            out["estimate"] = made
        else:
            made = resize_bicubic(lr, 2 * lr.shape[1], 2 * lr.shape[2])
        if reference is None or static:
            return made
        return jnp.where(use, reference.astype(made.dtype), made)
