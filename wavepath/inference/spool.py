"""Finished bands of a slide that is being made, kept beside the output so that a killed command goes on where it was.

    OUT.tiff.parts/settings.json      what the bands are bands of
    OUT.tiff.parts/band_00007.part    rows, width, checksum; differences of neighbouring pixels, compressed without loss

A band is written whole or not at all, and one that was damaged since counts as missing. Bands are lossless since the lower levels of the
slide are made from the pixels, not from their JPEG: then an interrupted slide equals an uninterrupted one to the byte.
"""

import shutil
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from wavepath.console import say
from wavepath.errors import WavepathError
from wavepath.files import atomic_path, read_json, write_json

BYTES_PER_PIXEL = 1.2  # what a pixel takes here, of stained tissue; for estimates
_HEADER = struct.Struct("<4sIII")  # magic, rows, width, CRC-32 of the pixels
_MAGIC = b"wpb1"


class Bands:
    """The folder of finished bands of one output; use `begin` first.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Takes over the bands of an earlier call with equal settings; forgets those of others, and says so."""
        path = self.folder / "settings.json"
        found = None
        if path.is_file():
            with suppress(WavepathError):  # damaged: then nothing in the folder can be trusted
                found = read_json(path)
            if found != dict(settings):
                names = sorted(name for name in {*settings, *(found or {})} if (found or {}).get(name) != settings.get(name)) if found else ["all"]
                say(f"{self.folder} holds parts made with other settings ({', '.join(names)}); they are deleted, and the slide is begun anew")
        if found != dict(settings):
            for part in self.folder.glob("band_*"):
                part.unlink()
            write_json(path, dict(settings))
        for left in self.folder.glob(".*.tmp"):  # by a process that was killed while it wrote
            if not left.name.startswith(".lock"):
                left.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"band_{index:05d}.part"

    def read(self, index: int, rows: int, width: int) -> np.ndarray | None:
        """uint8[rows, width, 3]: band `index`, or None where it is not there or not whole."""
        try:
            data = self._path(index).read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < _HEADER.size or _HEADER.unpack_from(data)[:3] != (_MAGIC, rows, width):
            return None
        try:
            raw = imagecodecs.zstd_decode(data[_HEADER.size :])
        except RuntimeError:
            return None
        if len(raw) != rows * width * 3:
            return None
        pixels = np.frombuffer(raw, np.uint8).reshape(rows, width, 3).cumsum(axis=1, dtype=np.uint8)
        return pixels if zlib.crc32(pixels) == _HEADER.unpack_from(data)[3] else None

    def write(self, index: int, pixels: np.ndarray) -> None:
        """Keeps a finished band, uint8[rows, width, 3].

        Raises:
            WavepathError: the disk is full or cannot be written; what was kept before stays.
        """
        rows, width, _ = pixels.shape
        differences = np.diff(pixels, axis=1, prepend=np.uint8(0))  # modulo 256: what compresses well, and back again by summing
        try:
            with atomic_path(self._path(index)) as temporary, open(temporary, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, rows, width, zlib.crc32(np.ascontiguousarray(pixels))))
                file.write(imagecodecs.zstd_encode(differences, level=1))
        except OSError as error:
            raise WavepathError(
                f"cannot keep finished rows in {self.folder}: {error.strerror}; free its disk and run the same command again, which goes on from here"
            ) from None

    def remove(self) -> None:
        """Deletes the folder: the output is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
