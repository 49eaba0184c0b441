"""The embedded default: tiny phantom slides made and prepared where no data are given, so that every `smoke` config runs by itself."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavepath import __version__, console
from wavepath.data.sources import STAIN_TASKS
from wavepath.errors import WavepathError
from wavepath.files import folder_lock, read_json, write_json

SLIDES, SEED, MPP = 2, 0, 0.25
PYRAMID_SLIDES = 3  # two to train on and one to test
PAIRS, PAIR_SHARE = 12, 1 / 3  # of three slides, one of them to test
BAGS = 48
_MARK = "phantom.json"


def ensure_phantom_data(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config with data made for it: tiles (labelled, where the config names no labels), for task `superres` pyramids, for staining pairs, for
    `mil` bags.

    Args:
        config: a train config without data.
        workdir: the run folder.
    """
    config = config.copy_and_resolve_references()
    if config.task == "superres":
        config.data.dir = str(ensure_phantom_pyramids(config, workdir))
    elif config.task in STAIN_TASKS:
        config.data.dir = str(ensure_phantom_pairs(config, workdir))
    elif config.task == "mil":
        config.data.bags, config.data.labels = map(str, ensure_bags(workdir))
    else:
        config.data.dir = str(ensure_phantom_tiles(config, workdir))
        if not config.data.labels and not config.data.label_pattern:
            config.data.labels = str(phantom_regions(config.data.dir))
    return config.lock()


def ensure_phantom_tiles(config: ConfigDict, workdir: Path) -> Path:
    """Makes two phantom slides under `workdir/phantom/slides` and prepares them with `config.prepare`; what is whole is kept.

    Args:
        config: a train config; only `config.prepare` matters.
        workdir: the run folder.

    Returns:
        The prepared folder, `workdir/phantom/tiles`.
    """
    from wavepath.data.prepare import prepare

    # Room for a handful of regions of the asked size, and no more: this runs before the user sees anything of the training.
    size = 1024 if config.prepare.screen.min_region_um <= 1024 * MPP / 2 and config.prepare.tiles.size <= 64 else 2048
    with _phantoms(workdir, SLIDES, size) as folder:
        result = prepare(folder / "slides", folder / "tiles", config.prepare, workers=2)
    _refuse_none(result.tiles, "tiles", result.rows)
    return folder / "tiles"


def ensure_phantom_pyramids(config: ConfigDict, workdir: Path) -> Path:
    """Makes three phantom slides under `workdir/phantom/slides` and their pyramids with `config.prepare.pyramids`; what is whole is kept.

    Returns:
        The pyramids, `workdir/phantom/pyramids`: of two slides to train on, of one to test.
    """
    from wavepath.data.pyramids import make_pyramids

    settings = config.prepare.copy_and_resolve_references()
    doublings = int(config.superres.scale).bit_length() - 1
    settings.pyramids.levels = max(settings.pyramids.levels, doublings + (config.superres.lr_source == "pyramid"))
    with _phantoms(workdir, PYRAMID_SLIDES, 1024 if settings.pyramids.size <= 256 else 2 * settings.pyramids.size) as folder:
        result = make_pyramids(folder / "slides", folder / "pyramids", settings, workers=2)
    _refuse_none(result.count("tiles"), "samples", result.rows)
    return folder / "pyramids"


def ensure_phantom_pairs(config: ConfigDict, workdir: Path) -> Path:
    """Makes phantom pairs under `workdir/phantom/stained`, with four training windows or so each, and stores them with `config.prepare.pairs`.

    Returns:
        The pairs, `workdir/phantom/pairs`: of two slides to train on, of one to test.
    """
    from wavepath.data import pair_files
    from wavepath.data.pairs import make_pairs
    from wavepath.data.phantom_pairs import GROUP_PATTERN, MAX_SIZE, MIN_SIZE, make_phantom_pairs
    from wavepath.data.phantom_pairs import MPP as PAIR_MPP

    size = min(max(2 * int(config.stain.crop), int(config.stain.crop) + int(config.stain.margin), MIN_SIZE), MAX_SIZE)
    settings = config.prepare.copy_and_resolve_references()
    settings.pairs.update(dict(test_share=PAIR_SHARE, min_size=min(settings.pairs.min_size, size)))

    def make(folder: Path) -> None:
        make_phantom_pairs(folder / "stained", PAIRS, SEED, size=size, progress=False)

    made = dict(pairs=PAIRS, seed=SEED, size=size, mpp=PAIR_MPP, version=__version__)
    with _made(workdir, made, make, f"{PAIRS} phantom pairs of {size} px") as folder:
        given = pair_files.with_patterns(pair_files.from_folders(folder / "stained"), GROUP_PATTERN)
        result = make_pairs(given, folder / "stained", folder / "pairs", settings, mpp=PAIR_MPP, workers=2)
    _refuse_none(result.count("tiles"), "pairs", result.rows)
    return folder / "pairs"


def ensure_bags(workdir: Path) -> tuple[Path, Path]:
    """Makes synthetic bags under `workdir/phantom/bags`: the folder of feature files, and the labels."""
    from wavepath.data.synthetic_bags import FEATURES, LABELS, make_bags

    made = dict(bags=BAGS, seed=SEED, version=__version__)
    with _made(workdir, made, lambda folder: make_bags(folder / "bags", BAGS, seed=SEED), f"{BAGS} synthetic bags") as folder:
        return folder / "bags" / FEATURES, folder / "bags" / LABELS


@contextlib.contextmanager
def _phantoms(workdir: Path, slides: int, size: int) -> Iterator[Path]:
    """The folder `workdir/phantom` with its slides made, locked."""
    from wavepath.data.phantom import make_phantoms

    def make(folder: Path) -> None:
        make_phantoms(folder / "slides", slides, SEED, size=size, mpp=MPP, progress=False)

    made = dict(slides=slides, seed=SEED, size=size, mpp=MPP, version=__version__)
    with _made(workdir, made, make, f"{slides} phantom slides of {size} px") as folder:
        yield folder


@contextlib.contextmanager
def _made(workdir: Path, made: dict[str, Any], make: Callable[[Path], None], what: str) -> Iterator[Path]:
    """The folder `workdir/phantom`, locked, with what `make` makes in it, as `made` describes it; what is there already is kept."""
    folder = Path(workdir) / "phantom"
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, "phantom.lock"):
        mark = folder / _MARK
        if not mark.is_file() or read_json(mark) != made:
            console.say(f"no data given: making {what} in {folder}")
            make(folder)
            write_json(mark, made)
        yield folder


def _refuse_none(count: int, what: str, rows: Sequence[Any]) -> None:
    if not count:
        reasons = "; ".join(f"{row.slide_id}: {row.reason}" for row in rows)
        raise WavepathError(f"the phantoms gave no {what} with these settings ({reasons}); give data with --config.data.dir")


def phantom_regions(tiles: str | Path) -> Path:
    """The annotated regions of the phantom slides behind the tiles that `ensure_phantom_tiles` made: a folder of GeoJSON files by slide."""
    return Path(tiles).parent / "slides" / "regions"
