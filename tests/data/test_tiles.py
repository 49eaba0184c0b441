"""The tile grid (lattice, tissue check, resolution, limits), extraction order, and the codecs."""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from wavepath.data import tiles
from wavepath.data.slide_backends import Level
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError, SlideError


class FakeSlide:
    """A slide held in memory: level 0 is smooth noise; the others are plain strides of it. Counts its reads."""

    def __init__(self, width=1100, height=700, mpp=0.25, downsamples=(1,)):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        self.mpp, self.dimensions = mpp, (width, height)
        self.levels = tuple(Level(width // step, height // step, float(step)) for step in downsamples)
        self.reads, self._lock = [], threading.Lock()

    def read_level(self, level, x, y, w, h):
        with self._lock:
            self.reads.append((level, x, y, w, h))
        step = int(self.levels[level].downsample)
        return self.pixels[::step, ::step][y : y + h, x : x + w].copy()

    def read(self, x0, y0, w, h, mpp):
        side = round(w * mpp / self.mpp)
        return np.asarray(Image.fromarray(self.pixels[y0 : y0 + side, x0 : x0 + side]).resize((w, h)))


def fake_screening(slide, side, *, tissue=1.0, fraction=None, **columns):
    """Square regions of `side` level-0 px over the whole slide, with columns that a test may set."""
    across, down = (int(extent / side + 1) for extent in slide.dimensions)
    corners = [(round(i * side), round(j * side)) for j in range(down) for i in range(across)]
    count = len(corners)
    table = dict(
        index=np.arange(count), x=np.array([x for x, _ in corners]), y=np.array([y for _, y in corners]), size=np.full(count, float(side)),
        tissue=np.full(count, tissue), pen=np.zeros(count), blur=np.zeros(count), energy=np.arange(count, dtype=np.float64),
        eligible=np.ones(count, bool),
    )
    table.update(columns)
    fractions = np.vectorize(fraction or (lambda x0, y0, w, h: 1.0), otypes=[float])
    return SimpleNamespace(regions=SimpleNamespace(**table), tissue=SimpleNamespace(fractions=fractions))


def settings(**changes):
    config = prepare_defaults()
    config.tiles.size = 32
    for name, value in changes.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


def grid(slide, screening, selected=None, config=None, slide_id="a"):
    selected = np.ones(len(screening.regions.index), bool) if selected is None else selected
    return tiles.tile_grid(slide, screening, selected, config or settings(), slide_id)


def test_a_region_of_whole_tiles_is_its_own_grid():
    slide = FakeSlide(512, 512)
    screening = fake_screening(slide, 256)
    selected = np.arange(len(screening.regions.index)) == 1
    plan = grid(slide, screening, selected)
    assert len(plan) == 64 and plan.level == 0 and plan.mpp == 0.25 and not plan.coarser
    assert plan.x.tolist() == [256 + 32 * i for _ in range(8) for i in range(8)] and plan.y.tolist() == [32 * j for j in range(8) for _ in range(8)]
    assert set(plan.region.tolist()) == {1} and set(plan.energy.tolist()) == {1.0}


@pytest.mark.parametrize("side", [70.4, 97.0, 221.6, 256.0])
def test_tiles_never_overlap_and_cover_the_slide(side):
    slide = FakeSlide(1100, 700)
    plan = grid(slide, fake_screening(slide, side))
    places = list(zip(plan.x.tolist(), plan.y.tolist(), strict=True))
    assert sorted(places) == [(32 * i, 32 * j) for i in range(1100 // 32) for j in range(700 // 32)]
    # Region by region, and the centre of each tile in its region.
    assert (np.diff(plan.region) >= 0).all()
    x, y = np.array(places).T + 16
    origin = np.rint(np.stack([plan.region % int(1100 / side + 1), plan.region // int(1100 / side + 1)]) * side)
    assert (x >= origin[0]).all() and (x < origin[0] + side + 1).all() and (y >= origin[1]).all() and (y < origin[1] + side + 1).all()


def test_tissue_is_checked_for_each_tile():
    slide = FakeSlide(512, 512)
    plan = grid(slide, fake_screening(slide, 256, fraction=lambda x0, y0, w, h: 0.5 if x0 < 128 else 0.49))
    assert len(plan) == 4 * 16 and plan.x.max() == 96 and plan.candidates == 64


def test_a_slide_with_any_tissue_tile_yields_one():
    slide = FakeSlide(512, 512)

    def fraction(x0, y0, w, h):  # tissue in the regions 0, 2 (one tile each; regions 3 x 3, of which the last row and column are empty)
        return float((x0, y0) in ((32, 0), (64, 32), (480, 480)))

    screening = fake_screening(slide, 250, fraction=fraction)
    chosen = np.arange(9) == 3
    plan = grid(slide, screening, chosen)
    # The energies rise with the index: region 4 holds (480, 480) and stands in for 3, which keeps its place in the selection.
    assert (plan.x.tolist(), plan.region.tolist(), np.flatnonzero(plan.selected).tolist()) == ([480], [4], [3, 4])
    assert not chosen[4]  # the caller's own array is left alone
    blurred = np.zeros(9)
    blurred[4] = 1.0
    screening.regions.blur, screening.regions.eligible = blurred, np.arange(9) == 3
    screening.regions.tissue = np.linspace(0.01, 0.09, 9)
    plan = grid(slide, screening, chosen)
    assert plan.region.tolist() == [0, 0]  # too little tissue for a rank, but some; the blurred region does not stand in
    nothing = grid(slide, fake_screening(slide, 250, fraction=lambda *_: 0.0), chosen)
    assert len(nothing) == 0 and nothing.x.dtype == np.int64


def test_a_coarser_slide_keeps_its_own_mpp():
    slide = FakeSlide(mpp=0.499)
    plan = grid(slide, fake_screening(slide, 224.4))
    assert plan.coarser and plan.mpp == 0.499 and plan.level == 0 and plan.footprint == 32
    with pytest.raises(SlideError, match=r"0.499 um/px are coarser than the 0.25.*--mpp 0.499"):
        grid(slide, fake_screening(slide, 224.4), config=settings(tiles__require_mpp=True))
    near = FakeSlide(mpp=0.2514)
    plan = grid(near, fake_screening(near, 224), config=settings(tiles__require_mpp=True))
    assert not plan.coarser and plan.mpp == 0.2514 and plan.level == 0


def test_a_finer_slide_is_read_at_its_true_footprint():
    slide = FakeSlide(mpp=0.2)
    plan = grid(slide, fake_screening(slide, 400))
    assert plan.level is None and plan.mpp == 0.25 and plan.footprint == 40
    assert plan.x.tolist()[:3] == [0, 40, 80] and plan.x.max() == (1100 // 40 - 1) * 40
    (tile,) = tiles.read_tiles(slide, plan, [1])
    np.testing.assert_array_equal(tile, np.asarray(Image.fromarray(slide.pixels[:40, 40:80]).resize((32, 32))))


def test_a_level_at_the_wanted_mpp_is_read_as_it_is():
    slide = FakeSlide(1024, 512, mpp=0.126, downsamples=(1, 2, 4))
    plan = grid(slide, fake_screening(slide, 512))
    assert plan.level == 1 and plan.mpp == 0.252 and plan.footprint == 64
    (tile,) = tiles.read_tiles(slide, plan, [int(np.flatnonzero((plan.x == 64) & (plan.y == 128))[0])])
    np.testing.assert_array_equal(tile, slide.pixels[128:192:2, 64:128:2])


def test_a_slide_smaller_than_a_tile_gives_none():
    slide = FakeSlide(31, 300)
    assert len(grid(slide, fake_screening(slide, 100))) == 0


def test_the_limit_is_even_handed_and_keyed():
    slide = FakeSlide(1024, 512)
    # Regions 0..7 of 8 x 8 tiles; region 2 has only 3 with tissue.
    screening = fake_screening(slide, 256, fraction=lambda x0, y0, w, h: float(not (512 <= x0 < 768 and y0 < 256) or (y0 == 0 and x0 < 600)))
    selected = screening.regions.x < 1024
    selected &= screening.regions.y < 512
    config = settings(tiles__max_per_slide=45)
    plan = grid(slide, screening, selected, config)
    counts = np.bincount(np.searchsorted(np.unique(plan.region), plan.region))
    assert len(plan) == 45 and plan.candidates == 7 * 64 + 3
    assert counts[2] == 3 and counts.sum() == 45 and set(np.delete(counts, 2)) == {6}
    again, other = grid(slide, screening, selected, config), grid(slide, screening, selected, config, "b")
    assert again.x.tolist() == plan.x.tolist() and other.x.tolist() != plan.x.tolist()
    assert (np.diff(plan.region) >= 0).all()
    assert len(grid(slide, screening, selected, settings(tiles__max_per_slide=10_000))) == 7 * 64 + 3


def test_tiles_do_not_depend_on_their_company():
    slide = FakeSlide()
    plan = grid(slide, fake_screening(slide, 256))
    some = [5, 300, 6, 7, 5, 40]
    together = tiles.read_tiles(slide, plan, some)
    for index, tile in zip(some, together, strict=True):
        np.testing.assert_array_equal(tile, tiles.read_tiles(slide, plan, [index])[0])
        np.testing.assert_array_equal(tile, slide.pixels[plan.y[index] : plan.y[index] + 32, plan.x[index] : plan.x[index] + 32])


@pytest.mark.parametrize("workers", [1, 3])
def test_extraction_keeps_the_order_and_reads_by_rows(workers):
    slide = FakeSlide()
    plan = grid(slide, fake_screening(slide, 256))
    seconds = {}
    got = list(tiles.map_tiles(slide, plan, lambda rgb, index: int(rgb[0, 0, 0]) + 1000 * index, workers, seconds))
    assert [index for index, _ in got] == list(range(len(plan)))
    assert [value for _, value in got] == [int(slide.pixels[y, x, 0]) + 1000 * i for i, (x, y) in enumerate(zip(plan.x, plan.y, strict=True))]
    assert seconds["read"] > 0
    if workers == 1:
        rows = [y for _, _, y, _, _ in slide.reads]
        assert rows == sorted(rows) and max(w for _, _, _, w, _ in slide.reads) <= 32 * tiles.RUN
        assert sum(w * h for _, _, _, w, h in slide.reads) == len(plan) * 32 * 32


def test_each_native_tile_is_decoded_once(tmp_path):
    from wavepath.data.slides import open_slide
    from wavepath.interop.tiff import write_pyramid

    fake = FakeSlide(1500, 900)
    write_pyramid(tmp_path / "slide.tiff", fake.pixels, 0.25, tile=48, codec="deflate")
    with open_slide(tmp_path / "slide.tiff", cache_mb=2) as slide:
        plan = grid(slide, fake_screening(slide, 256))
        assert len(plan) == (1500 // 32) * (900 // 32)
        for index, rgb in tiles.map_tiles(slide, plan, lambda rgb, _: rgb, workers=3):
            np.testing.assert_array_equal(rgb, fake.pixels[plan.y[index] : plan.y[index] + 32, plan.x[index] : plan.x[index] + 32])
        # 2 MiB hold a good row of the 32 x 19 native tiles of 7 kB, not all of them.
        assert slide.native_decodes == -(-(1500 // 32 * 32) // 48) * -(-(900 // 32 * 32) // 48)


def test_extraction_ends_early_and_reports_errors():
    slide = FakeSlide()
    plan = grid(slide, fake_screening(slide, 256))
    stream = tiles.map_tiles(slide, plan, lambda rgb, index: index)
    assert next(stream) == (0, 0)
    before = threading.active_count()
    stream.close()
    assert threading.active_count() < before

    def fail(rgb, index):
        raise SlideError("a damaged tile")

    with pytest.raises(SlideError, match="a damaged tile"):
        list(tiles.map_tiles(slide, plan, fail))


def test_extract_gives_stored_pixels():
    slide = FakeSlide(200, 100)
    plan = grid(slide, fake_screening(slide, 100))
    plain, stored = list(tiles.extract(slide, plan)), list(tiles.extract(slide, plan, settings()))
    exact = list(tiles.extract(slide, plan, settings(tiles__codec="png")))
    assert len(plain) == len(plan) == 18 and (plain[3].x, plain[3].y) == (plan.x[3], plan.y[3])
    for a, b, c in zip(plain, stored, exact, strict=True):
        np.testing.assert_array_equal(b.rgb, tiles.decode_tile(tiles.encode_tile(a.rgb, "jpeg", 90)))
        np.testing.assert_array_equal(a.rgb, c.rgb)
    assert not np.array_equal(plain[0].rgb, stored[0].rgb)


def test_codecs():
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    rgb = np.stack([ramp, ramp.T, 255 - ramp], axis=-1).astype(np.uint8)
    png, jpeg = tiles.encode_tile(rgb, "png"), tiles.encode_tile(rgb, "jpeg", 90)
    np.testing.assert_array_equal(tiles.decode_tile(png), rgb)
    back = tiles.decode_tile(jpeg)
    assert np.abs(back.astype(int) - rgb).mean() < 2 and tiles.encode_tile(rgb, "jpeg", 90) == jpeg
    # Any other reader sees the same pixels.
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(jpeg))), back)
    assert len(tiles.encode_tile(rgb, "jpeg", 30)) < len(jpeg)
    with pytest.raises(ConfigError, match="choose from jpeg, png"):
        tiles.encode_tile(rgb, "webp")
    for damaged in (jpeg[:20], jpeg[:-30], png[: len(png) // 2], b"", b"hello"):
        with pytest.raises(DatasetError, match="not a whole JPEG or PNG"):
            tiles.decode_tile(damaged)


def test_jpeg_keeps_colour_resolution():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = (200, 60, 60)
    stripes[:, 1::2] = (60, 60, 200)
    back = tiles.decode_tile(tiles.encode_tile(stripes, "jpeg", 90)).astype(int)
    assert (back[:, ::2, 0] - back[:, 1::2, 0]).mean() > 100  # 4:2:0 leaves next to nothing of it
