"""The report's part on evaluations: tables, embedded pictures, links, and what is not to be trusted in a results.json."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from wavepath.errors import DatasetError
from wavepath.evaluation import report_results
from wavepath.evaluation.evaluate import summarise, write_results
from wavepath.evaluation.probes import Predictions
from wavepath.evaluation.report import write_report
from wavepath.evaluation.report_results import figure, results_section


def _results(**more):
    rng = np.random.default_rng(0)
    truth, scores = np.arange(12) % 2, rng.random((12, 2))
    one = Predictions(("normal", "tumour"), truth, scores / scores.sum(1, keepdims=True), np.array([f"s{i}" for i in range(12)]), truth * 0)
    return {
        "kind": "arm", "scored": "bags of tile features", "slides": 12, "groups": 12, "classes": {"normal": 6, "tumour": 6}, "positive": "tumour",
        "seeds": 1, "probes": {"abmil": {"folds": 2, **summarise([one], "tumour", bootstraps=5)}}, **more,
    }  # fmt: skip


def _picture(path, size=(40, 30), colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def _sizes(page):
    import base64
    import io

    return [Image.open(io.BytesIO(base64.b64decode(data))).size for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)]


def test_rows_keep_their_order_and_encoders_their_names(tmp_path):
    entry = _results()["probes"]["abmil"]
    overlap = {"ours": {}, "colours": {}}
    notes = ["ours: 1 of 3 slides was pretrained on: not in the test", "± of sgd: its runs", "one more note"]
    write_results(tmp_path, _results(probes={"ours, knn": entry, "colours, knn": entry}, overlap=overlap, notes=notes))
    page = results_section(tmp_path, tmp_path / "a.html")
    assert page.index("<td>ours, knn") < page.index("<td>colours, knn"), "the first encoder is the reader's own; JSON sorts its keys"
    assert ". ours: 1 of 3" in page and " One more note." in page
    assert page.count("AUC: area under the ROC curve") == 1


def test_an_evaluation_alone_makes_a_page(tmp_path):
    out = tmp_path / "evaluation of <slides>"
    listed = [
        {"file": "roc.png", "title": "ROC & bands", "kind": "roc"},
        {"file": "heatmaps/a b.png", "title": "a b: predicted tumour", "kind": "heatmap"},
        {"file": "heatmaps/a b_tiles.png", "title": "tiles of a b", "kind": "tiles"},
        {"file": "heatmaps/a b.geojson", "title": "a b", "kind": "geojson"},
        {"file": "gone.png", "title": "was deleted", "kind": "map"},
    ]
    for index, each in enumerate(listed[:3]):
        _picture(out / each["file"], (50 + index, 30))
    (out / "heatmaps" / "a b.geojson").write_text("{}")
    write_results(out, _results(pictures=listed))
    page = write_report(out, tmp_path / "pages" / "report.html").read_text()
    assert "<h2>Evaluation</h2>" in page and "<th>arm</th>" in page and "<th>sensitivity</th>" in page and "12 labelled slides" in page
    assert "ROC &amp; bands" in page and "evaluation of &lt;slides&gt;" in page and "<h2>Slides</h2>" not in page and "<h2>Training</h2>" not in page
    sizes = _sizes(page)
    assert sizes[0] == (50, 30) and sizes[2:] == [(51, 30), (52, 30)] and len(sizes) == 4, "ROC, confusion, heatmap, tiles"
    (link,) = re.findall(r'href="([^"]+)"', page)
    assert link == "../evaluation%20of%20%3Cslides%3E/heatmaps/a%20b.geojson" and "&gt; Import objects" in page
    assert not re.search(r'src="(?!data:)', page)


def test_pictures_outside_of_the_folder_are_not_taken(tmp_path):
    _picture(tmp_path / "secret.png", (77, 7))
    _picture(tmp_path / "evaluation" / "a.png", (11, 7))
    (tmp_path / "evaluation" / "link.png").symlink_to(tmp_path / "secret.png")
    paths = ("../secret.png", str(tmp_path / "secret.png"), "link.png", "a.png")
    write_results(tmp_path / "evaluation", _results(pictures=[{"file": path, "kind": "heatmap", "title": "x"} for path in paths]))
    assert _sizes(results_section(tmp_path / "evaluation", tmp_path / "page.html"))[1:] == [(11, 7)]


def test_number_and_size_of_pictures_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(report_results, "MOST", 3)
    listed = [{"file": f"{index}.png", "title": "x", "kind": "heatmap"} for index in range(5)]
    for each in listed:
        _picture(tmp_path / each["file"], (2800, 20))
    write_results(tmp_path, _results(pictures=listed))
    page = results_section(tmp_path, tmp_path / "page.html")
    assert _sizes(page)[1:] == [(1400, 10)] * 3 and "2 more pictures of slides lie in" in page
    assert figure(tmp_path / "none.png") == ""


def test_results_without_a_list_and_with_a_table_of_their_own(tmp_path):
    (tmp_path / "old").mkdir()
    old = _results()
    write_results(tmp_path / "old", old)
    del old["pictures"]
    (tmp_path / "old" / "results.json").write_text(json.dumps(old))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "results.json").write_text(json.dumps({"about": "3 slides & more", "table": [["slide", "p"], [["s<1>", "0.9"]]]}))
    _picture(tmp_path / "own" / "scatter.png", (33, 3))
    page = results_section(tmp_path, tmp_path / "page.html")
    assert "<h3>old</h3>" in page and "<h3>own</h3>" in page and "3 slides &amp; more" in page and "s&lt;1&gt;" in page
    assert len(_sizes(page)) == 2 and _sizes(page)[1] == (33, 3)


def test_probes_of_tiles_keep_their_heading_and_nothing_is_said_so(tmp_path):
    assert "Not evaluated" in results_section(tmp_path, tmp_path / "page.html")
    tiles = _results(pool="cls", tiles=12)
    for name in ("kind", "slides", "scored"):
        del tiles[name]
    write_results(tmp_path / "evaluation", tiles)
    page = results_section(tmp_path / "evaluation", tmp_path / "page.html")
    assert "<h2>Probes</h2>" in page and "12 labelled tiles" in page
    with pytest.raises(DatasetError, match="nor results.json"):
        write_report(tmp_path, tmp_path / "page.html")


def test_a_run_on_features_says_where_they_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "mil", "data": {"dir": "", "bags": "/features/uni"}, "seed": 0}))
    page = write_report(tmp_path, tmp_path / "page.html").read_text()
    assert "Trained on features: /features/uni" in page and "give them with --data" not in page
