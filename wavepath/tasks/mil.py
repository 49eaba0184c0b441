"""Slides classified from the features of their tiles, under weak supervision: one label for each bag.

    features [b, n, d], tiles [b, n] -> ABMIL, CLAM, TransMIL or pooling -> logits, attention -> cross-entropy of the bag, and CLAM's loss on tiles

The bag's cross-entropy is weighted by class, so that rare classes count as much as common ones (CLAM draws slides by class instead: the same in
expectation). Dropout is keyed by slide and epoch, so it does not depend on devices, on the other slides of a batch or on the size that a bag is
padded to. The loop evaluates the validation part of the split and may stop by it (`train.patience`); nothing is chosen by the test part, which
`wavepath evaluate --mil` scores.

Folds and seeds of a cross-validation share their compiled programs: class weights come with the batch, and the seed of the dropout, drawn from the
run's, is part of the State.

Not as published: TransMIL's Lookahead-RAdam is Adam here.

Source: METHODS 5.3 to 5.5.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wavepath.errors import ConfigError
from wavepath.models.mil import ABMIL, CLAM, PooledMIL, instance_loss
from wavepath.models.transmil import TransMIL
from wavepath.ops.random import example_keys, named
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State
from wavepath.tasks.optim import make_optimizer
from wavepath.tasks.single import SingleNetwork

NETWORK = "mil"
NETWORKS = ("abmil", "abmil_plain", "clam_sb", "clam_mb", "transmil", "mean", "max")
OUTPUTS = ("logits", "probability", "attention", "class_attention")
WEIGHTS = ("balanced", "none")
# Width of the first layer, width inside the attention, dropout: as published. 0: none. `transmil` has no attention of that kind.
_OWN = {
    "abmil": (128, 128, 0.0), "abmil_plain": (128, 128, 0.0), "clam_sb": (512, 256, 0.25), "clam_mb": (512, 256, 0.25), "transmil": (512, 0, 0.1),
    "mean": (0, 0, 0.25), "max": (0, 0, 0.25),
}  # fmt: skip
_INIT_TILES = 4  # parameters do not depend on the number of tiles


class MultipleInstance(SingleNetwork):
    """The task `mil`. Outputs of `predict`: `logits`, `probability` [b, c], `attention` [b, n] and, of `clam_mb`, `class_attention` [b, c, n].

    `attention` is not negative, sums to 1 over a bag's tiles and is 0 on padding. Of `clam_mb`, which has one for each class, it is that of the class
    that the bag is given; `class_attention` has all.
    """

    networks = (NETWORK,)
    validates = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.check_accumulation()
        self._check()
        self.settings = config.mil
        self.dtype = jnp.dtype(config.model.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self.tx, self.rate = make_optimizer(config.optim, config.lr, config.train.steps, config.batch_size)

    # The data ------------------------------------------------------------------------------------------------------------------------

    def sources(self) -> Any:
        """The training part of the split, a `BagSource`; its `held_out` is the validation part and `test` the test part."""
        from wavepath.data.bag_splits import bag_split, parts
        from wavepath.data.bags import open_bags

        source = open_bags(self.config)
        train = parts(source, bag_split(source, self.config))
        for part in (train, train.held_out, train.test):
            part.weights = tuple(class_weights(list(train.counts().values()), self.settings.class_weights))
        return train

    def pipeline(self) -> Any:
        from wavepath.data import bag_batches

        return bag_batches

    def held_out(self, source: Any) -> Any:
        """The validation part; without one the test part (nothing is chosen by it), and of a split without either the training part.

        Raises:
            ConfigError: the slides, labels or split are not those that the run began with; or early stopping without a validation part.
        """
        now = self.measure(source)
        changed = [name for name in now if self.constants.get(name, now[name]) != now[name]]
        if changed:
            raise ConfigError(
                f"the slides or their labels are not those that the run began with ({', '.join(changed)} of its constants.json differ); restore"
                " them, or give a new --workdir"
            )
        if self.config.train.patience and not len(source.held_out):
            raise ConfigError(
                f"config.train.patience={self.config.train.patience} needs a validation part, and {source.split} has none; set"
                " config.mil.validation=0.1 (or a column val in the table of splits), or config.train.patience=0"
            )
        return next(part for part in (source.held_out, source.test, source) if part is not None and len(part))

    def measure(self, source: Any) -> dict[str, Any]:
        """What a run keeps of its bags: `classes` in the order of the outputs; `width`, `encoder` and `column` of the features; tiles of the
        `longest`; training `counts` and `class_weights` by class; `split`: its name and the slides of each part; `labels`: checksums.
        """
        sides = {"train": source, "validation": source.held_out, "test": source.test}
        return {
            "classes": list(source.classes), "width": source.width, "encoder": list(source.encoder), "column": source.column,
            "longest": int(max(side.lengths.max() for side in sides.values() if len(side))), "mean_tiles": round(float(source.lengths.mean()), 1),
            "counts": source.counts(), "class_weights": list(source.weights),
            "split": {"name": source.split} | {name: list(side.slides) for name, side in sides.items()},
            "cases": sorted({str(case) for side in (source, source.held_out) for case in side.cases}),  # that it learns from
            "labels": [side.digest() for side in sides.values()], "train_slides": sorted([*source.slides, *source.held_out.slides]),
        }  # fmt: skip

    @property
    def classes(self) -> int:
        """Number of outputs: as many as the labels have named, or `config.mil.classes` where the data has not been opened.

        Raises:
            ConfigError: neither is known, or they differ.
        """
        return self._known("classes", len(self.constants.get("classes", ())), self.settings.classes)

    @property
    def width(self) -> int:
        """Of the features; likewise, or `config.mil.features`."""
        return self._known("features", int(self.constants.get("width", 0)), self.settings.features)

    def _known(self, name: str, found: int, asked: int) -> int:
        if not found and not asked:
            raise ConfigError(f"the number of {name} is not known before the bags are opened; give it as config.mil.{name}")
        if found and asked and found != asked:
            raise ConfigError(f"config.mil.{name}={asked}, but the data have {found}; 0 takes them as they are")
        return found or asked

    # The network ---------------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """Built when it is asked for: the labels decide its width."""
        name, settings = self.settings.network, self.settings
        embed, hidden, dropout = _OWN[name]
        embed = embed if settings.embed == 0 else max(settings.embed, 0)
        hidden = settings.hidden or hidden
        common = dict(dropout=dropout if settings.dropout < 0 else settings.dropout, dtype=self.dtype, param_dtype=self.param_dtype)
        if name in ("abmil", "abmil_plain"):
            return ABMIL(self.classes, embed, hidden, gated=name == "abmil", **common)
        if name in ("clam_sb", "clam_mb"):
            return CLAM(self.classes, multi_branch=name == "clam_mb", width=embed, hidden=hidden, **common)
        if name == "transmil":
            return TransMIL(self.classes, embed, settings.heads, settings.head_width, settings.landmarks, **common)
        return PooledMIL(self.classes, name, embed, **common)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the largest bucket that training meets: of the longest bag, or of `config.mil.max_tiles`."""
        from wavepath.data.bag_batches import bucket

        longest, most = int(self.constants.get("longest", 0)), int(self.settings.max_tiles)
        if not longest and not most:
            raise ConfigError("the number of tiles in a bag is not known before the bags are opened; give config.mil.max_tiles")
        b, n = self.config.batch_size, bucket(min(filter(None, (longest, most))), self.settings.buckets)
        shape = jax.ShapeDtypeStruct
        return {
            "features": shape((b, n, self.width), jnp.float32), "tiles": shape((b, n), jnp.bool_), "label": shape((b,), jnp.int32),
            "weight": shape((b,), jnp.float32), "example_id": shape((b,), jnp.int32), "epoch": shape((b,), jnp.int32),
            "position": shape((b,), jnp.uint32),
        }  # fmt: skip

    def init(self, rng: Array) -> State:
        one = jnp.zeros((1, _INIT_TILES, self.width), self.param_dtype)
        state = self.fresh(self.model.init(rng, one, jnp.ones((1, _INIT_TILES), bool))["params"])
        return state.replace(extra={"dropout": jax.random.bits(named(rng, "dropout"))})

    # Training ------------------------------------------------------------------------------------------------------------------------

    def given(self, state: State) -> dict[str, Any]:
        return {"seed": state.extra["dropout"]}

    def loss(self, params: Any, batch: Batch, seed: Any = 0) -> tuple[Array, Metrics]:
        """`seed` keys the dropout, with slide and epoch."""
        keys = example_keys(seed, batch["example_id"], batch["epoch"])
        model, features, tiles = self.model, jnp.asarray(batch["features"], self.param_dtype), jnp.asarray(batch["tiles"])

        def one(features: Array, tiles: Array, key: Array) -> dict[str, Array]:
            out = model.apply({"params": params}, features[None], tiles[None], train=True, rngs={"dropout": key})
            return {name: value[0] for name, value in out.items()}

        # Bag by bag: a draw for a batch would depend on what else is in it.
        out = jax.vmap(one)(features, tiles, keys) if model.dropout else model.apply({"params": params}, features, tiles)
        bag, instance, hits = self._terms(out, batch)
        total = bag if instance is None else self.settings.bag_weight * bag + self.settings.inst_weight * instance
        found = {"loss": total, "accuracy": hits} | ({} if instance is None else {"bag_loss": bag, "instance_loss": instance})
        return total.mean(), {name: pairs.pair(value) for name, value in found.items()}

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """`loss` is the bag's alone, weighted by class as in training: what early stopping goes by (METHODS 5.4)."""
        bag, instance, hits = self._terms(self._forward(state, batch), batch)
        found = {"loss": bag, "accuracy": hits} | ({} if instance is None else {"instance_loss": instance})
        return {name: pairs.pair(value, batch.get("mask")) for name, value in found.items()}

    def _terms(self, out: dict[str, Array], batch: Batch) -> tuple[Array, Array | None, Array]:
        """Weighted cross-entropy [b], CLAM's loss on tiles [b] (None of the other networks), and whether the class is right [b]."""
        settings, labels = self.settings, batch["label"]
        logs = jax.nn.log_softmax(out["logits"])
        bag = -batch["weight"].astype(logs.dtype) * jnp.take_along_axis(logs, labels[:, None], axis=1)[:, 0]
        instance = None
        if "instance_logits" in out:
            instance = instance_loss(
                out["instance_logits"], labels, out["attention"], batch["tiles"], top=settings.inst_tiles, subtyping=settings.subtyping,
                margin=settings.inst_margin,
            )  # fmt: skip
        return bag, instance, (out["logits"].argmax(axis=1) == labels).astype(logs.dtype)

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Class probabilities and attention of bags.

        Args:
            state: of this task.
            batch: `features` [b, n, d], `tiles` bool [b, n]; no labels are needed.
            names: of `logits`, `probability`, `attention`, `class_attention` (where there is one); None: all.
        """
        names = set(OUTPUTS if names is None else names)
        if unknown := names - set(OUTPUTS):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {OUTPUTS}")
        out = self._forward(state, batch)
        logits, attention = out["logits"], out["attention"]
        result = {"logits": logits, "probability": jax.nn.softmax(logits), "attention": attention}
        if attention.ndim == 3:
            chosen = logits.argmax(axis=1)[:, None, None]
            result |= {"attention": jnp.take_along_axis(attention, chosen, axis=1)[:, 0], "class_attention": attention}
        return {name: value.astype(jnp.float32) for name, value in result.items() if name in names}

    def _forward(self, state: State, batch: Batch) -> dict[str, Array]:
        return self.model.apply({"params": self.kept(state)}, jnp.asarray(batch["features"], self.param_dtype), jnp.asarray(batch["tiles"]))

    def flops(self) -> float:
        """Three times a forward pass over a bag of mean length: products with weights alone, twice their number for each tile; of `transmil` the
        attention too.
        """
        tiles = float(self.constants.get("mean_tiles") or self.settings.max_tiles or 1)
        kernels = jax.eval_shape(self.init, jax.random.key(0)).params[NETWORK]
        weights = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(kernels) if len(leaf.shape) == 2)
        extra = 0.0
        if self.settings.network == "transmil":
            # Two layers, each: landmarks to tokens and back, scores and values; six steps of four products for the pseudo-inverse.
            inner, marks = self.settings.heads * self.settings.head_width, self.settings.landmarks
            extra = 2 * (8.0 * tiles * marks * inner + 6 * 4 * 2.0 * self.settings.heads * marks**3)
        return 3.0 * (2.0 * tiles * weights + extra)

    def _check(self) -> None:
        model, settings = self.config.model, self.config.mil
        bare = ("clam_sb", "clam_mb", "transmil")
        for problem, message in (
            (settings.network not in NETWORKS, f"config.mil.network={settings.network!r} is unknown; choose one of {', '.join(NETWORKS)}"),
            (settings.class_weights not in WEIGHTS, f"config.mil.class_weights={settings.class_weights!r} is unknown; choose one of balanced, none"),
            (
                model.dtype not in ("float32", "bfloat16", "float16", "float64"),
                f"config.model.dtype={model.dtype!r} is unknown; choose float32 or bfloat16",
            ),
            (not 0 <= self.config.ema < 1, f"config.ema={self.config.ema} must be at least 0 and below 1"),
            (settings.dropout >= 1, f"config.mil.dropout={settings.dropout} must be below 1 (below 0: the network's own)"),
            (settings.embed < 0 and settings.network in bare, f"config.mil.embed={settings.embed}: {settings.network} needs its first layer; give 0"),
            (settings.hidden < 0, f"config.mil.hidden={settings.hidden} must not be negative"),
            (settings.max_tiles < 0, f"config.mil.max_tiles={settings.max_tiles} must not be negative"),
            (settings.inst_tiles < 1, f"config.mil.inst_tiles={settings.inst_tiles} must be at least 1"),
            (
                settings.bag_weight < 0 or settings.inst_weight < 0,
                f"config.mil.bag_weight={settings.bag_weight} and inst_weight={settings.inst_weight} must not be negative",
            ),
            (settings.classes < 0 or settings.classes == 1, f"config.mil.classes={settings.classes} must be 0 (from the labels) or at least 2"),
        ):
            if problem:
                raise ConfigError(message)


def class_weights(counts: list[int], how: str) -> list[float]:
    """Weights of the classes in the loss: `balanced`: slides over classes times slides of the class, whose mean over the slides is 1; `none`: 1 each.

    Args:
        counts: training slides of each class.
        how: one of `WEIGHTS`.
    """
    if how == "none":
        return [1.0] * len(counts)
    return [sum(counts) / (len(counts) * max(count, 1)) for count in counts]
