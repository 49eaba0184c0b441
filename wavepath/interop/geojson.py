"""QuPath GeoJSON: regions and scored tiles out, annotations in.

QuPath reads a FeatureCollection of polygons in level-0 pixels (origin at the top left of the slide) by `File > Import
objects`. Annotations are drawn by hand or hold regions; thousands of scored tiles are better `tile` or `detection`
objects, which stay fast and can be coloured by their measurements. Ids are UUIDs made from the content, so that equal
features give equal bytes.
"""

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from wavepath.errors import WavepathError
from wavepath.files import write_text

OBJECT_TYPES = ("annotation", "detection", "tile", "cell")
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://qupath.github.io/geojson")

Ring = Sequence[Sequence[float]]


def _ring(points: Ring) -> list[list[float]]:
    """A closed ring of [x, y] with coordinates rounded to a hundredth of a pixel."""
    ring = [[_number(x), _number(y)] for x, y in points]
    if len(ring) < 3:
        raise ValueError(f"a polygon needs three points, got {len(ring)}")
    return ring if ring[0] == ring[-1] else [*ring, ring[0]]


def _number(value: float) -> float | int:
    value = round(float(value), 2)
    return int(value) if value.is_integer() else value


def _geometry(coords: Ring | BaseGeometry) -> dict[str, Any]:
    if isinstance(coords, Polygon):
        rings = [coords.exterior, *coords.interiors]
        return {"type": "Polygon", "coordinates": [_ring(ring.coords) for ring in rings]}
    if isinstance(coords, MultiPolygon):
        return {"type": "MultiPolygon", "coordinates": [_geometry(part)["coordinates"] for part in coords.geoms]}
    if isinstance(coords, BaseGeometry):
        raise ValueError(f"regions are polygons, got a {coords.geom_type}")
    return {"type": "Polygon", "coordinates": [_ring(coords)]}


def polygon_feature(
    coords: Ring | BaseGeometry,
    name: str = "",
    classification: str = "",
    color: Sequence[int] | None = None,
    object_type: str = "annotation",
    measurements: Mapping[str, float] | None = None,
    locked: bool = False,
) -> dict[str, Any]:
    """One QuPath object.

    Args:
        coords: outline as (x, y) points in level-0 pixels, closed or not, or a shapely Polygon or MultiPolygon (holes
            are kept).
        name: shown in QuPath's list; empty leaves it out.
        classification: QuPath class, such as "Tumor"; empty leaves it out.
        color: RGB, 0..255, of the class (of the object where there is no class).
        object_type: "annotation", "detection", "tile" or "cell".
        measurements: numbers by name; NaN and infinities are kept, as the strings that QuPath expects.
        locked: QuPath then keeps it from being moved or edited by accident.

    Returns:
        A GeoJSON feature for `write_features`.
    """
    if object_type not in OBJECT_TYPES:
        raise ValueError(f"object_type is one of {', '.join(OBJECT_TYPES)}, got {object_type!r}")
    properties: dict[str, Any] = {"objectType": object_type}
    if name:
        properties["name"] = name
    rgb = None if color is None else [int(part) for part in color]
    if classification:
        properties["classification"] = {"name": classification} | ({} if rgb is None else {"color": rgb})
    elif rgb is not None:
        properties["color"] = rgb
    if locked:
        properties["isLocked"] = True
    if measurements:
        properties["measurements"] = {key: _measurement(value) for key, value in measurements.items()}
    return {"type": "Feature", "geometry": _geometry(coords), "properties": properties}


def _measurement(value: float) -> float | str:
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def write_features(path: Path, features: Iterable[Mapping[str, Any]]) -> None:
    """Writes features as a QuPath FeatureCollection, whole or not at all; one feature a line.

    A feature without an `id` gets a UUID made from its content and its place in the file.
    """
    lines = []
    for index, feature in enumerate(features):
        content = json.dumps(feature, ensure_ascii=False, sort_keys=True)
        identity = feature.get("id", str(uuid.uuid5(_NAMESPACE, f"{index}:{content}")))
        ordered = {"type": "Feature", "id": identity} | {
            key: feature[key] for key in feature if key not in ("type", "id")
        }
        lines.append(json.dumps(ordered, ensure_ascii=False, allow_nan=False))
    write_text(Path(path), '{"type": "FeatureCollection", "features": [\n' + ",\n".join(lines) + "\n]}\n")


def read_features(path: Path) -> list[dict[str, Any]]:
    """Reads the features of a FeatureCollection, a bare list of features, or a single feature.

    Raises:
        WavepathError: the file is missing or is not GeoJSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise WavepathError(f"cannot read {path}: {error.strerror}; give the GeoJSON that QuPath exported") from None
    except ValueError as error:
        raise WavepathError(
            f"{path} is not GeoJSON ({error}); export it again from QuPath (File > Export objects as GeoJSON)"
        ) from None
    if isinstance(content, dict):
        content = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    if not isinstance(content, list) or not all(
        isinstance(item, dict) and item.get("type") == "Feature" for item in content
    ):
        raise WavepathError(
            f"{path} holds no GeoJSON features; export it again from QuPath (File > Export objects as GeoJSON)"
        )
    return content


def class_name(feature: Mapping[str, Any]) -> str:
    """A feature's QuPath class, parts joined by ": " as QuPath shows them; its name where it has none; else ""."""
    properties = feature.get("properties") or {}
    classification = properties.get("classification")
    if isinstance(classification, str):
        return classification
    if isinstance(classification, Mapping):
        if classification.get("names"):
            return ": ".join(str(part) for part in classification["names"])
        if classification.get("name"):
            return str(classification["name"])
    return str(properties.get("name") or "")


def read_regions(path: Path) -> list[tuple[str, Polygon]]:
    """Reads the areas of a GeoJSON with their class names, in the file's order.

    Multipolygons give one entry a part. Outlines drawn by hand that cross themselves are mended (even-odd rule).
    Points and lines have no area and are left out, and so are features with neither class nor name, which say nothing
    about the tissue.

    Args:
        path: a GeoJSON file as QuPath exports it (both the current and the array form).

    Returns:
        (class name, shapely polygon in level-0 pixels) pairs.

    Raises:
        WavepathError: the file is missing, is not GeoJSON, or holds a broken geometry.
    """
    regions: list[tuple[str, Polygon]] = []
    for number, feature in enumerate(read_features(path)):
        name = class_name(feature)
        geometry = feature.get("geometry") or {}
        if not name or geometry.get("type") not in ("Polygon", "MultiPolygon", "GeometryCollection"):
            continue
        try:
            shape = shapely.from_geojson(json.dumps(geometry))
        except (shapely.errors.ShapelyError, ValueError, TypeError) as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WavepathError(
                f"{path}: feature {number} ({name}) is not a polygon ({message}); redraw or delete it in QuPath"
            ) from None
        regions.extend((name, part) for part in _polygons(shape))
    return regions


def _polygons(shape: BaseGeometry) -> list[Polygon]:
    if not shape.is_valid:
        shape = shapely.make_valid(shape)
    if isinstance(shape, Polygon):
        return [] if shape.is_empty else [shape]
    return [polygon for part in getattr(shape, "geoms", []) for polygon in _polygons(part)]
