"""A loss between the co-occurrence matrices of patches, which never holds the matrices of more than a few patches.

METHODS 2.2: per offset, `P` counts pairs of levels in the prediction and `Q` in the target, `S` is the number of pairs, both are re-weighted to
`P (1 - P/S)`, and the loss of a patch is the mean squared difference over all entries of all offsets. A 16x16 patch has 480 pairs for two
offsets, which touch some 2,000 of the 131,072 entries at 256 levels.

Formulations, equal to rounding: `matmul` (dense memberships), `scatter` (matrices from windows, compared whole) and `sparse`: matrices from
windows, read back only where a window lies. A distance that is zero where both are, `d(P, Q) = P u(P, Q) + Q v(P, Q)`, summed over entries
equals the sum over windows of their own mass times u or v at their place, however often windows overlap. Each term holds the
difference of P and Q as a factor, so nothing large cancels.

Patches are worked off in short blocks, which yield their loss and its gradient in one go. The rule for derivatives is hand-written
(`jax.custom_jvp`: reverse mode, forward mode and higher derivatives all work), and computes the target's gradient only where one is asked for.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from wavepath.ops.glcm_matrices import FORMULATIONS, Offsets, add_windows, check_offsets, pair_counts, take_windows, windows
from wavepath.ops.glcm_membership import GlcmError, Membership, check_float, check_range, choose, level_coordinate, make_membership
from wavepath.ops.platform import platform

DISTANCES = ("squared", "l1", "jensen_shannon")
LOSS_FORMULATIONS = ("sparse", "scatter", "matmul")

# Keeps the logarithms of empty entries, and their gradients, finite; a single pair's probability in a patch is a million times larger.
_FLOOR = 1e-9


class _Settings(NamedTuple):
    """The static part of a loss."""

    kind: str
    levels: int
    count: int
    offsets: Offsets
    reweight: bool
    normalize: bool
    distance: str
    impl: str

    def membership(self, sharpness: Array) -> Membership:
        return Membership(self.kind, self.levels, self.count, sharpness)


def default_loss_formulation(levels: int, count: int, backend: str | None = None) -> str:
    """The formulation for `glcm_loss` where none is named. Measured on a CPU (docs/glcm.md), by reasoning elsewhere:

    | backend | up to 64 levels, narrow window | more levels, narrow window | window of most levels |
    |---------|--------------------------------|----------------------------|-----------------------|
    | cpu     | scatter                        | sparse                     | matmul                |
    | others  | matmul                         | matmul                     | matmul                |
    """
    if (backend or platform()) != "cpu" or 2 * count > levels > 4:
        return "matmul"
    return "scatter" if levels <= 64 else "sparse"


def glcm_loss(
    prediction: Float[Array, "n h w"],
    target: Float[Array, "n h w"],
    levels: int = 256,
    offsets: Sequence = ((0, 1), (1, 0)),
    *,
    value_range: tuple | list,
    membership: str = "sigmoid",
    sharpness: float | int | Array | None = None,
    window: int | None = None,
    reweight: bool = True,
    normalize: bool = False,
    distance: str = "squared",
    impl: str | None = None,
) -> Float[Array, "n"]:
    """The loss of each patch; the defaults are the published setting (METHODS 2.2), to be averaged over the masked patches.

    prediction, target: grey patches, n of them (fold batch and patches together). levels, offsets, value_range, membership, sharpness, window:
    as in `cooccurrence`; 32 levels or fewer give a more informative gradient on 16x16 patches than the published 256 (METHODS 2.8).
    reweight: damps dominant entries. normalize: probabilities times `levels**2` instead of counts, so that the loss depends little on levels and
    patch size. distance: `squared` and `l1`, means over all entries (with normalize and without reweight, l1 is twice the total variation), or
    `jensen_shannon`, in nats, of the probabilities, a mean over offsets. impl: `sparse`, `scatter` or `matmul`, default by
    `default_loss_formulation`.

    Gradients reach prediction and target; sharpness is a constant, which may be traced. Half precision is computed in float32. Raises
    TypeError for integers and GlcmError for what does not fit. Memory: a few megabytes beyond prediction, target and one gradient.
    """
    prediction, target = check_float(prediction, "glcm_loss"), check_float(target, "glcm_loss")
    if prediction.ndim != 3 or prediction.shape != target.shape:
        raise GlcmError(f"glcm_loss takes two equal stacks of patches [n, h, w] and got the shapes {prediction.shape} and {target.shape}")
    dtype = jnp.promote_types(prediction.dtype, target.dtype)
    lo, hi = check_range(value_range)
    m = make_membership(membership, levels, sharpness, window)
    pairs = check_offsets(offsets, *prediction.shape[1:])
    choose(distance, DISTANCES, "distance")
    impl = choose(impl or default_loss_formulation(levels, m.count), LOSS_FORMULATIONS, "formulation")
    settings = _Settings(m.kind, levels, m.count, pairs, reweight, normalize, distance, impl)
    place = partial(level_coordinate, levels=levels, lo=lo, hi=hi)
    return _loss(place(prediction.astype(dtype)), place(target.astype(dtype)), jnp.asarray(m.sharpness, dtype), settings)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _loss(prediction: Array, target: Array, sharpness: Array, settings: _Settings) -> Array:
    return _in_blocks(prediction, target, sharpness, settings, False, False)[0]


def _loss_jvp(settings: _Settings, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    moved = [not isinstance(tangent, SymbolicZero) for tangent in tangents[:2]]
    loss, *gradients = _in_blocks(*primals, settings, *moved)
    change = jnp.zeros_like(loss)
    for gradient, tangent in zip(gradients, tangents[:2], strict=True):
        if gradient is not None:
            change += (gradient * tangent).sum((1, 2))
    return loss, change


_loss.defjvp(_loss_jvp, symbolic_zeros=True)


def _block_size(settings: _Settings, patches: int, pixels: int) -> int:
    """Patches worked on at a time. On a CPU few, so that all stays in the cache; elsewhere many, to fill the machine."""
    cpu = platform() == "cpu"
    if settings.impl == "matmul":
        return max(1, min(patches, (4 if cpu else 256) * 2**20 // (pixels * settings.levels * 4)))
    matrices = 2 * len(settings.offsets) * settings.levels**2 * 4
    narrow = 2**17 if settings.impl == "scatter" else 2**20
    budget = narrow * (1 if settings.count <= 2 else 2) if cpu else 2**28
    return max(1, min(patches, 4 if cpu else patches, budget // matrices))


def _in_blocks(prediction: Array, target: Array, sharpness: Array, settings: _Settings, move_p: bool, move_t: bool) -> tuple:
    """Losses, and the gradients by prediction and target where wanted (None elsewhere)."""
    patches, height, width = prediction.shape
    size = _block_size(settings, patches, height * width)
    work = _sparse_block if settings.impl == "sparse" else _dense_block
    if size >= patches:
        return work(prediction, target, sharpness, settings, move_p, move_t)
    blocks = -(-patches // size)

    # Block k holds the patches k, k + blocks, ...: where a batch lies on several devices, every device then works on a share of each block.
    def fold(a: Array) -> Array:
        return jnp.pad(a, ((0, blocks * size - patches), (0, 0), (0, 0))).reshape(size, blocks, height, width).swapaxes(0, 1)

    results = lax.map(lambda pt: work(*pt, sharpness, settings, move_p, move_t), (fold(prediction), fold(target)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(blocks * size, *a.shape[2:])[:patches], results)


def _dense_block(prediction: Array, target: Array, sharpness: Array, settings: _Settings, move_p: bool, move_t: bool) -> tuple:
    m = settings.membership(sharpness)
    pairs, scale = _constants(settings, prediction)

    def whole(prediction: Array, target: Array) -> Array:
        p, q = (FORMULATIONS[settings.impl](v, m, settings.offsets, None) for v in (prediction, target))
        # Rows first: a sum along the last axis does not vectorise on a CPU.
        entries = _entry(p, q, pairs[:, None, None], settings).sum(-2)
        return (entries * scale[:, None]).sum((1, 2))

    def ones(loss: Array) -> Array:
        return jnp.ones_like(loss)

    if move_p and move_t:
        loss, pull = jax.vjp(whole, prediction, target)
        return loss, *pull(ones(loss))
    if move_p:
        loss, pull = jax.vjp(lambda p: whole(p, target), prediction)
        return loss, *pull(ones(loss)), None
    if move_t:
        loss, pull = jax.vjp(lambda t: whole(prediction, t), target)
        return loss, None, *pull(ones(loss))
    return whole(prediction, target), None, None


def _sparse_block(prediction: Array, target: Array, sharpness: Array, settings: _Settings, move_p: bool, move_t: bool) -> tuple:
    m = settings.membership(sharpness)
    block = prediction.shape[0]
    each = pair_counts(settings.offsets, *prediction.shape[1:])
    pairs, scale = (_by_window(constants, each, block) for constants in _constants(settings, prediction))

    def by_patch(masses: Array) -> Array:
        parts = jnp.split(masses.sum((1, 2)), np.cumsum([block * n for n in each])[:-1])
        return sum(part.reshape(block, -1).sum(1) for part in parts)

    def make(v: Array) -> tuple[Array, Array]:
        return windows(v, m, settings.offsets)

    p_mass, p_pull, p_places = jax.vjp(make, prediction, has_aux=True)
    q_mass, q_pull, q_places = jax.vjp(make, target, has_aux=True)
    # Both kinds of matrices in one array: two scatters would share their zeros, and copy them.
    matrices = block * len(each)
    to_q = jnp.asarray([matrices, 0, 0], p_places.dtype)
    both = add_windows(jnp.concatenate([p_mass, q_mass]), jnp.concatenate([p_places, q_places + to_q]), 2 * matrices, m.levels)
    at_p = [take_windows(both, places, m.count) for places in (p_places, p_places + to_q)]
    at_q = [take_windows(both, places, m.count) for places in (q_places, q_places + to_q)]
    loss = by_patch(p_mass * scale * _factors(*at_p, pairs, settings)[0]) + by_patch(q_mass * scale * _factors(*at_q, pairs, settings)[1])

    def slope(values: list[Array], which: int) -> Array:
        tangents = [jnp.ones_like(a) if k == which else jnp.zeros_like(a) for k, a in enumerate(values)]
        return scale * jax.jvp(lambda p, q: _entry(p, q, pairs, settings), values, tangents)[1]

    return loss, p_pull(slope(at_p, 0))[0] if move_p else None, q_pull(slope(at_q, 1))[0] if move_t else None


def _by_window(by_offset: Array, each: tuple[int, ...], block: int) -> Array:
    """A constant of each offset, repeated for the windows of a block in the order of `windows`."""
    return jnp.repeat(by_offset, np.asarray([block * n for n in each]), total_repeat_length=block * sum(each))[:, None, None]


def _constants(settings: _Settings, like: Array) -> tuple[Array, Array]:
    """Pairs of pixels at each offset, and what the sum over the entries of an offset is to be multiplied by."""
    each = np.asarray(pair_counts(settings.offsets, *like.shape[1:]), np.float64)
    entries = settings.levels**2
    # Memberships sum to one, so that a matrix sums to its number of pairs, without adding it up.
    scale = {
        "squared": (entries / each) ** 2 / entries if settings.normalize else np.full_like(each, 1 / entries),
        "l1": 1 / each if settings.normalize else np.full_like(each, 1 / entries),
        "jensen_shannon": np.ones_like(each),
    }[settings.distance]
    return jnp.asarray(each, like.dtype), jnp.asarray(scale / len(each), like.dtype)


def _difference(p: Array, q: Array, pairs: Array, settings: _Settings) -> tuple[Array, Array]:
    """f(P) - f(Q) of the re-weighted entries f(P) = P (1 - P/S), as (P - Q) times a factor, and that factor."""
    factor = 1 - (p + q) / pairs if settings.reweight else jnp.ones_like(p)
    return (p - q) * factor, factor


def _probabilities(p: Array, q: Array, pairs: Array, settings: _Settings) -> tuple[Array, Array, Array, Array]:
    """The re-weighted probabilities of an entry and half the logarithms of their ratios to the mean of both."""
    p, q = p / pairs, q / pairs
    if settings.reweight:
        p, q = p * (1 - p), q * (1 - q)
    mean = jnp.log((p + q) / 2 + _FLOOR)
    return p, q, (jnp.log(p + _FLOOR) - mean) / 2, (jnp.log(q + _FLOOR) - mean) / 2


def _entry(p: Array, q: Array, pairs: Array, settings: _Settings) -> Array:
    """The distance of two entries, unscaled. For matrices that do not sum to one, as after re-weighting, Jensen-Shannon is the sum of
    their generalised divergences from the mean, whose linear terms cancel."""
    if settings.distance == "jensen_shannon":
        p, q, log_p, log_q = _probabilities(p, q, pairs, settings)
        return p * log_p + q * log_q
    difference, _ = _difference(p, q, pairs, settings)
    return jnp.square(difference) if settings.distance == "squared" else jnp.abs(difference)


def _factors(p: Array, q: Array, pairs: Array, settings: _Settings) -> tuple[Array, Array]:
    """u and v of `_entry = P u + Q v`."""
    if settings.distance == "jensen_shannon":
        *_, log_p, log_q = _probabilities(p, q, pairs, settings)
        damp = (lambda a: (1 - a / pairs) / pairs) if settings.reweight else (lambda a: 1 / pairs)
        return damp(p) * log_p, damp(q) * log_q
    difference, factor = _difference(p, q, pairs, settings)
    signed = (difference if settings.distance == "squared" else jnp.sign(difference)) * factor
    return signed, -signed
