"""`wavepath report`: one self-contained HTML page of a run: slides, regions and why they were chosen, curves, reconstructions, probes."""

import csv
import html
import json
from pathlib import Path

import numpy as np
from PIL import Image

from wavepath import __version__
from wavepath.console import duration, progress, warn
from wavepath.data.manifest import EMPTY, FAILED, MANIFEST, OK, SCREENING, SETTINGS, SlideRow, read_manifest, slide_folder
from wavepath.data.pair_records import is_pairs
from wavepath.data.pyramid_records import is_pyramids
from wavepath.data.slide_runs import load_screening
from wavepath.data.slides import open_slide
from wavepath.errors import DatasetError, SlideError, WavepathError
from wavepath.evaluation import pictures
from wavepath.evaluation.report_results import RESULTS, figure, results_section, table
from wavepath.files import read_json, writable_folder, write_text
from wavepath.training.panels import panel_steps
from wavepath.training.runs import read_curves, read_status

EXAMPLE_PX = 112  # side of an example region in the page
CURVES = {  # word in a metric's name -> title; each has a scale of its own
    "loss": "loss", "mse": "squared error", "ssim": "structure (1 - SSIM)", "glcm": "co-occurrence distance", "accuracy": "accuracy",
    "psnr": "PSNR (dB)", "lr": "learning rate", "images_per_second": "images per second",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2530;max-width:1180px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0 0 .2rem}h2{margin:2.2rem 0 .6rem;border-bottom:1px solid #d8dee6;padding-bottom:.2rem}h3{margin:1.6rem 0 .4rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #e4e8ee;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}figure{margin:.3rem 0}figcaption{font-size:.85rem;color:#596676}
.row{display:flex;flex-wrap:wrap;gap:1rem}.row figure{flex:1 1 260px;max-width:380px}img{max-width:100%;height:auto;border-radius:3px}
.row img{width:100%}.muted{color:#596676}.strips img{display:block}
"""


def write_report(run: Path, out: Path, *, tiles: Path | None = None, evaluation: Path | None = None, max_slides: int = 12) -> Path:
    """Writes the page.

    Args:
        run: a run folder of `wavepath train`; or a prepared folder alone, or an evaluation's: then the page has no training part.
        out: the HTML file.
        tiles: the prepared folder; default: the run's `config.data.dir`, or the phantom tiles inside the run.
        evaluation: folder with results.json; default: RUN/evaluation.
        max_slides: slides shown with pictures; the table lists all.

    Raises:
        DatasetError: `run` is none of these.
    """
    run, out = Path(run), Path(out)
    if out.is_dir():
        raise WavepathError(f"--out {out} is a folder; give the name of an HTML file, such as {out / 'report.html'}")
    is_run, is_tiles = (run / "config.json").exists(), (run / MANIFEST).exists()
    is_evaluation = not is_run and not is_tiles and (run / RESULTS).exists()
    if not (is_run or is_tiles or is_evaluation):
        raise DatasetError(
            f"{run} holds neither config.json (a run of `wavepath train`) nor {MANIFEST} (a folder of `wavepath prepare`), nor {RESULTS} (of "
            "`wavepath evaluate`)"
        )
    writable_folder(out.parent)  # said now rather than after the pictures are drawn
    config = read_json(run / "config.json") if is_run else {}
    tiles = tiles or _tiles_folder(run, config, is_tiles)
    evaluation = evaluation or (run if is_evaluation else run / "evaluation")
    sections = [_header(run, tiles)]
    if tiles is not None and is_pyramids(tiles):
        overview = figure(tiles / "overview.jpg")
        sections.append(f"<h2>Pyramids</h2><p class=muted>Aligned crops of {html.escape(str(tiles))}, from the finest level on.</p>{overview}")
    elif tiles is not None and is_pairs(tiles):
        overview = figure(tiles / "overview.jpg")
        sections.append(f"<h2>Pairs</h2><p class=muted>H&amp;E and immunostain of {html.escape(str(tiles))}.</p>{overview}")
    elif tiles is not None and (tiles / MANIFEST).exists():
        sections.append(_slides_section(tiles, max_slides))
    elif tiles is not None and tiles.is_dir():
        sections.append(f"<h2>Slides</h2><p class=muted>{html.escape(str(tiles))} is a folder of images: there are no slides or regions to show.</p>")
    elif is_run and config.get("task") == "mil":
        bags = config["data"]["bags"] or "synthetic bags"
        sections.append(f"<h2>Slides</h2><p class=muted>Trained on features: {html.escape(str(bags))}.</p>")
    elif is_run:
        sections.append(f"<h2>Slides</h2><p class=muted>The tiles of this run are not at {html.escape(str(tiles))}; give them with --data.</p>")
    if is_run:
        sections += [_training_section(run), _reconstruction_section(run)]
    sections.append(results_section(evaluation, out))
    if is_run:
        sections.append(_config_section(config))
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>wavepath: {html.escape(run.name)}</title><style>{STYLE}</style><body>"
    write_text(out, page + "\n".join(sections) + "</body></html>\n")
    return out


def _tiles_folder(run: Path, config: dict, is_tiles: bool) -> Path | None:
    if is_tiles:
        return run
    data = config.get("data", {})
    if data.get("dir"):
        return Path(data["dir"])
    found = sorted(run.glob("phantom*/**/manifest.csv"))
    return found[0].parent if found else None


def _header(run: Path, tiles: Path | None) -> str:
    where = f", tiles {html.escape(str(tiles))}" if tiles else ""
    return f"<h1>{html.escape(run.name)}</h1><p class=muted>wavepath {__version__}, run {html.escape(str(run))}{where}</p>"


# --- slides ------------------------------------------------------------------------------------------------------------------------------


def _slides_section(tiles: Path, max_slides: int) -> str:
    rows = read_manifest(tiles)
    counts = {status: sum(row.status == status for row in rows) for status in (OK, EMPTY, FAILED)}
    text = f"{len(rows)} slides: {counts[OK]} with tiles, {counts[EMPTY]} empty, {counts[FAILED]} failed; {sum(row.tiles for row in rows)} tiles."
    names = ["slide_id", "status", "mpp", "mpp_source", "width", "height", "regions", "regions_tissue", "regions_selected"]
    names += ["tiles", "tile_mpp", "reason"]
    header = [name.replace("_", " ").replace("regions tissue", "ranked").replace("regions selected", "chosen") for name in names]
    cells = [[_short(getattr(row, name)) for name in names] for row in rows]
    parts = ["<h2>Slides</h2>", f"<p>{text}</p>", table(header, cells, {2, 4, 5, 6, 7, 8, 9, 10})]
    # A slide without tiles is where a reader wants to see why; one that failed before its screening has no picture.
    seen = [row for row in rows if row.status != FAILED and (slide_folder(tiles, row.slide_id) / SCREENING).exists()]
    if len(seen) > max_slides:
        parts.append(f"<p class=muted>Pictures of the first {max_slides} slides; --max-slides shows more.</p>")
    root = Path(read_json(tiles / SETTINGS)["slides"])
    with progress("slides in the report", min(len(seen), max_slides), "slides") as bar:
        for row in seen[:max_slides]:
            parts.append(_slide(tiles, root, row))
            bar.advance(1, row.slide_id)
    return "\n".join(parts)


def _short(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def read_selection(path: Path) -> dict[int, int]:
    """Tiles of each selected region, by the region's index, from a slide's selection.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return {int(row["index"]): int(row["tiles"]) for row in csv.DictReader(file) if row["selected"] == "1"}


def _slide(tiles: Path, root: Path, row: SlideRow) -> str:
    folder = slide_folder(tiles, row.slide_id)
    screening = load_screening(folder)
    table, tissue, thumbnail = screening.regions, screening.tissue, screening.thumbnail
    selected = read_selection(folder / "selection.csv")
    regions = {name: np.asarray(getattr(table, name)) for name in ("index", "x", "y", "energy", "eligible")}
    regions["size"] = np.broadcast_to(np.asarray(table.size), regions["x"].shape)
    regions["selected"] = np.isin(regions["index"], list(selected))
    scale = thumbnail.shape[1] / row.width
    extent = (tissue.tissue.shape[1] * tissue.cell * scale, tissue.tissue.shape[0] * tissue.cell * scale)
    layers = {name: getattr(tissue, name) for name in ("tissue", "pen", "blur")}
    shown = [
        (thumbnail, "slide"),
        (pictures.tissue_picture(thumbnail, layers, extent), "tissue (blue), pen (magenta), out of focus (orange)"),
        (pictures.energy_picture(thumbnail, regions, scale), "wavelet energy by rank: dark low, yellow high"),
        (pictures.choice_picture(thumbnail, regions, scale), f"{row.regions_selected} chosen regions (green), other ranked ones veiled"),
    ]
    figures = "".join(f'<figure><img alt="" src="{pictures.data_uri(image)}"><figcaption>{text}</figcaption></figure>' for image, text in shown)
    examples = _examples(root, row, regions)
    return f"<h3>{html.escape(row.slide_id)}</h3><p>{html.escape(_costs(row))}</p><div class=row>{figures}</div>{examples}"


def _costs(row: SlideRow) -> str:
    text = f"{row.regions_selected} of {row.regions_tissue} ranked regions chosen"
    if row.energy_selected is not None and row.energy_tissue:
        text += f" (mean energy {row.energy_selected:.2e}, all ranked {row.energy_tissue:.2e})"
    text += f", {row.tiles} tiles"
    if row.pixels_tissue:
        screened, stored = 100 * row.pixels_screened / row.pixels_tissue, 100 * row.pixels_tiles / row.pixels_tissue
        text += f"; screening read {screened:.1f} % and the tiles hold {stored:.1f} % of the {row.pixels_tissue / 1e6:.0f} Mpx"
        text += " that all tissue has at the tiles' mpp"
    return text


def _examples(root: Path, row: SlideRow, regions: dict[str, np.ndarray]) -> str:
    rows = {name: indices for name, indices in pictures.example_rows(regions).items() if len(indices)}
    if not rows:
        return ""
    path = root / row.path
    parts = []
    try:
        with open_slide(path, mpp=row.mpp) as slide:
            for name, indices in rows.items():
                crops = []
                for index in indices:
                    mpp = row.mpp * float(regions["size"][index]) / EXAMPLE_PX
                    crops.append(slide.read(int(regions["x"][index]), int(regions["y"][index]), EXAMPLE_PX, EXAMPLE_PX, mpp))
                energies = ", ".join(f"{regions['energy'][index]:.2e}" for index in indices)
                picture = pictures.data_uri(pictures.strip(crops))
                parts.append(f'<figure><img alt="" src="{picture}"><figcaption>{name} energies: {energies}</figcaption></figure>')
    except (SlideError, OSError) as error:
        warn(f"no example regions of {row.slide_id}: {error}")
        return f"<p class=muted>No example regions: the slide is no longer readable at {html.escape(str(path))}.</p>"
    return f"<div class=strips>{''.join(parts)}</div>"


# --- training ----------------------------------------------------------------------------------------------------------------------------


def _training_section(run: Path) -> str:
    curves, _ = read_curves(run / "metrics.jsonl")
    if not curves:
        return "<h2>Training</h2><p class=muted>No metrics yet.</p>"
    status = read_status(run)
    facts = [f"step {max(steps[-1] for steps, _ in curves.values() if steps)}"]
    if status.get("steps"):
        facts[0] += f" of {status['steps']}"
    if status.get("seconds"):
        facts.append(f"{duration(status['seconds'])} of training")
    if status.get("images_per_second"):
        facts.append(f"{status['images_per_second']:.1f} images/s")
    facts.append(str(status.get("status", "stopped before its end")))
    titles = CURVES | ({"ssim": "SSIM"} if any("psnr" in name for name in curves) else {})  # super-resolution logs similarity, not its loss
    drawn = {title: [name for name in sorted(curves) if word in name.rpartition("/")[2]] for word, title in titles.items()}
    figures = [pictures.curves_figure(curves, names, title) for title, names in drawn.items() if names]
    shown = "".join(f'<figure><img alt="" src="{pictures.figure_uri(figure)}"></figure>' for figure in figures)
    return f"<h2>Training</h2><p>{html.escape(', '.join(facts))}</p><div class=row>{shown}</div>"


def _reconstruction_section(run: Path) -> str:
    panels = panel_steps(run)
    if not panels:
        return ""
    chosen = [panels[0], panels[-1]] if len(panels) > 1 else panels
    shown = "".join(
        f'<figure><img alt="" src="{pictures.data_uri(Image.open(path))}">'
        f"<figcaption>step {step}</figcaption></figure>"  # the columns are named in the picture
        for step, path in chosen
    )
    return f"<h2>Reconstructions</h2>{shown}"


def _config_section(config: dict) -> str:
    return (
        f"<h2>Config</h2><details><summary>resolved fields</summary><pre>{html.escape(json.dumps(config, indent=1, sort_keys=True))}</pre></details>"
    )
