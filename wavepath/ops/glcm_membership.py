"""How a pixel belongs to grey levels: the memberships behind `wavepath.ops.glcm`.

`levels` levels of equal width cover the value range; level k has its centre at `lo + (k + 1/2) * width` (METHODS 2.2). A membership gives every
value a weight in each level, and the weights of a value sum to one everywhere, at both ends of the range too:

| name | weight of level k, d = distance to its centre in level widths | touches |
|------|----------------------------------------------------------------|---------|
| `triangular` | `clip((1/2 - abs(d)) * sharpness + 1/2, 0, 1)`; sharpness 1 is the hat, larger ones flat-topped | 2 levels |
| `sigmoid`    | difference of two sigmoids of width `1/sharpness` at the level's edges, with its mirror images at both range ends | see `window` |
| `hard`       | 1 in the level that holds the value, 0 elsewhere; no gradient | 1 level |

Since few levels hold all of a pixel's weight, the sparse formulations keep `count` weights a pixel and the index of the first of them.
"""

import difflib
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from wavepath.errors import WavepathError
from wavepath.ops import checks

MEMBERSHIPS = ("triangular", "sigmoid", "hard")
# Width of the published method's sigmoids: a thirtieth of a level (METHODS 2.2).
PUBLISHED_SHARPNESS = 30.0
# A window leaves out at most this much of a pixel's unit weight.
TRUNCATED_MASS = 1e-6


class GlcmError(WavepathError, ValueError):
    """An option of the co-occurrence operators that does not exist or does not fit; the message names what does."""


class Membership(NamedTuple):
    """A membership with everything static but its sharpness, which may be traced.

    kind: one of MEMBERSHIPS. levels: their number. count: levels kept for a pixel. sharpness: widths in a level.
    """

    kind: str
    levels: int
    count: int
    sharpness: float | Array


def choose(name: str, names: tuple[str, ...], what: str) -> str:
    """`name` where it is one of `names`; otherwise a GlcmError naming the nearest."""
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        raise GlcmError(f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"))
    return name


def window_for(sharpness: float, levels: int) -> int:
    """Levels of the sigmoid membership which a pixel must keep, so that it loses less than TRUNCATED_MASS wherever it lies.

    `count` levels starting at `floor(v - (count - 1) / 2)` reach at least `(count - 1) / 2` level widths to either side of the value v,
    and a sigmoid's tail beyond a distance d is `exp(-d * sharpness)`: 2 levels at sharpness 30, 7 at 5.
    """
    return min(levels, 1 + math.ceil(2 * math.log(2 / TRUNCATED_MASS) / sharpness))


def make_membership(kind: str, levels: int, sharpness: float | int | Array | None, window: int | None) -> Membership:
    """A checked Membership. `window`: levels kept on each side of a value (sigmoid), needed where the sharpness is traced.

    Raises GlcmError for an unknown kind, fewer than two levels, and a sharpness or window which does not fit.
    """
    choose(kind, MEMBERSHIPS, "membership")
    try:
        count = operator.index(levels)
    except TypeError:
        count = 0
    if count < 2:
        raise GlcmError(f"levels={levels!r} must be a whole number of at least 2, such as 32")
    levels = count
    if window is not None and (not isinstance(window, int) or window < 1):
        raise GlcmError(f"window={window!r} must be a whole number of levels of at least 1, or None to follow from the sharpness")
    if sharpness is None:
        sharpness = PUBLISHED_SHARPNESS if kind == "sigmoid" else 1.0
    known = not isinstance(sharpness, jax.core.Tracer)
    sharpness = float(sharpness) if known else sharpness
    if known and not (math.isfinite(sharpness) and sharpness > 0):
        raise GlcmError(f"sharpness={sharpness} must be positive and finite: widths in a level, such as {PUBLISHED_SHARPNESS:g}")
    if kind == "hard":
        return Membership(kind, levels, 1, 1.0)
    if kind == "triangular":
        if known and sharpness < 1:
            raise GlcmError(f"sharpness={sharpness:g} is below 1: a triangular membership wider than its level does not sum to one; use sigmoid")
        return Membership(kind, levels, 2, sharpness)
    if known and sharpness * levels < math.log(2 / TRUNCATED_MASS):
        raise GlcmError(f"sharpness={sharpness:g} makes sigmoids as wide as all {levels} levels, which do not sum to one: raise it or the levels")
    if window is not None:
        if known and min(levels, 2 * window) < window_for(sharpness, levels):
            raise GlcmError(
                f"window={window} loses mass at sharpness={sharpness:g}: give {-(-window_for(sharpness, levels) // 2)} or more levels a side, or None"
            )
        return Membership(kind, levels, min(levels, 2 * window), sharpness)
    if not known:
        raise GlcmError("a traced sharpness needs window=, the levels to keep on each side of a value: 4 serves sharpness 5 and above")
    return Membership(kind, levels, window_for(sharpness, levels), sharpness)


def check_range(value_range) -> tuple:
    """`(lo, hi)`; raises GlcmError where it is no pair or, where both are known, is empty."""
    try:
        lo, hi = value_range
    except TypeError as error:
        raise GlcmError(f"value_range={value_range!r} must be a pair (lo, hi), such as (0.0, 1.0)") from error
    if not any(isinstance(end, jax.core.Tracer) for end in (lo, hi)) and not -math.inf < float(lo) < float(hi) < math.inf:
        raise GlcmError(f"value_range=({float(lo):g}, {float(hi):g}) must be finite, the first below the second; a constant image has no range")
    return lo, hi


def check_float(x, function: str) -> Array:
    """As `checks.check_float`, with half precision made float32, which can count."""
    x = checks.check_float(x, function)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def level_coordinate(x: Array, levels: int, lo, hi) -> Array:
    """Position of each value in level widths, 0 at `lo` and `levels` at `hi`; values outside are clamped. Level k has its centre at k + 1/2."""
    lo, hi = jnp.asarray(lo, x.dtype), jnp.asarray(hi, x.dtype)
    return jnp.clip((jnp.clip(x, lo, hi) - lo) * (levels / (hi - lo)), 0, levels)


def windowed(v: Float[Array, "*s"], m: Membership) -> tuple[Int[Array, "*s"], Float[Array, "*s n"]]:
    """First level and weights of the `m.count` levels which a value touches, from its level coordinate. The weights sum to one."""
    if m.kind == "hard":
        start = jnp.clip(jnp.floor(v), 0, m.levels - 1)
        return start.astype(jnp.int32), jnp.ones((*v.shape, 1), v.dtype)
    start = jax.lax.stop_gradient(jnp.clip(jnp.floor(v - (m.count - 1) / 2), 0, m.levels - m.count))
    sharpness = jnp.asarray(m.sharpness, v.dtype)
    if m.kind == "triangular":
        # Below the first and above the last centre a value belongs to that level alone.
        upper = jnp.clip((v - start - 1) * sharpness + 0.5, 0, 1)
        return start.astype(jnp.int32), jnp.stack([1 - upper, upper], -1)
    return start.astype(jnp.int32), _sigmoid_weights(v, start, sharpness, m)


def _sigmoid_weights(v: Array, start: Array, sharpness: Array, m: Membership) -> Array:
    """The mass above an edge e is s(v - e), plus what the mirror image at the lower end sends above it, less what the one at the upper end
    takes back; weights are its differences. All arguments are distances from the window's start: 256 levels leave float32 few digits."""
    local, first = (v - start)[..., None], start[..., None]
    edge = jnp.arange(m.count + 1, dtype=v.dtype)
    sigmoid = jax.nn.sigmoid
    above = sigmoid(sharpness * (local - edge))
    above += sigmoid(-sharpness * (local + 2 * first + edge)) - sigmoid(-sharpness * (2 * (m.levels - first) - local - edge))
    return above[..., :-1] - above[..., 1:]


def dense(v: Float[Array, "*s"], m: Membership) -> Float[Array, "*s l"]:
    """Weights in every level, from the level coordinate; equal to `windowed` with the rest filled in."""
    if m.kind == "hard":
        return jax.nn.one_hot(jnp.clip(jnp.floor(v), 0, m.levels - 1).astype(jnp.int32), m.levels, dtype=v.dtype)
    sharpness = jnp.asarray(m.sharpness, v.dtype)
    if m.kind == "sigmoid":
        return _sigmoid_weights(v, jnp.zeros_like(v), sharpness, m._replace(count=m.levels))
    distance = jnp.clip(v - 0.5, 0, m.levels - 1)[..., None] - jnp.arange(m.levels, dtype=v.dtype)
    return jnp.clip((0.5 - jnp.abs(distance)) * sharpness + 0.5, 0, 1)
