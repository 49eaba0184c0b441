"""Residual networks with batch normalisation, as torchvision builds them (stride in the 3x3 convolution of a bottleneck).

Batch statistics are those of the whole batch: under a mapped axis the shards' means are averaged (`ops.collectives`), so that a network trains the
same on one device and on eight. Running statistics live in the collection `batch_stats`.

Source: He et al., CVPR 2016; METHODS 4.8 uses a ResNet-50 to tell what restored images are worth for a diagnosis.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.ops import collectives

# Blocks in each of four stages, and whether they are bottlenecks.
DEPTHS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True),
}  # fmt: skip
STEM = 64
_KERNEL = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class BatchNorm(nn.Module):
    """Batch normalisation over all positions of all examples, on all shards.

    Attributes:
        momentum: share of the old running statistics that each training step keeps (torch's `momentum` is 1 minus this).
        epsilon: added to the variance.
        zero: the scale starts at 0, so that a residual block starts as the identity.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    zero: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.zeros if self.zero else nn.initializers.ones, width, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, width, self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width, self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, width, self.param_dtype)
        if train:
            wide = x.astype(self.param_dtype)
            own_mean = collectives.pmean(wide.mean(axis=(0, 1, 2)))
            own_var = collectives.pmean(jnp.square(wide - own_mean).mean(axis=(0, 1, 2)))
            if not self.is_initializing():
                count = x.shape[0] * x.shape[1] * x.shape[2] * collectives.size()
                unbiased = own_var * (count / max(1, count - 1))  # as torch keeps it; the batch itself is divided by n
                mean.value = self.momentum * mean.value + (1 - self.momentum) * own_mean
                var.value = self.momentum * var.value + (1 - self.momentum) * unbiased
        else:
            own_mean, own_var = mean.value, var.value
        factor = scale * jax.lax.rsqrt(own_var + self.epsilon)
        return (x.astype(self.param_dtype) * factor + (bias - own_mean * factor)).astype(self.dtype)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times as many channels at the end; the stride is in the (first) 3x3."""

    channels: int
    stride: int
    bottleneck: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b i j d"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        convs = [(1, 1, 1), (3, self.stride, 1), (1, 1, 4)] if self.bottleneck else [(3, self.stride, 1), (3, 1, 1)]
        y = x
        for number, (size, stride, factor) in enumerate(convs, 1):
            last = number == len(convs)
            y = _conv(self.channels * factor, size, stride, types, f"conv{number}")(y)
            y = BatchNorm(zero=last, name=f"bn{number}", **types)(y, train)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = _conv(y.shape[-1], 1, self.stride, types, "downsample")(x)
            x = BatchNorm(name="downsample_bn", **types)(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """An image classifier: stem (7x7 convolution of stride 2, maximum of 3x3 at every second), four stages, mean over positions, linear head.

    Attributes:
        depth: 18, 34, 50 or 101.
        classes: outputs.
    """

    depth: int
    classes: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], train: bool = False) -> tuple[Float[Array, "b k"], dict[str, Array]]:
        """Logits [b, classes] in float32 or wider, and `pooled` [b, d], what the head sees.

        Args:
            images: [b, h, w, 3], normalised; at least 32 px on a side.
            train: normalise by the batch, and (with the collection `batch_stats` mutable) move the running statistics.
        """
        if self.depth not in DEPTHS:
            raise ConfigError(f"config.classify.depth={self.depth} is unknown; choose one of {', '.join(map(str, DEPTHS))}")
        blocks, bottleneck = DEPTHS[self.depth]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = _conv(STEM, 7, 2, types, "conv1")(images.astype(self.dtype))
        x = nn.relu(BatchNorm(name="bn1", **types)(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage and not number else 1
                x = Block(STEM * 2**stage, stride, bottleneck, name=f"layer{stage + 1}_{number}", **types)(x, train)
        pooled = x.mean(axis=(1, 2))
        bound = pooled.shape[-1] ** -0.5  # torch's linear layer: uniform within 1 / sqrt(inputs)

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        logits = nn.Dense(self.classes, kernel_init=uniform, bias_init=uniform, name="fc", **types)(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), {"pooled": pooled}


def _conv(channels: int, size: int, stride: int, types: dict[str, Any], name: str) -> nn.Conv:
    return nn.Conv(channels, (size, size), stride, padding=size // 2, use_bias=False, kernel_init=_KERNEL, name=name, **types)


def resnet_flops(depth: int, side: int, classes: int) -> float:
    """Floating-point operations (multiply and add) of one forward pass of one image of `side` px: convolutions and the head."""
    blocks, bottleneck = DEPTHS[depth]
    side = -(-side // 2)
    total = side**2 * 7 * 7 * 3 * STEM
    side, inputs = -(-side // 2), STEM
    for stage, count in enumerate(blocks):
        width = STEM * 2**stage
        outputs = width * 4 if bottleneck else width
        for number in range(count):
            small = -(-side // 2) if stage and not number else side
            if bottleneck:
                total += side**2 * inputs * width + small**2 * (9 * width**2 + width * outputs)
            else:
                total += small**2 * 9 * (inputs * width + width**2)
            if inputs != outputs or small != side:
                total += small**2 * inputs * outputs
            side, inputs = small, outputs
    return 2.0 * (total + inputs * classes)
