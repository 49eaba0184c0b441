"""Pyramids of single images: the FTMS construction (METHODS 4.7). The lower levels are repeated bicubic halvings of the image itself.

An image is cut at its centre to a size that halves evenly; one whose sides are both two crops or more is cut into a grid of crops. For the split
every image is a slide of its own, or belongs to the group that a pattern finds in its name.
"""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data import manifest as mf
from wavepath.data import pyramid_places as places
from wavepath.data.images import decode_image, find_images
from wavepath.data.mpp import resolve
from wavepath.data.pyramids import PyramidJob, PyramidResult, Sample, check_settings, ordered_map, run_job
from wavepath.data.slide_lists import SlideRef
from wavepath.data.slide_runs import Report, match_labels
from wavepath.errors import ConfigError, SlideError, WavepathError


class ImagePyramids(PyramidJob):
    """The pyramids of images. `members`: the files of each group."""

    title, unit = "pyramids", "image"
    members: Mapping[str, Sequence[Path]] = {}

    def fingerprint(self, ref: SlideRef, *groups: str) -> str:
        settings = self.settings(groups)
        settings["label"] = self.label_of.get(ref.id, {})
        settings["images"] = [self._name(path) for path in self.members[ref.id]]  # which their samples carry
        settings["files"] = [mf.fingerprint(path, {}, None) for path in self.members[ref.id][1:]]
        return mf.fingerprint(ref.path, settings, self.mpp[ref.id])

    def _name(self, path: Path) -> str:
        return mf.printable(path.relative_to(self.root).as_posix())

    def samples(self, ref: SlideRef, facts: dict[str, Any], counts: Counter, seconds: dict[str, float], report: Report) -> Iterator[Sample]:
        settings, paths, mpp = self.config.pyramids, self.members[ref.id], self.mpp[ref.id]
        size, label = int(settings.size), self.label_of.get(ref.id, {}).get("label", "")
        facts.update(mpp=mpp, mpp_source="given" if mpp else "", finest_mpp=mpp, backend="image", own_levels="0")
        if settings.split == "sample":
            splits = places.split_samples(ref.id, [(index, 0) for index in range(len(paths))], settings.test_share, self.config.seed)
        else:
            splits = ["train"] * len(paths)  # a group moves as a whole, when all are done
        for number, path in enumerate(paths):
            begin = time.perf_counter()
            try:
                image = decode_image(path.read_bytes())
            except Exception as error:  # the codecs have error classes of their own, one each
                counts.update(places=1, unreadable=1)
                reason = mf.one_line(f"{path.name} cannot be read: {error}")
                if len(paths) == 1:
                    raise SlideError(reason) from None
                console.warn(f"{ref.id}: {reason}")
                continue
            seconds["read"] = seconds.get("read", 0.0) + time.perf_counter() - begin
            facts.update(height=image.shape[0], width=image.shape[1])
            if min(image.shape[:2]) < settings.min_size:
                counts.update(places=1, small=1)
                continue
            boxes = cut(*image.shape[:2], size, 2 ** (int(settings.levels) - 1))
            counts["places"] += len(boxes)
            kept = places.draw(path.as_posix(), boxes, int(settings.per_slide), self.config.seed)
            counts["limit"] += len(boxes) - len(kept)

            def make(box: tuple[int, int, int, int], image: np.ndarray = image, split: str = splits[number], path: Path = path) -> Sample:
                x, y, width, height = box
                crops = halvings(image[y : y + height, x : x + width], int(settings.levels))
                sample = self.encode(crops, x + width // 2, y + height // 2, label, split, mpp)
                return dataclasses.replace(sample, image=self._name(path))

            yield from ordered_map(make, kept, self.workers)
            report((number + 1) / len(paths), f"{number + 1}/{len(paths)} images")


def cut(height: int, width: int, size: int, unit: int) -> list[tuple[int, int, int, int]]:
    """Boxes (x, y, width, height) of the samples of an image: all of it but the few pixels at the border that do not halve evenly, or, where both
    sides have room for two, crops of `size`, the grid in the middle.
    """
    if min(height, width) < 2 * size:
        w, h = width // unit * unit, height // unit * unit
        return [((width - w) // 2, (height - h) // 2, w, h)]
    columns, rows = width // size, height // size
    left, top = (width - columns * size) // 2, (height - rows * size) // 2
    return [(left + column * size, top + row * size, size, size) for row in range(rows) for column in range(columns)]


def halvings(image: np.ndarray, levels: int) -> list[np.ndarray]:
    """The image and its repeated halvings, uint8, by Pillow's antialiased bicubic filter."""
    from PIL import Image

    out = [image]
    for _ in range(1, levels):
        height, width = out[-1].shape[:2]
        picture = Image.fromarray(np.ascontiguousarray(out[-1])).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
        out.append(np.asarray(picture))
    return out


def group_images(paths: Sequence[Path], folder: Path, pattern: str) -> dict[str, list[Path]]:
    """The files of each group: one by one under their paths without suffix (with it where two would be equal), or by the first group of a pattern.

    Raises:
        ConfigError: a pattern that is none, or that finds nothing in a name.
    """
    names = [path.relative_to(folder).as_posix() for path in paths]
    bare = [Path(name).with_suffix("").as_posix() for name in names]
    if not pattern:
        count = Counter(bare)
        return {(short if count[short] == 1 else name): [path] for path, name, short in zip(paths, names, bare, strict=True)}
    groups: dict[str, list[Path]] = {}
    for path, name in zip(paths, bare, strict=True):
        try:
            match = re.search(pattern, name)
            group = match and match[1]
        except (re.error, IndexError) as error:
            raise ConfigError(f"--group-pattern is a regular expression with one group, as in '^([^_]+)_', not {pattern!r} ({error})") from None
        if not group:
            # An image that became a group of its own in silence could be on both sides of the split.
            raise ConfigError(f"--group-pattern {pattern!r} finds nothing in {name!r}; give one that names the group of every image")
        groups.setdefault(group, []).append(path)
    return dict(sorted(groups.items()))


def make_image_pyramids(
    images: Path, out: Path, config: ConfigDict, *, group_pattern: str = "", slide_mpp: float | None = None, labels: Path | None = None,
    strict: bool = False, workers: int = 2,
) -> PyramidResult:
    """Samples of single images, stored as `make_pyramids` stores those of slides; an image that cannot be read is reported, and the rest goes on.

    Args:
        images: a folder of JPEG, PNG and TIFF images at any depth.
        group_pattern: regular expression with one group, searched in each image's path below the folder without suffix: images of one group are on
            one side of the split. Empty: each image is its own.
        slide_mpp: micrometres per pixel of all of them; None: not known.
        labels: table `case_id,slide_id,label`; the slide is the image or its group.

    Raises:
        WavepathError: as `make_pyramids`.
    """
    from wavepath.data.slides import read_labels

    check_settings(config)
    images, out = Path(images), Path(out)
    if not images.is_dir():
        raise WavepathError(f"there is no folder {images}; --images takes a folder of .jpg, .png or .tif images")
    if slide_mpp is not None:
        resolve((), slide_mpp, images)
    if out.resolve() in (images.resolve(), *images.resolve().parents):
        raise WavepathError(f"--out {out} is the folder of the images, or holds it; choose another one")
    paths = [path for path in find_images(images) if out.resolve() not in path.resolve().parents]
    if not paths:
        raise WavepathError(f"no images in {images}; give a folder of .jpg, .png or .tif images")
    members = group_images(paths, images, group_pattern)
    refs = [SlideRef(files[0], name) for name, files in members.items()]
    label_of = match_labels(refs, read_labels(labels) if labels else [])
    if config.pyramids.split == "slide":
        places.split_slides({ref.id: label_of.get(ref.id, {}).get("case_id") or ref.id for ref in refs}, config.pyramids.test_share, config.seed)
    job = ImagePyramids(images, config, workers, None, dict.fromkeys(members, slide_mpp))
    job.members, job.label_of = members, label_of
    return run_job(job, refs, out, whole_folder=True, strict=strict)
