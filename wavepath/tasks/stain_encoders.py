"""First stage of virtual staining: two encoders, of H&E and of the immunostain, that learn to agree on one tissue in two stains.

    windows he | ihc -> one random place, flips and turns -> E_HE, E_IHC -> unit embeddings q, k -> InfoNCE over the batch -> Adam

Row i of a batch is a pair; its negatives are the other rows, on all devices, and there is no memory of earlier ones. So a batch must not hold one
place twice: its order is a permutation of the windows, and only a batch that spans the end of an epoch may, which is rare enough to be left alone.
Windows of one pair may lie in one batch: where they overlap by much, choose `stain.margin` such that a window is the whole image.

Batch statistics and negatives couple the examples of a batch, so that it is not accumulated from parts. Of a run the second stage takes both networks
and their running statistics (`State.params`, `State.stats`).

Source: METHODS 3.2.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from wavepath.errors import ConfigError, DatasetError
from wavepath.models.stain_encoder import StainEncoder, check_sides, encoder_flops
from wavepath.models.stain_layers import NORMS, fresh_parameters
from wavepath.ops import collectives
from wavepath.ops.random import example_keys, named
from wavepath.ops.similarity import info_nce, unit
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State
from wavepath.tasks.optim import make_optimizer
from wavepath.tasks.paired import SIDES, PairTask

NETWORKS = SIDES
OUTPUTS = ("he", "ihc", "cosine", "input", "target")
PICTURES = {"input": "he", "target": "ihc"}  # output -> column of the batch
DTYPES = ("float32", "bfloat16", "float16", "float64")
_GROUPS = 32  # at most, of group normalisation (`stain_layers.Norm`)
LEAST, MULTIPLE = 16, 4  # px, of the sides of an image: the residual blocks reflect maps of a quarter of that


class StainEncoders(PairTask):
    """The task `stain_encoders`.

    Outputs of `predict`: `he`, `ihc` [b, d] (embeddings of length 1), `cosine` [b] (of each pair), `input`, `target` (pictures).
    """

    networks = NETWORKS

    def __init__(self, config: Any):
        super().__init__(config)
        self.settings = config.stain
        self.check_accumulation()
        self._check()
        self.crop = int(self.settings.crop)
        self.dtype = jnp.dtype(self.settings.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self.tx, self.rate = make_optimizer(config.optim, config.lr, config.train.steps, config.batch_size)

    def check_accumulation(self) -> None:
        """Refuses micro-batches: they have fewer negatives and other batch statistics than their batch."""
        if (parts := int(self.config.optim.accumulate)) > 1:
            raise ConfigError(
                f"config.optim.accumulate={parts} would change the loss of task {self.config.task!r}, whose negatives and batch statistics are of the"
                " whole batch; set config.optim.accumulate=1 and, for less memory, config.stain.remat=True, a smaller config.stain.crop or"
                " config.batch_size, or more devices"
            )
        super().check_accumulation()

    # The data ------------------------------------------------------------------------------------------------------------------------

    def measure(self, source: Any) -> dict[str, Any]:
        """`train_slides`, `mpp`: see `PairTask`.

        Raises:
            DatasetError: fewer windows than a batch has rows: each place would be among its own negatives.
        """
        if len(source) < self.config.batch_size:
            raise DatasetError(
                f"{source.name} has {len(source)} training windows, fewer than config.batch_size={self.config.batch_size}, so that a batch would show"
                " places twice, as negatives of themselves; lower config.batch_size, or get more windows with smaller config.stain.margin or crop"
            )
        return super().measure(source)

    # The networks --------------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> StainEncoder:
        """Of both sides; they share no parameter."""
        settings = self.settings
        return StainEncoder(
            settings.encoder_channels, settings.encoder_blocks, settings.encoder_norm, settings.remat, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def init(self, rng: Array) -> State:
        image = jax.ShapeDtypeStruct((1, self.crop, self.crop, 3), self.param_dtype)
        variables = {name: fresh_parameters(self.model, named(rng, name), image) for name in NETWORKS}
        return State(
            step=jnp.zeros((), jnp.int32),
            params={name: value["params"] for name, value in variables.items()},
            opt={name: self.tx.init(value["params"]) for name, value in variables.items()},
            stats={name: value.get("batch_stats", {}) for name, value in variables.items()},
        )

    def _embed(self, state: State, name: str, images: Array) -> Float[Array, "b d"]:
        """Unit embeddings as they are in use: normalised by the running statistics, each image by itself."""
        embedding, _ = self.model.apply({"params": state.params[name], "batch_stats": state.stats[name]}, images)
        return unit(embedding)

    # Training ------------------------------------------------------------------------------------------------------------------------

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update of both encoders; `config.optim.clip_norm` bounds the gradient of each."""
        keys = example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        views = self.views(batch, keys)

        def loss(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
            embeddings, stats = {}, {}
            for name in NETWORKS:
                variables = {"params": params[name], "batch_stats": state.stats[name]}
                (embeddings[name], _), moved = self.model.apply(variables, views[name], True, mutable=["batch_stats"])
                stats[name] = moved.get("batch_stats", {})
            he, ihc = embeddings["he"], embeddings["ihc"]
            each, hit = info_nce(he, ihc, self.settings.temperature, self.settings.symmetric)
            found = {"loss": pairs.pair(each), "accuracy": pairs.pair(hit), "cosine": pairs.pair(_cosine(unit(he), unit(ihc)))}
            return each.mean(), (found, stats)

        (_, (sums, stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        grads = collectives.pmean(grads)
        params, opt = {}, {}
        for name in NETWORKS:
            updates, opt[name] = self.tx.update(grads[name], state.opt[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        sums["grad_norm"] = pairs.constant(optax.global_norm(grads))
        sums["lr"] = pairs.constant(self.rate(state.step))
        return state.replace(step=state.step + 1, params=params, opt=opt, stats=stats), sums

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """Of central crops, by the running statistics: how well an H&E image finds its immunostain among those of the batch.

        `loss` and `accuracy` as in training, but padding is nobody's negative; `chance`: the accuracy of guessing, which is higher in a batch that is
        not full; `cosine`: of pairs; `cosine_others`: of the H&E image with the immunostains of others.
        """
        views, mask = self.views(batch), batch.get("mask")
        he, ihc = (self._embed(state, name, views[name]) for name in NETWORKS)
        mask = jnp.ones(he.shape[:1], he.dtype) if mask is None else mask.astype(he.dtype)
        temperature = self.settings.temperature
        loss, hit, others, count = _among(he, ihc, mask, temperature)
        if self.settings.symmetric:
            back, back_hit, _, _ = _among(ihc, he, mask, temperature)
            loss, hit = (loss + back) / 2, (hit + back_hit) / 2
        each = {"loss": loss, "accuracy": hit, "chance": 1 / jnp.broadcast_to(count, loss.shape), "cosine": _cosine(he, ihc)}
        found = {name: pairs.pair(value, mask) for name, value in each.items()}
        total, rows = pairs.pair(others, mask)
        return found | {"cosine_others": (total, rows * (count - 1))}

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Embeddings of whole images, by the running statistics, and the images in [0, 1].

        Args:
            state: of this task.
            batch: `he`, `ihc` uint8 [b, h, w, 3], or one of them; any sides divisible by 4, but trained on `config.stain.crop` px.
            names: of `he`, `ihc`, `cosine`, `input`, `target`; None: all that the batch allows.

        Raises:
            ConfigError: sides that are not divisible by 4. ValueError: an output that the batch does not allow.
        """
        offered = [name for name in OUTPUTS if set(NETWORKS if name == "cosine" else (PICTURES.get(name, name),)) <= set(batch)]
        names = set(offered if names is None else names)
        if unknown := names - set(offered):
            raise ValueError(f"unknown outputs {sorted(unknown)}; of this batch there are {offered}")
        images = {name: batch[name].astype(self.param_dtype) / 255 for name in NETWORKS if name in batch}
        wanted = [name for name in NETWORKS if name in names or "cosine" in names]
        result = {name: self._embed(state, name, images[name]) for name in wanted}
        if "cosine" in names:
            result["cosine"] = _cosine(result["he"], result["ihc"])
        result |= {name: images[column] for name, column in PICTURES.items() if name in names}
        return {name: result[name].astype(jnp.float32) for name in OUTPUTS if name in names}

    def flops(self) -> float:
        """Both encoders; a backward pass counts twice a forward pass."""
        return 3.0 * len(NETWORKS) * encoder_flops(self.crop, self.settings.encoder_channels, self.settings.encoder_blocks)

    def _check(self) -> None:
        settings, config = self.settings, self.config
        for problem, message in (
            (settings.dtype not in DTYPES, f"config.stain.dtype={settings.dtype!r} is unknown; choose float32 or bfloat16"),
            (
                settings.encoder_norm not in NORMS,
                f"config.stain.encoder_norm={settings.encoder_norm!r} is unknown; choose one of {', '.join(NORMS)}",
            ),
            (settings.crop < LEAST or settings.margin < 0, f"config.stain.crop must be at least {LEAST} px and config.stain.margin not negative"),
            (
                min(settings.encoder_channels, settings.encoder_blocks) < 1,
                "config.stain.encoder_channels and config.stain.encoder_blocks must be at least 1",
            ),
            (
                settings.crop < least_side(settings),
                f"config.stain.encoder_norm={settings.encoder_norm} leaves nothing of a crop of {settings.crop} px, whose last maps have a single"
                " value to normalise by; use config.stain.encoder_norm=batch, a larger config.stain.crop or more config.stain.encoder_channels",
            ),
            (settings.temperature <= 0, f"config.stain.temperature={settings.temperature} must be above 0"),
            (config.batch_size < 2, f"config.batch_size={config.batch_size}: a pair alone has no negatives; give at least 2"),
            (config.ema != 0, "config.ema must be 0: the running statistics of batch normalisation belong to parameters that are not averaged"),
        ):
            if problem:
                raise ConfigError(message)
        check_sides(settings.crop, settings.crop)


def least_side(settings: Any) -> int:
    """Of an image in px: in a smaller one a last map has one value in a group of its norm, and minus its mean that is 0, whatever the image.

    Args:
        settings: `config.stain`.
    """
    if settings.encoder_norm == "batch":
        return LEAST
    # The last three maps: their widths, in those of the stem, and the largest image of which they are a single pixel.
    sides = [side for factor, side in ((4, 16), (8, 32), (16, 64)) if settings.encoder_norm == "instance"
             or _GROUPS % (settings.encoder_channels * factor) == 0]
    return max(LEAST, *(side + MULTIPLE for side in sides)) if sides else LEAST


def _cosine(he: Float[Array, "b d"], ihc: Float[Array, "b d"]) -> Float[Array, "b"]:
    """Of each pair of unit vectors."""
    return jnp.sum(he * ihc, axis=-1)


def _among(
    query: Float[Array, "b d"], key: Float[Array, "b d"], mask: Float[Array, "b"], temperature: float
) -> tuple[Float[Array, "b"], Float[Array, "b"], Float[Array, "b"], Float[Array, ""]]:
    """InfoNCE one way as `ops.similarity.info_nce`, of unit vectors, where rows with mask 0 are no keys; what it says of these rows is meaningless.

    Returns:
        Loss [b]; [b] whether the partner was the nearest; [b] the sum of the cosines with all others; the number of keys.
    """
    valid = collectives.all_gather(mask) > 0
    cosines = jnp.matmul(query, collectives.all_gather(key).T, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.where(valid, cosines / temperature, -jnp.inf)
    own = jnp.arange(query.shape[0]) + collectives.index() * query.shape[0]
    positive = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    hit = (jnp.argmax(logits, axis=1) == own).astype(logits.dtype)
    others = jnp.where(valid, cosines, 0).sum(axis=1) - _cosine(query, key)
    return jax.nn.logsumexp(logits, axis=1) - positive, hit, others, valid.sum().astype(logits.dtype)
