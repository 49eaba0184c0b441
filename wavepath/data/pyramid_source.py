"""Pyramids as a source of aligned windows: low resolution, high resolution, and the level between where the scale is above 2 (METHODS 4.1, 4.7).

An example is a window of a sample: `window` px of its low resolution, every `stride` px (the last one flush with the edge), and what the same place
is at the other levels. High resolution is the finest level. Low resolution is a bicubic reduction of it (`lr_source="bicubic"`: Pillow's,
antialiased, on the whole sample, 8 bits), or the pyramid's own level (`"pyramid"`). `next`, the reference I_GT' of METHODS 4.1, is the pyramid's
level above the low resolution; at 2x it is the high resolution, and no column of its own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath.data.decode import thread_count
from wavepath.data.manifest import one_line
from wavepath.data.pyramid_records import PyramidShards, SampleRow, is_pyramids
from wavepath.data.sources import Source, read_slide_list
from wavepath.data.tiles import decode_tile
from wavepath.data.windows import WindowSource, for_training
from wavepath.errors import ConfigError, DatasetError

SPLITS = ("train", "test", "all")
LR_SOURCES = ("bicubic", "pyramid")
SCALES = (2, 4, 8)
_HOW = "make them with `wavepath pyramids --slides SLIDES --out PYRAMIDS` and give --config.data.dir=PYRAMIDS"


class PyramidSource(WindowSource):
    """Windows of the samples of a folder that `wavepath pyramids` made; safe to use from several threads.

    Args:
        folder: the pyramids.
        split: `train`, `test` or `all`.
        scale: 2, 4 or 8.
        window: side of the low-resolution windows in px.
        stride: px between windows; 0: `window`.
        lr_source: `bicubic` or `pyramid`.
        exclude: slides to leave out.
        threads: that decode samples.
        cache_mb: MiB of decoded samples that are kept.

    Attributes:
        samples: facts about each sample of the split, for `whole`: `slide`, `x`, `y` (centre, level-0 px), `mpp` (of the high resolution), `mpps`
            (of each level; both None where not known), `width`, `height` (of the high resolution in px), `label`, `split`, `tissue`,
            `image` (of single images the file, below their folder).
        mean: RGB of the training split's finest level, 0 to 1.

    Raises:
        DatasetError: no whole pyramids there, too few levels for the scale, slides to exclude that are not there, or samples that are all smaller
            than a window. ConfigError: an unknown split, scale or source of low resolution.
    """

    kind = "pyramids"

    def __init__(
        self, folder: Path, split: str = "train", *, scale: int = 2, window: int = 80, stride: int = 0, lr_source: str = "bicubic",
        exclude: Sequence[str] = (), threads: int = 2, cache_mb: float = 512,
    ):
        for name, value, known in (("split", split, SPLITS), ("scale", scale, SCALES), ("lr_source", lr_source, LR_SOURCES)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; choose from {', '.join(map(str, known))}")
        self.name, self.split, self.scale, self.window, self.lr_source = str(folder), split, int(scale), int(window), lr_source
        self.threads = thread_count(threads)
        self._shards = PyramidShards(Path(folder))
        self.mean, self.pyramids = self._shards.mean, MappingProxyType(self._shards.config)
        self._levels = self._needed_levels()
        self._made = self._shards.made(self._levels["lr"]) if "lr" in self._levels else {}
        self._rows = self._chosen(self._shards.rows, exclude)
        self.samples = [self._facts(row) for _, row in self._rows]
        self._open(
            {"lr": 1, "hr": self.scale} | ({"next": 2} if self.scale > 2 else {}), self.scale, int(stride) or self.window, cache_mb,
            (f"{self.window * self.scale} px a side, which {self.scale}x with windows of {self.window} px (patch + margin) needs",
             "lower --config.superres.patch, or make larger crops"),
        )

    def _needed_levels(self) -> dict[str, int]:
        """The stored level of each column; low resolution has none where it is made."""
        doublings = self.scale.bit_length() - 1
        needed = {"hr": 0} | ({"next": doublings - 1} if self.scale > 2 else {}) | ({"lr": doublings} if self.lr_source == "pyramid" else {})
        if max(needed.values()) >= self._shards.levels:
            other = ", or take the low resolution from the finest level with --config.superres.lr_source=bicubic" if "lr" in needed else ""
            raise DatasetError(
                f"{self.name} has {self._shards.levels} levels; {self.scale}x with lr_source={self.lr_source} needs {max(needed.values()) + 1}: make "
                f"them with `wavepath pyramids --levels {max(needed.values()) + 1}`{other}"
            )
        return needed

    def _facts(self, row: SampleRow) -> dict[str, Any]:
        mpps = tuple(None if row.mpp is None else row.mpp * 2**level for level in range(self._shards.levels))
        width, height = (extent // self.scale * self.scale for extent in (row.width, row.height))
        return dict(
            slide=row.slide_id, x=row.x, y=row.y, mpp=row.mpp, mpps=mpps, width=width, height=height, label=row.label, split=row.split,
            tissue=row.tissue, image=row.image,
        )

    def _name(self, facts: Mapping[str, Any]) -> str:
        return f"{facts['image'] or facts['slide']}_{facts['x']}_{facts['y']}"

    def _decoded(self, sample_index: int) -> dict[str, np.ndarray]:
        from PIL import Image

        number, row = self._rows[sample_index]
        facts = self.samples[sample_index]
        images = {}
        for (name, level), data in zip(self._levels.items(), self._shards.images(number, list(self._levels.values())), strict=True):
            # Sizes that the scale does not divide lose a few pixels at the right and below, at every level the same.
            height, width = facts["height"] >> level, facts["width"] >> level
            try:
                image = decode_tile(data)
                if image.shape[0] < height or image.shape[1] < width:
                    raise DatasetError(f"it has {image.shape[1]} x {image.shape[0]} px")
            except Exception as error:  # the codecs have error classes of their own, one each
                raise DatasetError(
                    f"{self.name}: level {level} of sample {number} ({row.slide_id} at {row.x}, {row.y}) cannot be decoded ({one_line(error)}); "
                    f"delete {row.shard} and run `wavepath pyramids` again, or train with --config.data.on_corrupt=replace"
                ) from None
            images[name] = image[:height, :width]
        if "lr" not in images:
            size = facts["width"] // self.scale, facts["height"] // self.scale
            images["lr"] = np.asarray(Image.fromarray(np.ascontiguousarray(images["hr"])).resize(size, Image.Resampling.BICUBIC))
        return images

    def describe(self) -> str:
        slides = {sample["slide"] for sample in self.samples}
        made = Counter(how for slide, how in self._made.items() if slide in slides)
        told = "".join(f", in {count} of {len(slides)} slides made by {how}" for how, count in sorted(made.items()))
        return (
            f"{len(self)} windows of {self.window} px for {self.scale}x in {len(self.samples)} samples ({self._extent()}) of "
            f"{len(slides)} slides; low resolution: {self.lr_source}{told}"
        )


def open_pyramids(config: ConfigDict, split: str = "train") -> PyramidSource:
    """The pyramids that `config.data.dir` names, as `config.superres` wants them; `data.exclude_slides` applies. A split may be empty.

    Raises:
        ConfigError, DatasetError: see `PyramidSource`; or `data.dir` is not a folder of pyramids.
    """
    data, settings = config.data, config.superres
    if not data.dir or data.slides:
        raise ConfigError(f"super-resolution {'does not stream from slides' if data.slides else 'learns from pyramids'}; {_HOW}")
    folder = Path(data.dir)
    if not is_pyramids(folder):
        found = "there is no such folder" if not folder.is_dir() else "there are none in it"
        raise DatasetError(f"task 'superres' learns from pyramids, but of {folder} {found}; {_HOW}")
    exclude = read_slide_list(Path(data.exclude_slides)) if data.exclude_slides else []
    return PyramidSource(
        folder, split, scale=int(settings.scale), window=int(settings.patch) + int(settings.margin), stride=int(settings.patch),
        lr_source=settings.lr_source, exclude=exclude, threads=data.threads, cache_mb=data.cache_mb,
    )


def open_training(config: ConfigDict) -> Source:
    """The training split as a source for the loop: `data.max_tiles` counts windows.

    Raises:
        DatasetError: as `open_pyramids`; nothing to train on; samples of several resolutions without `data.mixed_mpp`.
    """
    source = open_pyramids(config, "train")
    nothing = f"{source.name} has no sample to train on (split {source.pyramids.get('split')}); see its samples.csv and manifest.csv"
    return for_training(source, config.data, "pyramids", nothing)


def refuse_pyramids(folder: Path, task: str) -> None:
    """Raises DatasetError where a task that learns from tiles is given pyramids."""
    if is_pyramids(folder):
        raise DatasetError(
            f"{folder} holds pyramids, which are for task 'superres' (configs/cwt_net.py), not {task!r}; make tiles with `wavepath prepare`"
        )
