"""What a masked autoencoder is scored by: squared error, structural similarity and co-occurrence of masked patches, in one or two phases.

    error = mse * L_MSE + ssim * L_SSIM + glcm * L_GLCM          (weights: config.loss; of the second phase: config.loss.second)

Each term is a mean over the masked patches of an example. GLCM-MAE (METHODS 2) trains first with squared error alone and then with
`L_GLCM + L_SSIM + 0.1 L_MSE`; `loss.second.start` is where the second phase begins. Only masked patches are predicted here, so only they enter.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wavepath.console import progress
from wavepath.errors import ConfigError
from wavepath.ops.glcm import GlcmError, glcm_loss
from wavepath.ops.glcm_membership import make_membership, window_for
from wavepath.ops.patches import Masking, gather_patches, normalise_patches, patchify
from wavepath.ops.similarity import ssim
from wavepath.ops.stain import hematoxylin_od, luminance, optical_density

TERMS = ("mse", "ssim", "glcm")
CHANNELS = ("first", "rgb", "luminance", "hematoxylin", "optical_density")
_BINS = 4096  # of the histogram behind `clip_percentile`: finer than the 256 values of a pixel

Terms = dict[str, tuple[Array, Array]]  # term -> (error of each example [b], 1 where the phase has the term, else 0)


class Reconstruction:
    """The weighted error of predicted patches.

    Attributes:
        used: the terms that have a weight in some phase.
        needs_range: whether ranges of pixel values must be known (`measure`).
    """

    def __init__(self, config: Any):
        self._loss, self._model = config.loss, config.model
        first = {term: float(self._loss[term]) for term in TERMS}
        second = {term: float(self._loss.second[term]) for term in TERMS}
        self._start = _step_number(self._loss.second.start)
        self._steps = int(config.train.steps)
        # Each phase: weights of its terms. A second phase that never begins, or begins at once, leaves one.
        self._phases = [first] if self._start is None else [second] if self._start == 0 else [first, second]
        self.used = tuple(term for term in TERMS if any(phase[term] for phase in self._phases))
        self.needs_range = bool(set(self.used) & {"ssim", "glcm"})
        self._check()

    # The error ------------------------------------------------------------------------------------------------------------------------

    def __call__(
        self, prediction: Float[Array, "b m p"], images: Float[Array, "b h w 3"], masking: Masking, step: Any, constants: Mapping[str, Any]
    ) -> tuple[Float[Array, "b"], Terms]:
        """The error of each example, and its terms.

        Args:
            prediction: of the masked patches.
            images: normalised by the model's mean and deviation.
            masking: the mask.
            step: number of the step, which decides on the phase and the sharpness.
            constants: what `measure` found.

        Raises:
            ConfigError: a term needs a range of values and none was measured.
        """
        target = gather_patches(patchify(images, self._model.patch), masking.masked)

        def phase(weights: Mapping[str, float]) -> tuple[Array, Terms]:
            total, terms = jnp.zeros(prediction.shape[0], prediction.dtype), {}
            for term in self.used:
                if weights[term]:
                    each = getattr(self, f"_{term}")(prediction, target, step, constants)
                    total = total + weights[term] * each
                    terms[term] = (each, jnp.ones((), each.dtype))
                else:
                    terms[term] = (jnp.zeros_like(total), jnp.zeros((), total.dtype))
            return total, terms

        if len(self._phases) == 1:
            return phase(self._phases[0])
        # A condition, not a weight of zero: the first phase shall not pay for the terms of the second.
        return jax.lax.cond(jnp.asarray(step) >= self._start, lambda: phase(self._phases[1]), lambda: phase(self._phases[0]))

    def squared_error(self, prediction: Float[Array, "b m p"], images: Float[Array, "b h w 3"], masking: Masking) -> Float[Array, "b"]:
        """The squared error alone, in the units of the term `mse`, whatever the weights."""
        target = gather_patches(patchify(images, self._model.patch), masking.masked)
        return self._mse(prediction, target, 0, {})

    def _mse(self, prediction: Array, target: Array, step: Any, constants: Mapping[str, Any]) -> Array:
        if self._loss.norm_pix:
            target = normalise_patches(target)
        return jnp.mean((prediction - target) ** 2, axis=(1, 2))

    def _ssim(self, prediction: Array, target: Array, step: Any, constants: Mapping[str, Any]) -> Array:
        """`1 - SSIM` of each patch, after each image was brought to [0, 1] by its own least and greatest value (METHODS 2.3).

        Those are of the masked patches, which alone are predicted; the published code takes them over all patches.
        """
        low, high = self._range(constants, "pixel_range")
        window = self._loss.ssim_window

        def scaled(patches: Array) -> Array:
            patches = jnp.clip(patches, low, high)
            if window.scale == "image":
                least, most = (f(patches, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
                patches = (patches - least) / jnp.maximum(most - least, 1e-6)
            else:
                patches = (patches - low) / (high - low)
            return self._pixels(patches)

        each = ssim(scaled(prediction), scaled(target), value_range=1.0, window=window.kind, size=window.size, sigma=window.sigma)
        return (1 - each).mean(axis=1)

    def _glcm(self, prediction: Array, target: Array, step: Any, constants: Mapping[str, Any]) -> Array:
        """Distance between the co-occurrence matrices of each patch (METHODS 2.2)."""
        planes = [self._planes(self._pixels(patches)) for patches in (prediction, target)]  # [b, m, y, x, k]
        b, m, k = *planes[0].shape[:2], planes[0].shape[-1]
        flat = [jnp.moveaxis(x, -1, 2).reshape(b * m * k, *x.shape[2:4]) for x in planes]
        return self._distance(*flat, step, self._range(constants, "value_range")).reshape(b, m * k).mean(axis=1)

    def _distance(self, prediction: Float[Array, "n y x"], target: Float[Array, "n y x"], step: Any, limits: tuple[float, float]) -> Array:
        glcm = self._loss.cooccurrence
        return glcm_loss(
            prediction, target, glcm.levels, tuple(tuple(offset) for offset in glcm.offsets), value_range=limits, membership=glcm.membership,
            reweight=glcm.reweight, normalize=glcm.normalize, distance=glcm.distance, **self._sharpness(step),
        )

    def _pixels(self, patches: Float[Array, "b m p"]) -> Float[Array, "b m y x 3"]:
        side = self._model.patch
        return patches.reshape(*patches.shape[:2], side, side, 3)

    def _planes(self, pixels: Float[Array, "*b y x 3"]) -> Float[Array, "*b y x k"]:
        """The grey planes whose co-occurrences count. `first` is the paper's: channel 0 of grey images, as the model sees them."""
        channel = self._loss.cooccurrence.channel
        if channel == "first":
            return pixels[..., :1]
        if channel == "rgb":
            return pixels
        mean, std = (np.asarray(self._model[name], pixels.dtype) for name in ("mean", "std"))
        # Clipped: a prediction may leave [0, 1], where densities are not defined. Out there this term has no gradient, the others have.
        colours = jnp.clip(pixels * std + mean, 1 / 255, 1.0)
        if channel == "luminance":
            plane = luminance(colours)
        elif channel == "hematoxylin":
            plane = hematoxylin_od(colours)
        else:
            plane = optical_density(colours).mean(axis=-1)
        return plane[..., None]

    def _sharpness(self, step: Any) -> dict[str, Any]:
        """`sharpness` and the window of levels; with a curriculum the former rises over the steps in which the term is at work."""
        glcm = self._loss.cooccurrence
        end, start = float(glcm.sharpness), float(glcm.sharpness_start)
        if not start:
            return {"sharpness": end or None}
        begin = self._start if self._start and not self._phases[0]["glcm"] else 0
        share = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(self._steps - begin, 1), 0.0, 1.0)
        # The window is compiled in, so it must hold the widest membership of the run.
        return {"sharpness": start + (end - start) * share, "window": -(-window_for(min(start, end), glcm.levels) // 2)}

    # Ranges of values -------------------------------------------------------------------------------------------------------------------

    def measure(self, batches: Any, count: int) -> dict[str, Any]:
        """One pass over the training images: `pixel_range` of normalised values over all channels, `value_range` of the co-occurrence channel.

        Args:
            batches: dicts of `image` uint8 [b, h, w, 3] and `mask` [b], 0 for padding.
            count: how many images there are, for the progress bar.

        Returns:
            Nothing where no term needs ranges.
        """
        if not self.needs_range:
            return {}
        mean, std = (np.asarray(self._model[name], np.float32) for name in ("mean", "std"))

        @jax.jit
        def one(images: Array) -> tuple[Array, Array, Array]:
            pixels = (images.astype(jnp.float32) / 255 - mean) / std
            planes = self._planes(pixels)
            return jnp.stack([pixels.min(), pixels.max()]), jnp.stack([planes.min(), planes.max()]), planes

        bounds = self._bounds()
        pixel, value = np.array([np.inf, -np.inf]), np.array([np.inf, -np.inf])
        histogram = np.zeros(_BINS, np.int64)
        with progress("range of values", count, "images") as bar:
            for batch in batches:
                images = np.asarray(batch["image"])[np.asarray(batch["mask"]) > 0]
                if not len(images):
                    continue
                pixels, planes, values = jax.device_get(one(images))
                pixel = np.array([min(pixel[0], pixels[0]), max(pixel[1], pixels[1])])
                value = np.array([min(value[0], planes[0]), max(value[1], planes[1])])
                if self._loss.cooccurrence.clip_percentile:
                    histogram += np.histogram(np.clip(values, *bounds), _BINS, bounds)[0]  # compiled values may round beyond them
                bar.advance(len(images))
        # The paper's range is that of all channels after normalisation; its channel 0 is binned with it.
        if self._loss.cooccurrence.channel in ("first", "rgb"):
            value = pixel
        if tail := float(self._loss.cooccurrence.clip_percentile):
            shares = np.cumsum(histogram) / histogram.sum()
            edges = np.linspace(*bounds, _BINS + 1)
            value = np.array([edges[np.searchsorted(shares, tail / 100)], edges[np.searchsorted(shares, 1 - tail / 100) + 1]])
        for low, high, what in ((*pixel, "pixel"), (*value, self._loss.cooccurrence.channel)):
            if not high > low:
                raise ConfigError(
                    f"every {what} value of the training images is {low:g}: blank images have no texture to learn from; check config.data.dir"
                )
        return {"pixel_range": [float(x) for x in pixel], "value_range": [float(x) for x in value]}

    def _bounds(self) -> tuple[float, float]:
        """Bounds that no value of the co-occurrence channel can leave."""
        model = self._model
        pixels = jnp.asarray([[(corner - m) / s for m, s in zip(model.mean, model.std, strict=True)] for corner in (0.0, 1.0)], jnp.float32)
        if self._loss.cooccurrence.channel == "hematoxylin":
            # Red absorbs haematoxylin alone of the two stains: black red over white green and blue is the extreme.
            pixels = jnp.asarray([[(c - m) / s for c, m, s in zip(corner, model.mean, model.std, strict=True)] for corner in np.ndindex(2, 2, 2)])
        planes = self._planes(pixels[:, None, None])
        return float(planes.min()), float(planes.max())

    def _range(self, constants: Mapping[str, Any], name: str) -> tuple[float, float]:
        if name == "value_range" and len(self._loss.cooccurrence.value_range):
            low, high = self._loss.cooccurrence.value_range
            return float(low), float(high)
        if name not in constants:
            raise ConfigError(
                f"the loss needs {name}, which a run measures over its training images before the first step; train with `wavepath train`,"
                " or set task.constants to what task.measure(source) gives"
            )
        low, high = constants[name]
        return float(low), float(high)

    # Settings ---------------------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        loss, glcm, window, patch = self._loss, self._loss.cooccurrence, self._loss.ssim_window, self._model.patch
        for problem, message in (
            (
                any(not any(phase.values()) for phase in self._phases),
                "all weights of the reconstruction, or of its second phase, are 0; set config.loss.mse, ssim or glcm (config.loss.second.mse, ...)",
            ),
            (
                any(weight < 0 for phase in self._phases for weight in phase.values()),
                "a weight of config.loss is negative, which would reward a bad reconstruction; set it to 0 or more",
            ),
            (
                loss.norm_pix and self.needs_range,
                "config.loss.norm_pix=True predicts patches without their mean and contrast, which SSIM and GLCM compare;"
                " set config.loss.norm_pix=False",
            ),
            (window.kind not in ("gaussian", "uniform"), f"config.loss.ssim_window.kind={window.kind!r} is unknown; choose gaussian or uniform"),
            (window.scale not in ("image", "data"), f"config.loss.ssim_window.scale={window.scale!r} is unknown; choose image or data"),
            (
                "ssim" in self.used and (window.size < 3 or window.size % 2 == 0 or window.size > patch),
                f"config.loss.ssim_window.size={window.size} must be odd, at least 3, and fit into config.model.patch={patch}",
            ),
            (glcm.channel not in CHANNELS, f"config.loss.cooccurrence.channel={glcm.channel!r} is unknown; choose one of {', '.join(CHANNELS)}"),
            (not 0 <= glcm.clip_percentile < 50, f"config.loss.cooccurrence.clip_percentile={glcm.clip_percentile} must be at least 0 and below 50"),
            (
                len(glcm.value_range) not in (0, 2) or (len(glcm.value_range) == 2 and not glcm.value_range[0] < glcm.value_range[1]),
                f"config.loss.cooccurrence.value_range={tuple(glcm.value_range)} is two rising numbers, or empty to measure them",
            ),
            (glcm.sharpness < 0 or glcm.sharpness_start < 0, "config.loss.cooccurrence.sharpness and sharpness_start must be at least 0"),
            (
                "glcm" in self.used and glcm.membership == "hard",
                "config.loss.cooccurrence.membership=hard has no gradient, so nothing is learnt from it; choose sigmoid or triangular",
            ),
            (
                glcm.sharpness_start > 0 and glcm.sharpness <= 0,
                "config.loss.cooccurrence.sharpness_start begins a curriculum; say where it ends with config.loss.cooccurrence.sharpness",
            ),
        ):
            if problem:
                raise ConfigError(message)
        if "glcm" in self.used:
            plane = jax.ShapeDtypeStruct((1, patch, patch), jnp.float32)
            try:  # what the operator itself refuses, said before any data is read
                for sharpness in filter(None, (float(glcm.sharpness_start), float(glcm.sharpness))):
                    make_membership(glcm.membership, glcm.levels, sharpness, None)  # traced below, where it cannot be looked at
                jax.eval_shape(lambda x: self._distance(x, x, 0, (0.0, 1.0)), plane)
            except GlcmError as error:
                raise ConfigError(f"config.loss.cooccurrence: {error}") from None


def _step_number(value: int | str) -> int | None:
    text = str(value).strip()
    if text and not text.isdigit():
        raise ConfigError(
            f"config.loss.second.start={value!r} depends on the length of the run; call wavepath.training.durations.resolve first, or give steps"
        )
    return int(text) if text else None
