"""Stained pairs as a source of windows: H&E and immunostain, cut at the same place (METHODS 3.2 to 3.5).

An example is a window of a pair, `crop + margin` px a side, every `crop` px (the last one flush with the edge): the task takes a random crop out of
it, the same of both sides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath.data.decode import thread_count
from wavepath.data.manifest import one_line
from wavepath.data.pair_records import SIDES, PairShards, is_pairs
from wavepath.data.sources import STAIN_TASKS, Source, read_slide_list
from wavepath.data.tiles import decode_tile
from wavepath.data.windows import WindowSource, for_training
from wavepath.errors import ConfigError, DatasetError

SPLITS = ("train", "test", "all")
_HOW = "make them with `wavepath pairs --folders ROOT --out PAIRS` and give --config.data.dir=PAIRS"


class PairSource(WindowSource):
    """Windows of the pairs of a folder that `wavepath pairs` made, columns `he` and `ihc`; safe to use from several threads.

    Args:
        folder: the pairs.
        split: `train`, `test` or `all`.
        window: side of the windows in px.
        stride: px between windows; 0: `window`.
        exclude: slides to leave out.
        threads: that decode.
        cache_mb: MiB of decoded pairs that are kept.

    Attributes:
        samples: facts about each pair of the split, for `whole`: `name`, `slide`, `label`, `split`, `x`, `y`, `mpp`, `width`, `height`, `dx`, `dy`
            (the estimated shift that remains, in px) and `sure` (whether it can be relied upon).

    Raises:
        DatasetError: no whole pairs there, slides to exclude that are not there, or pairs that are all smaller than a window. ConfigError: an
            unknown split.
    """

    kind = "pairs"

    def __init__(
        self, folder: Path, split: str = "train", *, window: int = 512, stride: int = 0, exclude: Sequence[str] = (), threads: int = 2,
        cache_mb: float = 512,
    ):
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}; choose from {', '.join(SPLITS)}")
        self.name, self.split, self.window, self.threads = str(folder), split, int(window), thread_count(threads)
        self._shards = PairShards(Path(folder))
        self.pairs = MappingProxyType(self._shards.config)
        self._rows = self._chosen(self._shards.rows, exclude)
        self.samples = [
            dict(
                name=row.name, slide=row.slide_id, label=row.label, split=row.split, x=row.x, y=row.y, mpp=row.mpp, width=row.width,
                height=row.height, dx=0 if row.corrected else row.dx, dy=0 if row.corrected else row.dy, sure=bool(row.sure),
            )
            for _, row in self._rows
        ]
        self._open(
            dict.fromkeys(SIDES, 1), 1, int(stride) or self.window, cache_mb,
            (f"{self.window} px a side, which the windows (crop + margin) have", "lower --config.stain.crop or --config.stain.margin"),
        )

    def _decoded(self, sample_index: int) -> dict[str, np.ndarray]:
        number, row = self._rows[sample_index]
        images = {}
        for side, data in zip(SIDES, self._shards.images(number), strict=True):
            try:
                image = decode_tile(data)
                if image.shape != (row.height, row.width, 3):
                    raise DatasetError(f"it has {image.shape[1]} x {image.shape[0]} px")
            except Exception as error:  # the codecs have error classes of their own, one each
                raise DatasetError(
                    f"{self.name}: {side} of pair {number} ({row.name}) cannot be decoded ({one_line(error)}); delete {row.shard} and run "
                    "`wavepath pairs` again, or train with --config.data.on_corrupt=replace"
                ) from None
            images[side] = image
        return images

    def _name(self, facts: Mapping[str, Any]) -> str:
        return str(facts["name"])

    def describe(self) -> str:
        unsure = sum(not sample["sure"] for sample in self.samples)
        return (
            f"{len(self)} windows of {self.window} px in {len(self.samples)} pairs ({self._extent()}) of "
            f"{len({sample['slide'] for sample in self.samples})} slides" + (f"; of {unsure} pairs the shift is not known" if unsure else "")
        )


def open_pairs(config: ConfigDict, split: str = "train") -> PairSource:
    """The pairs that `config.data.dir` names, in windows of `stain.crop + stain.margin`; `data.exclude_slides` applies. A split may be empty.

    Raises:
        ConfigError, DatasetError: see `PairSource`; or `data.dir` is not a folder of pairs.
    """
    data, settings = config.data, config.stain
    if not data.dir or data.slides:
        raise ConfigError(f"{_HOW}; staining does not stream from slides")
    folder = Path(data.dir)
    if not is_pairs(folder):
        found = "there is no such folder" if not folder.is_dir() else "there are none in it"
        raise DatasetError(f"task {config.task!r} learns from stained pairs, but of {folder} {found}; {_HOW}")
    exclude = read_slide_list(Path(data.exclude_slides)) if data.exclude_slides else []
    return PairSource(
        folder, split, window=int(settings.crop) + int(settings.margin), stride=int(settings.crop), exclude=exclude, threads=data.threads,
        cache_mb=data.cache_mb,
    )


def open_training(config: ConfigDict) -> Source:
    """The training split as a source for the loop: `data.max_tiles` counts windows.

    Raises:
        DatasetError: as `open_pairs`; nothing to train on; pairs of several resolutions without `data.mixed_mpp`.
    """
    source = open_pairs(config, "train")
    return for_training(source, config.data, "pairs", f"{source.name} has no pair to train on; see its pairs.csv and manifest.csv")


def refuse_pairs(folder: Path, task: str) -> None:
    """Raises DatasetError where a task that learns from tiles is given pairs."""
    if is_pairs(folder):
        tasks = " and ".join(STAIN_TASKS)
        raise DatasetError(f"{folder} holds stained pairs, which are for tasks {tasks}, not {task!r}; make tiles with `wavepath prepare`")
