"""Decoding into the batch: memory that is used again only when nobody holds it, errors by name, threads by default."""

import gc
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from wavepath.data import decode
from wavepath.data.images import decode_image, decode_in_place
from wavepath.data.tiles import decode_tile, encode_tile
from wavepath.errors import DatasetError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def test_threads_default_to_the_cores_of_the_process():
    assert decode.thread_count(3) == 3
    assert 1 <= decode.thread_count(0) <= os.cpu_count()


def test_arrays_are_aligned_and_of_the_shape_asked_for():
    arrays = decode.BatchArrays()
    for count in (0, 1, 7):
        array = arrays.get(count, (5, 3, 3))
        assert array.shape == (count, 5, 3, 3) and array.dtype == np.uint8 and array.flags.writeable and array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0 or not count


def test_memory_comes_back_when_the_last_view_is_gone():
    arrays = decode.BatchArrays()
    first = arrays.get(4, (8, 8, 3))
    address, view = first.ctypes.data, first[1:].reshape(-1)[5:].view(np.int8)
    del first
    gc.collect()
    other = arrays.get(4, (8, 8, 3))
    assert other.ctypes.data != address, "a view was still alive"
    view[:] = 7
    assert (view == 7).all()
    del view
    gc.collect()
    larger = arrays.get(5, (8, 8, 3))  # of another size: does not fit, and does not lose what is there
    assert arrays.get(4, (8, 8, 3)).ctypes.data == address and larger.ctypes.data != address


def test_little_memory_waits():
    arrays = decode.BatchArrays()
    held = [arrays.get(2, (4, 4, 3)) for _ in range(20)]
    assert len({array.ctypes.data for array in held}) == 20
    held.clear()
    gc.collect()
    assert 1 <= len(arrays._free) <= decode._KEPT


def test_every_place_is_worked_on_once_and_errors_come_out():
    done = []
    with ThreadPoolExecutor(3) as pool:
        decode.in_threads(done.append, 10, pool, 3)
        assert sorted(done) == list(range(10))
        decode.in_threads(done.append, 0, pool, 3)
        with pytest.raises(ZeroDivisionError):
            decode.in_threads(lambda place: 1 // (place - 4), 10, pool, 3)


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_a_tile_is_decoded_in_place_as_elsewhere(codec):
    encoded, out = encode_tile(NOISE, codec, 90), np.zeros_like(NOISE)
    decode.decode_into(encoded, out, lambda: "tile 5")
    assert np.array_equal(out, decode_tile(encoded))
    with pytest.raises(DatasetError, match="tile 5"):
        decode.decode_into(encoded, np.zeros((24, 24, 3), np.uint8), lambda: "tile 5")
    with pytest.raises(DatasetError, match="tile 5 cannot be decoded"):
        decode.decode_into(encoded[:40], out, lambda: "tile 5")


def test_the_memory_of_a_thread_serves_tiles_of_any_shape_and_leaves_none_behind():
    tiles = [NOISE, NOISE[:16, :24], NOISE[::-1].copy(), NOISE[:16, :24][::-1].copy()]
    encoded, outs = [encode_tile(tile, "jpeg", 90) for tile in tiles], [np.zeros_like(tile) for tile in tiles]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            decode.in_threads(lambda place: decode.decode_into(encoded[place], outs[place], lambda: "a tile"), 4, pool, 2)
    for tile, out in zip(encoded, outs, strict=True):
        assert np.array_equal(out, decode_tile(tile))
    assert decode._own_tile((24, 24, 3)).ctypes.data % 32 == 16


def test_cut_short_is_judged_by_the_end_marker():
    encoded = encode_tile(NOISE, "jpeg", 90)
    decode.check_whole(encoded)
    decode.check_whole(encoded + b"padding of a camera")
    for cut in (2, len(encoded) // 2):
        with pytest.raises(ValueError):
            decode.check_whole(encoded[:-cut])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_of_other_kinds_take_the_general_way(mode):
    file = io.BytesIO()
    Image.fromarray(NOISE).convert(mode).save(file, "JPEG")
    out = np.zeros_like(NOISE)
    assert decode_in_place(file.getvalue(), out) == (mode == "RGB")
    if mode == "RGB":
        assert np.array_equal(out, decode_image(file.getvalue()))
    assert not decode_in_place(file.getvalue(), np.zeros((8, 8, 3), np.uint8))
