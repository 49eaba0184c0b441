"""From feature files and labels of each form to a results file."""

import csv
import json

import numpy as np
import pytest

from wavepath.errors import DatasetError
from wavepath.evaluation.evaluate import evaluate
from wavepath.evaluation.labels import label_tiles
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
