"""TransMIL: a transformer over a bag of tiles, with Nystrom attention and a pyramid of convolutions for positions (METHODS 5.5).

The method depends on a bag's length: tiles fill a square, row by row, the first ones once more where it has places left over; the landmarks of
Nystrom attention are means of runs of tokens, whose length goes with the number of tokens. Here that length is the number of *real* tiles, a
value and not a shape: arrays have the size that the padded bag asks for, and where things stand in them is computed. So one compiled step serves
all bags of a bucket, and every bag has the answer that the published network gives for it alone and unpadded, whatever bucket it came in.

Kept of the public code, since trained weights depend on it: zeros fill the tokens up to a multiple of the landmarks, at the front and without a
mask, so that they take part in the softmax over tokens, with a score of 0, and in the first landmarks. Not kept: a scale of the pseudo-inverse
taken over the whole batch, which would let bags change each other (published with one bag a batch, where it is the same).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wavepath.models.linear import dense
from wavepath.models.mil import real_tiles, widened
from wavepath.ops.depthwise import depthwise_conv

# What torch gives convolutions: U(-1/sqrt(taps), 1/sqrt(taps)).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2), out_axis=3)
_EPS = 1e-5  # of this network's LayerNorms, torch's default


class TransMIL(nn.Module):
    """Features to `width`, tokens in a square behind a class token, attention, PPEG, attention, norm; the class token gives the logits.

    Outputs as in `models.mil`: `logits` [b, c] and `attention` [b, n]. As the method has no weights of its own to show, `attention` is what the
    class token takes from each tile in the second attention: mean over heads, the parts of a tile's repetitions added, negative values (the
    approximation has some) set to 0, divided by the sum; equal for all tiles should nothing be positive. A bag without tiles has attention 0
    and the logits of the class token alone, finite and always the same.

    The order of tiles matters, that of padding does not: real tiles may stand anywhere in the mask and keep their order.

    Attributes:
        classes: outputs c.
        width: of the tokens; published with heads * head_width.
        heads, head_width: of the attention.
        landmarks: m.
        iterations: of the pseudo-inverse.
        dropout: behind each attention, in training (stream `dropout`).
        dtype, param_dtype: compute and parameter type; softmaxes and the pseudo-inverse are float32 or wider.
    """

    classes: int
    width: int = 512
    heads: int = 8
    head_width: int = 64
    landmarks: int = 256
    iterations: int = 6
    dropout: float = 0.1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"], *, train: bool = False) -> dict[str, Array]:
        """See above; dropout draws from the stream `dropout`."""
        types = (self.dtype, self.param_dtype)
        tiles, side = mask.sum(axis=1), square_side(mask)
        # Token i is real tile i modulo their number; a stable sort brings those to the front.
        order = jnp.argsort(~mask, axis=1, stable=True)
        places = jnp.arange(_most_side(mask.shape[1]) ** 2)
        source = jnp.take_along_axis(order, places % jnp.maximum(tiles, 1)[:, None], axis=1)

        h = jax.nn.relu(dense(self.width, *types, name="embed")(real_tiles(features, mask, self.dtype)))
        tokens = jnp.take_along_axis(h, source[..., None], axis=1)
        first = self.param("cls", nn.initializers.normal(1.0), (1, 1, self.width), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(h), 1, self.width)), tokens], axis=1)
        count = 1 + side**2

        def attended(x: Array, number: int) -> tuple[Array, Array]:
            normal = nn.LayerNorm(epsilon=_EPS, dtype=self.dtype, param_dtype=self.param_dtype, name=f"norm{number}")(x)
            change, weights = NystromAttention(
                self.heads, self.head_width, self.landmarks, self.iterations, dropout=self.dropout, dtype=self.dtype, param_dtype=self.param_dtype,
                name=f"attention{number}",
            )(normal, count, train=train)  # fmt: skip
            return x + change, weights

        x, _ = attended(x, 1)
        x = jnp.concatenate([x[:, :1], PPEG(*types, name="ppeg")(x[:, 1:], side)], axis=1)
        x, weights = attended(x, 2)
        z = nn.LayerNorm(epsilon=_EPS, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x[:, 0])
        logits = dense(self.classes, *types, name="head")(z)
        return {"logits": widened(logits), "attention": _by_tile(weights[:, 1:], mask, tiles)}


def _most_side(tiles: int) -> int:
    """ceil(sqrt(tiles)), exactly."""
    return math.isqrt(max(tiles, 1) - 1) + 1


def square_side(mask: Bool[Array, "b n"]) -> Int[Array, "b"]:
    """ceil(sqrt(number of real tiles)) of each bag: the side of the square that they fill, repeated; 0 of an empty bag."""
    return jnp.sum(jnp.arange(_most_side(mask.shape[1])) ** 2 < mask.sum(axis=1)[:, None], axis=1)


def _by_tile(weights: Float[Array, "b t"], mask: Bool[Array, "b n"], tiles: Int[Array, "b"]) -> Float[Array, "b n"]:
    """Weights of tokens, 0 where there is none, as the attention of tiles: see `TransMIL`."""
    # A square has at most as many places left over as there are tiles, so none is repeated twice.
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    again = rank + tiles[:, None]
    inside = again < weights.shape[1]
    repeated = jnp.where(inside, jnp.take_along_axis(weights, jnp.where(inside, again, 0), axis=1), 0)
    positive = jnp.where(mask, jnp.maximum(jnp.take_along_axis(weights, rank, axis=1) + repeated, 0), 0)
    total = positive.sum(axis=1, keepdims=True)
    positive = jnp.where(total > 0, positive, mask)
    return positive / jnp.maximum(jnp.where(total > 0, total, tiles[:, None]), jnp.finfo(weights.dtype).tiny)


class NystromAttention(nn.Module):
    """softmax(q k_L^T) pinv(softmax(q_L k_L^T)) softmax(q_L k^T) v + depthwise convolution of v over the tokens, by head; then a linear layer.

    q_L and k_L are the landmarks: means of m runs of equally many tokens (Xiong et al., AAAI 2021). Nothing is biased before the last layer.

    Attributes:
        heads, head_width: h heads of this width.
        landmarks: m.
        iterations: of the pseudo-inverse.
        kernel: taps of the convolution, one filter a head.
        dropout: on the output, in training.
        dtype, param_dtype: compute and parameter type.
    """

    heads: int = 8
    head_width: int = 64
    landmarks: int = 256
    iterations: int = 6
    kernel: int = 33
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], count: Int[Array, "b"], *, train: bool = False
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t"]]:
        """The attention's output, and what the first token takes from each token (mean over heads; 0 behind the last token).

        Args:
            x: [b, t, d]; what stands behind the first `count` tokens is not read, and what comes out there means nothing.
            count: [b], tokens of each bag, at least 1.
            train: whether dropout acts.
        """
        b, t, d = x.shape
        h, w, m = self.heads, self.head_width, self.landmarks
        place = jnp.arange(t)
        real = place < count[:, None]
        x = jnp.where(real[..., None], x, 0)

        # Zeros in front make the tokens m runs of `run`; they are counted where they matter and stand nowhere.
        run, zeros = -(-count // m), -count % m
        member = ((place + zeros[:, None]) // run[:, None])[:, None] == jnp.arange(m)[:, None]
        member = (member & real[:, None]).astype(x.dtype) / run[:, None, None].astype(x.dtype)
        means = jnp.einsum("bmt,btd->bmd", member, x)

        project = nn.Dense(
            3 * h * w, use_bias=False, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, param_dtype=self.param_dtype, name="qkv"
        )
        q, k, v = jnp.moveaxis(project(x).reshape(b, t, 3, h, w), 2, 0)
        # The projection is linear and unbiased: the mean token's is the tokens' mean.
        q_mean, k_mean, _ = jnp.moveaxis(project(means).reshape(b, m, 3, h, w), 2, 0)
        q, q_mean = q * w**-0.5, q_mean * w**-0.5

        to_landmarks = jax.nn.softmax(widened(jnp.einsum("bthw,bmhw->bhtm", q, k_mean)), axis=-1)
        between = jax.nn.softmax(widened(jnp.einsum("bnhw,bmhw->bhnm", q_mean, k_mean)), axis=-1)
        scores = jnp.where(real[:, None, None], widened(jnp.einsum("bmhw,bthw->bhmt", q_mean, k)), -jnp.inf)
        every = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        to_tokens = jnp.exp(scores - jnp.logaddexp(every, jnp.log(zeros.astype(every.dtype))[:, None, None, None]))
        inverse = pseudo_inverse(between, self.iterations)

        taken = jnp.einsum("bhmt,bthw->bhmw", to_tokens.astype(v.dtype), v)
        taken = jnp.einsum("bhnm,bhmw->bhnw", inverse, widened(taken)).astype(v.dtype)
        out = jnp.einsum("bhtm,bhmw->bthw", to_landmarks.astype(v.dtype), taken)
        filters = self.param("residual", _UNIFORM, (self.kernel, 1, 1, h), self.param_dtype).astype(self.dtype)
        out = out + depthwise_conv(v.swapaxes(2, 3), filters).swapaxes(2, 3)
        out = dense(d, self.dtype, self.param_dtype, name="proj")(out.reshape(b, t, h * w))
        of_first = jnp.einsum("bhn,bhnm,bhmt->bt", to_landmarks[:, :, 0], inverse, to_tokens) / h
        return nn.Dropout(self.dropout, deterministic=not train)(out), of_first


def pseudo_inverse(x: Float[Array, "b h m m"], iterations: int = 6) -> Float[Array, "b h m m"]:
    """Approximate Moore-Penrose inverse of row-stochastic matrices: z <- z (13 - xz (15 - xz (7 - xz))) / 4, from a multiple of x^T.

    The first multiple is 1 over the product of the largest row sum, which is 1, and the largest column sum, over all heads of a bag together
    (as published for a batch of one bag).
    """
    z = x.swapaxes(-1, -2) / x.sum(axis=-2).max(axis=(1, 2))[:, None, None, None]
    one = jnp.eye(x.shape[-1], dtype=x.dtype)

    def step(_, z: Array) -> Array:
        xz = x @ z
        return 0.25 * z @ (13 * one - xz @ (15 * one - xz @ (7 * one - xz)))

    return jax.lax.fori_loop(0, iterations, step, z)


class PPEG(nn.Module):
    """Positions from convolutions: x plus its depthwise convolutions of 7x7, 5x5 and 3x3, with bias and zeros around the square.

    As all three are linear, they and x itself are one convolution with the sum of the filters.

    Attributes:
        dtype, param_dtype: compute and parameter type.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], side: Int[Array, "b"]) -> Float[Array, "b t d"]:
        """
        Args:
            x: [b, t, d], t a square number; the first `side`^2 tokens of a bag are its square, row by row. The others are not read, and what
                comes out there means nothing.
            side: [b], sides of the squares.
        """
        b, t, d = x.shape
        most = math.isqrt(t)
        total, shift = jnp.zeros((7, 7, 1, d), self.param_dtype).at[3, 3].set(1), jnp.zeros((d,), self.param_dtype)
        for size in (7, 5, 3):
            edge = (7 - size) // 2
            filters = self.param(f"kernel{size}", _UNIFORM, (size, size, 1, d), self.param_dtype)
            total = total + jnp.pad(filters, ((edge, edge), (edge, edge), (0, 0), (0, 0)))
            shift = shift + self.param(f"bias{size}", nn.initializers.zeros_init(), (d,), self.param_dtype)
        # In the corner of the largest square; zeros around it are the zeros around the published one.
        row, column = jnp.divmod(jnp.arange(t), most)
        inside = (row < side[:, None]) & (column < side[:, None])
        cells = jnp.take_along_axis(x, jnp.where(inside, row * side[:, None] + column, 0)[..., None], axis=1)
        grid = jnp.where(inside[..., None], cells, 0).reshape(b, most, most, d)
        out = (depthwise_conv(grid, total.astype(self.dtype)) + shift.astype(self.dtype)).reshape(b, t, d)
        row, column = jnp.divmod(jnp.arange(t), jnp.maximum(side, 1)[:, None])
        return jnp.take_along_axis(out, jnp.where(row < most, row * most + column, 0)[..., None], axis=1)
