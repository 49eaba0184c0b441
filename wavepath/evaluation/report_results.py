"""The part of a report's page that shows evaluations: a table for each results.json, and the pictures that it lists."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from wavepath.console import progress
from wavepath.evaluation.evaluate import counted, scored_by, table_rows
from wavepath.evaluation.pictures import data_uri
from wavepath.files import read_json

RESULTS = "results.json"
DRAWN = ("comparison.png", "scatter.png", "encoders.png")  # by evaluations that have a table of their own
BESIDE, BELOW = ("roc", "confusion", "map"), ("heatmap", "tiles")  # kinds of pictures: side by side, or one under another
MOST = 24  # pictures of one results.json below one another: the page holds them all, and is opened in a browser
LEGEND = (
    "All are predicted by models that have not seen their case. Balanced accuracy: mean of the share found of each class; macro F1: mean of"
    " the classes' F1; AUC: area under the ROC curve (0.5 is chance), of more than two classes the mean of each against the rest."
)
_WIDEST = 1400  # px of an embedded picture


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], numeric: frozenset[int] | set[int] = frozenset()) -> str:
    """An HTML table; columns in `numeric` stand to the right."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if i in numeric else ''}>{html.escape(str(c))}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def figure(path: Path, title: str = "", width: int = 720) -> str:
    """A picture of an evaluation, inside of the page, at most `width` px wide; empty where it was not drawn."""
    if not path.is_file():
        return ""
    with Image.open(path) as image:
        image.thumbnail((_WIDEST, 4 * _WIDEST), Image.Resampling.LANCZOS)
        shown = data_uri(image, 90)
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    return f'<figure><img alt="" style="max-width:{width}px;width:100%" src="{shown}">{caption}</figure>'


def results_section(evaluation: Path, page: Path) -> str:
    """Every results.json below a folder.

    Args:
        page: where the HTML will lie: files that are not pictures (GeoJSON) are linked from there.
    """
    found = sorted(evaluation.rglob(RESULTS))
    if not found:
        todo = "<code>wavepath embed</code> and <code>wavepath evaluate --out RUN/evaluation</code>"
        return f"<h2>Probes</h2><p class=muted>Not evaluated; run {todo}.</p>"
    loaded = {path: read_json(path) for path in found}
    probes = all("table" not in results and results.get("kind", "probe").endswith("probe") for results in loaded.values())
    parts = [f"<h2>{'Probes' if probes else 'Evaluation'}</h2>"]
    with progress("evaluations in the report", len(loaded), "evaluations") as bar:
        for path, results in loaded.items():
            name = "" if path.parent == evaluation else f"<h3>{html.escape(path.parent.relative_to(evaluation).as_posix())}</h3>"
            parts.append(name + _one(path.parent, results, page))
            bar.advance(1)
    return "".join(parts)


def _one(folder: Path, results: Mapping[str, Any], page: Path) -> str:
    legend = ""
    if "table" in results:  # it says itself what it shows (super-resolution, staining, slides without labels)
        head, rows = results["about"], results["table"]
        default = [{"file": name, "kind": "table"} for name in DRAWN]
    else:
        head, rows, legend = _head(results), table_rows(results), f"<p class=muted>{LEGEND}</p>"
        default = [{"file": "confusion.png", "kind": "confusion"}]
    return f"<p>{html.escape(head)}</p>{table(*rows)}{legend}{_pictures(folder, results.get('pictures') or default, page)}"


def _head(results: Mapping[str, Any]) -> str:
    classes = ", ".join(f"{name} {count}" for name, count in results["classes"].items())
    head = (
        f"{counted(results).replace(' ', ' labelled ')} of {results['groups']} cases or slides ({classes}); {scored_by(results)}; "
        "95 % bootstrap intervals over cases or slides."
    )
    if results.get("positive"):
        head += f" Positive class: {results['positive']}, against the rest."
    # A name of an encoder stays as it is.
    named = tuple(f"{name}: " for name in results.get("overlap", ()))
    return head + "".join(f" {note if note.startswith(named) else note[:1].upper() + note[1:]}." for note in results.get("notes", ()))


def _pictures(folder: Path, listed: Sequence[Mapping[str, str]], page: Path) -> str:
    """Pictures of a results.json; a path that leads out of its folder is passed over: the page may be given away, and the file came from anywhere."""
    inside = folder.resolve()
    listed = [{"kind": "", "title": "", **each} for each in listed if (folder / each["file"]).resolve().is_relative_to(inside)]
    beside = [figure(folder / each["file"], each["title"]) for each in listed if each["kind"] in BESIDE]
    parts = [f"<div class=row>{''.join(beside)}</div>"] if any(beside) else []
    parts += [figure(folder / each["file"], each["title"]) for each in listed if each["kind"] not in (*BESIDE, *BELOW, "geojson")]
    below = [each for each in listed if each["kind"] in BELOW]
    parts += [figure(folder / each["file"], "" if each["kind"] == "heatmap" else each["title"], 900) for each in below[:MOST]]
    if len(below) > MOST:
        parts.append(f"<p class=muted>{len(below) - MOST} more pictures of slides lie in {html.escape(str(folder))}.</p>")
    if files := [each["file"] for each in listed if each["kind"] == "geojson" and (folder / each["file"]).is_file()]:
        there = {name: quote(Path(os.path.relpath(folder / name, page.parent)).as_posix()) for name in files}
        links = ", ".join(f'<a href="{address}">{html.escape(name)}</a>' for name, address in there.items())
        parts.append(f"<p>For QuPath (File &gt; Import objects), beside this page: {links}</p>")
    return "".join(parts)
