"""`wavepath evaluate` for slides as a user types it: trained, scored, drawn and reported; and flags that do not go together."""

import json

import pytest

from wavepath import cli
from wavepath.data.synthetic_bags import make_bags

TINY = (
    "train.steps=4", "train.eval_every=2", "train.save_every=4", "train.log_every=2", "batch_size=4", "lr=1.0", "mil.buckets=(16,)", "mil.embed=4",
    "mil.hidden=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """16 slides of 8 cases."""
    return make_bags(tmp_path_factory.mktemp("bags"), slides=16, width=6, tiles=(5, 16))


def test_slides_are_trained_scored_drawn_and_new_ones_predicted(bags, tmp_path, capsys):
    out, overrides = tmp_path / "out", [f"--config.{field}" for field in TINY]
    flags = ["--bags", str(bags[0]), "--labels", str(bags[1]), "--folds", "2", "--config", "configs/mil.py:smoke", "--network", "max"]
    flags += ["--heatmaps", "2", *overrides]
    assert cli.main(["evaluate", *flags, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "auc by fold" in shown.out and "16 of 8 cases" in shown.err and "2 runs" in shown.err
    results = json.loads((out / "results.json").read_text())
    kinds = [picture["kind"] for picture in results["pictures"]]
    assert sorted(set(kinds)) == ["confusion", "geojson", "heatmap", "map", "roc"] and kinds.count("heatmap") == kinds.count("geojson") == 2
    for picture in results["pictures"]:
        assert (out / picture["file"]).stat().st_size > 500 and picture["title"]
    quilt = json.loads(next((out / "heatmaps").glob("*.geojson")).read_text())
    features = quilt["features"] if isinstance(quilt, dict) else quilt
    shares = [one["properties"]["measurements"]["attention"] for one in features]
    assert sum(shares) == pytest.approx(1, abs=1e-4) and features[0]["properties"]["objectType"] == "tile"
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "16 labelled slides of 8 cases" in page and "auc by fold" in page and ".geojson" in page
    capsys.readouterr()
    run = out / "runs" / "max" / "seed_0" / "fold_1"
    assert cli.main(["evaluate", "--mil", str(run), "--bags", str(bags[0]), "--heatmaps", "0", "--out", str(tmp_path / "new")]) == 0
    assert "predicted" in capsys.readouterr().err and len(list((tmp_path / "new" / "attention").glob("*.h5"))) == 16
    assert cli.main(["evaluate", "--mil", str(run), "--out", str(tmp_path / "one")]) == 1
    assert "lacks fold 0 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing is named that shall be scored"),
        (["--mil", "x", "--superres", "y"], "two things are named"),
        (["--bags", "x"], "--bags needs --labels"),
        (["--bags", "x", "--labels", "y", "--folds", "3", "--splits", "camelyon16"], "two ways to divide"),
        (["--bags", "x", "--labels", "y", "--k", "3"], "--k belongs to the probes of --features"),
        (["--bags", "x", "--labels", "y", "--partial"], "--partial belongs to --runs, --mil"),
        (["--bags", "x", "--labels", "y", "--config.data.fold=1"], "config.data.fold is set for each run"),
        (["--bags", "a/x", "b/x", "--labels", "y"], "are called 'x'"),
        (["--bags", "x", "--labels", "y", "--heatmaps", "-1"], "--heatmaps -1 is not a number"),
        (["--bags", "x", "--labels", "y", "--tiles", "a", "--slides", "b"], "two places for thumbnails"),
        (["--bags", "x", "--labels", "y", "--label-pattern", "(.)"], "not allowed with"),
        (["--bags", "nowhere", "--labels", "y"], "there is no folder"),
        (["--mil", "x"], "no run in x"),
        (["--mil", "x", "--folds", "3"], "--folds belongs to --features, --bags"),
        (["--mil", "x", "--network", "abmil"], "--network belongs to --bags"),
        (["--mil", "x", "--config.lr=1"], "--config.lr belongs to --bags, which trains"),
        (["--mil", "x", "--bags", "y", "--data", "z"], "--data is of --mil alone"),
        (["--mil", "x", "--bags", "y", "z"], "takes one folder of new slides, not 2"),
        (["--features", "x", "--labels", "y", "--heatmaps", "3"], "--heatmaps belongs to --mil, --bags"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    assert cli.main(["evaluate", *flags, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
