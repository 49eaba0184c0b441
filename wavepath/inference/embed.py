"""Frozen features of tiles: a trained encoder over a prepared dataset, a folder of images, or slides; one HDF5 file for each slide.

A file is written whole or not at all and carries what it was made from, so running the command again embeds only what is missing or
outdated. Every batch has the same shape (the last is padded), so the encoder compiles once.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavepath import __version__
from wavepath.console import progress, say, warn
from wavepath.data.pipeline import eval_batches
from wavepath.data.sources import Source, Span, open_source
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.files import folder_lock, writable_folder, write_json
from wavepath.interop.features import SUFFIX, read_features, write_features
from wavepath.training import checkpoint, parallel


@dataclass(frozen=True)
class EmbedResult:
    """What was done: slides in all, whole already, failed (slide id -> reason), tiles embedded now, width of the features."""

    slides: int
    reused: int
    failed: dict[str, str]
    tiles: int
    width: int


def embed(
    run: Path,
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
) -> EmbedResult:
    """Embeds every tile and writes `<out>/<slide_id>.h5`: class token (`features`), mean of patches (`features_mean`), `coords`.

    Args:
        run: run folder of `wavepath train`; its newest whole checkpoint is used, or `step`.
        out: folder for the feature files, `embed.json` and nothing else.
        data: a prepared dataset or a folder of images. slides: slides to stream tiles from, screened with the run's settings.
        batch_size: tiles at once, over all devices.
        select: with `slides`: `all` tissue tiles (default), or `wavelet`, `random`, `threshold` as in `wavepath prepare`.
        mpp_csv, slide_mpp: pixel sizes for slides that carry none.
        on_corrupt: `error`, or `replace` (the next readable tile's features stand in, and are counted).

    Raises:
        ConfigError: neither or both of `data` and `slides`.
        CheckpointError: no whole checkpoint in `run`.
        DatasetError: nothing to embed.
    """
    if (data is None) == (slides is None):
        raise ConfigError("give one of --data (prepared tiles or images) and --slides")
    out = writable_folder(out)
    config = _config(run, data, slides, select, mpp_csv, slide_mpp)
    devices_used = parallel.make(config.parallel)
    if devices:
        config.parallel.devices = devices
        devices_used = parallel.make(config.parallel)
    devices_used.check(batch_size)
    config, task, state = checkpoint.restore_run(run, step, parallel=devices_used)
    say(f"encoder: {run} at step {int(state.step)}, {devices_used}")
    source = open_source(_config(run, data, slides, select, mpp_csv, slide_mpp))
    origin = {"run": str(Path(run).resolve()), "step": int(state.step), "parameters": _digest(state.params), "wavepath_version": __version__}
    predict = devices_used.predict(task, ("cls", "mean"))

    def encode(ids: np.ndarray, bar) -> tuple[np.ndarray, np.ndarray]:
        columns: tuple[list, list] = ([], [])
        with eval_batches(source, batch_size, ids=ids, on_corrupt=on_corrupt) as batches:
            for batch in batches:
                real = batch["mask"] > 0
                outputs = predict(state, devices_used.put(batch))
                for column, name in zip(columns, ("cls", "mean"), strict=True):
                    column.append(np.asarray(outputs[name], np.float32)[real])
                bar.advance(int(real.sum()))
        if batches.corrupt_count:
            warn(f"{batches.corrupt_count} tiles could not be read; features of the next readable ones stand in")
        return np.concatenate(columns[0]), np.concatenate(columns[1])

    failed: dict[str, str] = {}
    reused = done = width = 0
    with folder_lock(out, "embed.lock"), progress("tiles embedded", len(source), "tiles") as bar:
        for span in source.spans:
            path = out / f"{span.slide}{SUFFIX}"
            attributes = _attributes(span, source, origin, config)
            known = _whole(path, attributes, span)
            if known:
                reused, width = reused + 1, known
                bar.advance(span.stop - span.start, f"{span.slide} is whole")
                continue
            ids = np.arange(span.start, span.stop)
            try:
                cls, mean = encode(ids, bar)
            except WavepathError as error:
                failed[span.slide] = str(error)
                warn(f"{span.slide}: {error}")
                continue
            metas = [source.meta(int(index)) for index in ids]
            coords = np.array([(meta["x"], meta["y"]) for meta in metas], np.int64)
            names = np.array([meta.get("name") or f"{span.slide}_{meta['x']}_{meta['y']}" for meta in metas])
            extra = {"features_mean": mean, "energy": np.array([meta["energy"] for meta in metas], np.float32), "names": names}
            write_features(path, cls, coords, attributes, extra)
            done, width = done + len(ids), cls.shape[1]
    write_json(out / "embed.json", {**origin, "source": source.name, "slides": len(source.spans), "failed": failed, "width": width})
    total = len(source.spans)
    source.close()
    if len(failed) == total:
        raise DatasetError(f"no slide could be embedded (first: {next(iter(failed.values()))})")
    return EmbedResult(total, reused, failed, done, width)


def _config(run: Path, data: Path | None, slides: Path | None, select: str, mpp_csv: str, slide_mpp: float):
    """The run's config with the data that is to be embedded in place of what it was trained on."""
    from wavepath import config as configs
    from wavepath.errors import CheckpointError

    path = Path(run) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{run} is no run folder (no config.json in it); give the --workdir of a `wavepath train`")
    config = configs.load_json(path)
    config.data.dir, config.data.slides = str(data or ""), str(slides or "")
    config.data.mpp_csv, config.data.slide_mpp = str(mpp_csv or ""), float(slide_mpp or 0.0)
    # Features are wanted of every tile, whatever a training run left out.
    config.data.exclude_slides, config.data.max_tiles, config.data.mixed_mpp = "", 0, True
    config.prepare.select.mode = select
    return config


def _attributes(span: Span, source: Source, origin: dict, config) -> dict:
    """TRIDENT's attributes and ours.

    Its reader takes a tile's footprint for patch_size * level0_magnification / target_magnification, so the magnifications are 10 / mpp as
    they are, not rounded to 20 or 40: then the footprint is the true one.
    """
    size = source.image_shape[0]
    attributes = {
        **origin,
        "name": span.slide,
        "patch_size": size,
        "overlap": 0,
        "encoder": f"wavepath-{config.task}-{config.model.variant}{config.model.patch}",
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
    attributes["fingerprint"] = hashlib.sha256(json.dumps({**attributes, "tiles": span.stop - span.start}, sort_keys=True).encode()).hexdigest()[:16]
    return attributes


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
        say(f"{span.slide}: embedded before with another checkpoint or other tiles; done again")
        return 0
    return found.features.shape[1]


def _digest(params: dict) -> str:
    """A short name of the parameters: features of other parameters are not mistaken for these."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
