"""Which statement of a pixel size is believed."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from wavepath.data.mpp import Candidate, given_mpp, read_mpp_csv, refusal, require_mpp, resolve, strip_suffix
from wavepath.data.slide_lists import SlideRef
from wavepath.data.slides import open_slide
from wavepath.errors import DatasetError, MissingMppError, SlideError

PIXELS = np.full((64, 64, 3), 200, np.uint8)
APERIO = "Aperio Image Library v11\n64x64 (64x64) JPEG/RGB Q=30|AppMag = 20|MPP = {}"
VIPS = '<?xml version="1.0"?><image><property><name>openslide.mpp-{}</name><value type="VipsRefString">{}</value></property></image>'


def tiff(path, tile=(64, 64), **options):
    tifffile.imwrite(path, PIXELS, tile=tile, photometric="rgb", metadata=None, **options)
    return path


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        (dict(description=APERIO.format("0.4990")), 0.499, "aperio.MPP"),
        (dict(description=APERIO.format("0,2520")), 0.252, "aperio.MPP"),
        (dict(resolution=(40000, 40000), resolutionunit="CENTIMETER"), 0.25, "TIFF resolution per cm"),
        (dict(resolution=(50800, 50800), resolutionunit="INCH"), 0.5, "TIFF resolution per inch"),
        (dict(description=VIPS.format("x", "0.46"), resolution=(72, 72), resolutionunit="INCH"), 0.46, "openslide.mpp-x in the description"),
        (dict(description=APERIO.format("0.5"), resolution=(72, 72), resolutionunit="INCH"), 0.5, "aperio.MPP"),
    ],
)
def test_metadata_that_is_believed(tmp_path, options, mpp, source):
    with open_slide(tiff(tmp_path / "s.tiff", **options)) as slide:
        assert slide.backend == "tiff"
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(mpp), source)
        assert require_mpp(slide) == slide.mpp
        assert slide.level_mpp(0) == slide.mpp


@pytest.mark.parametrize("dpi", [72, 96, 150, 300])
@pytest.mark.parametrize("kind", ["tiled", "untiled", "png", "jpeg"])
def test_screen_and_print_resolutions_are_refused(tmp_path, dpi, kind):
    path = tmp_path / f"s.{'tif' if kind.endswith('tiled') else kind}"
    if kind in ("png", "jpeg"):
        Image.fromarray(PIXELS).save(path, dpi=(dpi, dpi))
    else:
        tiff(path, tile=(64, 64) if kind == "tiled" else None, resolution=(dpi, dpi), resolutionunit="INCH")
    with open_slide(path) as slide:
        assert slide.mpp is None and slide.mpp_source == ""
        with pytest.raises(MissingMppError, match=f"{dpi} dpi, a screen or print resolution") as caught:
            require_mpp(slide)
    for way in ("metadata", "--mpp-csv", "--slide-mpp", "slide,mpp"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(description=APERIO.format("0")), dict(description=APERIO.format("n/a")), dict(description=APERIO.format("0.001")),
        dict(resolution=(10, 10), resolutionunit="CENTIMETER"), dict(resolution=(40000, 30000), resolutionunit="CENTIMETER"),
        dict(resolution=(40000, 40000), resolutionunit="NONE"), dict(resolution=(0, 0), resolutionunit="CENTIMETER"),
    ],
)  # fmt: skip
def test_metadata_that_is_not_believed(tmp_path, options):
    with open_slide(tiff(tmp_path / "s.tiff", **options)) as slide:
        assert slide.mpp is None
        with pytest.raises(MissingMppError, match="s.tiff has no usable pixel size"):
            slide.read(0, 0, 8, 8, 0.5)


def test_the_objective_is_named_but_not_used(tmp_path):
    with open_slide(tiff(tmp_path / "s.tiff", description="Aperio x|AppMag = 20")) as slide:
        assert slide.objective == 20 and slide.mpp is None
        with pytest.raises(MissingMppError, match="its objective is 20x; .* not inferred"):
            require_mpp(slide)


def test_imagej_microns(tmp_path):
    path = tmp_path / "ij.tif"
    tifffile.imwrite(path, PIXELS, imagej=True, resolution=(4, 4), metadata={"unit": "um"})
    with open_slide(path) as slide:
        assert slide.backend == "image" and slide.mpp == pytest.approx(0.25)


def test_a_given_value_goes_first_and_must_be_sane(tmp_path):
    path = tiff(tmp_path / "s.tiff", description=APERIO.format("0.5"))
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "given")
    for wrong in (0.0, -1.0, 0.01, 21.0, float("nan")):
        with pytest.raises(SlideError, match="mpp given for .*s.tiff cannot be right"):
            open_slide(path, mpp=wrong)


def test_refusals():
    assert refusal(Candidate("f", 0.25, 0.2505)) is None
    assert refusal(Candidate("f", 0.05, 0.05)) is None and refusal(Candidate("f", 20.0, 20.0)) is None
    assert "outside" in refusal(Candidate("f", 20.1, 20.1)) and "outside" in refusal(Candidate("f", 0.049, 0.049))
    assert "72 dpi" in refusal(Candidate("f", 352.78, 352.78)) and "not square" in refusal(Candidate("f", 0.25, 0.3))


def test_resolve_falls_through_refused_candidates(tmp_path):
    found = resolve([Candidate("a", 352.78, 352.78), Candidate("b", 0.5, 0.502), Candidate("c", 0.25, 0.25)], None, tmp_path)
    assert found.value == pytest.approx(0.501) and found.source == "b" and len(found.refused) == 1


def test_strip_suffix():
    names = {"a.svs": "a", "a/b.ome.tiff": "a/b", "x.OME.TIF": "x", "case.1.2.ndpi": "case.1.2", "bare": "bare", "a.b/c": "a.b/c", ".svs": ".svs"}
    assert {name: strip_suffix(name) for name in names} == names


def test_mpp_table(tmp_path, capsys):
    path = tmp_path / "mpp.csv"
    path.write_text("Slide, MPP\na.svs,0.25\nsub/b,0.5\nc.ome.tiff,\nd.svs,352.78\ne.svs,0.25\ne.tiff,0.5\n./f.svs,0.3\n")
    table = read_mpp_csv(path)
    assert table == {"a.svs": 0.25, "sub/b": 0.5, "e.svs": 0.25, "e.tiff": 0.5, "f.svs": 0.3}
    assert "mpp of d.svs is left out" in capsys.readouterr().err


def test_mpp_table_of_trident(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("wsi,mpp\nfolder/a.svs,0.25\n")
    assert read_mpp_csv(path) == {"folder/a.svs": 0.25}


def test_a_value_is_given_to_the_slide_that_the_table_names_and_to_no_other(tmp_path, capsys):
    refs = [SlideRef(tmp_path / file, name) for file, name in (
        ("a.tiff", "a"), ("sub/b.ome.tiff", "sub/b"), ("case.svs", "case"), ("case.1.svs", "case.1"), ("d.svs", "d.svs"), ("d.tiff", "d.tiff"),
        ("series/largest.dcm", "series"), ("other/e.svs", "other/e"), ("other/case.1.svs", "other/case.1"),
    )]
    table = {"a.svs": 1.0, "sub/b.ome.tiff": 0.2, "case.1": 0.3, "d.svs": 0.4, "series": 0.5, "e": 0.6}
    assert given_mpp(refs, table, None) == {
        "a": None, "sub/b": 0.2, "case": None, "case.1": 0.3, "d.svs": 0.4, "d.tiff": None, "series": 0.5, "other/e": 0.6, "other/case.1": None,
    }
    assert "names 1 slides that are not there (first: 'a.svs')" in capsys.readouterr().err
    assert given_mpp(refs[:1], {}, 0.25) == {"a": 0.25}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("slide,size\na,1\n", "columns slide,mpp"),
        ("slide,mpp\na,x\n", "line 2.*not a positive number"),
        ("slide,mpp\na,.2\na,.3\n", "two different"),
        ("slide,mpp\n", "no rows"),
    ],
)
def test_bad_mpp_tables(tmp_path, text, reason):
    path = tmp_path / "mpp.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=reason):
        read_mpp_csv(path)
