"""Frechet distance of two sets of images: between Gaussians of the same mean and covariance as their features.

    images -> whole, or windows that do not overlap -> a network -> features [n, d] -> |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

The network is InceptionV3 with weights from the user's own file (then it is the FID of papers), or the encoder of a run. Nothing is ever fetched.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.data.sources import open_source
from wavepath.errors import CheckpointError, ConfigError, DatasetError, WavepathError
from wavepath.evaluation.weights import check_weights, read_weights
from wavepath.models import inception as network
from wavepath.tasks.base import task_class, trained_on
from wavepath.tasks.stain_encoders import MULTIPLE, least_side
from wavepath.training import parallel
from wavepath.training.checkpoint import restore_run

HOW = "Mixed_5b.branch1x1.conv.weight, Mixed_5b.branch1x1.bn.running_mean and so on, of pytorch_fid's fid_inception_v3 or torchvision's inception_v3"
WHOLE = "whole"
ENCODERS = "stain_encoders"
_BATCH = 8
_ANOTHER_MPP = 1.25  # images this much finer or coarser than what a run has learned show other sizes of nuclei
CONVENTIONS = {
    "frechet": "distance between Gaussians fitted to features, covariances divided by n - 1, float64; biased upwards where samples are few, and with "
    "fewer samples than features the covariances have not full rank: only values of one table, with one number of samples, compare",
    "inception": "2048 features of InceptionV3 after its last mean, as pytorch_fid: whole images resized to 299 px, bilinear without antialiasing",
    "run": "features of a run's encoder, of windows of the side that it was trained on, side by side about the middle of the image; what is left at "
    "its edges is not looked at. An encoder that a method was trained with favours that method",
}


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """The distance of two sets of features, from 0; see `CONVENTIONS`.

    The trace of (S_a S_b)^(1/2) is the sum of the singular values of A B^T, where A and B are the centred features over (n - 1)^(1/2): so no matrix
    root is taken, sets of fewer samples than features need no regularisation, and rounding does not go through a square root.

    Raises:
        DatasetError: widths that differ, fewer than two samples, values that are not finite.

    Source: Dowson & Landau, J. Multivariate Anal. 12, 1982; METHODS 3.6.
    """
    a, b = (np.asarray(features, np.float64) for features in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DatasetError(f"features {a.shape} and {b.shape} do not compare; both must be [samples, width] of one network")
    if min(len(a), len(b)) < 2:
        raise DatasetError(f"the Frechet distance of {len(a)} and {len(b)} samples is not defined; give at least two images of each, or leave it out")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DatasetError("features that are not finite have no Frechet distance; the network that made them is damaged")
    means = [features.mean(axis=0) for features in (a, b)]
    roots = [_root(features - mean) for features, mean in zip((a, b), means, strict=True)]
    spread = sum(float(np.square(root).sum()) for root in roots)
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return max(0.0, float(np.square(means[0] - means[1]).sum()) + spread - 2 * shared)


def _root(centred: np.ndarray) -> np.ndarray:
    """R of at most d rows with R^T R the covariance."""
    centred = centred / np.sqrt(len(centred) - 1)
    return np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred


def caveat(samples: int, dim: int) -> str:
    """What must be said of a distance from so few samples; empty where there are enough."""
    if samples > dim:
        return ""
    return f"{samples} samples of {dim} features: the covariances have not full rank, and the Frechet distance compares within one table alone"


def another_mpp(features: "Features", found: Iterable[float | None]) -> str:
    """What must be said where images have other resolutions, in um per px, than a run of features was trained on; empty where they have not, or where
    either is not known."""
    far = [mpp for mpp in found if mpp and features.mpp and not 1 / _ANOTHER_MPP <= mpp / features.mpp <= _ANOTHER_MPP]
    if not far:
        return ""
    return (
        f"features of {features.name}: trained at {features.mpp:.4g} um per px, and {len(far)} images have others (first: {far[0]:.4g}); their"
        " Frechet distance says little: take a run that was trained at theirs"
    )


def windows(images: Sequence[UInt8[np.ndarray, "h w 3"]], side: int) -> list[np.ndarray]:
    """Squares that lie side by side about the middle of each image; of an image that is smaller, its middle, in its own size."""
    found = []
    for image in images:
        sides = [min(side, extent) for extent in image.shape[:2]]
        counts = [extent // size for extent, size in zip(image.shape[:2], sides, strict=True)]
        top, left = ((extent - count * size) // 2 for extent, count, size in zip(image.shape[:2], counts, sides, strict=True))
        for row in range(counts[0]):
            for column in range(counts[1]):
                y, x = top + row * sides[0], left + column * sides[1]
                found.append(image[y : y + sides[0], x : x + sides[1]])
    return found


class Features:
    """A network that turns images into features: call it with images, see `inception` and `of_run`.

    Attributes:
        name: short: `inception`, or the task of the run.
        about: what a reader of the distance must know of them.
        dim: features of a sample.
        patches: `whole`, or the side in px of the windows that images are cut into.
        mpp: micrometres per px of what the run was trained on; None: not known, or no run.
    """

    mpp: float | None = None

    def __init__(
        self, name: str, about: str, dim: int, patches: int | str, encode: Callable[[np.ndarray], jax.Array], multiple: int = 1, least: int = 1
    ):
        if patches != WHOLE and (not isinstance(patches, int) or patches < least or patches % multiple):
            sides = f"at least {least}" + (f" and divisible by {multiple}" if multiple > 1 else "")
            raise ConfigError(f"patches={patches!r} is neither {WHOLE!r} nor a side in px that {name} takes ({sides})")
        self.name, self.dim, self.patches = name, dim, patches
        self.about = f"{about}, " + ("whole images" if patches == WHOLE else f"windows of {patches} px")
        self._encode, self._multiple, self._least = encode, multiple, least

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n d"]:
        """Features float64[n, dim], image after image; n is the number of windows, or of images.

        Raises:
            DatasetError: an image that is too small for the network.
        """
        parts = list(images) if self.patches == WHOLE else windows(images, int(self.patches))
        parts = [self._fitting(part) for part in parts]
        found = np.zeros((len(parts), self.dim))
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, part in enumerate(parts):
            alike[part.shape].append(number)
        for numbers in alike.values():
            for start in range(0, len(numbers), _BATCH):
                some = numbers[start : start + _BATCH]
                # Filled up to a power of two: a handful of sizes to compile, and a single image costs one.
                rows = some + some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
                found[some] = np.asarray(self._encode(np.stack([parts[number] for number in rows])), np.float64)[: len(some)]
        return found

    def _fitting(self, part: np.ndarray) -> np.ndarray:
        """The middle of a part, of sides that the network takes."""
        height, width = part.shape[:2]
        if min(height, width) < self._least:
            raise DatasetError(f"an image of {width} x {height} px is too small for the features of {self.name}: they need {self._least} px")
        sides = [extent // self._multiple * self._multiple for extent in (height, width)]
        top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
        return part[top : top + sides[0], left : left + sides[1]]

    @classmethod
    def inception(cls, path: Path, patches: int | str = WHOLE) -> "Features":
        """InceptionV3 with weights from a .safetensors or .npz file.

        Args:
            patches: `whole`, as pytorch_fid, or the side of windows in px, each resized to 299.

        Raises:
            DatasetError: no such file, another format, arrays that are missing or of another shape (named).
        """
        weights = read_weights(path, f"--inception takes a .safetensors or .npz file with {HOW}")
        want = network.parameters()
        check_weights(path, weights, want, "InceptionV3", HOW)
        # Both have a classifier: the one trained by Google and that pytorch_fid took over has 1008 classes.
        classes = {1008: " (of pytorch_fid)", 1000: " (of torchvision: its distances are not those of papers)"}
        origin = classes.get(len(weights["fc.bias"]), "") if "fc.bias" in weights else ""
        on_device = {name: jnp.asarray(weights[name], jnp.float32) for name in want}
        # Apart, so that images of another size compile the resizing alone.
        resized = jax.jit(lambda images: network.resized(images.astype(jnp.float32) / 255))
        trunk = jax.jit(network.trunk)
        return cls("inception", f"InceptionV3{origin}", network.FEATURES, patches, lambda images: trunk(on_device, resized(images)))

    @classmethod
    def of_run(cls, run: Path, patches: int | str | None = None) -> "Features":
        """The encoder of a run: means of patches of a pretraining or fine-tuning run, or embeddings of immunostains by a run of `stain_encoders`.

        Args:
            patches: as of `inception`; None: the side of the images that it was trained on.

        Raises:
            ConfigError: a run without features. CheckpointError: no run folder, or no whole checkpoint.
        """
        run = Path(run)
        if not (run / "config.json").is_file():
            raise CheckpointError(f"{run} is no run folder (no config.json in it); give the --workdir of a `wavepath train`")
        task = configs.load_json(run / "config.json").task
        if task != ENCODERS and not task_class(task).embeds:
            raise ConfigError(f"{run} is a run of task {task!r}, which has no features; give a pretraining or fine-tuning run, or one of {ENCODERS}")
        device = parallel.Parallel("jit", jax.local_devices()[:1])
        config, made, state = restore_run(run, parallel=device)
        column, output = ("ihc", "ihc") if task == ENCODERS else ("image", "mean")
        side = int(config.stain.crop) if task == ENCODERS else int(config.prepare.tiles.size)
        predict = device.predict(made, (output,))

        def encode(images: np.ndarray) -> jax.Array:
            return predict(state, device.put({column: images}))[output]

        shapes = jax.eval_shape(lambda: made.predict(state, {column: jnp.zeros((1, side, side, 3), jnp.uint8)}, (output,)))
        # Of a run of tiles any image is cut to a square and resized to what its network takes.
        sizes = dict(multiple=MULTIPLE, least=least_side(config.stain)) if task == ENCODERS else {}
        about = f"{'embeddings' if task == ENCODERS else 'means of patches'} of {run} at step {int(state.step)}"
        features = cls(task, about, shapes[output].shape[-1], side if patches is None else patches, encode, **sizes)
        features.mpp = made.constants.get("mpp") if task == ENCODERS else _mpp_of_tiles(config)
        return features


def _mpp_of_tiles(config: ConfigDict) -> float | None:
    """Micrometres per px of the prepared tiles that a run was trained from, where they are still there and of one resolution."""
    if not config.data.dir or config.data.slides:
        return None
    try:
        source = open_source(config)
    except WavepathError:
        return None
    try:
        return trained_on(source).get("mpp")
    finally:
        source.close()
