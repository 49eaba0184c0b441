"""Puts a folder of pyramids together when all slides are done: which are for testing, shards in order, tables, mean RGB, a picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from wavepath import __version__
from wavepath.data import manifest as mf
from wavepath.data import pyramid_places as places
from wavepath.data import pyramid_records as pr
from wavepath.data import records, tiles
from wavepath.errors import DatasetError
from wavepath.files import atomic_path, write_json, write_text

_PICTURED = 6  # samples in the picture, evenly over all,
_PICTURE_SIDE = 320  # at this height in pixels
_GAP = 4


def publish(
    folder: mf.PreparedFolder, rows: Sequence[pr.PyramidRow], config: ConfigDict, origin: str
) -> tuple[list[pr.PyramidRow], tuple[float, ...]]:
    """Divides the slides, moves their shards to their places and writes the tables and TFDS's metadata, these last.

    Args:
        rows: of all slides, in the order in which their samples will be.
        origin: the folder that they come from, for settings.json.

    Returns:
        The rows with their counts by split, and the mean RGB in [0, 1] of the finest level over the training split (empty without samples).

    Raises:
        ConfigError: no two slides to divide.
    """
    whole = [row for row in rows if row.status == mf.OK]
    known = {row.slide_id: mf.read_stage(folder.slide(row.slide_id) / mf.INFO)["samples"] for row in whole}
    settings = dict(format=mf.FORMAT, version=__version__, origin=origin, config={"pyramids": config.pyramids.to_dict(), "seed": config.seed})
    if not whole:
        folder.unpublish()
        for name in (mf.SAMPLES, mf.OVERVIEW):
            (folder.out / name).unlink(missing_ok=True)
        write_json(folder.out / mf.SETTINGS, settings | {"mean_rgb": []})
        write_text(folder.out / mf.MANIFEST, mf.manifest_text(rows, pr.PyramidRow))
        return list(rows), ()
    if config.pyramids.split == "sample":
        lying = {(slide, split): split for slide, parts in known.items() for split in parts}
    else:
        side = places.split_slides({row.slide_id: row.case_id or row.slide_id for row in whole}, config.pyramids.test_share, config.seed)
        # Each has one shard, under the side where an earlier run had put it.
        lying = {(slide, next(iter(folder.shards[slide]))): side[slide] for slide in known}
    targets: dict[tuple[str, str], Path] = {}
    samples: list[pr.SampleRow] = []
    splits: dict[str, tuple[list[int], int]] = {}
    mpps = {row.slide_id: row.finest_mpp for row in whole}
    for split in pr.SPLITS:
        mine = [key for key, side_of in lying.items() if side_of == split]
        lengths, size = [], 0
        for number, (slide, part) in enumerate(mine):
            path = folder.out / records.shard_name(number, len(mine), pr.DATASET, split)
            targets[slide, part] = path
            facts = known[slide][part] if part in known[slide] else next(iter(known[slide].values()))
            samples += [
                pr.SampleRow(slide, split, x, y, width, height, mpps[slide], label, tissue, path.name, record, *image)
                for record, (x, y, width, height, label, tissue, _, *image) in enumerate(facts)
            ]
            lengths.append(len(facts))
            size += folder.shards[slide][part].stat().st_size
        if lengths:
            splits[split] = (lengths, size)
    mean = _mean(samples, known, lying)
    folder.arrange(targets)
    counted = {(slide, split): 0 for slide in known for split in pr.SPLITS}
    for sample in samples:
        counted[sample.slide_id, sample.split] += 1
    rows = [
        dataclasses.replace(row, train=counted.get((row.slide_id, "train"), 0), test=counted.get((row.slide_id, "test"), 0)) for row in rows
    ]
    write_json(folder.out / mf.SETTINGS, settings | {"mean_rgb": list(mean)})
    write_text(folder.out / mf.SAMPLES, mf.manifest_text(samples, pr.SampleRow))
    write_text(folder.out / mf.MANIFEST, mf.manifest_text(rows, pr.PyramidRow))
    pr.write_metadata(
        folder.out, splits, int(config.pyramids.levels), config.pyramids.codec,
        f"Aligned crops of {len(whole)} slides at {config.pyramids.levels} magnifications made by wavepath {__version__}; samples.csv lists them.",
        single=any(sample.image for sample in samples),
    )
    write_overview(folder.out)
    return rows, mean


def _mean(samples: Sequence[pr.SampleRow], known: dict, lying: dict) -> tuple[float, ...]:
    """Mean RGB over the pixels of the training split; over all where there is none."""
    wanted = "train" if any(sample.split == "train" for sample in samples) else "test"
    total, pixels = np.zeros(3), 0.0
    for (slide, part), split in lying.items():
        if split == wanted:
            for _, _, width, height, _, _, mean, *_ in known[slide].get(part) or next(iter(known[slide].values())):
                total += np.array(mean) * (width * height)
                pixels += width * height
    return tuple(round(float(value), 6) for value in total / pixels)


def write_overview(out: Path) -> None:
    """A picture of a few samples, one a row: every level at the same height, so that what the coarser ones lack can be seen."""
    from PIL import Image, ImageDraw

    shards = pr.PyramidShards(out)
    picked = sorted({round(place) for place in np.linspace(0, len(shards) - 1, min(_PICTURED, len(shards)))})
    band = 16
    sheet = Image.new("RGB", (shards.levels * (_PICTURE_SIDE + _GAP) + _GAP, len(picked) * (_PICTURE_SIDE + band + _GAP) + _GAP), (255, 255, 255))
    write = ImageDraw.Draw(sheet)
    for line, index in enumerate(picked):
        row, top = shards.rows[index], _GAP + line * (_PICTURE_SIDE + band + _GAP)
        for level, data in enumerate(shards.images(index, range(shards.levels))):
            image = Image.fromarray(tiles.decode_tile(data))
            left = _GAP + level * (_PICTURE_SIDE + _GAP)
            mpp = "" if row.mpp is None else f", {row.mpp * 2**level:.4g} um/px"
            name = row.slide_id.encode("ascii", "replace").decode()
            write.text((left, top), f"{name} {row.split}{mpp}" if level == 0 else f"{image.width} x {image.height} px{mpp}", fill=(0, 0, 0))
            # Pixels stay pixels: the finest level shrinks, the coarser ones are shown as they are.
            square = image.crop((0, 0, min(image.size), min(image.size)))
            way = Image.Resampling.NEAREST if square.width < _PICTURE_SIDE else Image.Resampling.BICUBIC
            sheet.paste(square.resize((_PICTURE_SIDE, _PICTURE_SIDE), way), (left, top + band))
    with atomic_path(out / mf.OVERVIEW) as path:
        sheet.save(path, format="JPEG", quality=90)


def read_rows(out: Path) -> list[pr.PyramidRow]:
    """The manifest of a folder of pyramids.

    Raises:
        DatasetError: there is none.
    """
    rows = mf.read_manifest(out, pr.PyramidRow, command=pr.COMMAND)
    if not rows:
        raise DatasetError(f"{out} lists no slides; run `{pr.COMMAND}` again")
    return rows
