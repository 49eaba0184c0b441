"""Tiles and features for TRIDENT, CLAM and QuPath, from a prepared folder and from features, with true footprints at 0.265 um per pixel."""

import csv
import json
import shutil
import uuid

import h5py
import numpy as np
import pytest
import shapely
from test_prepare import settings, texture

from wavepath.data import manifest as mf
from wavepath.data.exchange import convert, region_features, tile_features, tissue_features
from wavepath.data.prepare import prepare
from wavepath.data.records import TileShards
from wavepath.data.slide_lists import LabelRow
from wavepath.data.slide_runs import load_screening
from wavepath.data.tile_sets import open_tile_set
from wavepath.data.tissue import TissueMap
from wavepath.errors import ConfigError, DatasetError
from wavepath.files import write_json
from wavepath.interop.coords import read_coords
from wavepath.interop.features import read_features, write_features
from wavepath.interop.tiff import write_pyramid

MPP, IDS = 0.265, ("a/case", "b")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A slide in a folder, one beside it, glass, and a file that is no slide; all with a level at 0.53. Not to be changed by tests."""
    folder, out = tmp_path_factory.mktemp("slides"), tmp_path_factory.mktemp("prepared") / "out"
    (folder / "a").mkdir()
    write_pyramid(folder / "a/case.tiff", texture(0), MPP, codec="deflate")
    write_pyramid(folder / "b.tiff", texture(1, 1100, 1040), MPP, codec="deflate")
    write_pyramid(folder / "glass.tiff", np.full((512, 640, 3), 244, np.uint8), MPP, codec="deflate")
    (folder / "broken.tiff").write_bytes(b"II*\0 and no more")
    (folder / "labels.csv").write_text("case_id,slide_id,label\np1,a/case,tumour\np2,b,normal\n")
    config = settings(tiles__mpp=0.53, select__top=0.5)
    config.screen.mpp, config.screen.region_um, config.screen.min_region_um, config.tissue.mpp = 1.06, 68.0, 68.0, 4.24
    prepare(folder, out, config, labels=folder / "labels.csv")
    return out


@pytest.fixture(scope="module")
def features(prepared, tmp_path_factory):
    """Features of its tiles as `wavepath embed` writes them."""
    folder = tmp_path_factory.mktemp("features")
    source = open_tile_set(prepared)
    for slide_id in IDS:
        tiles = source.read(slide_id)
        values = np.random.default_rng(0).normal(size=(len(tiles), 6)).astype(np.float32)
        said = dict(
            patch_size=32, mpp=0.53, level0_mpp=MPP, level0_magnification=10 / MPP, target_magnification=10 / 0.53, encoder="net/16", name=slide_id,
            overlap=0,
        )
        extra = {"features_mean": values * 2, "energy": tiles.columns["energy"], "empty": np.full(len(values), np.nan)}
        extra["names"] = np.array(["x"] * len(values))
        write_features(folder / f"{slide_id}.h5", values, tiles.coords, said, extra)
    source.close()
    write_json(folder / "embed.json", {"source": str(prepared), "kind": "prepared"})
    return folder


def converted(path, out, to, slides=None, column="features", encoder="", **options):
    source = open_tile_set(path, slides=slides, column=column, encoder=encoder)
    try:
        return convert(source, out, to, **options)
    finally:
        source.close()


def check_qupath(path):
    """The fields that QuPath's importer knows, of its types; returns the features."""
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert set(content) == {"type", "features"} and content["type"] == "FeatureCollection"
    for feature in content["features"]:
        assert set(feature) == {"type", "id", "geometry", "properties"} and feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        shape = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert shape.geom_type == "Polygon" and shape.is_valid and shape.area > 0
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
        properties = feature["properties"]
        assert set(properties) <= {"objectType", "name", "classification", "color", "isLocked", "measurements", "metadata"}
        assert properties["objectType"] in ("annotation", "detection", "tile", "cell")
        assert isinstance(properties.get("name", ""), str) and isinstance(properties.get("isLocked", False), bool)
        assert set(properties["classification"]) == {"name", "color"} and len(properties["classification"]["color"]) == 3
        assert all(0 <= part <= 255 and isinstance(part, int) for part in properties["classification"]["color"])
        assert all(isinstance(value, int | float) or value == "NaN" for value in properties.get("measurements", {}).values())
    assert len({feature["id"] for feature in content["features"]}) == len(content["features"])
    return content["features"]


def test_tiles_as_tridents_coordinates(prepared, tmp_path):
    result = converted(prepared, tmp_path, "trident")
    folder = tmp_path / "18.87x_32px_0px_overlap/patches"
    assert result.done == result.total == 3 and not result.failed and result.folders == [folder]
    assert sorted(path.name for path in folder.iterdir()) == ["b_patches.h5", "case_patches.h5", "glass_patches.h5"]
    assert len(read_coords(folder / "glass_patches.h5")) == 0
    rows, shards = {row.slide_id: row for row in mf.read_manifest(prepared)}, TileShards(prepared)
    metas = [shards.meta(index) for index in range(len(shards))]
    for slide_id in IDS:
        mine = [meta for meta in metas if meta["slide"] == slide_id]
        with h5py.File(folder / f"{slide_id.rsplit('/')[-1]}_patches.h5") as file:
            said = dict(file["coords"].attrs)
            np.testing.assert_array_equal(file["coords"][()], [(meta["x"], meta["y"]) for meta in mine])
            np.testing.assert_array_equal(file["energy"][()], np.array([meta["energy"] for meta in mine], np.float32))
        assert round(said["patch_size"] * said["level0_magnification"] / said["target_magnification"]) == said["patch_size_level0"] == 64
        assert (said["level0_width"], said["level0_height"]) == (rows[slide_id].width, rows[slide_id].height)
        assert (said["mpp"], said["level0_mpp"], said["slide_id"]) == (0.53, MPP, slide_id)


def test_features_as_tridents(features, tmp_path):
    result = converted(features, tmp_path, "trident")
    folder = tmp_path / "18.87x_32px_0px_overlap"
    assert [path.name for path in result.folders] == ["patches", "features_net_16"]
    with h5py.File(folder / "features_net_16/case.h5") as file:
        assert file["features"].dtype == np.float32 and file["coords"].dtype == np.int64 and "empty" not in file
        for name in ("features", "coords"):
            said = file[name].attrs
            assert said["name"] == "case" and said["encoder"] == "net/16" and said["savetodir"] == str(folder / "features_net_16")
            assert round(said["patch_size"] * said["level0_magnification"] / said["target_magnification"]) == 64 == said["patch_size_level0"]
            assert said["level0_width"] == 640  # from the folder that they were made from
        np.testing.assert_array_equal(file["features"][()], read_features(features / "a/case.h5").features)
        rows = file["coords"][()]
    np.testing.assert_array_equal(rows, read_coords(folder / "patches/case_patches.h5").coords)
    converted(features, tmp_path / "mean", "trident", column="features_mean", encoder="mine")
    mean = read_features(tmp_path / "mean/18.87x_32px_0px_overlap/features_mine/b.h5")
    np.testing.assert_array_equal(mean.features, read_features(features / "b.h5").extra["features_mean"])


def test_clams_folder(prepared, features, tmp_path):
    result = converted(features, tmp_path, "clam")
    assert [path.name for path in result.folders] == ["patches", "h5_files", "pt_files"] and not result.notes
    with h5py.File(tmp_path / "patches/b.h5") as file:
        said = dict(file["coords"].attrs)
    # A level of the slide is at the tiles' resolution.
    assert (said["patch_level"], said["patch_size"], said["downsample"].tolist(), said["level_dim"].tolist()) == (1, 32, [2.0, 2.0], [550, 520])
    assert read_coords(tmp_path / "patches/case.h5").geometry.level == 1
    with open(tmp_path / "process_list_autogen.csv", newline="") as file:
        assert [row["slide_id"] for row in csv.DictReader(file)] == ["case.tiff", "b.tiff"]
    with open(tmp_path / "dataset.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["p1", "case", "tumour"], ["p2", "b", "normal"]]
    of_tiles = converted(prepared, tmp_path / "tiles", "clam")
    assert sorted(path.name for path in (tmp_path / "tiles/patches").iterdir()) == ["b.h5", "case.h5"]
    assert of_tiles.notes == ["glass has no tiles and is left out"]
    torch = pytest.importorskip("torch", reason="pip install torch, the oracle of .pt files")
    tensor = torch.load(tmp_path / "pt_files/case.pt", weights_only=True)
    np.testing.assert_array_equal(tensor.numpy(), read_features(features / "a/case.h5").features)


def test_clams_size_is_the_nearest_whole_one_and_that_is_said(features, tmp_path):
    moved = tmp_path / "features"
    shutil.copytree(features, moved)
    found = read_features(moved / "b.h5")
    said = {**found.attributes, "mpp": 0.5, "target_magnification": 20.0}
    write_features(moved / "b.h5", found.features, found.coords, said)
    result = converted(moved, tmp_path / "out", "clam", labels=[LabelRow("p", "b", "x"), LabelRow("q", "elsewhere", "y")])
    assert result.notes[0].startswith("b: tiles of 60.3774 level-0 px are written as 60 px of level 0, -0.62 %")
    assert "1 slides have no label" in result.notes[1] and "elsewhere" in result.notes[2]
    with pytest.raises(DatasetError, match="the label table names none of the slides"):
        converted(moved, tmp_path / "other", "clam", labels=[LabelRow("q", "elsewhere", "y")])


def test_features_without_anything_else(features, tmp_path):
    """Of another tool, or moved: what their attributes say is enough for TRIDENT; CLAM's extractor needs the slide."""
    alone = tmp_path / "alone"
    shutil.copytree(features, alone)
    (alone / "embed.json").unlink()
    result = converted(alone, tmp_path / "clam", "clam")
    assert [path.name for path in result.folders] == ["h5_files", "pt_files"] and "--slides" in result.notes[0] and len(result.notes) == 2
    assert converted(alone, tmp_path / "trident", "trident").done == 2
    # CLAM's own features say nothing of their size.
    with pytest.raises(DatasetError, match="no slide could be converted.*how large its tiles are"):
        converted(tmp_path / "clam", tmp_path / "back", "trident")
    assert converted(tmp_path / "clam", tmp_path / "again", "clam").done == 2


def test_clams_features_have_the_size_of_the_patches_beside_them(features, tmp_path):
    converted(features, tmp_path / "clam", "clam")
    shutil.copytree(tmp_path / "clam", tmp_path / "other")
    converted(tmp_path / "clam", tmp_path / "qupath", "geojson")
    found, tile = check_qupath(tmp_path / "qupath/b.geojson"), read_features(features / "b.h5")
    (left, top), (right, bottom) = (bound(np.array(found[0]["geometry"]["coordinates"][0]), axis=0) for bound in (np.min, np.max))
    # 32 px of a level of half the resolution; the last tiles of a slide are cut at its border only where its size is known.
    assert [left, top] == tile.coords[0].tolist() and (right - left, bottom - top) == (64, 64)
    shutil.rmtree(tmp_path / "clam/h5_files")  # `.pt` alone have no coordinates
    result = converted(tmp_path / "clam", tmp_path / "again", "clam")
    assert sum("carry no coordinates" in note for note in result.notes) == 2
    with pytest.raises(DatasetError, match="how large its tiles are"):
        converted(tmp_path / "clam", tmp_path / "none", "geojson")
    patches = tmp_path / "other/patches/b.h5"
    with h5py.File(patches, "r+") as file:
        file["coords"][0] = [1, 1]  # of other tiles
    result = converted(tmp_path / "other", tmp_path / "b", "geojson")
    assert list(result.failed) == ["b"] and "how large its tiles are" in result.failed["b"]


def test_slides_that_were_moved_are_given(prepared, features, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(features, alone)
    (alone / "embed.json").unlink()
    root = mf.read_stage(prepared / "settings.json")["slides"]
    result = converted(alone, tmp_path / "clam", "clam", slides=root)
    assert len(result.folders) == 3 and read_coords(tmp_path / "clam/patches/b.h5").geometry.level == 1


def test_qupaths_objects(prepared, tmp_path):
    result = converted(prepared, tmp_path, "geojson")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.geojson", "case.geojson", "glass.geojson"] and result.tiles > 30
    found = check_qupath(tmp_path / "case.geojson")
    by_class = {}
    for feature in found:
        by_class.setdefault(feature["properties"]["classification"]["name"], []).append(feature)
    screening = load_screening(prepared / "slides/a/case")
    row = next(row for row in mf.read_manifest(prepared) if row.slide_id == "a/case")
    assert len(by_class["Tile"]) == row.tiles and len(by_class["Selected region"]) == row.regions_selected
    assert all(f["properties"]["objectType"] == "annotation" and f["properties"]["isLocked"] for f in by_class["Tissue"])
    assert all(f["properties"]["objectType"] == "tile" for name in by_class for f in by_class[name] if name != "Tissue")
    region = by_class["Selected region"][0]["properties"]
    place = int(region["name"].split()[1])
    assert region["measurements"]["wavelet energy"] == screening.regions.energy[place] and region["measurements"]["selected"] == 1.0
    assert sum(f["properties"]["measurements"]["tiles"] for f in by_class["Selected region"]) == row.tiles
    tile = by_class["Tile"][3]
    assert tile["properties"]["measurements"]["tile"] == 3 and tile["properties"]["measurements"]["wavelet energy"] > 0
    shapes = [shapely.from_geojson(json.dumps(f["geometry"])) for f in found]
    assert all(0 <= s.bounds[0] and s.bounds[2] <= row.width and s.bounds[3] <= row.height for s in shapes)
    assert shapely.from_geojson(json.dumps(tile["geometry"])).area == 64 * 64
    assert check_qupath(tmp_path / "glass.geojson") == []


def test_layers_are_chosen(prepared, features, tmp_path):
    converted(prepared, tmp_path / "a", "geojson", layers=["tissue"])
    assert {f["properties"]["classification"]["name"] for f in check_qupath(tmp_path / "a/case.geojson")} == {"Tissue"}
    converted(features, tmp_path / "b", "geojson", layers=["tiles"])
    found = check_qupath(tmp_path / "b/b.geojson")
    assert len(found) == len(read_features(features / "b.h5")) and set(found[0]["properties"]["measurements"]) == {"tile", "wavelet energy"}
    with pytest.raises(ConfigError, match="no layer 'tile'; choose from tissue, regions, tiles"):
        converted(prepared, tmp_path / "c", "geojson", layers=["tile"])


@pytest.mark.parametrize("seed", range(3))
def test_the_outlines_hold_the_cells_of_the_mask(seed):
    """Islands in holes too: the centre of a cell is inside of a polygon exactly where there is tissue."""
    rng = np.random.default_rng(seed)
    mask = rng.random((17, 23)) < (0.2, 0.5, 0.8)[seed]
    nothing = np.zeros_like(mask)
    cell = 12.5
    found = tissue_features(TissueMap(mask, nothing, nothing, nothing, cell, 8.0, True, ""))
    whole = shapely.union_all([shapely.from_geojson(json.dumps(f["geometry"])) for f in found])
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    np.testing.assert_array_equal(shapely.contains_xy(whole, (x + 0.5) * cell, (y + 0.5) * cell), mask)
    assert tissue_features(TissueMap(nothing, nothing, nothing, nothing, cell, 8.0, False, "")) == []


def test_numbers_that_are_none_are_kept_as_qupath_wants_them():
    found = tile_features(np.array([[0, 0], [64, 0]]), 64.0, {"energy": np.array([np.nan, 2.0]), "score": np.array([1, 2])}, (100, 50))
    assert found[0]["properties"]["measurements"] == {"wavelet energy": "NaN", "score": 1.0, "tile": 0.0}
    assert found[1]["geometry"]["coordinates"][0][2] == [100, 50]
    assert region_features(type("Regions", (), {"tissue": np.zeros(3)})(), {}) == []


def test_one_damaged_file_is_one_slide(features, tmp_path):
    broken = tmp_path / "features"
    shutil.copytree(features, broken)
    (broken / "b.h5").write_bytes((broken / "b.h5").read_bytes()[:400])
    result = converted(broken, tmp_path / "out", "trident")
    assert result.done == 1 and list(result.failed) == ["b"] and "cannot read" in result.failed["b"]
    with pytest.raises(DatasetError, match="cannot read"):
        converted(broken, tmp_path / "strict", "trident", strict=True)


def test_what_is_no_source(prepared, features, tmp_path):
    with pytest.raises(DatasetError, match="no folder"):
        open_tile_set(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="--column and --encoder go with a folder of features"):
        open_tile_set(prepared, column="features_mean")
    with pytest.raises(ConfigError, match="has no features 'names'"):
        converted(features, tmp_path, "trident", column="names")
    with pytest.raises(ConfigError, match="no format 'stamp'"):
        converted(features, tmp_path, "stamp")
