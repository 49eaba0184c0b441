"""What a TIFF says about itself: vendor, objective, properties, and every statement about the pixel size."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field

import tifffile

from wavepath.data.mpp import Candidate, from_density, micrometres, number

_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_INCH, _CENTIMETRE = 2, 3
_VIPS_MPP = re.compile(r"<name>openslide\.mpp-([xy])</name>\s*<value[^>]*>([^<]+)<")


@dataclass
class TiffFacts:
    """`mpp_candidates` in the order in which they deserve belief: a scanner's own field, then OME, then resolution tags."""

    vendor: str = "generic-tiff"
    objective: float | None = None
    compression: str = ""
    properties: dict[str, str] = field(default_factory=dict)
    mpp_candidates: list[Candidate] = field(default_factory=list)

    def add_candidate(self, source: str, x: object, y: object) -> None:
        """Notes a pixel size in micrometres, if both numbers are numbers."""
        x, y = number(x), number(y)
        if x and y:
            self.mpp_candidates.append(Candidate(source, x, y))


def tiff_facts(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> TiffFacts:
    """Reads the description of a TIFF's first page (Aperio, OME-XML, ImageJ, libvips) and the resolution tags of level 0, `page`."""
    description = tiff.pages[0].description
    facts = TiffFacts(compression=getattr(page.compression, "name", str(page.compression)))
    facts.properties = {"tiff.ImageDescription": description, "tiff.Software": str(tiff.pages[0].software or "")}
    if description.startswith("Aperio"):
        facts.vendor = "aperio"
        for entry in description.split("|")[1:]:
            name, _, value = entry.partition("=")
            facts.properties[f"aperio.{name.strip()}"] = value.strip()
        facts.objective = number(facts.properties.get("aperio.AppMag"))
        facts.add_candidate("aperio.MPP", facts.properties.get("aperio.MPP"), facts.properties.get("aperio.MPP"))
    if tiff.is_ome:
        facts.vendor = "ome-tiff"
        _add_ome(facts, tiff.ome_metadata)
    vips = dict(_VIPS_MPP.findall(description))
    if vips:
        facts.add_candidate("openslide.mpp-x in the description", vips.get("x"), vips.get("y", vips.get("x")))
    x, y = (_ratio(page.tags.valueof(tag)) for tag in (_X_RESOLUTION, _Y_RESOLUTION))
    # Without a unit tag the TIFF standard says inch; ImageJ writes "none" and names its unit in the description.
    unit = int(page.tags.valueof(_RESOLUTION_UNIT, default=_INCH))
    imagej = micrometres(str((tiff.imagej_metadata or {}).get("unit", "pixel"))) if tiff.is_imagej else None
    if imagej:
        facts.mpp_candidates += from_density("ImageJ resolution", x, y, imagej)
    elif unit == _INCH:
        facts.mpp_candidates += from_density("TIFF resolution per inch", x, y, 25400.0)
    elif unit == _CENTIMETRE:
        facts.mpp_candidates += from_density("TIFF resolution per cm", x, y, 10000.0)
    return facts


def _add_ome(facts: TiffFacts, xml: str) -> None:
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        facts.properties["ome.error"] = str(error)
        return
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag == "Objective" and facts.objective is None:
            facts.objective = number(element.get("NominalMagnification"))
        if tag == "Pixels" and element.get("PhysicalSizeX"):
            sizes = []
            for axis in "XY":
                unit = micrometres(element.get(f"PhysicalSize{axis}Unit", "µm"))
                value = number(element.get(f"PhysicalSize{axis}", element.get("PhysicalSizeX")))
                sizes.append(value * unit if value and unit else None)
            facts.add_candidate("OME PhysicalSize", *sizes)
            # Later images are label and macro; the slide comes first.
            break


def _ratio(value: object) -> float:
    """A TIFF rational as a float; 0 for a missing or empty one."""
    try:
        top, bottom = value
        return top / bottom if bottom else 0.0
    except TypeError:
        return 0.0
