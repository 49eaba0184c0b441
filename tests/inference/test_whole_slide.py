"""Whole slides by tiles: the pixels of the whole image, no seams, bounded memory, and bytes that an interruption does not change."""

import contextlib
import errno
import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import openslide
import pytest
from PIL import Image
from slide_files import picture

from wavepath.data.slides import open_slide
from wavepath.errors import ConfigError, WavepathError
from wavepath.inference import spool, whole_slide
from wavepath.inference.grid import Grid
from wavepath.inference.whole_slide import Pixels, enlarge, write_slide


def repeat(scale):
    """Nearest neighbour; refuses any other than the one shape of batches."""

    def predict(tiles):
        assert tiles.shape == (4, 16, 16, 3) and tiles.dtype == np.uint8
        return np.repeat(np.repeat(tiles, scale, 1), scale, 2) / np.float32(255)

    return predict


def bicubic(tiles):
    large = [np.asarray(Image.fromarray(tile).resize((2 * tile.shape[1], 2 * tile.shape[0]), Image.Resampling.BICUBIC)) for tile in tiles]
    return np.stack(large) / np.float32(255)


@pytest.mark.parametrize("shape", [(1, 1), (5, 30), (16, 16), (61, 43)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_what_has_no_context_is_exact(shape, scale):
    image = picture(*shape)
    made = enlarge(repeat(scale), image, scale, tile=16, overlap=4, batch=4)
    np.testing.assert_array_equal(made, np.repeat(np.repeat(image, scale, 0), scale, 1))


def test_a_local_network_gives_what_it_gives_on_the_whole_image():
    image = picture(90, 70)
    whole = np.rint(bicubic(image[None])[0] * 255).astype(np.uint8)
    made = enlarge(bicubic, image, 2, tile=24, overlap=8, batch=3, context=2)
    np.testing.assert_array_equal(made[4:-4, 4:-4], whole[4:-4, 4:-4])  # at the border Pillow cuts its filter off, tiles are mirrored
    # Without the unused border of tiles this does not hold.
    assert (enlarge(bicubic, image, 2, tile=24, overlap=8, batch=3, context=0) != made).mean() > 0.01


def test_a_second_image_comes_along_tile_by_tile():
    rng = np.random.default_rng(0)
    image, above = (rng.integers(0, 256, (k * 29, k * 37, 3)).astype(np.uint8) for k in (1, 2))

    def grow(tiles, times):
        return np.repeat(np.repeat(tiles, times, 1), times, 2) / np.float32(255)

    def both(tiles, next):
        assert next.shape == (5, 32, 32, 3) and np.isin(next[:, ::2, ::2], above).all()
        return grow(next, 2)

    sizes = dict(tile=16, overlap=8, batch=5)
    found = enlarge(both, image, 4, extra={"next": (above, 2)}, **sizes)
    np.testing.assert_array_equal(found, np.repeat(np.repeat(above, 2, 0), 2, 1))
    found = enlarge(lambda tiles, next: grow(tiles, 4), image, 4, extra={"next": (above, 2)}, **sizes)
    np.testing.assert_array_equal(found, enlarge(lambda tiles: grow(tiles, 4), image, 4, **sizes))
    with pytest.raises(WavepathError, match="not finite"):
        enlarge(lambda tiles, next: grow(tiles, 4) * np.nan, image, 4, extra={"next": (above, 2)}, **sizes)
    with pytest.raises(ValueError, match="2 times the image"):
        enlarge(both, image, 4, extra={"next": (image, 2)}, **sizes)


def random_network(seed, wide=0.5):
    """Random convolutions with zero padding, a sub-pixel layer, and a part that sees the whole tile, as attention does: harder than a trained one."""
    rng = np.random.default_rng(seed)
    shapes = [(3, 8), *[(8, 8)] * 5, (8, 12)]
    kernels = [jnp.asarray(rng.normal(0, (2 / (9 * c)) ** 0.5, (3, 3, c, o)), jnp.float32) for c, o in shapes]

    @jax.jit
    def predict(tiles):
        given = tiles.astype(jnp.float32) / 255
        hidden = given - 0.6
        for kernel in kernels:
            hidden = jax.lax.conv_general_dilated(jax.nn.relu(hidden) if kernel is not kernels[0] else hidden, kernel, (1, 1), "SAME",
                                                  dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
        hidden += wide * hidden.mean(axis=(1, 2), keepdims=True)
        b, h, w, _ = hidden.shape
        large = hidden.reshape(b, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 3)
        return jnp.clip(jnp.repeat(jnp.repeat(given, 2, 1), 2, 2) + 0.2 * large, 0, 1)

    return predict


def test_there_are_no_seams(seams):
    image, network = picture(500, 500), random_network(1)

    def made(tile, overlap, context):
        return enlarge(network, image, 2, tile=tile, overlap=overlap, batch=16, context=context), Grid(500, 500, tile, overlap, context, 2)

    control = made(96, 42, 8)
    ratio, z = seams(*made(64, 16, 4), *control)
    assert abs(ratio - 1) < 0.02 and abs(z) < 3
    ratio, z = seams(*made(64, 0, 0), *control)  # tiles side by side: the same statistic sees them
    assert abs(ratio - 1) > 0.05 and abs(z) > 4


# The TIFF ------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(monkeypatch):
    """An image of 150 x 110 px, its tiles in bands of two rows, and a call that writes it twice as large."""
    monkeypatch.setattr(whole_slide, "BAND_TILES", 20)
    image = picture(150, 110)
    image[:40, :50] = 230

    def write(out, predict=None, **options):
        pixels = Pixels(110, 150, lambda x, y, w, h: image[y : y + h, x : x + w], mpp=0.5)
        settings = dict(task="test", origin={"of": "picture"}, scale=2, tile=16, overlap=4, batch=4, quality=90)
        return write_slide(pixels, predict or repeat(2), out, **{**settings, **options})

    return write, np.repeat(np.repeat(image, 2, 0), 2, 1)


def test_openslide_reads_every_level(job, tmp_path):
    write, large = job
    large = np.repeat(np.repeat(large, 2, 0), 2, 1)
    done = write(tmp_path / "new" / "out.tiff", lambda tiles: np.repeat(np.repeat(tiles, 4, 1), 4, 2) / np.float32(255), scale=4)
    assert (done.width, done.height, done.mpp, done.bands, done.reused, done.filled) == (440, 600, 0.125, 5, 0, 0)
    assert done.tiles == 9 * 13 and not done.whole
    with openslide.OpenSlide(tmp_path / "new/out.tiff") as slide:
        assert slide.level_dimensions == ((440, 600), (220, 300))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.125) == pytest.approx(float(slide.properties["openslide.mpp-y"]))
        for level, (width, height) in enumerate(slide.level_dimensions):
            read = np.asarray(slide.read_region((0, 0), level, (width, height)).convert("RGB")).astype(int)
            want = large[:: 2**level, :: 2**level]
            assert np.abs(read - want).mean() < 8  # JPEG, chroma halved
    with open_slide(tmp_path / "new/out.tiff") as slide:
        assert slide.level_mpp(1) == pytest.approx(0.25)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.tiff"]


@pytest.mark.parametrize("after", [1, 20, 60])
def test_an_interruption_changes_no_byte(job, tmp_path, after, capfd):
    write, _ = job
    network = random_network(0)
    write(tmp_path / "whole.tiff", network, overlap=10)
    calls = [0]

    def dies(tiles):
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return network(tiles)

    out = tmp_path / "cut.tiff"
    with pytest.raises(KeyboardInterrupt):
        write(out, dies, overlap=10)
    kept = sorted(path.name for path in (tmp_path / "cut.tiff.parts").glob("band_*"))
    assert not out.exists() and bool(kept) == (after > 1)
    (tmp_path / ".cut.tiff.killed.tmp").touch()  # what kill -9 leaves
    (tmp_path / "cut.tiff.parts/.band_00001.part.x.tmp").touch()
    done = write(out, network, overlap=10)
    assert done.reused == len(kept) and out.read_bytes() == (tmp_path / "whole.tiff").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.tiff", "whole.tiff"]
    assert ("going on" in capfd.readouterr().err) == bool(kept)


def test_parts_are_used_only_if_whole_and_of_the_same_settings(job, tmp_path, capfd):
    write, _ = job
    write(tmp_path / "whole.tiff")
    out, parts = tmp_path / "cut.tiff", tmp_path / "cut.tiff.parts"

    def cut(after, **options):
        calls = iter(range(after))
        with pytest.raises(StopIteration):
            write(out, lambda tiles: (next(calls), repeat(2)(tiles))[1], **options)

    cut(25)
    names = sorted(path.name for path in parts.glob("band_*"))
    assert len(names) >= 3
    damaged = bytearray((parts / names[1]).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (parts / names[1]).write_bytes(damaged)
    assert write(out).reused == 1 and out.read_bytes() == (tmp_path / "whole.tiff").read_bytes()
    assert not parts.exists()
    out.unlink()
    cut(25, quality=80)
    capfd.readouterr()
    assert write(out).reused == 0 and out.read_bytes() == (tmp_path / "whole.tiff").read_bytes()
    assert "other settings (fingerprint, quality); they are deleted" in capfd.readouterr().err


def test_what_is_there_is_left_or_replaced_on_request(job, tmp_path):
    write, _ = job
    out = tmp_path / "out.tiff"
    write(out)
    before = (out.read_bytes(), out.stat().st_mtime_ns)

    def never(tiles):
        raise AssertionError("there is nothing to do")

    assert write(out, never, batch=3).whole and (out.read_bytes(), out.stat().st_mtime_ns) == before
    with pytest.raises(ConfigError, match="add --overwrite"):
        write(out, never, origin={"of": "another"})
    write(out, origin={"of": "another"}, overwrite=True)
    assert out.read_bytes() != before[0]
    facts = json.loads(whole_slide.described(out).removeprefix("wavepath test "))
    assert (facts["of"], facts["mpp"], facts["tile"], facts["context"]) == ("another", 0.25, 16, 1)
    foreign = tmp_path / "notes.tiff"
    foreign.write_text("mine")
    with pytest.raises(ConfigError, match="add --overwrite"):
        write(foreign, never)
    with pytest.raises(ConfigError, match="end in .tiff"):
        write(tmp_path / "out.png", never)
    with pytest.raises(ConfigError, match="is a folder"):
        (tmp_path / "folder.tiff").mkdir() or write(tmp_path / "folder.tiff", never)


def test_tiles_can_be_filled_in_without_the_network(job, tmp_path):
    write, large = job
    seen = []

    def predict(tiles):
        seen.append(tiles)
        return repeat(2)(tiles)

    done = write(tmp_path / "out.tiff", predict, fill=lambda tile: np.full((32, 32, 3), 7, np.uint8) if (tile == 230).all() else None)
    assert done.filled >= 6 and done.tiles + done.filled == 9 * 13 and not any((tile == 230).all() for batch in seen for tile in batch)
    with open_slide(tmp_path / "out.tiff") as slide:
        assert abs(int(slide.read_level(0, 30, 30, 1, 1).max()) - 7) < 8


def test_blank_tiles_between_others_do_not_cut_batches_short(job, tmp_path):
    """Tissue as a diagonal strip: every batch of a band but its last is full, and an interrupted slide is still the same."""
    write, _ = job
    network, sizes = random_network(0), []
    wanted = picture(150, 110)
    wanted[np.abs(np.arange(150)[:, None] * 110 / 150 - np.arange(110)) > 12] = 230
    pixels = Pixels(110, 150, lambda x, y, w, h: wanted[y : y + h, x : x + w])

    def glass(tile):
        return np.full((32, 32, 3), 230, np.uint8) if (tile == 230).all() else None

    def predict(tiles):
        sizes.append(len({tile.tobytes() for tile in tiles}))
        if len(sizes) == stop:
            raise KeyboardInterrupt
        return network(tiles)

    options = dict(task="test", origin={}, scale=2, tile=16, overlap=10, batch=4, fill=glass)
    stop = 0
    done = write_slide(pixels, predict, tmp_path / "whole.tiff", **options)
    grid = Grid(150, 110, 16, 10, 2, 2)
    seen = [[glass(whole_slide._read(pixels.read, grid, row, n)) is None for row in band for n in range(len(grid.columns.starts))]
            for band in grid.bands(20)]  # fmt: skip
    assert done.filled > done.tiles == sum(map(sum, seen)) == sum(sizes) and len(sizes) == sum(math.ceil(sum(band) / 4) for band in seen)
    for stop in (3, len(sizes) - 1):
        sizes, out = [], tmp_path / f"{stop}.tiff"
        with pytest.raises(KeyboardInterrupt):
            write_slide(pixels, predict, out, **options)
        stop = 0
        write_slide(pixels, predict, out, **options)
        assert out.read_bytes() == (tmp_path / "whole.tiff").read_bytes()


def test_an_output_that_was_finished_before_the_lock_was_free_is_left(job, tmp_path, monkeypatch):
    write, _ = job
    out, lock, held = tmp_path / "out.tiff", whole_slide.folder_lock, []

    @contextlib.contextmanager
    def late(folder, name):
        if not held:
            held.append(True)
            write(out)
            yield
            return
        with lock(folder, name):
            yield

    def never(tiles):
        raise AssertionError("there is nothing to do")

    monkeypatch.setattr(whole_slide, "folder_lock", late)
    assert write(out, never).whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.tiff"]


def test_a_full_disk_is_one_line_and_nothing_is_lost(job, tmp_path, monkeypatch):
    write, _ = job
    write(tmp_path / "whole.tiff")
    out, encode, calls = tmp_path / "cut.tiff", spool.imagecodecs.zstd_encode, iter(range(3))

    def full(*args, **options):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(spool.imagecodecs, "zstd_encode", full)
        with pytest.raises(WavepathError, match="No space left on device; free its disk and run the same command again"):
            write(out)
    assert write(out).reused == 3 and out.read_bytes() == (tmp_path / "whole.tiff").read_bytes()


def test_values_that_are_not_finite_are_an_error(job, tmp_path):
    with pytest.raises(WavepathError, match="not finite"):
        job[0](tmp_path / "out.tiff", lambda tiles: np.full((4, 32, 32, 3), np.nan, np.float32))
    assert not (tmp_path / "out.tiff").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_height(tmp_path):
    """Tile 64, overlap 16, 1000 px across, 2x: what the module's text says, and the same for four times the height."""
    peaks = []

    def larger(tiles):
        return np.repeat(np.repeat(tiles, 2, 1), 2, 2) / np.float32(255)

    for height in (1500, 6000):
        rows = np.random.default_rng(0).integers(0, 256, (64, 1000, 3), np.uint8)
        image = Pixels(1000, height, lambda x, y, w, h, rows=rows: rows[:h, x : x + w])
        tracemalloc.start()
        write_slide(image, larger, tmp_path / f"{height}.tiff", task="test", origin={}, scale=2, tile=64, overlap=16, batch=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    across, band = 2000, 4 * 128  # 21 tiles across: bands of four rows
    batches = 16 * 128 * 128 * 3 * 4
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < across * (band * 15 + 256 * 6) + 12 * batches < 6000 * 2 * across * 3
