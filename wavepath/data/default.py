"""The embedded default: tiny phantom slides made and prepared where no data are given, so that every `smoke` config runs by itself."""

from pathlib import Path

from ml_collections import ConfigDict

from wavepath import __version__, console
from wavepath.errors import WavepathError
from wavepath.files import folder_lock, read_json, write_json

SLIDES, SEED, MPP = 2, 0, 0.25
_MARK = "phantom.json"


def ensure_phantom_tiles(config: ConfigDict, workdir: Path) -> Path:
    """Makes two phantom slides under `workdir/phantom/slides` and prepares them with `config.prepare`; what is whole is kept.

    Args:
        config: a train config; only `config.prepare` matters.
        workdir: the run folder.

    Returns:
        The prepared folder, `workdir/phantom/tiles`.
    """
    from wavepath.data.phantom import make_phantoms
    from wavepath.data.prepare import prepare

    folder = Path(workdir) / "phantom"
    folder.mkdir(parents=True, exist_ok=True)
    # Room for a handful of regions of the asked size, and no more: this runs before the user sees anything of the training.
    size = 1024 if config.prepare.screen.min_region_um <= 1024 * MPP / 2 and config.prepare.tiles.size <= 64 else 2048
    made = dict(slides=SLIDES, seed=SEED, size=size, mpp=MPP, version=__version__)
    with folder_lock(folder, "phantom.lock"):
        mark = folder / _MARK
        if not mark.is_file() or read_json(mark) != made:
            console.say(f"no data given: making {SLIDES} phantom slides of {size} px in {folder}")
            make_phantoms(folder / "slides", SLIDES, SEED, size=size, mpp=MPP, progress=False)
            write_json(mark, made)
        result = prepare(folder / "slides", folder / "tiles", config.prepare, workers=2)
    if not result.tiles:
        reasons = "; ".join(f"{row.slide_id}: {row.reason}" for row in result.rows)
        raise WavepathError(f"the phantom slides gave no tiles with these settings ({reasons}); give data with --config.data.dir")
    return folder / "tiles"


def phantom_regions(tiles: str | Path) -> Path:
    """The annotated regions of the phantom slides behind the tiles that `ensure_phantom_tiles` made: a folder of GeoJSON files by slide."""
    return Path(tiles).parent / "slides" / "regions"
