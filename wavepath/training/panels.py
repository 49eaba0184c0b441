"""Pictures of what a run has learnt: rows of examples, columns input, masked and reconstruction, as PNG in `<run>/panels`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, PngImagePlugin

from wavepath.files import atomic_path

COLUMNS = ("input", "bicubic", "masked", "reconstruction", "output", "target")
FOLDER = "panels"
_GAP, _HEADING, _LEAST = 4, 16, 112
_NAMES = "columns"  # key of the PNG text that names the columns


def columns_of(outputs: Mapping[str, Float[np.ndarray, "b h w c"]]) -> list[str]:
    """The outputs that are drawn, from left to right."""
    return [name for name in COLUMNS if name in outputs and np.ndim(outputs[name]) == 4]


def panel(outputs: Mapping[str, Float[np.ndarray, "b h w c"]], rows: int = 6) -> UInt8[np.ndarray, "height width 3"] | None:
    """Puts a task's image outputs side by side, one example a row.

    Args:
        outputs: named outputs of `Task.predict`; those named in `COLUMNS` are drawn, values in [0, 1], others are left out.
        rows: how many examples at most.

    Returns:
        The picture, or None where the task draws nothing.
    """
    columns = columns_of(outputs)
    if not columns:
        return None
    rows = min(rows, *(len(outputs[name]) for name in columns))
    images = {name: _to_uint8(outputs[name][:rows]) for name in columns}
    # Small tiles are enlarged by whole factors, so that a pixel stays a square; tiles of other sizes beside them (superresolution) fill the cell.
    side = max(max(stack.shape[1:3]) for stack in images.values())
    cell = side * max(1, -(-_LEAST // side))
    width, height = len(columns) * (cell + _GAP) + _GAP, rows * (cell + _GAP) + _GAP + _HEADING
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        x = _GAP + column * (cell + _GAP)
        draw.text((x, 2), name, fill=(0, 0, 0))
        for row in range(rows):
            tile = images[name][row]
            scale = cell // max(tile.shape[:2])
            size = (tile.shape[1] * scale, tile.shape[0] * scale)
            canvas.paste(Image.fromarray(tile).resize(size, Image.Resampling.NEAREST), (x, _HEADING + _GAP + row * (cell + _GAP)))
    return np.asarray(canvas)


def _to_uint8(images: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w 3"]:
    images = np.nan_to_num(np.asarray(images, np.float32), nan=0.0)
    images = np.clip(np.round(images * 255), 0, 255).astype(np.uint8)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images[..., :3]


def write_panel(run: Path, step: int, pixels: UInt8[np.ndarray, "height width 3"], columns: Sequence[str] = ()) -> Path:
    """Writes `<run>/panels/step_000100.png`, whole or not at all, with the names of its columns inside; returns its path."""
    path = Path(run) / FOLDER / f"step_{step:06d}.png"
    names = PngImagePlugin.PngInfo()
    names.add_text(_NAMES, ",".join(columns))
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=names)
    return path


def side_by_side(panels: Mapping[str, Path]) -> UInt8[np.ndarray, "height width 3"] | None:
    """The panels of several runs in one picture: what they have in common once, then the last column of each under its run's name.

    Args:
        panels: name -> file written by `write_panel`; all of the same examples and columns.

    Returns:
        The picture; None where the panels differ in examples, masks, size or columns, or do not name their columns.
    """
    opened = {name: Image.open(path) for name, path in panels.items()}
    kinds = {(image.size, image.info.get(_NAMES, "")) for image in opened.values()}
    if len(kinds) != 1:
        return None
    ((width, height), listed), = kinds
    if not listed:
        return None
    columns = listed.split(",")
    step = (width - _GAP) // len(columns)
    shared, last = (len(columns) - 1) * step, slice((len(columns) - 1) * step, len(columns) * step)
    canvas = Image.new("RGB", (shared + len(opened) * step + _GAP, height), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for index, (name, image) in enumerate(opened.items()):
        pixels = np.asarray(image.convert("RGB"))
        if index == 0:
            first = pixels[:, :shared]
            canvas.paste(Image.fromarray(first), (0, 0))
        elif not np.array_equal(pixels[:, :shared], first):
            return None
        x = shared + index * step
        canvas.paste(Image.fromarray(pixels[_HEADING:, last]), (x, _HEADING))
        draw.text((x + _GAP, 2), name, fill=(0, 0, 0))
    return np.asarray(canvas)


def panel_steps(run: Path) -> Sequence[tuple[int, Path]]:
    """The panels of a run, oldest first: `(step, path)`."""
    folder = Path(run) / FOLDER
    found = [(int(path.stem.removeprefix("step_")), path) for path in folder.glob("step_*.png")] if folder.is_dir() else []
    return sorted(found)
