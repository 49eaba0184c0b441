"""Puts a folder of pairs together when all slides are done: which are for testing, shards in order, tables, a picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from wavepath import __version__
from wavepath.data import manifest as mf
from wavepath.data import pair_records as pr
from wavepath.data import pyramid_places as places
from wavepath.data import records, tiles
from wavepath.data.pair_files import PairFiles
from wavepath.files import atomic_path, write_json, write_text

_PICTURED = 6  # pairs in the picture, evenly over all,
_PICTURE_SIDE = 384  # at this side in pixels
_CHECKS = 6  # fields of the checkerboard along a side
_GAP = 4


def publish(
    folder: mf.PreparedFolder, rows: Sequence[pr.PairSlideRow], members: Mapping[str, Sequence[PairFiles]], config: ConfigDict, origin: str,
    divided: bool,
) -> tuple[list[pr.PairSlideRow], list[pr.PairRow]]:
    """Divides the slides, moves their shards to their places and writes the tables and TFDS's metadata, these last.

    Args:
        rows: of all slides, in the order of their ids.
        members: the pairs of each, for those that failed as a whole.
        origin: the folder that they come from, for settings.json.
        divided: whether the pairs said themselves on which side of the split they are.

    Returns:
        The rows with their counts by split, and all pairs: the stored ones in the order of the dataset, then the others.
    """
    known: dict[str, list[pr.PairRow]] = {}
    for row in rows:
        stage = mf.read_stage(folder.slide(row.slide_id) / mf.INFO)
        if stage is None:  # something went wrong with the slide as a whole
            known[row.slide_id] = [pr.PairRow(row.slide_id, pair.name, pair.split, reason=row.reason) for pair in members[row.slide_id]]
        else:
            known[row.slide_id] = [pr.PairRow(**pair) for pair in stage["pairs"]]
    whole = [row.slide_id for row in rows if row.status == mf.OK]
    if divided:
        lying = {(slide, split): split for slide in whole for split in folder.shards[slide]}
    else:
        share = config.pairs.test_share
        # Of the slides that gave something; with one left, none can be held out.
        side = places.split_slides({slide: slide for slide in whole}, share, config.seed) if len(whole) > 1 or not 0 < share < 1 else {}
        # Each has one shard, under the side where an earlier run had put it.
        lying = {(slide, next(iter(folder.shards[slide]))): side.get(slide, "train") for slide in whole}
    targets: dict[tuple[str, str], Path] = {}
    listed: list[pr.PairRow] = []
    splits: dict[str, tuple[list[int], int]] = {}
    counted = {(slide, split): 0 for slide in known for split in pr.SPLITS}
    for split in pr.SPLITS:
        mine = [key for key, side_of in lying.items() if side_of == split]
        lengths, size = [], 0
        for number, (slide, part) in enumerate(mine):
            path = folder.out / records.shard_name(number, len(mine), pr.DATASET, split)
            targets[slide, part] = path
            here = [row for row in known[slide] if row.status == pr.STORED and (not divided or row.split == split)]
            listed += [dataclasses.replace(row, split=split, shard=path.name) for row in here]
            lengths.append(len(here))
            counted[slide, split] += len(here)
            size += folder.shards[slide][part].stat().st_size
        if lengths:
            splits[split] = (lengths, size)
    listed += [row for slide in known.values() for row in slide if row.status != pr.STORED]
    folder.arrange(targets)
    rows = [dataclasses.replace(row, **{split: counted[row.slide_id, split] for split in pr.SPLITS}) for row in rows]
    settings = dict(format=mf.FORMAT, version=__version__, origin=origin, config={"pairs": config.pairs.to_dict(), "seed": config.seed})
    write_json(folder.out / mf.SETTINGS, settings)
    if not whole:
        folder.unpublish()
        (folder.out / mf.OVERVIEW).unlink(missing_ok=True)
    write_text(folder.out / mf.PAIRS, mf.manifest_text(listed, pr.PairRow))
    write_text(folder.out / mf.MANIFEST, mf.manifest_text(rows, pr.PairSlideRow))
    if whole:
        count = sum(row.tiles for row in rows)
        described = f"{count} pairs of H&E and immunostain of {len(whole)} slides made by wavepath {__version__}; pairs.csv lists them."
        pr.write_metadata(folder.out, splits, config.pairs.codec, described)
        write_overview(folder.out)
    return rows, listed


def checkerboard(first: np.ndarray, second: np.ndarray, fields: int = _CHECKS) -> np.ndarray:
    """Two pictures of one size in turns: where they are aligned, structures go on over the edges."""
    height, width = first.shape[:2]
    odd = (np.arange(height)[:, None] * fields // height + np.arange(width)[None] * fields // width) % 2
    return np.where(odd[..., None] == 1, second, first)


def write_overview(out: Path) -> None:
    """A picture of a few pairs, one a row: H&E, immunostain, and both in turns, with the estimated shift."""
    from PIL import Image, ImageDraw

    shards = pr.PairShards(out)
    picked = sorted({round(place) for place in np.linspace(0, len(shards) - 1, min(_PICTURED, len(shards)))})
    band, side = 16, _PICTURE_SIDE
    sheet = Image.new("RGB", (3 * (side + _GAP) + _GAP, len(picked) * (side + band + _GAP) + _GAP), (255, 255, 255))
    write = ImageDraw.Draw(sheet)
    for line, index in enumerate(picked):
        row, top = shards.rows[index], _GAP + line * (side + band + _GAP)
        he, ihc = (tiles.decode_tile(data) for data in shards.images(index))
        square = min(he.shape[:2])
        pictures = [Image.fromarray(np.ascontiguousarray(image[:square, :square])) for image in (he, ihc, checkerboard(he, ihc))]
        name = row.name.encode("ascii", "replace").decode()
        shift = "" if row.dx is None else f"shift {row.dx}, {row.dy} px" + (", corrected" if row.corrected else "")
        shift += "" if row.sure is None else f" (peak {row.peak:.1f}, {'sure' if row.sure else 'NOT sure'})"
        texts = [f"{name} {row.split}", f"{row.label} {row.width} x {row.height} px" + (f", {row.blur} out of focus" if row.blur else ""), shift]
        for column, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            left = _GAP + column * (side + _GAP)
            write.text((left, top), text.strip(), fill=(0, 0, 0))
            way = Image.Resampling.NEAREST if square < side else Image.Resampling.BICUBIC
            sheet.paste(picture.resize((side, side), way), (left, top + band))
    with atomic_path(out / mf.OVERVIEW) as path:
        sheet.save(path, format="JPEG", quality=90)
