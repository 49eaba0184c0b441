"""The report's pictures, each a function from arrays to a small JPEG or PNG as a data URI, so that the page needs no other file; and sheets of
pictures side by side, as files."""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wavepath.data.tissue import contours
from wavepath.files import atomic_path

CHOSEN, REJECTED, TISSUE, PEN, BLUR = (20, 120, 60), (150, 150, 150), (20, 90, 200), (220, 30, 160), (240, 160, 0)
_GAP, _TEXT = 6, 16  # px, of a sheet


def data_uri(image: np.ndarray | Image.Image, quality: int = 85) -> str:
    """A JPEG as `data:image/jpeg;base64,...` from uint8 [h, w, 3]."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_uri(figure) -> str:
    """A PNG data URI of a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outline(draw: ImageDraw.ImageDraw, mask: np.ndarray, scale: tuple[float, float], colour: tuple[int, int, int]) -> None:
    for line in contours(mask):
        draw.line([(x * scale[0], y * scale[1]) for x, y in line], fill=colour, width=2)


def tissue_picture(thumbnail: np.ndarray, layers: dict[str, np.ndarray], extent: tuple[float, float]) -> Image.Image:
    """The thumbnail with the contour of the tissue (blue) and of pen (magenta) and blur (orange).

    Args:
        thumbnail: uint8 [h, w, 3]. layers: bool masks [gh, gw] by name. extent: how much of the thumbnail (width, height in its
        pixels) the whole grid covers.
    """
    picture = Image.fromarray(thumbnail).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for name, colour in (("blur", BLUR), ("pen", PEN), ("tissue", TISSUE)):
        mask = layers.get(name)
        if mask is not None and mask.any():
            _outline(draw, mask, (extent[0] / mask.shape[1], extent[1] / mask.shape[0]), colour)
    return picture


def energy_picture(thumbnail: np.ndarray, regions: dict[str, np.ndarray], scale: float) -> Image.Image:
    """Each eligible region coloured by its energy rank (dark: low, yellow: high) over a faded thumbnail; `scale` = thumbnail px per level-0 px."""
    from matplotlib import colormaps

    faded = (255 - (255 - thumbnail.astype(np.float32)) * 0.35).astype(np.uint8)
    picture = Image.fromarray(faded).convert("RGB")
    overlay = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(overlay)
    eligible = np.flatnonzero(regions["eligible"])
    # Ranks, not values: energies span decades, and the selection is by rank.
    order = regions["energy"][eligible].argsort().argsort() / max(1, len(eligible) - 1)
    for index, rank in zip(eligible, order, strict=True):
        red, green, blue, _ = (int(255 * value) for value in colormaps["viridis"](float(rank)))
        draw.rectangle(_box(regions, index, scale), fill=(red, green, blue, 190))
    return Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")


def choice_picture(thumbnail: np.ndarray, regions: dict[str, np.ndarray], scale: float) -> Image.Image:
    """Chosen regions framed in green; eligible but rejected ones in grey, veiled."""
    picture = Image.fromarray(thumbnail).convert("RGBA")
    overlay = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(overlay)
    for index in np.flatnonzero(regions["eligible"] & ~regions["selected"]):
        draw.rectangle(_box(regions, index, scale), outline=(*REJECTED, 255), fill=(255, 255, 255, 120))
    width = 3 if scale * float(np.median(regions["size"])) > 12 else 1
    for index in np.flatnonzero(regions["selected"]):
        draw.rectangle(_box(regions, index, scale), outline=(*CHOSEN, 255), width=width)
    return Image.alpha_composite(picture, overlay).convert("RGB")


def _box(regions: dict[str, np.ndarray], index: int, scale: float) -> tuple[float, float, float, float]:
    x, y, size = (float(regions[name][index]) * scale for name in ("x", "y", "size"))
    return x, y, x + size - 1, y + size - 1


def example_rows(regions: dict[str, np.ndarray], count: int = 5) -> dict[str, np.ndarray]:
    """Indices of the eligible regions with the highest, the middle and the lowest energies, at most `count` each, none twice."""
    eligible = np.flatnonzero(regions["eligible"])
    ranked = eligible[np.argsort(-regions["energy"][eligible], kind="stable")]
    count = max(1, min(count, len(ranked) // 3)) if len(ranked) >= 3 else len(ranked)
    middle = (len(ranked) - count) // 2
    rows = {"highest": ranked[:count], "median": ranked[middle : middle + count], "lowest": ranked[len(ranked) - count :]}
    return rows if len(ranked) >= 3 else {"highest": ranked}


def strip(tiles: Sequence[np.ndarray], size: int = 112, gap: int = 4) -> Image.Image:
    """Tiles side by side, each resized to `size` px."""
    picture = Image.new("RGB", (len(tiles) * (size + gap) - gap, size), "white")
    for index, tile in enumerate(tiles):
        picture.paste(Image.fromarray(tile).resize((size, size), Image.Resampling.LANCZOS), (index * (size + gap), 0))
    return picture


def curves_figure(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], names: Sequence[str], title: str):
    """Training curves (name -> steps, values), one line a name; a name that there is not is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axis = figure.subplots()
    present = [name for name in names if name in curves]
    for name in present:
        steps, values = curves[name]
        axis.plot(steps, values, label=name, linewidth=1.4, marker="." if len(steps) < 40 else "")
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.25)
    if len(present) > 1:
        axis.legend(fontsize=8)
    return figure


def draw_sheet(path: Path, titles: Sequence[str], lines: Sequence[Sequence[tuple[Image.Image, str]]]) -> None:
    """Writes a PNG of pictures in lines, a title above each column and a note under each picture.

    Args:
        lines: as many pictures each as there are titles, of any size; columns are as wide as the widest.
    """
    font = ImageFont.load_default(_TEXT)
    cell = max(picture.width for line in lines for picture, _ in line)
    heights = [max(picture.height for picture, _ in line) for line in lines]
    wrapped = [textwrap.wrap(title, cell // 9) or [""] for title in titles]
    top = max(map(len, wrapped)) * (_TEXT + 4) + 8
    canvas = Image.new("RGB", (len(titles) * (cell + _GAP) + _GAP, top + sum(heights) + len(lines) * (_TEXT + 14)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(wrapped):
        draw.multiline_text((_GAP + column * (cell + _GAP), 3), "\n".join(text), fill="black", font=font, spacing=3)
    for line, height in zip(lines, heights, strict=True):
        for column, (picture, note) in enumerate(line):
            x = _GAP + column * (cell + _GAP)
            canvas.paste(picture, (x, top))
            draw.text((x, top + height + 2), note, fill="black", font=font)
        top += height + _TEXT + 14
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")
