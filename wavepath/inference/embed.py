"""Frozen features of tiles: a trained encoder over a prepared dataset, a folder of images, or slides; one HDF5 file for each slide.

A file is written whole or not at all and carries what it was made from, so running the command again embeds only what is missing or
outdated. Every batch has the same shape (the last is padded), so the encoder compiles once.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from wavepath.console import progress, say, warn
from wavepath.data.coords_source import CoordsStream, open_coords_stream, stored_overlap
from wavepath.data.pipeline import eval_batches
from wavepath.data.sources import Source, Span, open_source
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.files import folder_lock, writable_folder, write_json
from wavepath.inference.encoders import Encoder, colour_encoder, run_config, run_encoder
from wavepath.interop.features import SUFFIX, read_features, write_features
from wavepath.tasks import lineage


@dataclass(frozen=True)
class EmbedResult:
    """What was done: slides in all, whole already, failed (slide id -> reason), tiles embedded now, left out as unreadable, feature width."""

    slides: int
    reused: int
    failed: dict[str, str]
    tiles: int
    skipped: int
    width: int


def embed(
    run: Path | None,
    out: Path,
    *,
    data: Path | None = None,
    slides: Path | None = None,
    step: int | None = None,
    batch_size: int = 64,
    select: str = "all",
    mpp_csv: str = "",
    slide_mpp: float = 0.0,
    devices: int = 0,
    on_corrupt: str = "error",
    untrained: bool = False,
    colours: bool = False,
    coords: Path | None = None,
    tile_size: int = 0,
    strict: bool = False,
) -> EmbedResult:
    """Embeds every tile and writes `<out>/<slide_id>.h5`: class token (`features`), mean of patches (`features_mean`), `coords`.

    Args:
        run: run folder of `wavepath train`; its newest whole checkpoint is used, or `step`. With `colours` None, or a run whose settings slides
            are screened with.
        out: folder for the feature files, `embed.json` and nothing else.
        data: a prepared dataset or a folder of images. slides: slides to stream tiles from, screened with the run's settings.
        batch_size: tiles at once, over all devices.
        select: with `slides`: `all` tissue tiles (default), or `wavelet`, `random`, `threshold` as in `wavepath prepare`.
        mpp_csv, slide_mpp: pixel sizes for slides that carry none.
        on_corrupt: what happens to a slide with a tile that cannot be read: `error` (listed as failed, without a file), or `skip` (the tile is
            left out and counted; the slide counts as incomplete, and is tried again by the next call).
        untrained: the encoder as it was before the first step. colours: colour statistics in place of an encoder (`inference.encoders`).
        coords: with `slides`: a folder of TRIDENT's or CLAM's coordinates (or a file), whose tiles are embedded in their order, unscreened;
            `tile_size` px wide where given. strict: what does not match between slides and coordinates, or fails, is an error.

    Raises:
        ConfigError: neither or both of `data` and `slides`, no encoder; a run of a task without features.
        CheckpointError: no whole checkpoint in `run`.
        DatasetError: nothing to embed.
    """
    if (data is None) == (slides is None):
        raise ConfigError("give one of --data (prepared tiles or images) and --slides")
    if coords is not None and slides is None:
        raise ConfigError("--coords needs --slides, the slides that the tiles are read from")
    if on_corrupt not in ("error", "skip"):
        raise ConfigError(f"--on-corrupt is 'error' or 'skip', not {on_corrupt!r}")
    if run is None and not colours:
        raise ConfigError("give --checkpoint RUN, whose encoder makes the features, or --colour-statistics, which need none")
    if colours and (untrained or step is not None):
        raise ConfigError("--colour-statistics are of no encoder; leave --untrained and --step out")
    out = writable_folder(out)
    # Before the encoder is restored, which takes its time.
    config = _config(None if run is None else run_config(run), data, slides, select, mpp_csv, slide_mpp)
    encoder = colour_encoder() if colours else run_encoder(run, step, batch_size, devices, untrained)
    source = open_source(config) if coords is None else open_coords_stream(config, Path(coords), tile_size, strict)

    def encode(ids: np.ndarray, bar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids that could be read, their class tokens and their means of patches."""
        columns: tuple[list, list, list] = ([], [], [])
        with eval_batches(source, batch_size, ids=ids, on_corrupt="replace" if on_corrupt == "skip" else "error") as batches:
            for batch in batches:
                real = batch["mask"] > 0
                # Where a tile cannot be read the batch holds another one, which has a row of its own (or belongs to another slide).
                kept = real & (batch["example_id"] == ids[np.minimum(batch["position"], len(ids) - 1)])
                outputs = encoder.encode(batch)
                for column, values in zip(columns, (batch["example_id"], outputs["cls"], outputs["mean"]), strict=True):
                    column.append(np.asarray(values)[kept])
                bar.advance(int(real.sum()))
        read, cls, mean = (np.concatenate(column) for column in columns)
        if not len(read):
            raise DatasetError(f"none of its {len(ids)} tiles can be read; make them again with `wavepath prepare`")
        return read, cls.astype(np.float32), mean.astype(np.float32)

    failed: dict[str, str] = dict(source.left_out)
    reused = done = skipped = width = 0
    total = len(source.spans) + len(failed)
    if not total:
        raise DatasetError(f"{source.name} holds no tile to embed; see its manifest.csv for why")
    with folder_lock(out, "embed.lock"), progress("tiles embedded", len(source), "tiles") as bar:
        for left in out.rglob(f".*{SUFFIX}.*.tmp"):  # by a run that was killed
            left.unlink()
        for slide_id in (*source.left_out, *(source.empty if isinstance(source, CoordsStream) else ())):
            _forget(out, slide_id)
        for span in source.spans:
            path = out / f"{span.slide}{SUFFIX}"
            attributes = _attributes(span, source, encoder)
            known = _whole(path, attributes, span)
            if known:
                reused, width = reused + 1, known
                bar.advance(span.stop - span.start, f"{span.slide} is whole")
                continue
            path.unlink(missing_ok=True)  # features of an older checkpoint must not stay among the new ones if this slide fails
            try:
                ids, cls, mean = encode(np.arange(span.start, span.stop), bar)
            except WavepathError as error:
                failed[span.slide] = str(error)
                warn(f"{span.slide}: {error}" + ("; or leave such tiles out with --on-corrupt=skip" if on_corrupt == "error" else ""))
                continue
            if missing := span.stop - span.start - len(ids):
                skipped += missing
                warn(f"{span.slide}: {missing} of {span.stop - span.start} tiles cannot be read and are left out")
            metas = [source.meta(int(index)) for index in ids]
            coords = np.array([(meta["x"], meta["y"]) for meta in metas], np.int64)
            names = np.array([meta.get("name") or f"{span.slide}_{meta['x']}_{meta['y']}" for meta in metas])
            extra = {"features_mean": mean, "energy": np.array([meta["energy"] for meta in metas], np.float32), "names": names}
            write_features(path, cls, coords, attributes, extra)
            done, width = done + len(ids), cls.shape[1]
    write_json(out / "embed.json", {
        **encoder.origin, "encoder": encoder.name, "source": str(Path(source.name).absolute()), "kind": source.kind, "slides": total,
        "failed": failed, "skipped": skipped, "width": width, lineage.KEY: encoder.train_slides,
    })
    source.close()
    if len(failed) == total:
        raise DatasetError(f"no slide could be embedded (first: {next(iter(failed.values()))})")
    return EmbedResult(total, reused, failed, done, skipped, width)


def _config(config: ConfigDict | None, data: Path | None, slides: Path | None, select: str, mpp_csv: str, slide_mpp: float) -> ConfigDict:
    """The run's config with the data that is to be embedded in place of what it was trained on."""
    config = train_defaults() if config is None else config
    config.data.dir, config.data.slides = str(data or ""), str(slides or "")
    config.data.mpp_csv, config.data.slide_mpp = str(mpp_csv or ""), float(slide_mpp or 0.0)
    # Features are wanted of every tile, whatever a training run left out.
    config.data.exclude_slides, config.data.max_tiles, config.data.mixed_mpp = "", 0, True
    config.prepare.select.mode = select
    return config


def _attributes(span: Span, source: Source, encoder: Encoder) -> dict:
    """TRIDENT's attributes and ours.

    Its reader takes a tile's footprint for patch_size * level0_magnification / target_magnification, so the magnifications are 10 / mpp as
    they are, not rounded to 20 or 40: then the footprint is the true one.
    """
    size = source.image_shape[0]
    attributes = {
        **encoder.origin,
        "name": span.slide,
        "patch_size": size,
        "overlap": stored_overlap(Path(source.name)) if source.kind == "prepared" else 0,
        "encoder": encoder.name,
    }
    if span.mpp:
        attributes |= {"mpp": float(span.mpp), "target_magnification": 10.0 / float(span.mpp)}
    if span.mpp and span.slide_mpp:
        footprint = size * float(span.mpp) / float(span.slide_mpp)
        attributes |= {
            "level0_mpp": float(span.slide_mpp),
            "level0_magnification": 10.0 / float(span.slide_mpp),
            "patch_size_level0": round(footprint),
        }
    if isinstance(source, CoordsStream):
        attributes |= source.origins[span.slide]
    attributes["fingerprint"] = hashlib.sha256(json.dumps({**attributes, "tiles": span.stop - span.start}, sort_keys=True).encode()).hexdigest()[:16]
    return attributes


def _forget(out: Path, slide_id: str) -> None:
    """Removes the features that an earlier run made of a slide that gives none now: they would pass for features of these tiles."""
    path = out / f"{slide_id}{SUFFIX}"
    if path.is_file():
        path.unlink()
        say(f"{slide_id}: its features of an earlier run are removed")


def _whole(path: Path, attributes: dict, span: Span) -> int:
    """Width of the features of a whole and current file; 0 where it is missing, damaged or outdated."""
    if not path.is_file():
        return 0
    try:
        found = read_features(path)
    except DatasetError as error:
        warn(f"{error}; embedding it again")
        return 0
    if found.attributes.get("fingerprint") != attributes["fingerprint"] or len(found) != span.stop - span.start:
        say(f"{span.slide}: embedded before with another checkpoint or other tiles, or incomplete; done again")
        return 0
    return found.features.shape[1]
