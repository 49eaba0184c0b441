"""The part of a task that all tasks of one network and one loss share: their State and their update."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from wavepath.ops import collectives
from wavepath.tasks import metrics as pairs
from wavepath.tasks.accumulate import value_and_grad
from wavepath.tasks.base import Batch, Metrics, State, Task
from wavepath.tasks.optim import ema_update


class SingleNetwork(Task):
    """One network, trained by the gradient of one loss.

    Subclasses set `networks` (one name), `tx`, `rate` and `param_dtype`, and define `loss(params, batch, step) -> (mean, sums and counts)`.
    """

    tx: optax.GradientTransformation
    rate: optax.Schedule
    param_dtype: Any

    def loss(self, params: Any, batch: Batch, step: Any = 0) -> tuple[Array, Metrics]:
        """Mean loss of a batch, differentiable by `params`, and metrics."""
        raise NotImplementedError

    def given(self, state: State) -> dict[str, Any]:
        """What `loss` is told of the State beside the parameters."""
        return {"step": state.step}

    def fresh(self, params: Any) -> State:
        """The State before the first step."""
        (name,) = self.networks
        ema = {name: jax.tree.map(jnp.copy, params)} if self.config.ema > 0 else {}
        return State(step=jnp.zeros((), jnp.int32), params={name: params}, opt={name: self.tx.init(params)}, ema=ema)

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        (name,) = self.networks
        params = state.params[name]
        _, sums, grads = value_and_grad(partial(self.loss, **self.given(state)), params, dict(batch), self.config.optim.accumulate)
        grads = collectives.pmean(grads)
        updates, opt = self.tx.update(grads, state.opt[name], params)
        params = optax.apply_updates(params, updates)
        ema = {name: ema_update(state.ema[name], params, self.config.ema)} if state.ema else {}
        sums["grad_norm"] = pairs.constant(optax.global_norm(grads))
        sums["lr"] = pairs.constant(self.rate(state.step))
        return state.replace(step=state.step + 1, params={name: params}, opt={name: opt}, ema=ema), sums

    def kept(self, state: State) -> Any:
        """The parameters that evaluation uses: the averaged ones where they are kept."""
        (name,) = self.networks
        return (state.ema or state.params)[name]

    def normalise(self, images: Array) -> Array:
        """[0, 1] to the model's mean and deviation."""
        mean, std = (np.asarray(self.config.model[name], self.param_dtype) for name in ("mean", "std"))
        return (images - mean) / std
