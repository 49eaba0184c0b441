"""A convolutional classifier of tiles, trained from noise: the network that says what restored images are worth for a diagnosis.

    uint8 batch -> window at the image's own pixels, flips, turns -> normalise -> ResNet with batch normalisation -> cross-entropy

Data, labels, folds and the held-out part are those of fine-tuning (`tasks/finetune.py`): a case is never on both sides. It is trained on images as
they are, and `wavepath evaluate --superres RUN --classifier RUN` shows it the held-out ones again as super-resolution restored them. So nothing is
resized on the way in: a smaller picture would hide the very detail that is asked about. Training takes a random window of `model.image_size` px with
the label of its image, evaluation all windows side by side, and the mean of their probabilities.

Batch statistics couple the examples of a batch, over all devices, so a batch is not accumulated from parts; running statistics are in `State.stats`.

Source: METHODS 4.7 and 4.8 (section IV-F of the paper: ResNet-50 on 128-px tiles).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from wavepath.errors import ConfigError
from wavepath.models.resnet import DEPTHS, ResNet, resnet_flops
from wavepath.ops import collectives
from wavepath.ops.augment import aligned_windows, center
from wavepath.ops.random import example_keys
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State, Task
from wavepath.tasks.finetune import FineTuning, smoothed_cross_entropy
from wavepath.tasks.optim import make_optimizer
from wavepath.tasks.single import SingleNetwork

NETWORK = "resnet"
OUTPUTS = ("logits", "probability", "mean", "input")
_LEAST = 32  # px: the network halves five times


class Classification(FineTuning):
    """The task `classify`. Outputs of `predict`: `logits`, `probability` [b, k], `mean` [b, d] (what the head sees), `input` (a picture)."""

    networks = (NETWORK,)
    coupled = True
    embeds = False  # a ResNet has no class token

    def __init__(self, config: Any):
        SingleNetwork.__init__(self, config)
        self.check_accumulation()
        self._check()
        self.dtype = jnp.dtype(config.model.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self.tx, self.rate = make_optimizer(config.optim, config.lr, config.train.steps, config.batch_size)

    @property
    def model(self) -> ResNet:
        """Built when it is asked for: the labels decide its width."""
        return ResNet(self.config.classify.depth, self.classes, dtype=self.dtype, param_dtype=self.param_dtype)

    def init(self, rng: Array) -> State:
        side = self.config.model.image_size
        variables = self.model.init(rng, jnp.zeros((1, side, side, 3), self.param_dtype))
        return self.fresh(variables["params"]).replace(stats={NETWORK: variables["batch_stats"]})

    def load(self, state: State, params: Mapping[str, Any]) -> State:
        """Starts from the parameters of another run of this task; running statistics start anew, and follow within some tens of steps."""
        return Task.load(self, state, params)

    # Training ------------------------------------------------------------------------------------------------------------------------

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        params = state.params[NETWORK]
        (_, (sums, stats)), grads = jax.value_and_grad(partial(self._loss, stats=state.stats[NETWORK], batch=batch), has_aux=True)(params)
        grads = collectives.pmean(grads)
        updates, opt = self.tx.update(grads, state.opt[NETWORK], params)
        params = optax.apply_updates(params, updates)
        sums["grad_norm"] = pairs.constant(optax.global_norm(grads))
        sums["lr"] = pairs.constant(self.rate(state.step))
        return state.replace(step=state.step + 1, params={NETWORK: params}, opt={NETWORK: opt}, stats={NETWORK: stats}), sums

    def _loss(self, params: Any, stats: Any, batch: Batch) -> tuple[Array, tuple[Metrics, Any]]:
        keys = example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        variables = {"params": params, "batch_stats": stats}
        (logits, _), moved = self.model.apply(variables, self.views(batch["image"], keys), True, mutable=["batch_stats"])
        each = smoothed_cross_entropy(logits, batch["label"], self.config.finetune.label_smoothing)
        hits = (logits.argmax(axis=1) == batch["label"]).astype(logits.dtype)
        return each.mean(), ({"loss": pairs.pair(each), "accuracy": pairs.pair(hits)}, moved["batch_stats"])

    def views(self, images: Array, keys: Array) -> Array:
        """Random windows [b, s, s, 3] of uint8 images, flipped and turned by the examples' keys, normalised."""
        side = self._side(images)
        return self.normalise(aligned_windows({"image": images}, keys, side, self.config.augment, dtype=self.param_dtype)["image"])

    def _side(self, images: Array) -> int:
        side = self.config.model.image_size
        if side > min(images.shape[1:3]):
            raise ConfigError(
                f"config.model.image_size={side}, but the images have {images.shape[2]} x {images.shape[1]} px and are not enlarged; give at most"
                f" {min(images.shape[1:3])}"
            )
        return side

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Class probabilities of whole images, normalised by the running statistics.

        Args:
            state: of this task.
            batch: `image` uint8 [b, h, w, 3]; no labels are needed.
            names: of `logits` (here log-probabilities), `probability`, `mean`, `input`; None: all.
        """
        names = set(OUTPUTS if names is None else names)
        if unknown := names - set(OUTPUTS):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {OUTPUTS}")
        result: dict[str, Array] = {}
        if names - {"input"}:
            logits, out = self._forward(state, batch)
            result = {"logits": logits, "probability": jax.nn.softmax(logits), "mean": out["pooled"]}
        if "input" in names:
            result["input"] = center(batch["image"], self.config.model.image_size)
        return {name: result[name].astype(jnp.float32) for name in OUTPUTS if name in names}

    def _forward(self, state: State, batch: Batch) -> tuple[Array, dict[str, Any]]:
        """Log-probabilities averaged (as probabilities) over the windows of each image, and what the head sees, averaged likewise."""
        images = batch["image"]
        side = self._side(images)
        (b, height, width), (down, across) = images.shape[:3], (images.shape[1] // side, images.shape[2] // side)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        x = images[:, top : top + down * side, left : left + across * side].reshape(b, down, side, across, side, 3)
        x = self.normalise(x.swapaxes(2, 3).reshape(-1, side, side, 3).astype(self.param_dtype) / 255)
        logits, out = self.model.apply({"params": self.kept(state), "batch_stats": state.stats[NETWORK]}, x)
        each = jax.nn.log_softmax(logits).reshape(b, down * across, -1)
        mean = jax.nn.logsumexp(each, axis=1) - np.log(down * across)
        return mean, {"pooled": out["pooled"].reshape(b, down * across, -1).mean(axis=1)}

    def flops(self) -> float:
        """A backward pass counts twice a forward pass."""
        return 3.0 * resnet_flops(self.config.classify.depth, self.config.model.image_size, len(self.constants.get("classes", ())) or 2)

    def _check(self) -> None:
        model, settings, depth = self.config.model, self.config.finetune, self.config.classify.depth
        for problem, message in (
            (depth not in DEPTHS, f"config.classify.depth={depth} is unknown; choose one of {', '.join(map(str, DEPTHS))}"),
            (model.image_size < _LEAST, f"config.model.image_size={model.image_size} is too small for a ResNet; give at least {_LEAST}"),
            (model.dtype not in ("float32", "bfloat16", "float64"), f"config.model.dtype={model.dtype!r} is unknown; choose float32 or bfloat16"),
            (self.config.ema != 0, "config.ema must be 0: the running statistics of batch normalisation belong to parameters that are not averaged"),
            (not 0 <= settings.label_smoothing < 1, f"config.finetune.label_smoothing={settings.label_smoothing} must be at least 0 and below 1"),
            (settings.classes < 0 or settings.classes == 1, f"config.finetune.classes={settings.classes} must be 0 (from the labels) or at least 2"),
        ):
            if problem:
                raise ConfigError(message)
