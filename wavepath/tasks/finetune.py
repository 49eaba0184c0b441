"""Fine-tuning a pretrained encoder on labelled tiles, one fold of a cross-validation by patient.

    uint8 batch -> crop, flips -> RandAugment -> normalise -> erase a box -> encoder -> mean of patch tokens -> norm -> head -> cross-entropy

Layer-wise decay of the learning rate, drop path, label smoothing; no mixup, no cutmix. `config.init_from` names the pretraining run whose
encoder starts this one; norm and head are fresh. The loop evaluates on the held-out fold and nothing is chosen by it: the last checkpoint is
the one that `wavepath evaluate --runs` scores. (Picking the best epoch by the test fold, as published scripts do, reports a maximum of
noise.)

Source: METHODS 2.5.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wavepath.console import say
from wavepath.errors import ConfigError
from wavepath.models.classifier import POOLS, Classifier
from wavepath.models.vit import vit_flops
from wavepath.ops.augment import augment_batch, center
from wavepath.ops.randaugment import MAX, rand_augment, random_erasing
from wavepath.ops.random import example_keys, named
from wavepath.tasks import lineage
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State
from wavepath.tasks.encoder import ENCODER, encoder_dtype, encoder_form, encoder_size, take_encoder
from wavepath.tasks.optim import TOKENS, decayed, layer_scales, make_optimizer
from wavepath.tasks.single import SingleNetwork

NETWORK = "classifier"
OUTPUTS = ("logits", "probability", "cls", "mean", "input")


class FineTuning(SingleNetwork):
    """The task `finetune`. Outputs of `predict`: `logits`, `probability` [b, k], `cls`, `mean` (features), `input` (a picture in [0, 1])."""

    networks = (NETWORK,)
    embeds = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.check_accumulation()
        self.size, self.form = encoder_size(config.model), encoder_form(config.model)
        self.dtype = encoder_dtype(config.model.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self._check()
        depth, decay = self.size.depth, float(config.finetune.layer_decay)
        self.tx, self.rate = make_optimizer(
            config.optim, config.lr, config.train.steps, config.batch_size,
            scales=(lambda params: layer_scales(params, depth, decay)) if decay != 1 else None, decays=_decayed,
        )

    # The data ------------------------------------------------------------------------------------------------------------------------

    def sources(self) -> Any:
        """The training part of the fold; its `held_out` is the fold."""
        from wavepath.data.labelled import open_labelled, split

        data = self.config.data
        return split(open_labelled(self.config), data.folds, data.fold, data.fold_seed)

    def held_out(self, source: Any) -> Any:
        """The held-out fold.

        Raises:
            ConfigError: labels or folds are not those that the run began with.
        """
        now = self.measure(source)
        # Slides may be called otherwise where data has moved; the labels' checksum tells whether it is the same.
        changed = [name for name in now if name != lineage.KEY and self.constants.get(name, now[name]) != now[name]]
        if changed:
            raise ConfigError(
                f"the labels are not those that the run began with ({', '.join(changed)} of its constants.json differ); restore them, or give a"
                " new --workdir"
            )
        return source.held_out

    def measure(self, source: Any) -> dict[str, Any]:
        """Class names in the order of the outputs, tiles of each class in both parts, the held-out cases, a checksum of all labels and cases, and
        the slides of the training part."""
        held = source.held_out
        return {
            "classes": list(source.classes), "training_tiles": source.counts(), "held_out_tiles": held.counts(),
            "held_out_cases": np.unique(held.cases).tolist(), "labels": source.whole, lineage.KEY: lineage.slides_of(source),
        }

    @property
    def classes(self) -> int:
        """Number of outputs: as many as the labels have named, or `config.finetune.classes` where the data has not been opened.

        Raises:
            ConfigError: neither is known, or they differ.
        """
        found, asked = len(self.constants.get("classes", ())), self.config.finetune.classes
        if not found and not asked:
            raise ConfigError("the number of classes is not known before the labels are read; give it as config.finetune.classes")
        if found and asked and found != asked:
            listed = ", ".join(self.constants["classes"])
            raise ConfigError(f"config.finetune.classes={asked}, but the labels name {found} ({listed}); 0 takes them as they are")
        return found or asked

    # The network ---------------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Classifier:
        """Built when it is asked for: the labels decide its width."""
        model = self.config.model
        return Classifier(
            *self.size, self.classes, patch=model.patch, pool=self.config.finetune.pool, drop_path=model.drop_path, attention=model.attention,
            scan=model.scan, remat=model.remat, dtype=self.dtype, param_dtype=self.param_dtype, form=self.form,
        )

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, side = self.config.batch_size, self.config.prepare.tiles.size
        shape = jax.ShapeDtypeStruct
        return {
            "image": shape((b, side, side, 3), jnp.uint8), "example_id": shape((b,), jnp.int32), "epoch": shape((b,), jnp.int32),
            "position": shape((b,), jnp.uint32), "label": shape((b,), jnp.int32),
        }

    def init(self, rng: Array) -> State:
        side = self.config.model.image_size
        params = self.model.init(rng, jnp.zeros((1, side, side, 3), self.param_dtype))["params"]
        return self.fresh(params)

    def load(self, state: State, params: Mapping[str, Any]) -> State:
        """Takes the encoder of whatever network has one; the norm before the head and the head stay fresh.

        Raises:
            CheckpointError: no encoder there, or one of another shape (named).
        """
        own = state.params[NETWORK]
        origin, encoder = take_encoder(own[ENCODER], params)
        leaves = jax.tree.leaves(encoder)
        say(
            f"encoder of {origin!r}: {len(leaves)} arrays, {sum(leaf.size for leaf in leaves) / 1e6:.3g} M parameters loaded; "
            f"fresh: {', '.join(sorted(set(own) - {ENCODER}))}"
        )
        merged = {**own, ENCODER: encoder}
        ema = {NETWORK: jax.tree.map(jnp.copy, merged)} if state.ema else {}
        return state.replace(params={NETWORK: merged}, ema=ema)

    # Training ------------------------------------------------------------------------------------------------------------------------

    def loss(self, params: Any, batch: Batch, step: Any = 0) -> tuple[Array, Metrics]:
        """Mean smoothed cross-entropy of augmented views, and loss and accuracy as sums and counts."""
        keys = example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        logits, _ = self.model.apply({"params": params}, self.views(batch["image"], keys), named(keys, "drop_path"))
        each = smoothed_cross_entropy(logits, batch["label"], self.config.finetune.label_smoothing)
        return each.mean(), {"loss": pairs.pair(each), "accuracy": pairs.pair(_hits(logits, batch["label"]))}

    def views(self, images: Array, keys: Array) -> Array:
        """Augmented, normalised views [b, s, s, 3] of uint8 tiles."""
        settings, size = self.config.finetune, self.config.model.image_size
        x = augment_batch(images, named(keys, "augment"), self.config.augment, size, self.param_dtype)
        x = rand_augment(
            x, keys, ops=settings.rand_ops, magnitude=settings.rand_magnitude, std=settings.rand_std, probability=settings.rand_probability,
            fill=tuple(self.config.model.mean),
        )
        return random_erasing(self.normalise(x), keys, settings.erasing)

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """Cross-entropy (not smoothed) and accuracy of central views."""
        logits, _ = self._forward(state, batch)
        each = smoothed_cross_entropy(logits, batch["label"], 0.0)
        mask = batch.get("mask")
        return {"loss": pairs.pair(each, mask), "accuracy": pairs.pair(_hits(logits, batch["label"]), mask)}

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Class probabilities and features of central views; averaged parameters where kept.

        Args:
            state: of this task.
            batch: `image` uint8 [b, h, w, 3]; no labels are needed.
            names: of `logits`, `probability`, `cls` (class token), `mean` (what the head sees where the pool is `mean`), `input`; None: all.
        """
        names = set(OUTPUTS if names is None else names)
        if unknown := names - set(OUTPUTS):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {OUTPUTS}")
        result: dict[str, Array] = {}
        if names - {"input"}:
            logits, out = self._forward(state, batch)
            mean = out["pooled"] if self.config.finetune.pool == "mean" else out["mean"]
            result = {"logits": logits, "probability": jax.nn.softmax(logits), "cls": out["cls"], "mean": mean}
        if "input" in names:
            result["input"] = center(batch["image"], self.config.model.image_size)
        return {name: result[name].astype(jnp.float32) for name in OUTPUTS if name in names}

    def _forward(self, state: State, batch: Batch) -> tuple[Array, dict[str, Any]]:
        images = self.normalise(center(batch["image"], self.config.model.image_size, self.param_dtype))
        return self.model.apply({"params": self.kept(state)}, images)

    def flops(self) -> float:
        """A backward pass counts twice a forward pass; the head's share is not worth counting."""
        patches = (self.config.model.image_size // self.config.model.patch) ** 2
        return 3.0 * vit_flops(patches, self.size, self.config.model.patch, form=self.form)

    def _check(self) -> None:
        model, settings = self.config.model, self.config.finetune
        for problem, message in (
            (model.image_size % model.patch, f"config.model.patch={model.patch} does not divide config.model.image_size={model.image_size}"),
            (not 0 <= model.drop_path < 1, f"config.model.drop_path={model.drop_path} must be at least 0 and below 1"),
            (not 0 <= self.config.ema < 1, f"config.ema={self.config.ema} must be at least 0 and below 1"),
            (settings.pool not in POOLS, f"config.finetune.pool={settings.pool!r} is unknown; choose one of {', '.join(POOLS)}"),
            (not 0 < settings.layer_decay <= 1, f"config.finetune.layer_decay={settings.layer_decay} must be above 0 and at most 1"),
            (not 0 <= settings.label_smoothing < 1, f"config.finetune.label_smoothing={settings.label_smoothing} must be at least 0 and below 1"),
            (not 0 <= settings.erasing <= 1, f"config.finetune.erasing={settings.erasing} is a share of 0 to 1"),
            (not 0 <= settings.rand_probability <= 1, f"config.finetune.rand_probability={settings.rand_probability} is a share of 0 to 1"),
            (not 0 <= settings.rand_magnitude <= MAX, f"config.finetune.rand_magnitude={settings.rand_magnitude} must be 0 to {MAX:g}"),
            (settings.rand_ops < 0 or settings.rand_std < 0, "config.finetune.rand_ops and config.finetune.rand_std must not be negative"),
            (settings.classes < 0 or settings.classes == 1, f"config.finetune.classes={settings.classes} must be 0 (from the labels) or at least 2"),
        ):
            if problem:
                raise ConfigError(message)


def smoothed_cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
    """`-(1 - s) log p[label] - s mean_k log p[k]` of each example [b].

    Args:
        logits: [b, k].
        labels: int [b].
        smoothing: s, in [0, 1).
    """
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, labels[:, None], axis=1)[:, 0]
    return -(1 - smoothing) * own - smoothing * logs.mean(axis=1)


def _hits(logits: Array, labels: Array) -> Array:
    return (logits.argmax(axis=1) == labels).astype(logits.dtype)


def _decayed(params: Any) -> Any:
    """As `decayed`, and neither learned tokens nor positions (METHODS 2.5's recipe names them)."""

    def one(path: tuple, decays: bool) -> bool:
        return decays and str(getattr(path[-1], "key", "")) not in TOKENS

    return jax.tree_util.tree_map_with_path(one, decayed(params))
