"""Coordinates of TRIDENT and CLAM as the source of tiles: matching, scale, places, and `prepare` and a stream that take them."""

from pathlib import Path

import numpy as np
import pytest
from test_prepare import settings, texture, tree

from wavepath.cli import main
from wavepath.data import manifest as mf
from wavepath.data.coords_source import coords_plan, coords_resolution, match_coords, open_coords_stream
from wavepath.data.exchange import convert
from wavepath.data.prepare import prepare
from wavepath.data.slides import SlideRef, find_slides, open_slide
from wavepath.data.sources import PreparedSource
from wavepath.data.tile_sets import open_tile_set
from wavepath.data.tiles import read_tiles
from wavepath.defaults import train_defaults
from wavepath.errors import DatasetError, SlideError
from wavepath.interop.clam import clam_patch, write_clam_coords
from wavepath.interop.coords import read_coords, trident_attributes, write_trident_coords
from wavepath.interop.tiff import write_pyramid

MPP = 0.265


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two slides of one name at 0.265 um per pixel, whose tiles are resampled, and one at 0.5, whose are not. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, (name, mpp) in enumerate((("a/case.tiff", MPP), ("b/case.tiff", MPP), ("c d.tiff", 0.5))):
        (folder / name).parent.mkdir(exist_ok=True)
        write_pyramid(folder / name, texture(seed), mpp, codec="deflate")
    return folder


@pytest.fixture(scope="module")
def prepared(slides, tmp_path_factory):
    """Their tiles of 32 px at 0.5 um, lossless: resampled from 0.265, and level 0 of the third."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(slides, out, small(), labels=None)
    return out


@pytest.fixture(scope="module")
def trident(prepared, tmp_path_factory):
    """The same as TRIDENT's coordinates."""
    out = tmp_path_factory.mktemp("trident")
    source = open_tile_set(prepared)
    convert(source, out, "trident")
    source.close()
    return out / "20x_32px_0px_overlap"


def small(**changes):
    config = settings(tiles__mpp=0.5, tiles__codec="png", select__top=0.5, **changes)
    config.screen.mpp, config.screen.region_um, config.screen.min_region_um, config.tissue.mpp = 1.0, 64.0, 64.0, 4.0
    return config


def write_coords(path, coords, mpp=MPP, size=32, target=0.5, **more):
    said = trident_attributes(name="x", patch_size=size, level0_magnification=10 / mpp, target_magnification=10 / target, more=more)
    write_trident_coords(path, np.array(coords, np.int64).reshape(-1, 2), said)
    return path


def test_the_tiles_come_back_to_the_bit(slides, prepared, trident, tmp_path):
    assert sorted(path.name for path in (trident / "patches").iterdir()) == ["a__case_patches.h5", "b__case_patches.h5", "c d_patches.h5"]
    result = prepare(slides, tmp_path / "back", small(), coords=trident)
    assert result.exit_code == 0 and result.tiles == sum(row.tiles for row in mf.read_manifest(prepared)) > 60
    before, after = tree(prepared), tree(tmp_path / "back")
    shards = [name for name in before if "array_record" in name]
    assert len(shards) == 3 and all(before[name] == after[name] for name in shards)  # pixels, places, mpp, energies, regions, order
    assert {row.tile_mpp for row in mf.read_manifest(tmp_path / "back")} == {0.5}
    assert before["slides/a/case/tissue.npz"] == after["slides/a/case/tissue.npz"] and "coords" in mf.read_stage(tmp_path / "back/settings.json")


def test_what_is_whole_is_kept_until_its_coordinates_change(slides, trident, tmp_path, capsys):
    copy, out = tmp_path / "patches", tmp_path / "out"
    copy.mkdir()
    for path in (trident / "patches").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    first = prepare(slides, out, small(), coords=copy)
    assert prepare(slides, out, small(), coords=copy).reused == 3
    write_coords(copy / "c d_patches.h5", [[0, 0], [64, 32]], mpp=0.5)
    second = prepare(slides, out, small(), coords=copy)
    assert second.reused == 2 and second.rows[2].tiles == 2 and second.tiles == first.tiles - first.rows[2].tiles + 2
    (copy / "c d_patches.h5").unlink()
    third = prepare(slides, out, small(), coords=copy)
    assert [(row.status, row.reason) for row in third.rows[2:]] == [(mf.EMPTY, "it has no coordinates")] and third.exit_code == 0
    assert "1 slides have no coordinates" in capsys.readouterr().err and len(PreparedSource(out)) == third.tiles


def test_one_bad_file_is_one_failed_slide(slides, tmp_path):
    write_coords(tmp_path / "a__case_patches.h5", [[10, 20]])
    (tmp_path / "b__case_patches.h5").write_bytes(b"\x89HDF\r\n\x1a\nnot much more")
    write_coords(tmp_path / "c d.h5", [[0, 0], [640, 0], [0, 511], [700, 900]], mpp=0.5)
    result = prepare(slides, tmp_path / "out", small(), coords=tmp_path)
    assert result.exit_code == 3 and [row.status for row in result.rows] == ["ok", "failed", "failed"]
    assert "cannot read" in result.rows[1].reason and "b__case_patches.h5" in result.rows[1].reason
    assert "2 of 4 tiles of c d.h5 lie outside of the slide (640 x 512 px), such as (640, 0), (700, 900)" in result.rows[2].reason


def test_no_tiles_at_all_are_an_empty_slide(slides, tmp_path):
    write_coords(tmp_path / "a__case_patches.h5", [[10, 20]])
    write_coords(tmp_path / "b__case_patches.h5", [])
    result = prepare(slides, tmp_path / "out", small(), coords=tmp_path)
    assert [(row.status, row.reason) for row in result.rows[:2]] == [("ok", ""), ("empty", "its coordinates are none")]


@pytest.mark.parametrize(("slide_mpp", "level0", "target", "size", "mpp", "footprint"), [
    (0.265, 40, 20, 64, 0.53, 128),  # TRIDENT's bucket: what it took for 20x is 0.53 um here
    (0.265, 10 / 0.265, 20, 64, 0.5, 64 * 0.5 / 0.265), (0.5, 20, 20, 64, 0.5, 64), (0.25, 40, 10, 32, 1.0, 128),
    (0.2513, 40, 20, 64, 0.5026, 128),
])  # fmt: skip
def test_the_slides_own_scale_is_recorded(tmp_path, slide_mpp, level0, target, size, mpp, footprint):
    rgb = texture(0)
    write_pyramid(tmp_path / "s.tiff", rgb, slide_mpp, codec="deflate")
    said = trident_attributes(name="s", patch_size=size, level0_magnification=level0, target_magnification=target)
    write_trident_coords(tmp_path / "s_patches.h5", np.array([[128, 64]]), said)
    with open_slide(tmp_path / "s.tiff") as slide:
        found = read_coords(tmp_path / "s_patches.h5")
        plan = coords_plan(slide, found, size)
        assert plan.mpp == pytest.approx(mpp, rel=1e-9) and plan.footprint == pytest.approx(footprint, rel=1e-9)
        (tile,) = read_tiles(slide, plan, [0])
        assert plan.mpp * size == pytest.approx(plan.footprint * slide.mpp)
    # The pixels are those of the footprint, whatever the resampling: mean colours agree.
    side = round(footprint)
    want = rgb[64 : 64 + side, 128 : 128 + side].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(tile.reshape(-1, 3).mean(0), want, atol=2.0)
    if footprint == size:
        np.testing.assert_array_equal(tile, rgb[64 : 64 + side, 128 : 128 + side])


def test_clams_levels_are_the_slides(tmp_path):
    rgb = texture(1, 1200, 1100)
    write_pyramid(tmp_path / "s.tiff", rgb, MPP, codec="deflate")
    with open_slide(tmp_path / "s.tiff") as slide:
        levels = [tuple(level) for level in slide.levels]
        write_clam_coords(tmp_path / "s.h5", np.array([[256, 128], [0, 600]]), clam_patch(128, 64, levels), "s")
        found = read_coords(tmp_path / "s.h5")
        assert found.geometry.level == 1 and coords_resolution(slide, found, 64) == (128, 2 * MPP)
        tiles = read_tiles(slide, coords_plan(slide, found, 64), [1, 0])
        np.testing.assert_array_equal(tiles[0], slide.read_level(1, 0, 300, 64, 64))
        np.testing.assert_array_equal(tiles[1], slide.read_level(1, 128, 64, 64, 64))
        write_clam_coords(tmp_path / "t.h5", found.coords, clam_patch(2048, 64, [(9, 9, 2.0**level) for level in range(6)]), "t")
        with pytest.raises(SlideError, match="pixels of level 5, but the slide has 3 levels"):
            coords_resolution(slide, read_coords(tmp_path / "t.h5"), 64)


def test_places_that_cannot_be(slides, tmp_path, capsys):
    with open_slide(slides / "c d.tiff") as slide:
        found = read_coords(write_coords(tmp_path / "a.h5", [[0, 0]], mpp=0.5, level0_width=600, level0_height=512))
        with pytest.raises(SlideError, match="made for a slide of 600 x 512 px, this one has 640 x 512"):
            coords_plan(slide, found, 32)
        found = read_coords(write_coords(tmp_path / "a.h5", [[-32, 0], [620, 500], [-31, -31]], mpp=0.5))
        with pytest.raises(SlideError, match=r"1 of 3 tiles.*such as \(-32, 0\)"):
            coords_plan(slide, found, 32)
        with pytest.raises(SlideError, match="32 px wide at full resolution, less than the 64 px asked for; give --tile-size 32 or less"):
            coords_plan(slide, found, 64)
        # Over the border is legal, and white there.
        found = read_coords(write_coords(tmp_path / "a.h5", [[620, 500]], mpp=0.5, level0_mpp=0.25))
        (tile,) = read_tiles(slide, coords_plan(slide, found, 32), [0])
        assert (tile[12:] == 255).all() and (tile[:, 20:] == 255).all() and (tile[:12, :20] != 255).any()
    assert "takes the slide for 0.25 um per pixel; it has 0.5, which counts" in capsys.readouterr().err


def refs(*names):
    return [SlideRef(Path(f"/x/{name}.svs"), name) for name in names]


def test_names_are_matched_without_doubt(tmp_path):
    for name in ("patches/case_patches.h5", "patches/a/case_patches.h5", "patches/other_patches.h5"):
        write_coords(tmp_path / name, [[0, 0]])
    found = match_coords(tmp_path, refs("a/case", "x/other"))
    assert {slide: path.parent.name for slide, path in found.files.items()} == {"a/case": "a", "x/other": "patches"} and found.size == 32
    # `case` could be either of them, and is taken for none.
    with pytest.raises(DatasetError, match="has coordinates for none of the 2 slides"):
        match_coords(tmp_path / "patches/case_patches.h5", refs("b/case", "c/case"))
    found = match_coords(tmp_path / "patches/case_patches.h5", refs("b/case", "case"))
    assert list(found.files) == ["case"] and found.without == ("b/case",)
    # `a__s` is a slide of its own, so that its file is not that of `a/s`.
    write_coords(tmp_path / "joined/a__s_patches.h5", [[0, 0]])
    assert list(match_coords(tmp_path / "joined", refs("a/s", "a__s")).files) == ["a__s"]
    assert list(match_coords(tmp_path / "joined", refs("a/s", "a__s", "b/s")).files) == ["a__s"]
    assert list(match_coords(tmp_path / "joined", refs("a/s", "b/s")).files) == ["a/s"]


def test_strict_names_what_does_not_match(tmp_path, capsys):
    write_coords(tmp_path / "a.h5", [[0, 0]])
    write_coords(tmp_path / "z.h5", [[0, 0]])
    match_coords(tmp_path, refs("a", "b"))
    told = capsys.readouterr().err
    assert "1 slides have no coordinates" in told and ": b" in told and "1 coordinate files belong to no slide: z" in told
    with pytest.raises(DatasetError, match="1 slides have no coordinates.*: b; .*leave out --strict"):
        match_coords(tmp_path, refs("a", "b"), strict=True)
    with pytest.raises(DatasetError, match="belong to no slide: z"):
        match_coords(tmp_path, refs("a"), strict=True)


def test_one_size_for_all(tmp_path):
    write_coords(tmp_path / "a.h5", [[0, 0]], size=32)
    write_coords(tmp_path / "b.h5", [[0, 0]], size=64)
    (tmp_path / "c.h5").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"several sizes: 32 px \(a\), 64 px \(b\); give .* --tile-size"):
        match_coords(tmp_path, refs("a", "b", "c"))
    assert match_coords(tmp_path, refs("a", "b", "c"), size=48).size == 48 and match_coords(tmp_path, refs("a", "c")).size == 32
    with pytest.raises(DatasetError, match="cannot read"):
        match_coords(tmp_path, refs("c"))


def test_a_stream_gives_them_in_order_and_as_they_are_stored(slides, trident, prepared, tmp_path):
    config = train_defaults()
    config.data.slides, config.prepare = str(slides), small()
    source = open_coords_stream(config, trident)
    stored = PreparedSource(prepared)
    assert source.slides == stored.slides and len(source) == len(stored)
    ids = np.random.default_rng(0).permutation(len(stored))[:20]
    np.testing.assert_array_equal(source.images(ids), stored.images(ids))
    for index in ids.tolist():
        ours, theirs = source.meta(index), stored.meta(index)
        assert all(ours[name] == theirs[name] for name in ("slide", "x", "y", "mpp", "id")) and np.isnan(ours["energy"])
    assert source.origins["c d"]["level0_width"] == 640 and source.blocks.max() <= 64
    source.close()
    # In the order of the file, whatever it is: column by column here.
    coords = [[x, y] for x in (0, 40, 300) for y in (0, 100, 33)]
    write_coords(tmp_path / "c d_patches.h5", coords, mpp=0.5)
    source = open_coords_stream(config, tmp_path)
    assert [[source.meta(i)["x"], source.meta(i)["y"]] for i in range(9)] == coords
    source.close()
    with pytest.raises(DatasetError, match="2 slides have no coordinates"):
        open_coords_stream(config, tmp_path, strict=True)


def test_another_size_keeps_the_footprint(slides, tmp_path):
    write_coords(tmp_path / "c d_patches.h5", [[64, 64]], mpp=0.5, size=64, target=0.5)
    out = tmp_path / "out"
    prepare(slides, out, small(), coords=tmp_path, tile_size=32)
    source = PreparedSource(out)
    assert source.image_shape == (32, 32, 3) and source.mpps == (1.0,)
    rgb = texture(2)[64:128, 64:128].reshape(32, 2, 32, 2, 3).mean((1, 3))
    np.testing.assert_allclose(source.images([0])[0], rgb, atol=0.51)
    source.close()


def test_the_overlap_is_kept(slides, tmp_path):
    said = trident_attributes(name="x", patch_size=64, level0_magnification=20, target_magnification=20, overlap=16)
    write_trident_coords(tmp_path / "c d_patches.h5", np.array([[64, 64], [112, 64]]), said)
    for size in (64, 32):
        out = tmp_path / f"out{size}"
        prepare(slides, out, small(), coords=tmp_path / "c d_patches.h5", tile_size=size if size == 32 else 0)
        source = open_tile_set(out)
        convert(source, tmp_path / "back", "trident")
        source.close()
    back = {path.parent.parent.name: read_coords(path) for path in (tmp_path / "back").rglob("*.h5")}
    assert {name: (each.geometry.overlap, each.geometry.footprint, len(each)) for name, each in back.items()} == {
        "20x_64px_16px_overlap": (16, 64, 2), "10x_32px_8px_overlap": (8, 64, 2),
    }
    assert main(["embed", "--colour-statistics", f"--data={tmp_path / 'out32'}", f"--out={tmp_path / 'features'}", "--devices=1"]) == 0
    assert read_coords(tmp_path / "features/c d.h5").geometry.overlap == 8


def test_beams_workers_get_the_coordinates(slides, trident, tmp_path):
    pytest.importorskip("apache_beam", reason='pip install "wavepath[beam]"')
    from wavepath.data.beam_worker import PrepareSlide
    from wavepath.data.prepare import TilesJob
    from wavepath.data.slide_runs import slides_in

    root, found = slides_in(slides, tmp_path)
    files = match_coords(trident, found).files
    config, work = small(), tmp_path / "out/work"
    work.mkdir(parents=True)
    job = TilesJob(root, config, 1, mf.PreparedFolder(tmp_path / "out"), dict.fromkeys(files), files)
    outcome = PrepareSlide(job, work, False)._outcome("c d", slides / "c d.tiff", None)
    assert outcome["row"]["status"] == "ok" and outcome["row"]["tiles"] == len(read_coords(files["c d"]))
    assert mf.read_stage(tmp_path / "out/slides/c d/info.json")["fingerprint"] == job.fingerprint(found[2])


@pytest.mark.parametrize(("flags", "said"), [
    (["--tile-size=64"], "--tile-size needs --coords"), (["--coords=C", "--top=0.5"], "--top has no meaning beside it"),
    (["--coords=C", "--require-mpp"], "--require-mpp has no meaning"), (["--coords=C", "--tile-size=4"], "at least 8 px"),
    (["--coords=C"], "no coordinates at C"),
])  # fmt: skip
def test_flags_that_cannot_be(slides, tmp_path, capsys, flags, said):
    assert main(["prepare", f"--slides={slides}", f"--out={tmp_path / 'out'}", *flags]) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


@pytest.mark.slow
def test_real_slides_come_back_to_the_bit(shared_data, tmp_path):
    """An SVS, a DICOM series, and one without mpp, at 0.499, in one folder."""
    (tmp_path / "slides").mkdir()
    for path in (shared_data / "slides").iterdir():
        (tmp_path / "slides" / path.name).symlink_to(path)
    config = train_defaults().prepare
    config.tiles.mpp, config.tiles.codec, config.select.mode, config.tiles.max_per_slide = 0.5, "png", "all", 40
    given = tmp_path / "mpp.csv"
    given.write_text("slide,mpp\n" + "\n".join(f"{ref.id},0.2527" for ref in find_slides(tmp_path / "slides") if ref.id.startswith("TCGA")) + "\n")
    before = prepare(tmp_path / "slides", tmp_path / "tiles", config, mpp_csv=given)
    assert before.ok == before.total == 3
    for to, read_as in (("trident", "trident/20x_224px_0px_overlap"), ("clam", "clam")):
        source = open_tile_set(tmp_path / "tiles")
        convert(source, tmp_path / to, to)
        source.close()
        out = tmp_path / f"back from {to}"
        size = 224 if to == "clam" else 0
        after = prepare(tmp_path / "slides", out, config, mpp_csv=given, coords=tmp_path / read_as, tile_size=size)
        assert after.tiles == before.tiles
        for old, new in zip(before.rows, after.rows, strict=True):
            # CLAM counts in whole pixels: 443.2 px of the slide at 0.2527 are 443 there.
            assert new.tile_mpp == (old.tile_mpp if to == "trident" else pytest.approx(old.tile_mpp, rel=2e-3))
            if to == "trident" or not old.slide_id.startswith("TCGA"):
                assert (tmp_path / "tiles" / old.shard).read_bytes() == (out / new.shard).read_bytes()
