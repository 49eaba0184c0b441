"""From feature files and labels of each form to a results file."""

import csv
import json

import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.evaluation.labels import label_tiles
from wavepath.evaluation.linear_probe import LinearProbe
from wavepath.evaluation.probes import ProbeSettings
from wavepath.evaluation.tiles import evaluate
from wavepath.files import write_json
from wavepath.interop.features import read_features, write_features
from wavepath.interop.geojson import polygon_feature
from wavepath.interop.geojson import write_features as write_geojson


def _slides(folder, slides=6, tiles=12, informative=True):
    rng = np.random.default_rng(0)
    for index in range(slides):
        label = index % 2
        x = rng.normal(size=(tiles, 8)) + (5 * label if informative else 0)
        names = np.array([f"{'ab'[label]}/{index}_{tile}" for tile in range(tiles)])
        coords = np.stack([np.arange(tiles) * 100, np.zeros(tiles, int)], 1)
        write_features(folder / f"s{index}.h5", x, coords, {"patch_size_level0": 100}, {"features_mean": -x.astype(np.float32), "names": names})
    return folder


def test_slide_labels_split_by_case(tmp_path):
    features = _slides(tmp_path / "features")
    rows = [f"case{i // 2 * 2 + i % 2},s{i},{'tumour' if i % 2 else 'normal'}" for i in range(5)]  # s5 has no label
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\n" + "\n".join(rows))
    results = evaluate(features, tmp_path / "labels.csv", tmp_path / "out", bootstraps=50, folds=2)
    assert results["label_kind"] == "slides" and results["tiles"] == 60 and results["tiles_without_label"] == 12
    assert results["probes"]["knn"]["accuracy"]["value"] > 0.95
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["classes"] == {"normal": 36, "tumour": 24}
    assert (tmp_path / "out" / "confusion.png").stat().st_size > 1000
    assert len((tmp_path / "out" / "predictions_knn.csv").read_text().splitlines()) == 61


def test_tile_labels_and_name_patterns_agree(tmp_path):
    features = [read_features(path) for path in sorted(_slides(tmp_path).glob("*.h5"))]
    names = [str(name) for slide in features for name in slide.extra["names"]]
    (tmp_path / "labels.csv").write_text("tile_id,label,case_id\n" + "\n".join(f"{n},{n[0]},{n[2]}" for n in names))
    table = label_tiles(features, tmp_path / "labels.csv")
    pattern = label_tiles(features, None, label_pattern="^(.)/", case_pattern="/([0-9]+)_")
    np.testing.assert_array_equal(table.labels, pattern.labels)
    np.testing.assert_array_equal(table.groups, pattern.groups)
    assert table.kind == "tiles" and pattern.kind == "names" and set(table.labels) == {"a", "b"}


def test_regions_label_by_centre_and_artefacts_win(tmp_path):
    features = [read_features(path) for path in sorted(_slides(tmp_path, slides=1).glob("*.h5"))]
    square = [(0, -50), (349, -50), (349, 200), (0, 200)]  # centres of tiles 0..2 lie inside (x = 50, 150, 250)
    pen = [(200, -50), (340, -50), (340, 200), (200, 200)]  # covers tile 2
    (tmp_path / "regions").mkdir()
    write_geojson(tmp_path / "regions" / "s0.geojson", [polygon_feature(pen, "pen", "pen"), polygon_feature(square, "tumour", "tumour")])
    found = label_tiles(features, tmp_path / "regions")
    assert list(found.labels) == ["tumour", "tumour"] and found.unlabelled == 10
    np.testing.assert_array_equal(found.features, features[0].features[:2])


def test_regions_need_the_size_of_a_tile(tmp_path):
    write_features(tmp_path / "s0.h5", np.zeros((2, 3)), np.zeros((2, 2)), {})
    write_geojson(tmp_path / "s0.geojson", [polygon_feature([(0, 0), (9, 0), (9, 9)], "tumour", "tumour")])
    with pytest.raises(DatasetError, match="patch_size_level0"):
        label_tiles([read_features(tmp_path / "s0.h5")], tmp_path)


def test_names_with_commas_stay_one_column(tmp_path):
    features = _slides(tmp_path / "features")
    names = ["a, b", "c"]
    rows = [f'"case, {index}",s{index},"{names[index % 2]}"' for index in range(6)]
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\n" + "\n".join(rows))
    evaluate(features, tmp_path / "labels.csv", tmp_path / "out", bootstraps=5, folds=2, probes=("knn",))
    with open(tmp_path / "out" / "predictions_knn.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["label"] for row in found} == {"a, b", "c"} and found[0]["group"] == "case, 0" and {"p_a, b", "p_c"} <= found[0].keys()


def test_mean_pool_reads_the_other_column(tmp_path):
    features = [read_features(path) for path in sorted(_slides(tmp_path).glob("*.h5"))]
    cls = label_tiles(features, None, "features", label_pattern="^(.)/")
    mean = label_tiles(features, None, "features_mean", label_pattern="^(.)/")
    np.testing.assert_array_equal(mean.features, -cls.features)
    with pytest.raises(DatasetError, match="no column other"):
        label_tiles(features, None, "other", label_pattern="^(.)/")


@pytest.mark.parametrize(
    "text, message",
    [
        ("slide,klass\ns0,a\n", "case_id,slide_id,label"),
        ("slide_id,label\nunknown,a\n", "no tile has a label"),
        ("slide_id,label\ns0,a\ns1,a\n", "two classes"),
    ],
)
def test_bad_tables_say_what_to_do(tmp_path, text, message):
    features = _slides(tmp_path / "features")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        evaluate(features, tmp_path / "labels.csv", tmp_path / "out")


def test_mixed_widths_are_refused(tmp_path):
    _slides(tmp_path / "features")
    write_features(tmp_path / "features" / "odd.h5", np.zeros((3, 5)), np.zeros((3, 2)), {})
    with pytest.raises(DatasetError, match=r"\[5, 8\]"):
        evaluate(tmp_path / "features", None, tmp_path / "out", label_pattern="(.)")


LABELS = dict(label_pattern="^(.)/", bootstraps=5, folds=2, probes=("knn",))


def test_several_encoders_are_rows_of_one_table_on_the_same_tiles(tmp_path):
    _slides(tmp_path / "ours")
    for path in sorted((tmp_path / "ours").glob("*.h5")):  # the same tiles in another order, and features that say nothing
        slide = read_features(path)
        order = np.random.default_rng(1).permutation(len(slide))
        noise = np.random.default_rng(2).normal(size=(len(slide), 3))
        write_features(tmp_path / "noise" / path.name, noise, slide.coords[order], {}, {"names": slide.extra["names"][order]})
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "".join(f"s{i},{'ab'[i % 2]}\n" for i in range(6)))
    folders = {"ours": tmp_path / "ours", "noise": tmp_path / "noise"}
    results = evaluate(folders, tmp_path / "labels.csv", tmp_path / "out", bootstraps=5, folds=3, probes=("knn", "simpleshot"))
    assert list(results["probes"]) == ["ours, knn", "ours, simpleshot", "noise, knn", "noise, simpleshot"] and results["kind"] == "encoder, probe"
    good, bad = results["probes"]["ours, simpleshot"], results["probes"]["noise, simpleshot"]
    assert good["accuracy"]["value"] > 0.9 > 0.8 > bad["accuracy"]["value"] and (good["width"], bad["width"]) == (8, 3)
    rows = {}
    for name in folders:
        with open(tmp_path / "out" / f"predictions_{name}_knn.csv", newline="") as file:
            rows[name] = [(row["tile"], row["group"], row["label"], row["fold"]) for row in csv.DictReader(file)]
    assert rows["ours"] == rows["noise"] and len(rows["ours"]) == 72, "tile by tile the same test"
    files = {picture["file"] for picture in results["pictures"]}
    assert files == {"roc.png", "confusion.png", "features_map_ours.png", "features_map_noise.png"}
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in files)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["features"] == {name: str(path) for name, path in folders.items()}


def test_slides_of_the_pretraining_teach_and_are_not_tested(tmp_path):
    features = _slides(tmp_path / "features")
    write_json(features / "embed.json", {"train_slides": ["s0", "old/s3"]})
    results = evaluate(features, None, tmp_path / "out", case_pattern="/([0-9]+)_", **LABELS)
    assert results["tiles"] == 48 and results["tiles_training_only"] == 24 and results["classes"] == {"a": 24, "b": 24} and results["groups"] == 4
    assert results["overlap"]["features"] == {"count": 2, "of": 6, "known": True, "scored": False, "slides": ["s0", "s3"]}
    assert "2 of 6 slides were pretrained on: not in the test" in (tmp_path / "out" / "results.md").read_text()
    with open(tmp_path / "out" / "predictions_knn.csv", newline="") as file:
        assert {row["group"] for row in csv.DictReader(file)} == {"1", "2", "4", "5"}
    assert evaluate(features, None, tmp_path / "out", case_pattern="/([0-9]+)_", keep_pretraining=True, **LABELS)["tiles"] == 72
    write_json(features / "embed.json", {"train_slides": [f"s{index}" for index in range(6)]})
    with pytest.raises(DatasetError, match="all 6 slides .*--keep-pretraining-slides"):
        evaluate(features, None, tmp_path / "out", case_pattern="/([0-9]+)_", **LABELS)


def test_a_table_of_encoders_tests_on_what_none_has_seen(tmp_path):
    folders = {name: _slides(tmp_path / name) for name in ("one", "two")}
    for name, seen in (("one", ["s0"]), ("two", ["s1", "s2"])):
        write_json(folders[name] / "embed.json", {"train_slides": seen})
    results = evaluate(folders, None, tmp_path / "out", case_pattern="/([0-9]+)_", **LABELS)
    assert results["groups"] == 3 and results["overlap"]["two"]["count"] == 2
    assert results["notes"][:2] == ["one: 1 of 6 slides was pretrained on: not in the test", "two: 2 of 6 slides were pretrained on: not in the test"]
    assert results["notes"][2] == "only 1 case of 'a' in the test: intervals over so few say little"
    write_json(folders["one"] / "embed.json", {"train_slides": ["s0", "s3", "s4", "s5"]})
    with pytest.raises(DatasetError, match="each slide was pretrained on by one of the encoders"):
        evaluate(folders, None, tmp_path / "out", case_pattern="/([0-9]+)_", **LABELS)


def test_the_sgd_probe_is_a_row_with_its_deviation(tmp_path):
    settings = ProbeSettings(sgd=LinearProbe(rate=0.01, steps=125, runs=2))
    given = LABELS | dict(probes=("sgd",), case_pattern="/([0-9]+)_", settings=settings)
    results = evaluate(_slides(tmp_path / "features"), None, tmp_path / "out", **given)
    entry = results["probes"]["sgd"]
    assert entry["runs"] == 2 and entry["accuracy"]["sd"] >= 0 and np.sum(entry["confusion"]) == 2 * 72
    assert "± of sgd: standard deviation over its runs" in (tmp_path / "out" / "results.md").read_text()
    with open(tmp_path / "out" / "predictions_sgd.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["0"] * 72 + ["1"] * 72


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__((slice(0, 3), 0), np.nan), r"3 of 12 tiles of s1 have features that are not finite \(column features\)"),
        (lambda x: x.__setitem__((5, 7), np.inf), "1 of 12 tiles of s1 have features that are not finite"),
    ],
)
def test_features_that_are_not_finite_name_their_slide(tmp_path, change, message):
    features = _slides(tmp_path / "features")
    slide = read_features(features / "s1.h5")
    change(slide.features)
    write_features(features / "s1.h5", slide.features, slide.coords, {}, slide.extra)
    with pytest.raises(DatasetError, match=message):
        evaluate(features, None, tmp_path / "out", **LABELS)


def test_a_class_of_one_case_is_refused_or_left_out(tmp_path, capsys):
    features = _slides(tmp_path / "features")
    labels = ["a", "b", "a", "b", "a", "c"]
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "".join(f"s{i},{label}\n" for i, label in enumerate(labels)))
    given = dict(bootstraps=5, folds=2, probes=("knn",))
    with pytest.raises(DatasetError, match="all tiles of class 'c' are of one case, 's5'.*--min-cases 2"):
        evaluate(features, tmp_path / "labels.csv", tmp_path / "out", **given)
    assert evaluate(features, tmp_path / "labels.csv", tmp_path / "out", min_cases=2, **given)["classes"] == {"a": 36, "b": 24}
    assert "classes of fewer than 2 cases are left out: c" in capsys.readouterr().err
    with pytest.raises(DatasetError, match="no class has 9 cases"):
        evaluate(features, tmp_path / "labels.csv", tmp_path / "out", min_cases=9, **given)


def test_labels_of_what_has_no_features_are_refused_or_left_out(tmp_path, capsys):
    features = _slides(tmp_path / "features")
    text = "slide_id,label\n" + "".join(f"s{i},{'ab'[i % 2]}\n" for i in range(6))
    (tmp_path / "labels.csv").write_text(text + "s77,a\ns78,b\ns79,\n")
    given = dict(bootstraps=5, folds=2, probes=("knn",))
    with pytest.raises(DatasetError, match="names 2 slides that have no features .such as 's77'.*--skip-missing"):
        evaluate(features, tmp_path / "labels.csv", tmp_path / "out", **given)
    assert evaluate(features, tmp_path / "labels.csv", tmp_path / "out", skip_missing=True, **given)["tiles"] == 72
    assert "names 2 slides" in capsys.readouterr().err
    write_features(features / "s77.h5", np.zeros((0, 8)), np.zeros((0, 2)), {})  # a slide without a tile is known
    write_features(features / "s78.h5", np.zeros((0, 8)), np.zeros((0, 2)), {})
    assert evaluate(features, tmp_path / "labels.csv", tmp_path / "out", **given)["tiles"] == 72
    (tmp_path / "labels.csv").write_text("tile_id,label\na/0_0,a\nb/1_1,b\nb/1_99,b\n")
    with pytest.raises(DatasetError, match="names 1 tiles that have no features .such as 'b/1_99'"):
        evaluate(features, tmp_path / "labels.csv", tmp_path / "out", **given)


def test_features_without_a_tile_at_all(tmp_path):
    write_features(tmp_path / "features" / "s0.h5", np.zeros((0, 8)), np.zeros((0, 2)), {})
    with pytest.raises(DatasetError, match="none of the 1 feature files holds a tile"):
        evaluate(tmp_path / "features", None, tmp_path / "out", **LABELS)
