"""Virtual staining: CEFF's second stage, and pix2pix and its pyramid under the same data and budget.

    windows he | ihc -> one random place, flips and turns
    he -> frozen H&E encoder, part by part -> features
    he, features -> generator -> made                               once a step: its gradient is pulled back at the end
    D: 1/2 (real + made) by the discriminator -> Adam
    G: adversarial by the updated discriminator + L1, weighted part by part by the frozen IHC encoder -> Adam

The encoders come from a run of the first stage (`config.encoders`). They are put in place after everything else has been drawn, are part of
`State.extra`, see no gradient, and normalise by their running statistics; the loop holds them against what they were ahead of every save. (In the
public code of the method the encoders are drawn anew behind their loading, and their statistics drift: METHODS 3.8.) `config.encoders=random` is the
control that this calls for.

Batch statistics, and the weights of the adaptive L1, couple the examples of a batch.

Source: METHODS 3.3, 3.4, 3.8, 3.9.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from wavepath.console import warn
from wavepath.errors import ConfigError
from wavepath.models.patchgan import PatchGAN, patchgan_flops
from wavepath.models.stain_encoder import StainEncoder, encoder_flops
from wavepath.models.stain_layers import NORMS, SPREAD, fresh_parameters, quadrant_features
from wavepath.models.staining import ENCODERS, StainGenerator, generator_flops
from wavepath.ops import collectives
from wavepath.ops.cross_attention import IMPLEMENTATIONS
from wavepath.ops.random import example_keys, named
from wavepath.ops.similarity import psnr, ssim
from wavepath.tasks import metrics as pairs
from wavepath.tasks.base import Batch, Metrics, State, Task, merge_params
from wavepath.tasks.optim import ema_update, make_optimizer
from wavepath.tasks.paired import HE, IHC, PairTask
from wavepath.tasks.stain_losses import GANS, L1S, Compared, adaptive_l1, discriminator_gan, fixed_l1, generator_gan, pyramid_l1

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
RANDOM = "random"
OUTPUTS = ("input", "output", "target")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WINDOW = 11  # px, of SSIM
MOST_DB = 100.0  # what an exact copy counts as in a mean of PSNRs, where it would be infinite


class Staining(PairTask):
    """The task `stain`. Outputs of `predict`: `input`, `output`, `target` (pictures in [0, 1])."""

    networks = (GENERATOR, DISCRIMINATOR)

    def __init__(self, config: Any):
        super().__init__(config)
        self.settings = config.stain
        self._check()
        self.check_accumulation()
        self.crop, self.grid = int(self.settings.crop), int(self.settings.grid)
        self.dtype = jnp.dtype(self.settings.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        self.encoders = self._encoders()
        self.frozen = ("encoders",) if self.encoders else ()
        self.tx, self.rate = make_optimizer(config.optim, config.lr, config.train.steps, config.batch_size)

    def check_accumulation(self) -> None:
        """Refuses micro-batches: they have other batch statistics and other weights of L1 than their batch."""
        if (parts := int(self.config.optim.accumulate)) != 1:
            raise ConfigError(
                f"config.optim.accumulate={parts} would change the losses of task {self.config.task!r}, whose networks and weights look at the whole"
                " batch; set config.optim.accumulate=1 and config.stain.remat=True (less memory), a smaller config.batch_size or config.stain.crop"
            )

    # The networks --------------------------------------------------------------------------------------------------------------------

    @property
    def generator(self) -> StainGenerator:
        s = self.settings
        return StainGenerator(
            s.channels, s.blocks, s.encoder, s.msfpm, s.coa, s.fusion, s.wavelet, s.norm, s.attention_chunk, s.attention, s.remat, **self._types
        )

    @property
    def discriminator(self) -> PatchGAN:
        s = self.settings
        return PatchGAN(s.discriminator_channels, s.discriminator_layers, s.norm, **self._types)

    @property
    def encoder(self) -> StainEncoder:
        """Of either kind: they have one form."""
        s = self.settings
        return StainEncoder(s.encoder_channels, s.encoder_blocks, s.encoder_norm, **self._types)

    @property
    def _types(self) -> dict[str, Any]:
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)

    def _encoders(self) -> tuple[str, ...]:
        """Those that the settings use."""
        return tuple(name for name, used in ((HE, self.settings.coa), (IHC, self.settings.l1 == "adaptive")) if used)

    def init(self, rng: Array) -> State:
        """Generator, discriminator, and encoders of noise, which `adopt` replaces; each from a key of its own."""
        image = jax.ShapeDtypeStruct((1, self.crop, self.crop, 3), self.param_dtype)
        maps = jax.ShapeDtypeStruct((1, self.crop // 4, self.crop // 4, 4 * self.settings.encoder_channels), self.param_dtype)
        made = {
            GENERATOR: fresh_parameters(self.generator, named(rng, GENERATOR), image, *([maps] if self.settings.coa else [])),
            DISCRIMINATOR: fresh_parameters(self.discriminator, named(rng, DISCRIMINATOR), image, image),
        }
        frozen = {name: _audible(fresh_parameters(self.encoder, named(rng, f"encoder_{name}"), image)) for name in self.encoders}
        params = {name: made[name]["params"] for name in self.networks}
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt={name: self.tx.init(params[name]) for name in self.networks},
            stats={name: made[name].get("batch_stats", {}) for name in self.networks},
            ema={GENERATOR: jax.tree.map(jnp.copy, params[GENERATOR])} if self.config.ema > 0 else {},
            extra={"encoders": frozen} if frozen else {},
        )

    def others(self) -> dict[str, str]:
        """The first stage's run, where anything of it is used."""
        return {"encoders": self.config.encoders} if self.encoders and self.config.encoders != RANDOM else {}

    def adopt(self, state: State, others: Mapping[str, tuple[Any, Task, State]]) -> tuple[State, dict[str, Any]]:
        """The encoders of the first stage in place of noise, with their running statistics; averaged parameters where it kept them.

        Raises:
            ConfigError: a run of another task, or encoders of another form.
        """
        if "encoders" not in others:
            return state, {}
        given, task, learnt = others["encoders"]
        if given.task != "stain_encoders":
            raise ConfigError(f"config.encoders={self.config.encoders} is a run of task {given.task!r}; give one of configs/ceff_encoders.py")
        wrong = [
            f"config.stain.{name}={given.stain[name]}" for name in ("encoder_channels", "encoder_blocks", "encoder_norm")
            if given.stain[name] != self.settings[name]
        ]
        if wrong:
            raise ConfigError(f"the encoders of {self.config.encoders} are of another form; give {' '.join('--' + field for field in wrong)}")
        mine, averaged = state.extra["encoders"], learnt.ema or learnt.params
        taken = {}
        for name in self.encoders:
            source = {"params": averaged[name]} | ({"batch_stats": learnt.stats[name]} if learnt.stats.get(name) else {})
            taken[name] = {part: merge_params(tree, source.get(part, {}), f"{name} {part}") for part, tree in mine[name].items()}
        self._warn_of_size(int(given.stain.crop))
        state, known = state.replace(extra={**state.extra, "encoders": taken}), task.constants.get("train_slides")
        if known is None:  # not the same as none: whoever evaluates says that it does not know
            return state, {"encoders": {}}
        seen = sorted(map(str, known))
        self._warn_of_slides(seen)
        return state, {"encoders": {"train_slides": seen}}

    def _warn_of_size(self, trained: int) -> None:
        """Encoders know tissue by its size in px: what they agree on in crops of one side says little of parts of another."""
        fields = {HE: "grid", IHC: "l1_grid"}
        shown = {fields[name]: self.crop // int(self.settings[fields[name]]) for name in self.encoders}
        if other := {field: side for field, side in shown.items() if side != trained}:
            parts = " and ".join(f"{side} px (config.stain.crop / {field})" for field, side in other.items())
            warn(
                f"the encoders of {self.config.encoders} were trained on crops of {trained} px and are shown parts of {parts}, on which they agree"
                f" less; train them with --config.stain.crop={next(iter(other.values()))}"
            )

    def _warn_of_slides(self, seen: list[str]) -> None:
        if unknown := sorted(set(seen) - set(self.constants.get("train_slides", seen))):
            warn(
                f"the encoders of {self.config.encoders} were trained on {len(unknown)} slides that this run leaves out (first: {unknown[0]}); what"
                " is measured on those is not held out"
            )

    def _encode(self, state: State, name: str, images: Array) -> tuple[Array, Array]:
        """Embedding and feature map of a frozen encoder, by its running statistics; nothing is differentiated."""
        embedding, out = self.encoder.apply(state.extra["encoders"][name], jax.lax.stop_gradient(images), train=False)
        return jax.lax.stop_gradient((embedding, out["features"]))

    def features(self, state: State, he: Array) -> Array | None:
        """What the generator attends to, [b, h / 4, w / 4, 4 encoder_channels], encoded part by part; None without CoA."""
        if not self.settings.coa:
            return None
        return quadrant_features(lambda parts: self._encode(state, HE, parts)[1], he, self.grid)

    # Training ------------------------------------------------------------------------------------------------------------------------

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step of each network, first the discriminator's: the generator answers to the updated one, as in pix2pix."""
        kind, keys = self.settings.gan, example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        he, ihc = self.views(batch, keys).values()
        features = self.features(state, he)

        def generate(params: Any) -> tuple[Array, Any]:
            return _train(self.generator, params, state.stats[GENERATOR], he, features)

        made, pull_back, g_stats = jax.vjp(generate, state.params[GENERATOR], has_aux=True)
        still = jax.lax.stop_gradient(made)

        def judge(params: Any) -> tuple[Array, Any]:
            fake, stats = _train(self.discriminator, params, state.stats[DISCRIMINATOR], he, still)
            real, stats = _train(self.discriminator, params, stats, he, ihc)
            judged = discriminator_gan(real, fake, kind)
            return judged.loss.mean(), (judged, stats)

        (_, (judged, d_stats)), d_grads = jax.value_and_grad(judge, has_aux=True)(state.params[DISCRIMINATOR])
        d_grads = collectives.pmean(d_grads)
        d_params, d_opt = self._updated(d_grads, state, DISCRIMINATOR)

        def please(image: Array) -> tuple[Array, Any]:
            logits, stats = _train(self.discriminator, d_params, d_stats, he, image)
            adversarial, compared = generator_gan(logits, kind), self.compare(state, image, ihc)
            each = self.settings.gan_weight * adversarial + compared.loss
            return each.mean(), (each, adversarial, compared, stats)

        (_, (each, adversarial, compared, d_stats)), by_image = jax.value_and_grad(please, has_aux=True)(made)
        (g_grads,) = pull_back(by_image)
        g_grads = collectives.pmean(g_grads)
        g_params, g_opt = self._updated(g_grads, state, GENERATOR)

        sums = {
            "loss": pairs.pair(each), "g_gan": pairs.pair(adversarial), "l1": pairs.pair(compared.l1),
            "l1_weight": pairs.constant(compared.weights.mean()), "d_loss": pairs.pair(judged.loss), "d_real": pairs.pair(judged.real),
            "d_fake": pairs.pair(judged.fake), "grad_norm": pairs.constant(optax.global_norm(g_grads)),
            "d_grad_norm": pairs.constant(optax.global_norm(d_grads)), "lr": pairs.constant(self.rate(state.step)),
        }
        if compared.similarity is not None:
            sums["similarity"] = pairs.pair(compared.similarity)
        return state.replace(
            step=state.step + 1,
            params={GENERATOR: g_params, DISCRIMINATOR: d_params},
            opt={GENERATOR: g_opt, DISCRIMINATOR: d_opt},
            stats={GENERATOR: g_stats, DISCRIMINATOR: d_stats},
            ema={GENERATOR: ema_update(state.ema[GENERATOR], g_params, self.config.ema)} if state.ema else {},
        ), sums

    def _updated(self, grads: Any, state: State, name: str) -> tuple[Any, Any]:
        updates, opt = self.tx.update(grads, state.opt[name], state.params[name])
        return optax.apply_updates(state.params[name], updates), opt

    def compare(self, state: State, made: Array, ihc: Array) -> Compared:
        """The L1 that `config.stain.l1` names."""
        s = self.settings
        if s.l1 == "fixed":
            return fixed_l1(made, ihc, s.l1_weight)
        if s.l1 == "pyramid":
            return pyramid_l1(made, ihc, s.octaves, s.pyramid_weight)
        return adaptive_l1(made, ihc, lambda parts: self._encode(state, IHC, parts)[0], s.l1_grid, s.l1_weight)

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        """Of central crops, in RGB: `l1` (values in [-1, 1]), `psnr` (dB) and `ssim` (Gaussian window) of the output as an 8-bit image.

        `copy_psnr` is that of the H&E image itself, to which nothing was done. The mean over whole images is for `wavepath evaluate --stain`.
        """
        he, ihc = self.views(batch).values()
        mask = batch.get("mask")
        made = jnp.round(self.stain(state, he) * 255) / 255
        return {
            "l1": pairs.pair(fixed_l1(made, ihc).l1, mask),
            "psnr": pairs.pair(jnp.minimum(psnr(made, ihc), MOST_DB), mask),
            "ssim": pairs.pair(ssim(made, ihc, value_range=1.0, size=WINDOW), mask),
            "copy_psnr": pairs.pair(jnp.minimum(psnr(he, ihc), MOST_DB), mask),
        }

    def stain(self, state: State, he: Array) -> Array:
        """The virtual stain of H&E images [b, h, w, 3] in [0, 1], by running statistics and averaged parameters where kept."""
        params = (state.ema or state.params)[GENERATOR]
        made, _ = self.generator.apply(_variables(params, state.stats[GENERATOR]), he, self.features(state, he), train=False)
        return made

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Pictures in [0, 1] of whole images.

        Args:
            state: of this task.
            batch: `he` uint8 [b, h, w, 3], sides divisible by 4 times `stain.grid` (without CoA by 4); `ihc` likewise is only returned as the target.
            names: of `input`, `output`, `target`; None: all that the batch allows.
        """
        offered = OUTPUTS if IHC in batch else OUTPUTS[:-1]
        names = set(offered if names is None else names)
        if unknown := names - set(offered):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {offered}")
        he = batch[HE].astype(self.param_dtype) / 255
        result = {"input": he}
        if "output" in names:
            result["output"] = self.stain(state, he)
        if "target" in names:
            result["target"] = batch[IHC].astype(self.param_dtype) / 255
        return {name: result[name].astype(jnp.float32) for name in OUTPUTS if name in names}

    @property
    def caption(self) -> str:
        """What a reader of the pictures must know."""
        kept = "random encoders, a control" if self.encoders and self.config.encoders == RANDOM else ""
        return "the output is a virtual stain, computed from the H&E image (input)" + (f"; {kept}" if kept else "")

    def flops(self) -> float:
        """A backward pass counts twice a forward pass; the generator's loss goes through the discriminator once more, differentiated by the image."""
        s = self.settings
        total = 3.0 * generator_flops(self.generator, self.crop) + 8.0 * patchgan_flops(self.crop, s.discriminator_channels, s.discriminator_layers)
        for name, grid, passes in ((HE, s.grid, 1), (IHC, s.l1_grid, 2)):
            if name in self.encoders:
                total += passes * grid**2 * encoder_flops(self.crop // grid, s.encoder_channels, s.encoder_blocks, embedding=name == IHC)
        return total

    def _check(self) -> None:
        s, config = self.settings, self.config
        parts = [("grid", s.grid)] * bool(s.coa) + [("l1_grid", s.l1_grid)] * (s.l1 == "adaptive")
        window = s.crop + s.margin
        unit = 4 * (s.grid if s.coa else 1)
        smallest = max(WINDOW, 3 * 2**s.discriminator_layers)
        counts = (
            "channels", "blocks", "grid", "encoder_channels", "encoder_blocks", "discriminator_channels", "discriminator_layers", "l1_grid",
            "octaves",
        )
        choices = (
            ("dtype", DTYPES), ("gan", GANS), ("l1", L1S), ("encoder", ENCODERS), ("norm", NORMS), ("encoder_norm", NORMS),
            ("attention", IMPLEMENTATIONS),
        )
        for problem, message in (
            *((s[name] not in known, f"config.stain.{name}={s[name]!r} is unknown; choose one of {', '.join(known)}") for name, known in choices),
            *((s[name] < 1, f"config.stain.{name}={s[name]} must be at least 1") for name in counts),
            (s.margin < 0, f"config.stain.margin={s.margin} must not be negative"),
            (s.crop < smallest, f"config.stain.crop={s.crop} is too small; give at least {smallest} px, or fewer config.stain.discriminator_layers"),
            *(
                (grid > 0 and s.crop % (4 * grid) != 0, f"config.stain.crop={s.crop} is not a multiple of 4 times config.stain.{name}={grid}")
                for name, grid in [*parts, ("grid", 1)][: len(parts) or 1]
            ),
            (s.grid > 0 and window % unit != 0, f"config.stain.crop + margin, {window} px, is not a multiple of {unit}, as the networks need"),
            (s.l1 == "pyramid" and s.crop < 2**s.octaves, f"config.stain.crop={s.crop} has no {s.octaves} octaves; give fewer config.stain.octaves"),
            (min(s.gan_weight, s.l1_weight, s.pyramid_weight) < 0, "weights of config.stain must not be negative"),
            (s.msfpm and s.blocks < 4, f"config.stain.blocks={s.blocks}: MSFPM wants at least 4, or give config.stain.msfpm=False"),
            (not 0 <= config.ema < 1, f"config.ema={config.ema} must be at least 0 and below 1"),
            (config.ema > 0 and s.norm == "batch", "config.ema needs config.stain.norm=instance or group: running statistics belong to no average"),
            (
                not config.encoders and bool(self._encoders()),
                "config.encoders is empty, but config.stain.coa=True or l1=adaptive need frozen encoders: train them with configs/ceff_encoders.py"
                " and give --config.encoders=RUN, or --config.encoders=random as a control",
            ),
        ):
            if problem:
                raise ConfigError(message)


def _audible(fresh: dict[str, Any]) -> dict[str, Any]:
    """Frozen noise whose convolutions keep the strength of their input (He), so that random encoders say something.

    As drawn for training, N(0, 0.02), with running statistics of 0 and 1 that are never moved, each layer would weaken the signal: features of 64
    channels would vary by 0.04 instead of 1 to 2, attention over them would be nearly uniform, and the control unfair.
    """

    def louder(path: tuple, leaf: Array) -> Array:
        if getattr(path[-1], "key", "") != "kernel":
            return leaf
        return leaf * (math.sqrt(2 / math.prod(leaf.shape[:-1])) / SPREAD)

    return {**fresh, "params": jax.tree_util.tree_map_with_path(louder, fresh["params"])}


def _variables(params: Any, stats: Any) -> dict[str, Any]:
    return {"params": params, "batch_stats": stats} if stats else {"params": params}


def _train(model: Any, params: Any, stats: Any, *inputs: Any) -> tuple[Array, Any]:
    """The output of a network that normalises by the batch, and the running statistics moved by it; `stats` itself where there are none."""
    if not stats:
        return model.apply({"params": params}, *inputs, train=True)[0], stats
    (out, _), moved = model.apply(_variables(params, stats), *inputs, train=True, mutable=["batch_stats"])
    return out, moved["batch_stats"]
