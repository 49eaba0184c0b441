"""Slides to tiles: finds tissue, scores regions by wavelet energy at low magnification, extracts tiles of the best ones.

OUT becomes a TFDS dataset (tfds.builder_from_directory(OUT).as_data_source()) with a manifest of every slide: train on it with
--config.data.dir=OUT. Run the same command again after a stop, or with more slides: what is whole is kept. Another --top
or tile size needs no second screening.
"""

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wavepath.data.prepare import PrepareResult

uses_config = True
EPILOG = """examples:
  wavepath prepare --slides SLIDES --out TILES
  wavepath prepare --slides SLIDES --out TILES --mpp-csv mpp.csv --labels labels.csv
  wavepath prepare --slides SLIDES --out CONTROL --select random          # same slides, same count of regions, chosen at random
  wavepath prepare --slides SLIDES --out TILES --config.screen.energy=relative --config.tiles.max_per_slide=150
  wavepath prepare --slides SLIDES --out TILES --coords TRIDENT_JOB/20x_512px_0px_overlap    # tiles where TRIDENT or CLAM found them

on several processes or a cluster, by Apache Beam (pip install "wavepath[beam]"), the same output; SLIDES and TILES lie on a file system that
all workers share (NFS, Lustre, Filestore: buckets are not supported); docs/beam.md has whole commands:
  --runner DirectRunner --beam-options="--direct_num_workers=2 --direct_running_mode=multi_processing"
  --runner DataflowRunner --beam-options="--project=P --region=R --temp_location=gs://B/tmp --sdk_container_image=IMAGE"
  --runner FlinkRunner --beam-options="--flink_master=HOST:8081 --environment_type=EXTERNAL --environment_config=localhost:50000"
  --runner SparkRunner --beam-options="--spark_master_url=spark://HOST:7077 --environment_type=EXTERNAL --environment_config=localhost:50000"

A slide that cannot be read, or has no mpp, is listed in OUT/manifest.csv with the reason and the others go on: exit code 3; --strict stops
instead. The fields behind --config.… are in wavepath/defaults.py (prepare_defaults)."""
# Flag -> field of the config; the flag wins over the config file, and --config.… over the flag.
_FIELDS = {"mpp": "tiles.mpp", "codec": "tiles.codec", "select": "select.mode", "top": "select.top", "require_mpp": "tiles.require_mpp"}

_BUCKET = re.compile(r"(gs|s3|abfss?|hdfs|https?):/")  # pathlib has made one slash of two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slides", type=Path, required=True, help="folder of slides (searched through its subfolders), or one slide")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tiles, made where it is missing")
    parser.add_argument("--config", default="configs/prepare.py", help="config file, with its arguments behind a colon (default: %(default)s)")
    parser.add_argument("--mpp", type=float, help="resolution of the tiles in um per pixel; coarser slides keep their own (default: 0.25, 40x)")
    parser.add_argument("--require-mpp", action="store_const", const="true", help="a slide coarser than --mpp is an error instead")
    parser.add_argument("--slide-mpp", type=float, help="um per pixel of the slides themselves, for those not in --mpp-csv; overrules the files")
    parser.add_argument("--mpp-csv", type=Path, help="table slide,mpp with the um per pixel of single slides; overrules the files")
    parser.add_argument("--labels", type=Path, help="table case_id,slide_id,label, copied into the manifest")
    parser.add_argument(
        "--select", choices=["wavelet", "random", "all", "threshold"],
        help="regions of the highest energy, as many at random, all with tissue, or all above --config.select.threshold (default: wavelet)",
    )
    parser.add_argument("--top", type=float, help="share of a slide's tissue regions that is kept, 0 to 1 (default: 0.2)")
    parser.add_argument("--codec", choices=["jpeg", "png"], help="how tiles are stored; png is exact and four times as large (default: jpeg)")
    parser.add_argument(
        "--coords", type=Path, metavar="DIR_OR_H5", help="TRIDENT's or CLAM's coordinates: their tiles at their size, in place of selected regions"
    )
    parser.add_argument("--tile-size", type=int, metavar="PX", help="with --coords: store tiles of this side (default: that of the coordinates)")
    parser.add_argument("--strict", action="store_true", help="stop at the first slide that gives no tiles")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and encode the tiles of a slide (default: %(default)s)")
    parser.add_argument("--runner", help="spread the slides over the workers of this Apache Beam runner, such as DirectRunner (see below)")
    parser.add_argument("--beam-options", metavar="FLAGS", help="Beam's own flags, quoted as one argument: --beam-options='--name=value ...'")


def run(args: argparse.Namespace) -> int:
    from wavepath.config import load_config
    from wavepath.data.prepare import prepare
    from wavepath.errors import ConfigError

    if args.workers < 1:
        raise ConfigError(f"--workers is at least 1, not {args.workers}")
    if args.beam_options is not None and args.runner is None:
        raise ConfigError("--beam-options needs --runner, such as --runner DirectRunner")
    if args.coords is None and args.tile_size is not None:
        raise ConfigError("--tile-size needs --coords; the size of screened tiles is --config.tiles.size")
    for flag in ("mpp", "require_mpp", "select", "top") if args.coords is not None else ():
        if getattr(args, flag) is not None:
            raise ConfigError(f"--coords takes tiles as they are given, so --{flag.replace('_', '-')} has no meaning beside it; leave it out")
    if args.tile_size is not None and args.tile_size < 8:
        raise ConfigError(f"--tile-size is at least 8 px, not {args.tile_size}")
    for flag, path in (("--slides", args.slides), ("--out", args.out)):
        if bucket := _BUCKET.match(str(path)):
            raise ConfigError(f"{flag} is a {bucket[1]}:// address; give a folder of a mounted file system (NFS, Lustre, Filestore)")
    flags = [f"{field}={getattr(args, flag)}" for flag, field in _FIELDS.items() if getattr(args, flag) is not None]
    config = load_config(args.config, [*flags, *args.config_overrides])
    run_slides = None
    if args.runner is not None:
        from wavepath.data.beam import on_runner

        run_slides = on_runner(args.runner, args.beam_options or "")
    result = prepare(
        args.slides, args.out, config, mpp_csv=args.mpp_csv, slide_mpp=args.slide_mpp, labels=args.labels, strict=args.strict,
        workers=args.workers, run=run_slides, coords=args.coords, tile_size=args.tile_size or 0,
    )
    _report(args.out, config.tiles.mpp if args.coords is None else None, result)
    return result.exit_code


def _report(out: Path, asked: float | None, result: "PrepareResult") -> None:
    from wavepath.console import duration, say, summary

    by_mpp: dict[float, int] = {}
    for row in result.rows:
        if row.tiles:
            by_mpp[round(row.tile_mpp, 4)] = by_mpp.get(round(row.tile_mpp, 4), 0) + 1
    resolutions = [
        f"{mpp:g} um/px ({count} {'slide' if count == 1 else 'slides'}{', coarser than asked' if asked and mpp > asked * 1.01 else ''})"
        for mpp, count in sorted(by_mpp.items())
    ]
    read, tissue = (sum(getattr(row, name) for row in result.rows) for name in ("pixels_screened", "pixels_tissue"))
    rows: list[tuple[str, object]] = [
        ("slides", f"{result.ok} of {result.total} gave tiles" + (f" ({result.reused} kept from before)" if result.reused else "")),
    ]
    rows += [(status, count) for status, count in (("failed", result.failed), ("empty", result.empty)) if count]
    chosen, with_tissue = (sum(getattr(row, f"regions_{name}") for row in result.rows) for name in ("selected", "tissue"))
    rows += [
        # Given coordinates may lie where screening sees no tissue.
        ("regions", f"{chosen} selected of {with_tissue} with tissue" if asked else f"{chosen} with tiles, {with_tissue} with tissue"),
        ("tiles", result.tiles), ("resolution", ", ".join(resolutions) or "none"),
    ]
    if tissue and result.tiles:
        stored = sum(row.pixels_tiles for row in result.rows)
        share = f"{100 * (read + stored) / tissue:.0f} % of all tissue"
        rows.append(("pixels read", f"{share} ({read / 1e6:.0f} M for screening, {stored / 1e6:.0f} M of tiles)"))
    if result.seconds.get("total"):
        stages = ", ".join(f"{stage} {duration(result.seconds[stage])}" for stage in ("screen", "read", "encode", "write"))
        rows.append(("time", f"{duration(result.seconds['total'])} ({stages}; read and encode are summed over threads)"))
    rows.append(("manifest", out / "manifest.csv"))
    summary("prepared" if result.tiles else "nothing prepared", rows)
    bad = [row for row in result.rows if row.status != "ok"]
    for row in bad[:10]:
        say(f"  {row.status}: {row.slide_id}: {row.reason}")
    if len(bad) > 10:
        say(f"  and {len(bad) - 10} more in the manifest")
    if result.tiles:
        say(f"next: wavepath train --config=configs/wise_mae.py:variant=S --config.data.dir={shlex.quote(str(out))} --workdir=RUN")
