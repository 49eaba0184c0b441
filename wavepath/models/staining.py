"""The generator of virtual staining: an H&E image to the IHC image of the same tissue (METHODS 3.3).

    image -- VMFE --> X1 (full), X2 (half), X3 (quarter size)
                       |          |          |------------ query
                       |          |          |               |
                       +- MSFPM: conv-GRU from coarse to fine -> h3, h2, h1        CoA <---- features of the frozen H&E encoder, quadrant by quadrant
                                                                  |    |   |        |
                                                         added ahead of blocks 2, 3, 4 of the body --> decoder --> image

Each part has a switch. Without all of them, and with `encoder="resnet"`, this is the generator of pix2pix (`pix2pix_generator`).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.errors import ConfigError
from wavepath.models.stain_encoder import check_sides
from wavepath.models.stain_layers import Conv, Deconv, Norm, ResnetBlock, ResnetEncoder, signed
from wavepath.models.wavelet_conv import WTConv
from wavepath.ops.cross_attention import cross_attention

ENCODERS = ("vmfe", "plain", "resnet")
_SLOPE = 0.01


class WaveletBlock(nn.Module):
    """WRes: conv (stride, bias), norm, ReLU, wavelet convolution (3x3, one level), norm, plus a shortcut, ReLU.

    The shortcut is the input, or, where the shape changes, a 1x1 convolution and norm of it. With wavelet=None a plain 3x3 convolution stands in the
    wavelet one's place. Borders are zeros.
    """

    features: int
    stride: int = 1
    wavelet: str | None = "haar"
    norm: str = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b i j d"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv(self.features, stride=self.stride, **types, name="conv1")(x)
        y = nn.relu(Norm(self.norm, **types, name="norm1")(y, train))
        y = _second(y, 3, 1, self.wavelet, types)
        y = Norm(self.norm, **types, name="norm2")(y, train)
        if x.shape != y.shape:
            x = Conv(self.features, 1, self.stride, bias=False, **types, name="shortcut")(x)
            x = Norm(self.norm, **types, name="shortcut_norm")(x, train)
        return nn.relu(x + y)


def _second(x: Array, kernel: int, levels: int, wavelet: str | None, types: dict[str, Any]) -> Array:
    if wavelet is None:
        return Conv(x.shape[-1], **types, name="conv2")(x)
    return WTConv(x.shape[-1], kernel, levels, wavelet, **types, name="wavelet")(x)


class VMFE(nn.Module):
    """The multi-scale encoder: a 3x3 convolution and a wavelet one of 7x7 at three levels (c channels), then two pairs of `WaveletBlock`s.

    1,234,304 parameters as published. With wavelet=None plain 3x3 convolutions stand in for the wavelet ones: the same depth and shapes, and more
    parameters (a filter for each pair of channels), so that an ablation with them does not owe its loss to a smaller network.
    """

    channels: int = 64
    wavelet: str | None = "haar"
    norm: str = "batch"
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], train: bool
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b i j d"], Float[Array, "b k l e"]]:
        """X1, X2, X3: [b, h, w, c], [b, h / 2, w / 2, 2c], [b, h / 4, w / 4, 4c]."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(self.channels, border="reflect", bias=False, **types, name="conv1")(x)
        x = nn.relu(Norm(self.norm, **types, name="norm1")(x, train))
        x = _second(x, 7, 3, self.wavelet, types)
        maps = [nn.relu(Norm(self.norm, **types, name="norm2")(x, train))]
        block = nn.remat(WaveletBlock, static_argnums=(2,)) if self.remat else WaveletBlock
        for level in (1, 2):
            x = maps[-1]
            for number, stride in enumerate((2, 1)):
                x = block(self.channels * 2**level, stride, self.wavelet, self.norm, **types, name=f"level{level}_{number}")(x, train)
            maps.append(x)
        return maps[0], maps[1], maps[2]


class ConvGRU(nn.Module):
    """A gated recurrent unit of 3x3 convolutions: z, r = sigmoid(conv [h, x]), q = tanh(conv [r h, x]), h' = (1 - z) h + z q. Borders are zeros."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, state: Float[Array, "b h w c"], x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = state.shape[-1]
        both = jnp.concatenate([state, x], axis=-1)
        update = nn.sigmoid(Conv(width, **types, name="update")(both))
        reset = nn.sigmoid(Conv(width, **types, name="reset")(both))
        candidate = jnp.tanh(Conv(width, **types, name="candidate")(jnp.concatenate([reset * state, x], axis=-1)))
        return (1 - update) * state + update * candidate


class MSFPM(nn.Module):
    """Maps of three scales to three states at quarter size, from coarse to fine; one GRU for both steps. Borders are reflected but in the GRU."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x1: Float[Array, "b h w c"], x2: Float[Array, "b i j d"], x3: Float[Array, "b k l e"]
    ) -> tuple[Float[Array, "b k l e"], Float[Array, "b k l e"], Float[Array, "b k l e"]]:
        """h3, h2, h1, each of X3's shape."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = x3.shape[-1]

        def conv(features: int, stride: int, name: str) -> Conv:
            return Conv(features, stride=stride, border="reflect", **types, name=name)

        h3 = jnp.tanh(conv(width, 1, "coarse")(x3))
        middle = nn.leaky_relu(conv((x2.shape[-1] + width) // 2, 2, "middle1")(x2), _SLOPE)
        middle = jnp.tanh(conv(width, 1, "middle2")(middle))
        fine = nn.leaky_relu(conv(2 * x1.shape[-1], 2, "fine1")(x1), _SLOPE)
        fine = jnp.tanh(conv(width, 2, "fine2")(fine))
        gru = ConvGRU(**types, name="gru")
        h2 = gru(h3, middle)
        return h3, h2, gru(h2, fine)


class CrossAttentionFusion(nn.Module):
    """CoA: x + `fusion` norm(W_o attention(W_q x, W_k f, W_v f)), one head, all W 1x1 convolutions to x's width.

    Attributes:
        fusion: how much of what was attended is added.
        chunk, attention: queries at once and form of `cross_attention`; 0 and None: chosen.
    """

    fusion: float = 0.2
    norm: str = "batch"
    chunk: int = 0
    attention: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], features: Float[Array, "b i j d"], train: bool) -> Float[Array, "b h w c"]:
        types = dict(size=1, dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1]
        query = Conv(width, **types, name="query")(x)
        key, value = (Conv(width, **types, name=name)(features.astype(self.dtype)) for name in ("key", "value"))
        found = cross_attention(query, key, value, chunk=self.chunk, impl=self.attention)
        found = Conv(width, **types, name="out")(found)
        return x + self.fusion * Norm(self.norm, self.dtype, self.param_dtype, name="norm")(found, train)


class StainGenerator(nn.Module):
    """The network of METHODS 3.3: 14,123,267 parameters as published, 1,234,304 of them in the encoder.

    Attributes:
        channels: width at full size; twice and four times as many at half and quarter size.
        blocks: residual blocks of the body; MSFPM wants at least 4.
        encoder: `vmfe`; `plain`: its wavelet convolutions replaced by plain ones; `resnet`: that of pix2pix.
        msfpm: the states of MSFPM are added in the body.
        coa: cross-attention over the encoder's features; False: they are not looked at.
        fusion: weight of what was attended.
        wavelet: of VMFE.
        norm: one of `stain_layers.NORMS`.
        attention_chunk, attention: queries at once, form of the attention; 0 and None: chosen.
        remat: recompute the blocks of encoder and body in the backward pass. XLA's CPU compiler reserves as much memory with it as without (3.1 GB
            for value and gradient at 512 px, 12 at 1024).
        dtype, param_dtype: of computation, of parameters.
    """

    channels: int = 64
    blocks: int = 6
    encoder: str = "vmfe"
    msfpm: bool = True
    coa: bool = True
    fusion: float = 0.2
    wavelet: str = "haar"
    norm: str = "batch"
    attention_chunk: int = 0
    attention: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], features: Float[Array, "b i j d"] | None = None, train: bool = False
    ) -> tuple[Float[Array, "b h w 3"], dict[str, Array]]:
        """The stained image in [0, 1], in float32 or wider, and by name the maps on the way.

        Args:
            images: H&E, [b, h, w, 3] in [0, 1], sides divisible by 4.
            features: [b, h / 4, w / 4, d], the frozen encoder's maps (`stain_layers.quadrant_features`); without `coa` None.
            train: normalise by the batch, and move the running statistics (`batch_stats` is then mutable).

        Returns:
            [b, h, w, 3]; `x1`, `x2`, `x3` of the encoder, `h3`, `h2`, `h1` (with `msfpm`), `fused` (with `coa`), `body`.

        Raises:
            ConfigError: sides that are not divisible by 4, an unknown encoder, too few blocks, features missing or not wanted.
        """
        check_sides(*images.shape[1:3])
        self._check(features)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.encoder == "resnet":
            encoder = ResnetEncoder(self.channels, self.norm, **types, name="encoder")
        else:
            wavelet = self.wavelet if self.encoder == "vmfe" else None
            encoder = VMFE(self.channels, wavelet, self.norm, self.remat, **types, name="encoder")
        x1, x2, x3 = encoder(signed(images, self.dtype), train)
        out = {"x1": x1, "x2": x2, "x3": x3}
        states: tuple[Array, ...] = ()
        if self.msfpm:
            states = MSFPM(**types, name="msfpm")(x1, x2, x3)
            out |= dict(zip(("h3", "h2", "h1"), states, strict=True))
        x = x3
        if self.coa:
            fusion = CrossAttentionFusion(self.fusion, self.norm, self.attention_chunk, self.attention, **types, name="coa")
            x = out["fused"] = fusion(x, features, train)
        block = nn.remat(ResnetBlock, static_argnums=(2,)) if self.remat else ResnetBlock
        for number in range(self.blocks):
            if 1 <= number <= len(states):
                x = x + states[number - 1]
            x = block(self.norm, **types, name=f"block_{number}")(x, train)
        out["body"] = x
        for number in (1, 2):
            x = Deconv(self.channels * 2 ** (2 - number), **types, name=f"up{number}")(x)
            x = nn.relu(Norm(self.norm, **types, name=f"norm{number}")(x, train))
        x = Conv(3, 7, border="reflect", **types, name="tail")(x)
        return (jnp.tanh(x.astype(jnp.promote_types(x.dtype, jnp.float32))) + 1) / 2, out

    def _check(self, features: Array | None) -> None:
        if self.encoder not in ENCODERS:
            raise ConfigError(f"config.stain.encoder={self.encoder!r} is unknown; choose one of {', '.join(ENCODERS)}")
        if self.msfpm and self.blocks < 4:
            raise ConfigError(f"config.stain.blocks={self.blocks}: MSFPM adds its states ahead of blocks 2 to 4; give 4, or config.stain.msfpm=False")
        if self.coa != (features is not None):
            raise ConfigError("the generator takes an encoder's features if and only if config.stain.coa=True")


def pix2pix_generator(blocks: int = 9, **settings: Any) -> StainGenerator:
    """The residual generator of pix2pix and of pyramid pix2pix (METHODS 3.9): 11,383,427 parameters with 9 blocks and 64 channels."""
    return StainGenerator(blocks=blocks, encoder="resnet", msfpm=False, coa=False, **settings)


def generator_flops(model: StainGenerator, side: int) -> float:
    """Floating-point operations (multiply and add) of one forward pass of one image of `side` px, without the frozen encoder.

    Convolutions and the attention's products count; norms, gates and the wavelet transforms themselves (additions) do not.
    """
    c, full, half, quarter = model.channels, side**2, (side // 2) ** 2, (side // 4) ** 2
    wide = 16 * c**2  # products of a 1x1 convolution at quarter size
    if model.encoder == "resnet":
        total = full * 147 * c + half * 18 * c**2 + quarter * 72 * c**2
    else:
        waves = model.encoder == "vmfe"
        # A level of the cascade has four times the channels at a quarter of the places: as many products as the image itself.
        total = full * (27 * c + (49 * c * (1 + 1 + 1 / 4 + 1 / 16) if waves else 9 * c**2))
        for places, width in ((half, 2 * c), (quarter, 4 * c)):
            second = 9 * width * 2 if waves else 9 * width**2
            total += places * (9 * width**2 // 2 + width**2 // 2 + second + 9 * width**2 + second)
    if model.msfpm:
        total += quarter * (9 * wide + 9 * (2 * c) * (3 * c) + 9 * (3 * c) * (4 * c) + 9 * 2 * c * 4 * c) + half * 9 * c * 2 * c
        total += quarter * 2 * 3 * 9 * 2 * wide
    if model.coa:
        total += quarter * 4 * wide + 2 * quarter**2 * 4 * c
    total += quarter * model.blocks * 18 * wide
    # A transposed convolution multiplies each input by nine filters.
    total += quarter * 9 * 8 * c**2 + half * 9 * 2 * c**2 + full * 147 * c
    return 2.0 * total
