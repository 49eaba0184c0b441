"""QuPath GeoJSON: what is written reads back, in QuPath's own terms, and what QuPath or a hand writes is read."""

import json
import uuid

import pytest
from shapely.geometry import MultiPolygon, Polygon, box

from wavepath.errors import WavepathError
from wavepath.interop.geojson import polygon_feature, read_regions, write_features

SQUARE = [(0, 0), (10, 0), (10, 10), (0, 10)]


def test_regions_read_back_with_holes_and_classes(tmp_path):
    ring = Polygon([(0, 0), (40, 0), (40, 40), (0, 40)], [[(10, 10), (10, 20), (20, 20), (20, 10)]])
    parts = MultiPolygon([box(100, 0, 110, 10), box(200, 0, 220, 10)])
    features = [
        polygon_feature(ring, "first", "tumour", (200, 0, 0)),
        polygon_feature(SQUARE, "second", "stroma"),
        polygon_feature(parts, "third", "fat"),
    ]
    write_features(tmp_path / "a b é.geojson", features)
    regions = read_regions(tmp_path / "a b é.geojson")
    assert [name for name, _ in regions] == ["tumour", "stroma", "fat", "fat"]
    assert [shape.area for _, shape in regions] == [1500, 100, 100, 200]
    assert regions[0][1].equals(ring)


def test_the_file_is_what_qupath_expects(tmp_path):
    values = {"wavelet_energy": 0.42, "missing": float("nan"), "open": float("inf")}
    features = [
        polygon_feature(SQUARE, "tile 1", "kept", (1, 2, 3), object_type="tile", measurements=values),
        polygon_feature(SQUARE),
    ]
    write_features(tmp_path / "a.geojson", features)
    content = json.loads(
        (tmp_path / "a.geojson").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert content["type"] == "FeatureCollection"
    first, second = content["features"]
    assert first["type"] == "Feature" and first["geometry"]["type"] == "Polygon"
    assert first["geometry"]["coordinates"] == [[[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]]
    assert first["properties"] == {
        "objectType": "tile",
        "name": "tile 1",
        "classification": {"name": "kept", "color": [1, 2, 3]},
        "measurements": {"wavelet_energy": 0.42, "missing": "NaN", "open": "Infinity"},
    }
    assert second["properties"] == {"objectType": "annotation"}
    assert uuid.UUID(first["id"]) != uuid.UUID(second["id"])


def test_equal_features_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_features(tmp_path / name, [polygon_feature(SQUARE, "x", "y")] * 2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    ids = [feature["id"] for feature in json.loads((tmp_path / "a").read_text())["features"]]
    assert len(set(ids)) == 2


def test_other_forms_of_geojson_are_read(tmp_path):
    bow_tie = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    square = {"type": "Polygon", "coordinates": [[*map(list, SQUARE), [0, 0]]]}
    point = {"type": "Point", "coordinates": [1, 2]}

    def feature(geometry, **properties):
        return {"type": "Feature", "geometry": geometry, "properties": properties}

    features = [
        feature(square, classification={"names": ["Tumor", "Positive"]}),
        feature(bow_tie, classification={"name": "drawn by hand"}),
        feature(square, name="by name"),
        feature(square),
        feature(point, name="a point"),
    ]
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(features))
    regions = read_regions(path)
    assert [name for name, _ in regions] == ["Tumor: Positive", "drawn by hand", "drawn by hand", "by name"]
    assert all(shape.is_valid for _, shape in regions)
    assert sum(shape.area for name, shape in regions if name == "drawn by hand") == pytest.approx(50)
    path.write_text(json.dumps(features[0]))
    assert len(read_regions(path)) == 1


def test_bad_files_are_one_clear_line(tmp_path):
    broken = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1]]]},
        "properties": {"name": "stump"},
    }
    texts = {"text": "not json", "list": "[1, 2]", "empty": "{}", "broken": json.dumps([broken])}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in [*texts, "absent"]:
        with pytest.raises(WavepathError, match=name) as caught:
            read_regions(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_is_no_region_is_refused():
    with pytest.raises(ValueError, match="object_type"):
        polygon_feature(SQUARE, object_type="blob")
    with pytest.raises(ValueError, match="three points"):
        polygon_feature(SQUARE[:2])
    with pytest.raises(ValueError, match="LineString"):
        polygon_feature(box(0, 0, 1, 1).exterior.interpolate(0.5).buffer(1).boundary)


def test_a_locked_object(tmp_path):
    properties = polygon_feature([(0, 0), (4, 0), (4, 4)], "t", "Tissue", locked=True)["properties"]
    assert properties["isLocked"] is True and "isLocked" not in polygon_feature([(0, 0), (4, 0), (4, 4)])["properties"]
