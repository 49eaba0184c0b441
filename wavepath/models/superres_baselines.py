"""Baselines of super-resolution, SRCNN, EDSR and RCAN, and the one place where `config.superres` becomes a network.

Each is called as `model(lr)` with [b, h, w, 3] in [0, 1] and returns (sr [b, h scale, w scale, 3], {}), like CWT-Net's pair; nothing is clipped.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.models.cwtnet import CWTNet, wavelet_depths
from wavepath.models.superres_layers import RCAB, Conv, ResBlock, Upsampler, doublings, finish, mean_shift
from wavepath.ops.resize import resize_bicubic

NETWORKS = ("cwt-net", "srcnn", "edsr", "rcan")


class SRCNN(nn.Module):
    """Three convolutions on the bicubically enlarged input (Dong et al. 2014, 9-1-5), with borders kept; ReLU between them."""

    scale: int = 2
    kernels: tuple[int, ...] = (9, 1, 5)
    channels: tuple[int, ...] = (64, 32)
    mean: tuple[float, ...] = ()
    skip: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, lr: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b y x 3"], dict[str, Array]]:
        doublings(self.scale)
        if len(self.kernels) != len(self.channels) + 1:
            raise ConfigError(f"config.superres.srcnn has {len(self.kernels)} kernels and {len(self.channels)} channels between; one fewer is right")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        enlarged = resize_bicubic(lr, lr.shape[1] * self.scale, lr.shape[2] * self.scale)
        x = mean_shift(enlarged, self.mean)
        for number, (kernel, width) in enumerate(zip(self.kernels[:-1], self.channels, strict=True)):
            x = nn.relu(Conv(width, kernel, **types, name=f"conv{number + 1}")(x))
        x = Conv(3, self.kernels[-1], **types, name="tail")(x)
        return finish(x, lr, self.mean, self.skip), {}


class EDSR(nn.Module):
    """EDSR (Lim et al. 2017); the defaults are EDSR-baseline: 16 residual blocks of 64 channels, a long skip, sub-pixel enlargement."""

    scale: int = 2
    blocks: int = 16
    channels: int = 64
    res_scale: float = 1.0
    mean: tuple[float, ...] = ()
    skip: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, lr: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b y x 3"], dict[str, Array]]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = head = Conv(self.channels, **types, name="head")(mean_shift(lr, self.mean))
        for number in range(self.blocks):
            x = ResBlock(self.res_scale, **types, name=f"block_{number}")(x)
        x = Conv(self.channels, **types, name="body")(x) + head
        x = Upsampler(self.scale, **types, name="up")(x)
        return finish(Conv(3, **types, name="tail")(x), lr, self.mean, self.skip), {}


class RCAN(nn.Module):
    """RCAN (Zhang et al. 2018): groups of channel-attention blocks with a convolution and a skip each, then as EDSR."""

    scale: int = 2
    groups: int = 10
    blocks: int = 20
    channels: int = 64
    reduction: int = 16
    mean: tuple[float, ...] = ()
    skip: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, lr: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b y x 3"], dict[str, Array]]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = head = Conv(self.channels, **types, name="head")(mean_shift(lr, self.mean))
        for group in range(self.groups):
            entry = x
            for number in range(self.blocks):
                x = RCAB(self.reduction, **types, name=f"group_{group}_block_{number}")(x)
            x = Conv(self.channels, **types, name=f"group_{group}_conv")(x) + entry
        x = Conv(self.channels, **types, name="body")(x) + head
        x = Upsampler(self.scale, **types, name="up")(x)
        return finish(Conv(3, **types, name="tail")(x), lr, self.mean, self.skip), {}


def build_superres(settings: Any, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, mean: Any = None) -> nn.Module:
    """The network that `config.superres` describes.

    Args:
        settings: the config group.
        dtype, param_dtype: of computation, of parameters.
        mean: RGB to subtract; None: `settings.mean`.

    Raises:
        ConfigError: an unknown network, or settings that do not fit together.
    """
    if settings.network not in NETWORKS:
        raise ConfigError(f"config.superres.network={settings.network!r} is unknown; choose one of {', '.join(NETWORKS)}")
    mean = tuple(float(value) for value in (settings.mean if mean is None else mean))
    if len(mean) not in (0, 3):
        raise ConfigError(f"config.superres.mean has {len(mean)} values; give three (RGB in [0, 1]) or none")
    doublings(settings.scale)
    shared = dict(scale=int(settings.scale), mean=mean, skip=settings.skip, dtype=dtype, param_dtype=param_dtype)
    if settings.network == "srcnn":
        group = settings.srcnn
        return SRCNN(kernels=tuple(group.kernels), channels=tuple(group.channels), **shared)
    if settings.network == "edsr":
        group = settings.edsr
        return EDSR(blocks=group.blocks, channels=group.channels, res_scale=group.res_scale, **shared)
    if settings.network == "rcan":
        group = settings.rcan
        return RCAN(groups=group.groups, blocks=group.blocks, channels=group.channels, reduction=group.reduction, **shared)
    wavelet_depths(settings.scale, settings.growth)
    names = ("channels", "blocks", "sr_blocks", "wavelet_blocks", "wr_blocks", "growth", "reduction", "res_scale", "attention_chunk")
    flags = ("wavelet_branch", "dwt", "wr", "remat")
    return CWTNet(**{name: settings[name] for name in names + flags}, **shared)


def superres_flops(settings: Any) -> float:
    """Operations (two for each multiply-add) of one forward pass for one LR patch of `settings.patch` px, the attention's scores included."""
    n = float(settings.patch) ** 2
    if settings.network == "srcnn":
        widths = (3, *settings.srcnn.channels, 3)
        sizes = zip(settings.srcnn.kernels, widths[:-1], widths[1:], strict=True)
        return 2 * n * settings.scale**2 * sum(kernel**2 * a * b for kernel, a, b in sizes)
    group = settings[settings.network] if settings.network in ("edsr", "rcan") else settings
    c, scale = int(group.channels), int(settings.scale)
    conv = 9 * c * c
    # In units of one LR pixel: enlargements work at their input's size, the last convolution at the output's.
    total = 27 * c + sum(4**step * 4 * conv for step in range(doublings(scale))) + scale**2 * 27 * c
    if settings.network == "edsr":
        total += conv * (2 * group.blocks + 1)
    elif settings.network == "rcan":
        total += conv * (group.groups * (2 * group.blocks + 1) + 1)
    else:
        total += conv * 2 * settings.blocks * settings.sr_blocks
        if settings.wavelet_branch:
            wavelet, wr = wavelet_depths(scale, settings.growth, settings.wavelet_blocks, settings.wr_blocks)
            attention = n * 9 * c  # each place's patch with every other
            total += settings.blocks * (conv * (2 * wavelet + 2) + attention) + 2 * 27 * c
            if settings.wr:
                total += 27 * c + conv * (2 * wr + 4) + 4 * 27 * c
    return 2 * n * total
