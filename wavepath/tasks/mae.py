"""Masked-autoencoder pretraining, the whole method: WISE-MAE's learning stage with and without its contrastive term, and GLCM-MAE.

    uint8 batch -> augment -> normalise -> mask -> encode the visible quarter -> decode -> error on masked patches -> AdamW

The error is squared error, structural similarity, co-occurrence, or a sum of them, in one or two phases: `tasks/reconstruction.py`.

With `loss.contrast_weight` above 0 a second view of each tile, augmented and masked on its own, passes the encoder too, and InfoNCE between the
views' mean tokens is added: L = L_mae + weight * L_nce. The first view alone is decoded: the decoder would double its cost for the same tile.

Source: METHODS 1.3, 1.5, 2.3, 2.4 and 5.1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wavepath.console import say
from wavepath.errors import ConfigError
from wavepath.models.mae import MAE, mae_flops
from wavepath.models.vit import Variant, vit_flops
from wavepath.ops import collectives
from wavepath.ops.augment import augment_batch, center
from wavepath.ops.patches import (
    Masking,
    assemble,
    gather_patches,
    patch_statistics,
    patchify,
    random_masking,
    unpatchify,
)
from wavepath.ops.random import example_keys, group_keys, named
from wavepath.ops.similarity import info_nce
from wavepath.tasks import lineage
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State
from wavepath.tasks.encoder import ENCODER, encoder_dtype, encoder_form, encoder_size, take_encoder
from wavepath.tasks.optim import make_optimizer
from wavepath.tasks.reconstruction import Reconstruction, Terms
from wavepath.tasks.single import SingleNetwork

NETWORK = "mae"
REPORTED = {"ssim": "one_minus_ssim"}
GREY = 0.5  # what masked patches look like in pictures


class MaskedAutoencoding(SingleNetwork):
    """The task `mae`. Outputs of `predict`: `cls`, `mean` (features), `input`, `masked`, `reconstruction` (pictures in [0, 1])."""

    networks = (NETWORK,)
    embeds = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.coupled = config.loss.contrast_weight > 0
        self.check_accumulation()
        self.size, self.form = encoder_size(config.model), encoder_form(config.model)
        self.decoder = Variant(config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads)
        self.dtype = encoder_dtype(config.model.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self._check()
        self.reconstruction = Reconstruction(config)
        self.patches = (config.model.image_size // config.model.patch) ** 2
        self.keep = int(self.patches * (1.0 - config.model.mask_ratio) + 1e-6)
        self.group = config.batch_size // config.model.mask_groups if config.model.mask_groups else 1
        self.model = self._model()
        self.tx, self.rate = make_optimizer(config.optim, config.lr, config.train.steps, config.batch_size)

    # The network --------------------------------------------------------------------------------------------------------------------

    def _model(self) -> MAE:
        model = self.config.model
        return MAE(
            *self.size, *_decoder(self.decoder), patch=model.patch, drop_path=model.drop_path, attention=model.attention, scan=model.scan,
            remat=model.remat, dtype=self.dtype, param_dtype=self.param_dtype, form=self.form,
        )

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, side = self.config.batch_size, self.config.prepare.tiles.size
        shape = jax.ShapeDtypeStruct
        return {
            "image": shape((b, side, side, 3), jnp.uint8), "example_id": shape((b,), jnp.int32), "epoch": shape((b,), jnp.int32),
            "position": shape((b,), jnp.uint32),
        }

    def init(self, rng: Array) -> State:
        side = self.config.model.image_size
        masking = Masking(order=jnp.arange(self.patches, dtype=jnp.int32)[None], keep=self.keep)
        params = self.model.init(rng, jnp.zeros((1, side, side, 3), self.param_dtype), masking)["params"]
        return self.fresh(params)

    def load(self, state: State, params: Mapping[str, Any]) -> State:
        """Takes a whole autoencoder; of a run that has none (an imported encoder, a fine-tuned one) the encoder alone, and the decoder stays fresh.

        Raises:
            CheckpointError: parameters that do not fit (named).
        """
        if NETWORK in params:
            return super().load(state, params)
        own = state.params[NETWORK]
        origin, encoder = take_encoder(own[ENCODER], params)
        say(f"encoder of {origin!r} loaded; the decoder is fresh")
        merged = {NETWORK: {**own, ENCODER: encoder}}
        return state.replace(params=merged, ema=jax.tree.map(jnp.copy, merged) if state.ema else {})

    # Training -----------------------------------------------------------------------------------------------------------------------

    def measure(self, source: Any) -> dict[str, Any]:
        """`train_slides`; and the ranges of values that SSIM and co-occurrence need, from one pass over the source, not for squared error alone."""
        known = {lineage.KEY: lineage.slides_of(source)}
        if not self.reconstruction.needs_range:
            return known
        # Imported here: reading data brings TensorFlow, which building a task must not.
        from wavepath.data.pipeline import eval_batches

        with eval_batches(source, self.config.batch_size, on_corrupt=self.config.data.on_corrupt) as batches:
            return known | self.reconstruction.measure(batches, len(source))

    def loss(self, params: Any, batch: Batch, step: Any = 0) -> tuple[Array, Metrics]:
        """Mean loss of a batch and its parts as sums and counts; the step decides on the phase."""
        keys = example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        weight = self.config.loss.contrast_weight
        if weight == 0:
            images, masking = self._view(batch, keys, "")
            prediction, _ = self.model.apply({"params": params}, images, masking, named(keys, "drop_path"))
            each, terms = self.error(prediction, images, masking, step)
            return each.mean(), {"loss": pairs.pair(each), **self._reported(terms)}
        first, second = self._view(batch, keys, ""), self._view(batch, keys, "_second")
        prediction, out = self.model.apply({"params": params}, *first, named(keys, "drop_path"))
        other, _ = self.model.apply({"params": params}, *second, named(keys, "drop_path_second"), method="encode")
        each, terms = self.error(prediction, *first, step)
        nce, hit = info_nce(_embedding(out["latent"]), _embedding(other), self.config.loss.contrast_temperature, symmetric=True)
        total = each + weight * nce
        return total.mean(), {
            "loss": pairs.pair(total), "reconstruction": pairs.pair(each), "contrast": pairs.pair(nce), "contrast_accuracy": pairs.pair(hit),
            **self._reported(terms),
        }

    def _view(self, batch: Batch, keys: Array, name: str) -> tuple[Array, Masking]:
        """One augmented, normalised view of each tile and its mask."""
        settings = self.config.model
        images = augment_batch(batch["image"], named(keys, "augment" + name), self.config.augment, settings.image_size, self.param_dtype)
        if not settings.mask_groups:
            return self.normalise(images), random_masking(named(keys, "mask" + name), self.patches, settings.mask_ratio)
        # Micro-batches take every `accumulate`-th example, so that share of a group stands together; where a shard cuts groups, less of it.
        run = self.group // self.config.optim.accumulate if self.group % self.config.optim.accumulate == 0 else 1
        run = math.gcd(run, images.shape[0])
        shared = group_keys(self.config.seed, batch["position"], self.group)[::run]
        return self.normalise(images), random_masking(named(shared, "mask" + name), self.patches, settings.mask_ratio)

    def error(self, prediction: Array, images: Array, masking: Masking, step: Any = 0) -> tuple[Array, Terms]:
        """The error of each example [b] over its masked patches, and its terms; see `Reconstruction`."""
        return self.reconstruction(prediction, images, masking, step, self.constants)

    def _reported(self, terms: Terms, mask: Array | None = None) -> Metrics:
        """Terms as metrics, where there is more than one; a term that the phase does not have has a count of 0.

        The term `ssim` is reported as `one_minus_ssim`, which says that less is better.
        """
        if len(terms) < 2:
            return {}
        found = {name: (pairs.pair(each, mask), active) for name, (each, active) in terms.items()}
        return {REPORTED.get(name, name): (total, count * active) for name, ((total, count), active) in found.items()}

    # Evaluation ---------------------------------------------------------------------------------------------------------------------

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """Reconstruction loss of central views, each with a mask that is the same in every evaluation; averaged parameters where kept."""
        images, masking = self._fixed(batch)
        prediction, _ = self.model.apply({"params": self.kept(state)}, images, masking)
        each, terms = self.error(prediction, images, masking, state.step)
        mask = batch.get("mask")
        # Squared error always: runs that are scored by other terms, or in another phase, can be compared by it.
        squared = self.reconstruction.squared_error(prediction, images, masking)
        return {"loss": pairs.pair(each, mask), **self._reported(terms, mask), "mse": pairs.pair(squared, mask)}

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Features from all tokens (no mask), and pictures of a masked reconstruction.

        With `loss.norm_pix` the network predicts normalised patches; pictures then borrow each target patch's own mean and deviation, which a
        user without the target does not have (`caption` says so).

        Args:
            state: averaged parameters are used where kept.
            batch: `image` uint8 [b, h, w, 3]; pictures also use `example_id` (absent: row numbers) to draw the mask.
            names: of `cls`, `mean`, `input`, `masked`, `reconstruction`; None: all. Features alone cost no decoder, pictures no full encoder.
        """
        names = set(OUTPUTS if names is None else names)
        if unknown := names - set(OUTPUTS):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {OUTPUTS}")
        params = {"params": self.kept(state)}
        result: dict[str, Array] = {}
        if names & {"cls", "mean"}:
            images = self.normalise(center(batch["image"], self.config.model.image_size, self.param_dtype))
            _, out = self.model.apply(params, images, method="encode")
            result |= {name: out[name].astype(jnp.float32) for name in ("cls", "mean")}
        if names & {"input", "masked", "reconstruction"}:
            images, masking = self._fixed(batch)
            prediction, _ = self.model.apply(params, images, masking)
            result |= self._pictures(prediction, images, masking)
        return {name: result[name] for name in OUTPUTS if name in names}

    @property
    def caption(self) -> str:
        """What a reader of the pictures must know."""
        shown = "masked patches predicted, visible patches copied"
        return shown + ("; predicted contrast, the target's own mean and deviation in each patch" if self.config.loss.norm_pix else "")

    def _pictures(self, prediction: Array, images: Array, masking: Masking) -> dict[str, Array]:
        patch, side = self.config.model.patch, images.shape[2]
        mean, std = (jnp.asarray(self.config.model[name], images.dtype) for name in ("mean", "std"))
        patches = patchify(images, patch)
        if self.config.loss.norm_pix:
            centre, spread = patch_statistics(gather_patches(patches, masking.masked))
            prediction = prediction * spread + centre
        visible = gather_patches(patches, masking.visible)
        grey = jnp.broadcast_to(jnp.tile((GREY - mean) / std, patch * patch), prediction.shape)

        def show(x: Array) -> Array:
            return jnp.clip(unpatchify(x, patch, side) * std + mean, 0.0, 1.0).astype(jnp.float32)

        return {
            "input": show(patches), "masked": show(assemble(visible, grey, masking)),
            "reconstruction": show(assemble(visible, prediction.astype(visible.dtype), masking)),
        }

    def _fixed(self, batch: Batch) -> tuple[Array, Masking]:
        images = self.normalise(center(batch["image"], self.config.model.image_size, self.param_dtype))
        ids = batch.get("example_id")
        if ids is None:
            ids = jnp.arange(images.shape[0], dtype=jnp.int32) + collectives.index() * images.shape[0]
        keys = named(example_keys(self.config.seed, ids, jnp.zeros_like(ids)), "evaluation")
        return images, random_masking(keys, self.patches, self.config.model.mask_ratio)

    def flops(self) -> float:
        """A backward pass counts twice a forward pass; recomputation (`model.remat`) is not counted."""
        patch = self.config.model.patch
        forward = mae_flops(self.size, self.decoder, patch, self.patches, self.keep, form=self.form)
        return 3.0 * (forward + (vit_flops(self.keep, self.size, patch, form=self.form) if self.coupled else 0.0))

    def _check(self) -> None:
        model, batch = self.config.model, self.config.batch_size
        for problem, message in (
            (model.image_size % model.patch, f"config.model.patch={model.patch} does not divide config.model.image_size={model.image_size}"),
            (self.decoder.width % 4, f"config.model.decoder_width={self.decoder.width} must be a multiple of 4"),
            (
                self.decoder.heads < 1 or self.decoder.width % self.decoder.heads,
                f"config.model.decoder_heads={self.decoder.heads} does not divide config.model.decoder_width={self.decoder.width}",
            ),
            (not 0 <= model.mask_ratio < 1, f"config.model.mask_ratio={model.mask_ratio} must be at least 0 and below 1"),
            (not 0 <= model.drop_path < 1, f"config.model.drop_path={model.drop_path} must be at least 0 and below 1"),
            (not 0 <= self.config.ema < 1, f"config.ema={self.config.ema} must be at least 0 and below 1"),
            (
                model.mask_groups and batch % model.mask_groups,
                f"config.model.mask_groups={model.mask_groups} does not divide config.batch_size={batch}; choose a divisor of it",
            ),
        ):
            if problem:
                raise ConfigError(message)
        patches = (model.image_size // model.patch) ** 2
        keep = int(patches * (1.0 - model.mask_ratio) + 1e-6)
        if not 0 < keep < patches:
            raise ConfigError(
                f"config.model.mask_ratio={model.mask_ratio} leaves {keep} of {patches} patches visible; at least one must be visible and one masked"
            )


OUTPUTS = ("cls", "mean", "input", "masked", "reconstruction")


def _decoder(size: Variant) -> tuple[int, int, int]:
    return size.width, size.depth, size.heads


def _embedding(tokens: Array) -> Array:
    """What the contrastive term compares: the mean over visible tokens and class token (METHODS 1.5), in float32 or wider."""
    return tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32)).mean(axis=1)
