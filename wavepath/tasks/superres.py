"""Super-resolution: CWT-Net with its two modes, and the baselines SRCNN, EDSR and RCAN under the same loss, data and budget.

    windows lr | next | hr -> one random place, flips and turns -> coin: `ref` or `wr` -> network -> 0.3 L_SR + 0.7 L_WT -> Adam

`next` is the image one level above `lr`, I_GT' of the paper; at 2x that is `hr` itself. In `ref` mode CWT-Net's wavelet branch reads it; in `wr`
mode nothing but `lr` enters the network, not even in the shape of an argument. Training throws one coin a step (equal on all devices), so that WR,
which stands in for the reference, learns. A number in `ref` mode has seen the answer; the one to report is that in `wr` mode.

Source: METHODS 4.3 to 4.6.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wavepath.errors import ConfigError
from wavepath.models.superres_baselines import build_superres, superres_flops
from wavepath.models.superres_layers import fresh_convolutions
from wavepath.ops.augment import aligned_windows
from wavepath.ops.random import coin, example_keys, named, step_key
from wavepath.ops.resize import resize_bicubic
from wavepath.ops.similarity import psnr, ssim
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State, kept_out, trained_on
from wavepath.tasks.optim import make_optimizer
from wavepath.tasks.single import SingleNetwork

NETWORK = "superres"
OUTPUTS = ("input", "bicubic", "output", "target")
MODES = ("wr", "ref")
PIXEL_LOSSES = {"l1": jnp.abs, "mse": jnp.square}
DTYPES = ("float32", "bfloat16", "float16", "float64")
WINDOW = 11  # px, of SSIM
MOST_DB = 100.0  # what an exact copy (a blank patch) counts as in a mean of PSNRs, where it would be infinite
_MEASURED = 1024  # windows that the mean colour is taken over, at most


class SuperResolution(SingleNetwork):
    """The task `superres`. Outputs of `predict`: `input`, `bicubic`, `output`, `target` (pictures in [0, 1])."""

    networks = (NETWORK,)

    def __init__(self, config: Any):
        super().__init__(config)
        self.settings = config.superres
        self.check_accumulation()
        self._check()
        self.scale, self.patch = int(self.settings.scale), int(self.settings.patch)
        self.dtype = jnp.dtype(self.settings.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self._network(())  # refuses settings of the network that do not fit together
        self.tx, self.rate = make_optimizer(config.optim, config.lr, config.train.steps, config.batch_size)

    # The data ------------------------------------------------------------------------------------------------------------------------

    def held_out(self, source: Any) -> Any:
        """The test part of the pyramids: other slides than those trained on.

        Raises:
            DatasetError: there is none, and the run is to be evaluated or drawn.
        """
        # Imported here: reading data brings TensorFlow, which building a task must not.
        from wavepath.data.pyramid_source import open_pyramids

        return kept_out(self.config, open_pyramids(self.config, "test"), source, "sample", "see its samples.csv, split anew with `wavepath pyramids`")

    def measure(self, source: Any) -> dict[str, Any]:
        """`mean`: the RGB in [0, 1] that the networks subtract: `superres.mean`, or what the pyramids say of their training split, or measured.

        `train_slides`: the ids of the slides (or groups of images) that the windows are of: a folder may be divided otherwise later.
        `mpp`: micrometres per px of the low resolution, where all of them have one.
        """
        known = tuple(self.settings.mean) or tuple(getattr(source, "mean", ()))
        if known:
            return {"mean": [float(value) for value in known], **trained_on(source, self.scale)}
        from wavepath.data.pipeline import eval_batches

        total, count = np.zeros(3), 0.0
        with eval_batches(source, self.config.batch_size, limit=_MEASURED, on_corrupt=self.config.data.on_corrupt) as batches:
            for batch in batches:
                total += (batch["lr"].mean(axis=(1, 2), dtype=np.float64) * batch["mask"][:, None]).sum(axis=0)
                count += batch["mask"].sum()
        return {"mean": [round(float(value), 6) for value in total / count / 255], **trained_on(source, self.scale)}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, side = self.config.batch_size, self.patch + int(self.settings.margin)
        shape = jax.ShapeDtypeStruct
        factors = {"lr": 1, "hr": self.scale} | ({"next": 2} if self.scale > 2 else {})
        pixels = {name: shape((b, factor * side, factor * side, 3), jnp.uint8) for name, factor in factors.items()}
        return {
            **pixels, "example_id": shape((b,), jnp.int32), "epoch": shape((b,), jnp.int32), "position": shape((b,), jnp.uint32),
        }

    # The network ---------------------------------------------------------------------------------------------------------------------

    @property
    def attends(self) -> bool:
        """Whether the network has a wavelet branch, and so two modes and an auxiliary output."""
        return bool(self.settings.network == "cwt-net" and self.settings.wavelet_branch)

    @property
    def model(self) -> Any:
        """Built when it is asked for: the training set decides which mean it subtracts."""
        mean = tuple(self.settings.mean) or tuple(self.constants.get("mean", ()))
        if not mean:
            raise ConfigError("the mean RGB is not known before the training set is read; give it as config.superres.mean=r,g,b (each in 0 to 1)")
        return self._network(mean)

    def _network(self, mean: tuple[float, ...]) -> Any:
        return build_superres(self.settings, self.dtype, self.param_dtype, mean)

    def init(self, rng: Array) -> State:
        # Neither the mean nor the size of the image matters to the parameters.
        # Behind a bicubic skip the last convolutions (of WR too) start at 0: the first image is then the bicubic one, and not that plus noise.
        zero = ("tail",) if self.settings.skip == "bicubic" else ()
        return self.fresh(fresh_convolutions(self._network(()), rng, jnp.zeros((1, 8, 8, 3), self.param_dtype), zero=zero))

    def _apply(self, params: Any, lr: Array, reference: Array | None = None, use: Any = True) -> tuple[Array, dict[str, Array]]:
        """(sr, intermediates); without a reference in `wr` mode."""
        variables = {"params": params}
        if reference is None or not self.attends:
            return self.model.apply(variables, lr)
        return self.model.apply(variables, lr, reference, use)

    # Training ------------------------------------------------------------------------------------------------------------------------

    def loss(self, params: Any, batch: Batch, step: Any = 0) -> tuple[Array, Metrics]:
        """Mean loss of a batch at random places, and its parts as sums and counts; the step's coin decides on the mode."""
        keys = example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        lr, hr, reference = self.views(batch, keys)
        sr, out = self._apply(params, lr, *self._reading(reference, step))
        each, terms = self.error(sr, out, hr, reference)
        return each.mean(), {"loss": pairs.pair(each), **{name: pairs.pair(value) for name, value in terms.items()}}

    def _reading(self, reference: Array | None, step: Any) -> tuple[Array | None, Any]:
        """What the wavelet branch may read in this step: (reference, whether it is used); the coin is the same on every device."""
        share = float(self.settings.wr_share)
        if share >= 1:
            return None, False
        return reference, True if share <= 0 else jnp.logical_not(coin(named(step_key(self.config.seed, step), "wr"), share))

    def views(self, batch: Batch, keys: Array | None = None) -> tuple[Array, Array, Array | None]:
        """(lr, hr, reference) in [0, 1] of one place: random, flipped and turned by the examples' keys, or central without keys.

        Returns:
            [b, patch, patch, 3], [b, scale patch, scale patch, 3], and [b, 2 patch, 2 patch, 3] where the network has a wavelet branch.
        """
        sides = batch["lr"].shape[1:3]
        if min(sides) < self.patch:
            raise ConfigError(f"the windows have {sides[0]}x{sides[1]} px; config.superres.patch={self.patch} is more")
        factors = {"lr": 1, "hr": self.scale}
        if self.attends and self.scale > 2:
            factors["next"] = 2
        seen = aligned_windows({name: batch[name] for name in factors}, keys, self.patch, self.config.augment, factors, self.param_dtype)
        lr, hr = seen["lr"], seen["hr"]
        if not self.attends:
            return lr, hr, None
        return lr, hr, seen.get("next", hr)

    def error(self, sr: Array, out: dict[str, Array], hr: Array, reference: Array | None) -> tuple[Array, dict[str, Array]]:
        """The loss of each example [b], and its terms where there is more than one.

        `sr_weight L_SR + wt_weight L_WT`, each `pixel loss + ssim_weight (1 - SSIM)` with the 11 x 11 Gaussian window. Images lie in [0, 1] and have
        a range of 1 in SSIM. The wavelet coefficients (Haar HH) lie in [-1, 1]: the pixel loss compares them as they are, SSIM compares (x + 1) / 2,
        again with a range of 1. Networks without a wavelet branch have L_SR alone, with a weight of 1.

        Args:
            sr: [b, scale h, scale w, 3], not clipped.
            out: the network's intermediates.
            hr: as `sr`.
            reference: [b, 2h, 2w, 3]; only with `out["wavelet"]`.

        Source: METHODS 4.5 (Eq. 10 to 14).
        """
        sr_loss = self._unlike(sr, hr)
        if "wavelet" not in out:
            return sr_loss, {}
        wt_loss = self._unlike(out["wavelet"], self.model.wavelet_target(reference), signed=self.settings.dwt)
        return self.settings.sr_weight * sr_loss + self.settings.wt_weight * wt_loss, {"sr_loss": sr_loss, "wt_loss": wt_loss}

    def _unlike(self, x: Array, target: Array, signed: bool = False) -> Array:
        each = PIXEL_LOSSES[self.settings.pixel](x - target).mean(axis=(1, 2, 3))
        if self.settings.ssim_weight == 0:
            return each
        if signed:
            x, target = (x + 1) / 2, (target + 1) / 2
        return each + self.settings.ssim_weight * (1 - ssim(x, target, value_range=1.0, size=WINDOW))

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """Of central patches: the loss, and PSNR (dB) and SSIM in RGB, no border cut, of the outputs as 8-bit images.

        `psnr` and `ssim` are those of `config.superres.mode`, `bicubic_...` of plain enlargement, and a network with two modes also has those of the
        other one (`ref_psnr`: what it would reach if it could read the level above). Averaged parameters where kept.
        """
        lr, hr, reference = self.views(batch)
        mask, params, mode = batch.get("mask"), self.kept(state), self.settings.mode
        other = MODES[1 - MODES.index(mode)]
        found = {}
        for prefix, which in (("", mode), (f"{other}_", other))[: 2 if self.attends else 1]:
            sr, out = self._apply(params, lr, reference if which == "ref" else None)
            if not prefix:
                each, terms = self.error(sr, out, hr, reference)
                found = {"loss": pairs.pair(each, mask), **{name: pairs.pair(value, mask) for name, value in terms.items()}}
            found |= _scores(prefix, sr, hr, mask)
        return found | _scores("bicubic_", resize_bicubic(lr, *hr.shape[1:3]), hr, mask)

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None, mode: str | None = None) -> dict[str, Array]:
        """Pictures in [0, 1], of whole images of any size; averaged parameters where kept.

        Args:
            state: of this task.
            batch: `lr` uint8 [b, h, w, 3] is all that the mode `wr` reads; `ref` reads `next` uint8 [b, 2h, 2w, 3] too (at 2x `hr` will do); `hr`
                uint8 [b, scale h, scale w, 3] is otherwise only returned as the target.
            names: of `input`, `bicubic`, `output`, `target`; None: all that the batch allows.
            mode: `wr` or `ref`; None: `config.superres.mode`.

        Raises:
            ConfigError: the mode `ref` without a reference, or with a network that takes none.
        """
        offered = OUTPUTS if "hr" in batch else OUTPUTS[:-1]
        names = set(offered if names is None else names)
        if unknown := names - set(offered):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {offered}")
        lr = batch["lr"].astype(self.param_dtype) / 255
        sides = [self.scale * side for side in lr.shape[1:3]]
        result = {"input": lr}
        if "bicubic" in names:
            result["bicubic"] = resize_bicubic(lr, *sides)
        if "output" in names:
            sr, _ = self._apply(self.kept(state), lr, self._reference(batch) if (mode or self.settings.mode) == "ref" else None)
            result["output"] = jnp.clip(sr, 0.0, 1.0)
        if "target" in names:
            result["target"] = batch["hr"].astype(self.param_dtype) / 255
        return {name: result[name].astype(jnp.float32) for name in OUTPUTS if name in names}

    @property
    def caption(self) -> str:
        """What a reader of the pictures must know."""
        reads = "the input alone" if self.settings.mode == "wr" else "the input and, for its detail, the level above it"
        return f"{self.scale}x, the network reads {reads}"

    def _reference(self, batch: Batch) -> Array:
        if not self.attends:
            raise ConfigError(f"config.superres.network={self.settings.network!r} has no wavelet branch; its mode is wr")
        name = "next" if "next" in batch else "hr" if self.scale == 2 else "next"
        if name not in batch:
            raise ConfigError("the mode ref reads the level above the input, which this batch does not have; use config.superres.mode=wr")
        return batch[name].astype(self.param_dtype) / 255

    def flops(self) -> float:
        """A backward pass counts twice a forward pass, but for the attention's scores, which choose and are not differentiated."""
        settings = self.settings
        scores = 2.0 * settings.blocks * 9 * settings.channels * float(self.patch) ** 4 if self.attends else 0.0
        return 3.0 * superres_flops(settings) - 2.0 * scores

    def _check(self) -> None:
        settings = self.settings
        smallest = settings.patch if self.attends else settings.patch * settings.scale
        for problem, message in (
            (settings.dtype not in DTYPES, f"config.superres.dtype={settings.dtype!r} is unknown; choose float32 or bfloat16"),
            (settings.patch < 2 or settings.margin < 0, "config.superres.patch must be at least 2 px and config.superres.margin not negative"),
            (
                smallest < WINDOW and settings.ssim_weight != 0,
                f"config.superres.patch={settings.patch} is too small for the {WINDOW}x{WINDOW} window of SSIM; give at least {WINDOW} px, or"
                " config.superres.ssim_weight=0",
            ),
            (
                settings.patch * settings.scale < WINDOW,
                f"config.superres.patch={settings.patch} at {settings.scale}x gives images too small for the {WINDOW}x{WINDOW} window of SSIM",
            ),
            (settings.pixel not in PIXEL_LOSSES, f"config.superres.pixel={settings.pixel!r} is unknown; choose one of {', '.join(PIXEL_LOSSES)}"),
            (settings.mode not in MODES, f"config.superres.mode={settings.mode!r} is unknown; choose one of {', '.join(MODES)}"),
            (settings.mode == "ref" and not self.attends, "config.superres.mode=ref needs network=cwt-net with its wavelet branch; others have wr"),
            (not 0 <= settings.wr_share <= 1, f"config.superres.wr_share={settings.wr_share} is a share of 0 to 1"),
            (min(settings.sr_weight, settings.wt_weight, settings.ssim_weight) < 0, "weights of config.superres must not be negative"),
            (settings.sr_weight == settings.wt_weight == 0, "config.superres.sr_weight and wt_weight are both 0: there is nothing to learn"),
            (len(settings.mean) not in (0, 3), f"config.superres.mean has {len(settings.mean)} values; give three (RGB in 0 to 1) or none"),
            *_bad_counts(settings),
            (not 0 <= self.config.ema < 1, f"config.ema={self.config.ema} must be at least 0 and below 1"),
        ):
            if problem:
                raise ConfigError(message)


def _bad_counts(settings: Any) -> Iterator[tuple[bool, str]]:
    """Sizes of the chosen network that no network has."""
    groups = {
        "cwt-net": ("", ("blocks", "channels", "reduction", "attention_chunk", "sr_blocks", "wavelet_blocks", "wr_blocks")),
        "edsr": ("edsr.", ("blocks", "channels")),
        "rcan": ("rcan.", ("groups", "blocks", "channels", "reduction")),
    }
    prefix, names = groups.get(settings.network, ("", ()))
    group = settings[prefix[:-1]] if prefix else settings
    for name in names:
        least = 0 if name in ("attention_chunk", "wavelet_blocks", "wr_blocks") else 1  # of these 0 leaves the choice to the network
        yield group[name] < least, f"config.superres.{prefix}{name}={group[name]} must be at least {least}"
    attends = settings.network == "rcan" or (settings.network == "cwt-net" and settings.wavelet_branch and settings.wr)
    if attends:  # over channels: RCAN, and WR
        yield (
            group.reduction > 0 and group.channels % group.reduction != 0,
            f"config.superres.{prefix}channels={group.channels} is not a multiple of config.superres.{prefix}reduction={group.reduction}",
        )


def _scores(prefix: str, sr: Array, hr: Array, mask: Array | None) -> Metrics:
    """PSNR and SSIM of each image as it would be written, in 8 bits."""
    sr = jnp.round(jnp.clip(sr, 0.0, 1.0) * 255) / 255
    return {
        f"{prefix}psnr": pairs.pair(jnp.minimum(psnr(sr, hr), MOST_DB), mask),
        f"{prefix}ssim": pairs.pair(ssim(sr, hr, value_range=1.0, size=WINDOW), mask),
    }
