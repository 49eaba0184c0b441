"""A linear layer on cached features, trained by AdamW with early stopping (METHODS 5.2, as kaiko's eva): several runs at once, on the device.

Each run draws its own initial weights, validation cases and order of tiles from its seed and number, so a run does not depend on how many there are.
Shapes are the same for all folds of a cross-validation (the whole table goes to the device, folds are places in it), so it compiles once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

EVERY = 125  # steps between two looks at the validation accuracy
_VALIDATION = 5  # one case of so many validates
_DRAWS = 20


@dataclass(frozen=True)
class LinearProbe:
    """Settings. Rate, batch, steps and patience are METHODS 5.2's; the decay is AdamW's usual one, where the source says nothing.

    Attributes:
        rate: of AdamW, constant. decay: decoupled weight decay.
        batch: tiles in a step; of fewer tiles the largest power of two that they fill (then folds share one compiled shape).
        steps: at most. patience: steps without a better validation accuracy that end a run, whose best weights are kept (of equal ones the last);
            0: all steps are taken, and no case is kept for validation.
        runs: mean and deviation are reported of.
    """

    rate: float = 3e-4
    decay: float = 0.01
    batch: int = 256
    steps: int = 12_500
    patience: int = 1_250
    runs: int = 5


class _State(NamedTuple):
    weights: dict[str, Array]
    opt: Any
    best: dict[str, Array]


def fit_predict(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], groups: np.ndarray, train: Int[np.ndarray, " t"], test: Int[np.ndarray, " m"],
    classes: int, seed: int = 0, settings: LinearProbe = LinearProbe(),
) -> Float[np.ndarray, "runs m classes"]:
    """Class probabilities of the test rows by each run.

    Features are standardised by the training rows, so that the rate means the same for encoders of any scale.

    Args:
        features: all rows. labels: in 0..classes-1. groups: str[n], the case of each row; validation is by case.
        train, test: places of the rows.
        seed: of all runs; each has its number beside it.

    Returns:
        Softmax of the logits, float64.
    """
    mean, std = features[train].mean(0), features[train].std(0)
    std = np.where(std < 1e-6 * max(1e-12, float(std.max(initial=0))), 1.0, std)
    x, y = jnp.asarray((features - mean) / std, jnp.float32), jnp.asarray(labels, jnp.int32)
    learnt, held = _parts(labels, groups, train, seed, settings)
    optimizer = _optimizer(settings.rate, settings.decay)
    batch = settings.batch if len(train) >= settings.batch else 1 << (len(train).bit_length() - 1)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), run) for run in range(settings.runs)])
    state = _fresh(keys, x.shape[1], classes, optimizer)
    best, since = np.full(settings.runs, -1.0), np.zeros(settings.runs, int)
    done = 0
    while done < settings.steps and (not settings.patience or (since < settings.patience).any()):
        count = min(EVERY, settings.steps - done)
        order = np.stack([_order(rows, done * batch, count * batch, (seed, run)) for run, rows in enumerate(learnt)])
        state, accuracy = _advance(state, x, y, held, order.reshape(settings.runs, count, batch), optimizer)
        done += count
        # A run that has ended stays ended, whatever the others' further steps would have brought it. Of equal accuracies the later weights are kept:
        # a few validation cases are told apart long before the weights are what they will be.
        on = since < settings.patience if settings.patience else np.ones(settings.runs, bool)
        better = np.asarray(accuracy) > best
        kept = on & (better | (np.asarray(accuracy) == best)) if settings.patience else on
        best = np.where(on & better, np.asarray(accuracy), best)
        since = np.where(on & better, 0, since + count)
        state = state._replace(best=_choose(kept, state.weights, state.best))
    logits = jnp.einsum("md,rdc->rmc", x[test], state.best["w"]) + state.best["b"][:, None]
    return np.asarray(jax.nn.softmax(logits, -1), np.float64)


@functools.cache  # one object for all folds: a compiled step is found again by it
def _optimizer(rate: float, decay: float) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=decay)


def _parts(
    labels: np.ndarray, groups: np.ndarray, train: np.ndarray, seed: int, settings: LinearProbe
) -> tuple[list[np.ndarray], Bool[Array, "runs n"]]:
    """Of each run the rows that it learns from, and a mask of those that validate: a fifth of the training cases, drawn anew for each run, of every
    class if a few draws find one.

    Where the cases do not allow it (one alone, or a class that would be left without one), a fifth of the tiles is drawn, of whatever case.
    """
    held = np.zeros((settings.runs, len(labels)), bool)
    learnt = []
    for run in range(settings.runs):
        if settings.patience and len(train) > 1:
            held[run, _validation(labels[train], groups[train], train, (seed, run))] = True
        learnt.append(train[~held[run, train]])
    return learnt, jnp.asarray(held)


def _validation(labels: np.ndarray, groups: np.ndarray, train: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    cases, kinds = np.unique(groups), len(np.unique(labels))
    best = None
    for _ in range(_DRAWS if len(cases) > 1 else 0):
        held = np.isin(groups, rng.permutation(cases)[: max(1, len(cases) // _VALIDATION)])
        if len(np.unique(labels[~held])) == kinds:
            best = train[held] if best is None else best
            if len(np.unique(labels[held])) == kinds:
                return train[held]
    return rng.permutation(train)[: max(1, len(train) // _VALIDATION)] if best is None else best


def _order(rows: np.ndarray, start: int, count: int, seed: Sequence[int]) -> Int[np.ndarray, " count"]:
    """Rows at the positions `start..start+count-1` of a run: one shuffle after the other, each a pure function of seed and epoch."""
    size = len(rows)
    first, last = start // size, (start + count - 1) // size
    shuffles = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(rows) for epoch in range(first, last + 1)])
    return shuffles[start - first * size :][:count].astype(np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fresh(keys: Array, width: int, classes: int, optimizer: optax.GradientTransformation) -> _State:
    bound = width**-0.5  # as torch.nn.Linear

    def one(key: Array) -> _State:
        first, second = jax.random.split(key)
        weights = {
            "w": jax.random.uniform(first, (width, classes), minval=-bound, maxval=bound),
            "b": jax.random.uniform(second, (classes,), minval=-bound, maxval=bound),
        }
        return _State(weights, optimizer.init(weights), weights)

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnums=5)
def _advance(
    state: _State, x: Float[Array, "n d"], y: Int[Array, " n"], held: Bool[Array, "runs n"], order: Int[Array, "runs steps batch"],
    optimizer: optax.GradientTransformation,
) -> tuple[_State, Float[Array, " runs"]]:
    """All runs, so many steps on; and their accuracy on the rows that validate."""

    def loss(weights: dict[str, Array], rows: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(x[rows] @ weights["w"] + weights["b"], y[rows]).mean()

    def one(state: _State, held: Array, order: Array) -> tuple[_State, Array]:
        def step(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], None]:
            weights, opt = carry
            updates, opt = optimizer.update(jax.grad(loss)(weights, rows), opt, weights)
            return (optax.apply_updates(weights, updates), opt), None

        (weights, opt), _ = jax.lax.scan(step, (state.weights, state.opt), order)
        right = (x @ weights["w"] + weights["b"]).argmax(-1) == y
        return state._replace(weights=weights, opt=opt), (right & held).sum() / jnp.maximum(held.sum(), 1)

    return jax.vmap(one)(state, held, order)


@jax.jit
def _choose(better: Bool[Array, " runs"], new: dict[str, Array], old: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda a, b: jnp.where(jnp.reshape(better, (-1,) + (1,) * (a.ndim - 1)), a, b), new, old)
