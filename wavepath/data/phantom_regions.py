"""Ground truth of the phantom slides: outlines of classes and artefacts as a pathologist would draw them."""

import numpy as np
import shapely
from jaxtyping import Bool
from scipy import ndimage
from shapely.geometry import Polygon
from skimage.measure import find_contours

from wavepath.data.phantom_noise import CELL, PAD
from wavepath.data.phantom_plan import Plan
from wavepath.interop.geojson import polygon_feature

TISSUE_CLASSES = ("tumour", "gland", "lymphocytes", "fat", "stroma")
ARTEFACTS = ("pen", "fold", "blur")
COLOURS = {
    "tumour": (200, 0, 0),
    "gland": (150, 80, 200),
    "lymphocytes": (40, 60, 160),
    "fat": (240, 200, 60),
    "stroma": (80, 180, 90),
    "pen": (90, 90, 90),
    "fold": (160, 100, 40),
    "blur": (120, 190, 210),
}
MIN_AREA_UM2 = 2000.0  # nobody outlines less


def _close(mask: np.ndarray, radius: float) -> np.ndarray:
    """Fills gaps narrower than twice `radius` cells."""
    if not mask.any() or mask.all():
        return mask
    grown = ndimage.distance_transform_edt(~mask) <= radius
    return ndimage.distance_transform_edt(np.pad(grown, 1, mode="edge"))[1:-1, 1:-1] > radius


def class_masks(plan: Plan) -> dict[str, Bool[np.ndarray, "gh gw"]]:
    """Where each class is, on the plan's cells without their margin; tissue classes do not overlap, artefacts lie
    over them.

    Thin septa within tumour count as tumour and so do gaps narrower than 12 um between glands as gland: outlines follow
    the structure, not each cell.
    """
    inner = (slice(PAD, -PAD), slice(PAD, -PAD))
    fields = {name: field[inner] for name, field in plan.fields.items()}
    cell_um = CELL * plan.mpp
    tissue = fields["tissue"] > 0
    masks = {}
    rest = tissue.copy()
    for name, field, gap_um in (
        ("tumour", "nest", 20.0),
        ("gland", "gland", 12.0),
        ("lymphocytes", "lymph", 0.0),
        ("fat", "fat", 0.0),
    ):
        mask = fields[field] > 0
        if gap_um / 2 > cell_um:
            mask = _close(mask, gap_um / 2 / cell_um)
        masks[name] = mask & rest
        rest &= ~mask
    masks["stroma"] = rest
    for name in ARTEFACTS:
        masks[name] = fields[name] > 0
    return masks


def outlines(mask: Bool[np.ndarray, "gh gw"], cell_px: float, min_area_px2: float) -> list[Polygon]:
    """Polygons with holes, in pixels, round the true cells of a mask; ordered by position."""
    if not mask.any():
        return []
    level = ndimage.gaussian_filter(np.pad(mask, 2).astype(np.float32), 0.6)
    # Cell (0, 0) has its centre half a cell inside the slide; 2 cells of padding.
    rings = [(contour[:, ::-1] - 1.5) * cell_px for contour in find_contours(level, 0.5) if len(contour) >= 4]
    area = shapely.build_area(shapely.GeometryCollection([shapely.LinearRing(ring) for ring in rings]))
    height, width = mask.shape
    frame = shapely.box(0, 0, width * cell_px, height * cell_px)
    area = shapely.intersection(shapely.simplify(area, 0.25 * cell_px), frame)
    parts = [
        part for part in shapely.get_parts(area).tolist() if isinstance(part, Polygon) and part.area >= min_area_px2
    ]
    # What is too small to be outlined is too small to be left out, too.
    holes = [[ring for ring in part.interiors if Polygon(ring).area >= min_area_px2] for part in parts]
    parts = [Polygon(part.exterior, kept) for part, kept in zip(parts, holes, strict=True)]
    return sorted((shapely.normalize(part) for part in parts), key=lambda part: part.bounds)


def region_features(plan: Plan) -> list[dict]:
    """QuPath annotations of one slide: tissue classes first, then artefacts."""
    min_area = MIN_AREA_UM2 / plan.mpp**2
    features = []
    for name, mask in class_masks(plan).items():
        for number, polygon in enumerate(outlines(mask, CELL, min_area), start=1):
            area = {"area_um2": round(polygon.area * plan.mpp**2, 1)}
            features.append(polygon_feature(polygon, f"{name} {number}", name, COLOURS[name], measurements=area))
    return features
