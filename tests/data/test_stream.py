"""Tiles from slides on the fly: equal to stored tiles to the bit, read region by region, bounded, and clear about what cannot be read."""

import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from wavepath.data import pipeline, records, stream
from wavepath.data.slides import TileCache, open_slide
from wavepath.data.sources import PreparedSource, open_source
from wavepath.data.tiles import TilePlan, decode_tile, encode_tile
from wavepath.defaults import prepare_defaults, train_defaults
from wavepath.errors import DatasetError

SIZE = 32
NATIVE = 64


def write_slide(path, side=512, seed=0):
    """A lossless tiled slide of coloured noise, with native tiles of 64 px."""
    import tifffile

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    pixels = (pixels.astype(np.int16) + rng.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(NATIVE, NATIVE), photometric="rgb", compression="deflate")
    return pixels


def lay_plan(side=512, region=128):
    """All tiles of a slide, in square regions, as `tile_grid` orders them."""
    per, lattice = region // SIZE, side // SIZE
    rows, columns = np.divmod(np.arange(lattice * lattice), lattice)
    regions = rows // per * (lattice // per) + columns // per
    order = np.lexsort((columns, rows, regions))
    rows, columns, regions = rows[order], columns[order], regions[order]
    return TilePlan(
        x=columns * SIZE, y=rows * SIZE, column=columns, row=rows, region=regions, energy=np.linspace(0, 1, len(rows), dtype=np.float32),
        size=SIZE, mpp=0.25, footprint=float(SIZE), level=0, coarser=False, selected=np.ones(regions.max() + 1, bool), candidates=len(rows),
    )


class Opened(list):
    """An opener that keeps the slides it opened, to count what was decoded."""

    def __init__(self, cache_mb=8):
        super().__init__()
        self.cache = TileCache(int(cache_mb * 2**20))

    def __call__(self, planned):
        self.append(open_slide(planned.path, mpp=0.25, cache=self.cache))
        return self[-1]

    @property
    def decodes(self):
        return sum(slide.native_decodes for slide in self)


def make_source(folder, slides=2, codec="png", cache_mb=8, opener=None, **options):
    settings = prepare_defaults()
    settings.tiles.size, settings.tiles.codec = SIZE, codec
    planned, pixels = [], []
    for number in range(slides):
        path = folder / f"s{number}.tif"
        pixels.append(write_slide(path, seed=number, **options))
        planned.append(stream.PlannedSlide(f"s{number}", path, None, lay_plan(**options)))
    source = stream.StreamSource(str(folder), planned, settings, threads=2, cache_mb=cache_mb, opener=opener if opener is not None else Opened())
    return source, pixels


def crop(pixels, plan, place):
    x, y = int(plan.x[place]), int(plan.y[place])
    return pixels[y : y + SIZE, x : x + SIZE]


def expected(pixels, ids, codec="png"):
    plan = lay_plan()
    crops = [crop(pixels[index // len(plan)], plan, index % len(plan)) for index in ids]
    return np.stack([decode_tile(encode_tile(tile, "jpeg", 90)) if codec == "jpeg" else tile for tile in crops])


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_pixels_are_those_of_the_slide_and_the_codec(tmp_path, codec):
    source, pixels = make_source(tmp_path, codec=codec)
    ids = np.array([3, 511, 0, 256, 255, 3, 17, 300])
    assert (len(source), source.image_shape, source.mpps) == (512, (SIZE, SIZE, 3), (0.25,))
    assert np.array_equal(source.images(ids), expected(pixels, ids, codec))
    encoded = source.read(ids)
    assert encoded[0][:3] == (b"\xff\xd8\xff" if codec == "jpeg" else b"\x89PN")
    assert np.array_equal(np.stack([decode_tile(data) for data in encoded]), expected(pixels, ids, codec))
    # Company does not matter, nor whether a tile was announced.
    source.prefetch(ids)
    assert np.array_equal(source.images(ids[::-1]), expected(pixels, ids[::-1], codec))
    with pytest.raises(IndexError):
        source.images([512])
    source.close()


def test_blocks_are_the_regions_and_meta_tells_the_place(tmp_path):
    source, _ = make_source(tmp_path)
    assert source.blocks.tolist() == [16] * 32
    assert stream._run_lengths(np.array([4, 4, 7, 4])).tolist() == [2, 1, 1] and stream._run_lengths(np.array([])).tolist() == []
    meta, plan = source.meta(256 + 20), lay_plan()
    assert (meta["slide"], meta["x"], meta["y"], meta["region"]) == ("s1", plan.x[20], plan.y[20], 1)
    assert meta["id"] == records.example_id("s1", int(plan.x[20]), int(plan.y[20]), 0.25)
    assert source.span_of(256).slide == "s1" and meta["slide_mpp"] == 0.25
    source.close()


def test_blocks_order_decodes_each_native_tile_once(tmp_path):
    """Regions of 128 px are whole native tiles here, so an epoch costs each native tile exactly one decode, even with a small cache."""
    opener = Opened(cache_mb=0.25)  # 21 native tiles of the 128
    source, pixels = make_source(tmp_path, opener=opener)
    with pipeline.batches(source, batch_size=24, seed=1, order="blocks", window=3, prefetch=1) as batches:
        seen = []
        while len(seen) < 512 - 24:
            batch = next(batches)
            assert np.array_equal(batch["image"], expected(pixels, batch["example_id"]))
            seen += batch["example_id"].tolist()
    assert max(Counter(seen).values()) == 1
    # Reading runs ahead into the next epoch by at most two windows of three regions of four native tiles.
    assert 128 - 24 <= opener.decodes <= 128 + 24 + 4
    source.close()

    scattered = Opened(cache_mb=0.25)
    source, _ = make_source(tmp_path, opener=scattered)
    with pipeline.batches(source, batch_size=24, seed=1, order="global") as batches:
        for _ in range(20):
            next(batches)
    assert scattered.decodes > 2 * 128  # what `blocks` avoids
    source.close()


def test_resume_in_the_middle_of_a_window(tmp_path):
    source, _ = make_source(tmp_path)
    options = dict(batch_size=10, seed=3, order="blocks", window=3)
    with pipeline.batches(source, **options) as batches:
        whole = [next(batches) for _ in range(12)]
    for skipped in (3, 7):
        with pipeline.batches(source, start_position=10 * skipped, **options) as batches:
            for batch in whole[skipped:]:
                again = next(batches)
                assert all(np.array_equal(batch[name], again[name]) for name in batch)
    source.close()


def test_what_waits_is_bounded(tmp_path, capsys):
    source, pixels = make_source(tmp_path, cache_mb=1)
    source._limit = 40
    with pipeline.batches(source, batch_size=24, seed=1, order="blocks", window=4, prefetch=1) as batches:
        for _ in range(10):
            batch = next(batches)
            assert np.array_equal(batch["image"], expected(pixels, batch["example_id"]))
            assert len(source._ahead) <= 40
    assert capsys.readouterr().err.count("data.cache_mb is too small") == 1
    source.forget()
    assert not source._ahead
    # Of a region that was read ahead, what has been handed out is let go of.
    source.prefetch(np.arange(16))
    source.images(np.arange(10))
    (job,) = {job for job, _ in source._ahead.values()}
    assert [tile is None for tile in job.result()] == [True] * 10 + [False] * 6
    source.close()


def test_an_announced_example_is_read_once(tmp_path):
    loads = []

    class Counting(stream.StreamSource):
        def _load(self, example_ids, finish):
            loads.append(len(example_ids))
            return super()._load(example_ids, finish)

    base, _ = make_source(tmp_path)
    settings = prepare_defaults()
    settings.tiles.size, settings.tiles.codec = SIZE, "png"
    source = Counting("x", base._planned, settings, threads=2, cache_mb=8, opener=Opened())
    source.prefetch(np.arange(32))
    source.prefetch(np.arange(8, 40))
    source.images(np.arange(40))
    assert loads == [16, 16, 8] and not source._ahead
    source.images(np.arange(4))
    assert loads[3:] == [4]
    for each in (base, source):
        each.close()


def test_damage_is_named_and_replaceable(tmp_path):
    class Damaged(Opened):
        def __call__(self, planned):
            from wavepath.errors import SlideError

            slide = super().__call__(planned)
            decode = slide._backend.decode

            def failing(level, column, row):
                if planned.slide_id == "s0" and (column, row) == (0, 0):
                    raise SlideError("tile (0, 0) is damaged")
                return decode(level, column, row)

            slide._backend.decode = failing
            return slide

    source, _ = make_source(tmp_path, opener=Damaged())
    with pytest.raises(DatasetError, match=r"s0\.tif: a tile of examples 0 to 2 cannot be read \(tile \(0, 0\)"):
        source.images([0, 2])
    source.prefetch([0, 2])
    with pytest.raises(DatasetError, match=r"s0\.tif"):
        source.images([2])
    assert source.images([2]).shape == (1, SIZE, SIZE, 3)  # on its own it can be read
    with pipeline.batches(source, batch_size=64, seed=0, order="blocks", window=4, on_corrupt="replace") as batches:
        ids = np.concatenate([next(batches)["example_id"] for _ in range(8)])
        assert batches.corrupt_count >= 4
    lost = {0, 1, 4, 5}  # the four tiles that need the damaged native tile
    assert set(range(512)) - set(ids.tolist()) == lost
    source.close()


def test_slides_are_closed_beyond_the_limit_but_not_in_use(tmp_path):
    class Fake:
        def __init__(self):
            self.closed = False

        def close(self):
            self.closed = True

    made = {}

    def opener(planned):
        made[planned.slide_id] = Fake()
        return made[planned.slide_id]

    pool = stream.SlidePool(opener, limit=2)
    planned = [stream.PlannedSlide(f"s{number}", tmp_path, None, None) for number in range(4)]
    with pool.slide(planned[0]) as first:
        for other in planned[1:]:
            with pool.slide(other):
                pass
        assert not first.closed and made["s1"].closed and not made["s3"].closed
        with pool.slide(planned[0]) as again:
            assert again is first
    pool.close()
    assert all(slide.closed for slide in made.values())


def test_many_threads_read_what_one_reads(tmp_path):
    source, pixels = make_source(tmp_path, opener=Opened(cache_mb=0.1))
    source._slides._limit = 1
    wrong = []

    def work(seed):
        ids = np.random.default_rng(seed).integers(0, 512, 40)
        if not np.array_equal(source.images(ids), expected(pixels, ids)):
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    source.close()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two phantoms, one of them finer than 0.25 um per pixel by the table, and a file that is no slide."""
    from wavepath.data.phantom import make_phantoms

    folder = tmp_path_factory.mktemp("slides")
    make_phantoms(folder, 2, 0, size=1024, progress=False)
    (folder / "broken.svs").write_text("no slide")
    (folder / "mpp.csv").write_text("slide,mpp\nphantom_001,0.2\n")
    return folder


def stream_config(slides, codec, **data):
    config = train_defaults()
    config.data.slides, config.data.mpp_csv = str(slides), str(slides / "mpp.csv")
    config.prepare.screen.region_um = config.prepare.screen.min_region_um = 56.0
    config.prepare.tiles.size, config.prepare.tiles.codec, config.prepare.select.top = 64, codec, 0.5
    for name, value in data.items():
        config.data[name] = value
    return config


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_a_stream_is_the_prepared_dataset(slides, tmp_path, codec, capsys):
    """Same examples in the same order with the same names, and the same pixels to the bit, whatever the order of reading."""
    from wavepath.data.prepare import prepare

    config = stream_config(slides, codec)
    prepare(slides, tmp_path / "tiles", config.prepare, mpp_csv=slides / "mpp.csv")
    stored, streamed = PreparedSource(tmp_path / "tiles"), open_source(config)
    assert "broken" in capsys.readouterr().err
    assert len(stored) == len(streamed) > 20 and stored.image_shape == streamed.image_shape
    assert stored.spans == streamed.spans and len(stored.spans) == 2
    for index in range(0, len(stored), 5):
        assert stored.meta(index) == pytest.approx(streamed.meta(index))
    ids = np.random.default_rng(0).permutation(len(stored))
    assert np.array_equal(stored.images(ids), streamed.images(ids))
    assert stored.read(ids[:20]) == streamed.read(ids[:20])
    with pipeline.batches(streamed, batch_size=7, seed=0, order="blocks", window=2) as batches:
        for _ in range(len(stored) // 7 + 2):
            batch = next(batches)
            assert np.array_equal(batch["image"], stored.images(batch["example_id"]))
    stored.close()
    streamed.close()


def test_excluded_slides_are_not_screened(slides, tmp_path, capsys):
    (tmp_path / "out.txt").write_text("phantom_000\nbroken\n")
    source = open_source(stream_config(slides, "png", exclude_slides=str(tmp_path / "out.txt"), max_tiles=10))
    assert len(source) == 10 and source.slides == ["phantom_001"] and source.blocks.sum() == 10
    assert "broken" not in capsys.readouterr().err
    source.close()
    (tmp_path / "out.txt").write_text("phantom_000\nphantom_001\n")
    with pytest.raises(DatasetError, match="none of 1 slides gives a tile"):
        open_source(stream_config(slides, "png", exclude_slides=str(tmp_path / "out.txt")))
    (tmp_path / "out.txt").write_text("other\n")
    with pytest.raises(DatasetError, match="none of which is in"):
        open_source(stream_config(slides, "png", exclude_slides=str(tmp_path / "out.txt")))


@pytest.mark.slow
def test_real_slides_stream_as_they_are_prepared(shared_data, tmp_path):
    """JPEG, JPEG2000 and a DICOM pyramid; their resolutions differ, so the mix must be allowed by name."""
    from wavepath.data.prepare import prepare

    config = stream_config(shared_data / "slides", "jpeg")
    config.prepare.screen.region_um = config.prepare.screen.min_region_um = 112.0
    (tmp_path / "mpp.csv").write_text("slide,mpp\nTCGA-CR-7395-01A-01-TS1,0.25\n")
    config.data.mpp_csv = str(tmp_path / "mpp.csv")
    prepare(shared_data / "slides", tmp_path / "tiles", config.prepare, mpp_csv=tmp_path / "mpp.csv")
    with pytest.raises(DatasetError, match=r"data\.mixed_mpp=True"):
        open_source(config)
    config.data.mixed_mpp = True
    stored, streamed = PreparedSource(tmp_path / "tiles"), open_source(config)
    assert len(stored.spans) == 3 and stored.spans == streamed.spans
    ids = np.random.default_rng(0).permutation(len(stored))[:300]
    assert np.array_equal(stored.images(ids), streamed.images(ids))
    stored.close()
    streamed.close()
