"""What is drawn of one slide's attention: a heatmap over the slide, its tiles for QuPath, the tiles with the most and the least of it."""

from pathlib import Path

import numpy as np

from wavepath.console import warn
from wavepath.errors import ConfigError, DatasetError, SlideError
from wavepath.evaluation.slide_pictures import Pixels, tile_strip
from wavepath.inference.heatmap import COLORMAP, draw_heatmap, heatmap_geojson, normalised
from wavepath.interop.attention import Attention
from wavepath.interop.coords import number


def draw_attention(
    out: Path, stem: str, found: Attention, *, pixels: Pixels | None = None, mode: str = "rank", colormap: str = COLORMAP, of_class: str = "",
    count: int = 8, arm: str = "",
) -> list[dict[str, str]]:
    """Writes `<stem>.png`, `<stem>.geojson` and, where there are pixels, `<stem>_tiles.png`.

    Args:
        out, stem: the files' place; `/` in the stem makes folders.
        pixels: where thumbnail and tiles come from; without them, or the slide among them, the heatmap is drawn on white.
        mode, colormap: see `inference.heatmap`. of_class: whose attention, of a network with one for each class; default: the predicted one's.
        count: tiles with the most, and with the least; 0: no strip. arm: of an evaluation of several, for the title.

    Returns:
        What results.json lists: `file` below `out`, `title`, `kind` (`heatmap`, `tiles`, `geojson`); nothing where the tiles have no coordinates,
        which is said.

    Raises:
        ConfigError: a class, mode or colour map that there is not. DatasetError: no finite attention.
    """
    if of_class and of_class not in found.classes:
        raise ConfigError(f"{found.slide_id}: no class {of_class!r}; the classes are {', '.join(found.classes)}")
    if len(found) > 1 and not np.ptp(found.coords, axis=0).any():
        warn(f"{found.slide_id}: its features carry no coordinates, so no heatmap is drawn")
        return []
    values, title = found.of_class(of_class), title_of(found, arm)
    name = f"attention to {of_class or found.predicted}" if found.attention.ndim == 2 else "attention"
    backdrop = pixels.backdrop(found.slide_id) if pixels is not None else None
    shown = {"coords": found.coords, "size_level0": found.size_level0}
    heatmap, quilt, strip = f"{stem}.png", f"{stem}.geojson", f"{stem}_tiles.png"
    draw_heatmap(
        out / heatmap, **shown, values=values, title=title, mode=mode, colormap=colormap, name=name,
        thumbnail=backdrop.thumbnail if backdrop else None, dimensions=backdrop.dimensions if backdrop else None,
        mpp=(backdrop.mpp if backdrop else None) or number(found.attributes.get("level0_mpp")),
    )  # fmt: skip
    columns = {"attention": values, "attention_rank": normalised(values)}
    if found.attention.ndim == 2:
        columns |= {f"attention {label}": row for label, row in zip(found.classes, found.attention, strict=True)}
    heatmap_geojson(out / quilt, **shown, columns=columns, classification_by="attention_rank", colormap=colormap)
    pictures = [{"file": heatmap, "title": title, "kind": "heatmap"}]
    if count and pixels is not None and (reader := pixels.reader(found.slide_id, found.coords, found.size_level0)) is not None:
        try:
            tile_strip(out / strip, tiles=reader, values=values, count=count, title=title, value_name=name)
        except (SlideError, DatasetError) as error:
            warn(f"no tiles of {found.slide_id}: {error}")
        else:
            pictures.append({"file": strip, "title": f"{found.slide_id}: tiles with the most and the least {name}", "kind": "tiles"})
    return [*pictures, {"file": quilt, "title": title, "kind": "geojson"}]


def title_of(found: Attention, arm: str = "") -> str:
    """Slide, prediction and, where it is known, truth."""
    share = float(found.probability[found.classes.index(found.predicted)])
    told = f"{found.slide_id}{f' ({arm})' if arm else ''}: predicted {found.predicted} ({share:.2f})"
    return told + (f", truth {found.label}" if found.label else "")
