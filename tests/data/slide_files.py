"""Small slide files for tests, and the comparison of the two readers of tiled TIFF."""

import numpy as np
import tifffile

from wavepath.data.slides import open_slide

APERIO = "Aperio Image Library v11\n{w}x{h} (64x64) |AppMag = 40|MPP = 0.2500"


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth stains with fine noise: what JPEG codecs and resampling both have to work for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + 2 * c) + np.cos(y / (7 + c)) for c in range(3)], axis=-1)
    return np.clip(150 + 40 * waves + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def write_tiff(path, rgb, levels=3, tile=64, description=None, **options):
    """A flat pyramid by plain subsampling: the levels' pixels need only be known, not good."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(levels):
            writer.write(
                rgb[:: 2**level, :: 2**level], tile=(tile, tile), photometric="rgb", subfiletype=int(level > 0), metadata=None,
                resolution=(4e4 / 2**level,) * 2, resolutionunit="CENTIMETER", description=description if level == 0 else None, **options,
            )
    return path


def assert_backends_agree(path):
    with open_slide(path, backend="tiff") as ours, open_slide(path, backend="openslide") as theirs:
        assert [level[:2] for level in ours.levels] == [level[:2] for level in theirs.levels]
        for level, (width, height, _) in enumerate(ours.levels):
            regions = [
                (width // 3, height // 3, 50, 40), (-7, -9, 60, 60), (width - 20, height - 30, 64, 64),
                (width + 5, 0, 10, 10), (-3, -3, width + 6, height + 6),
            ]  # fmt: skip
            for region in regions:
                np.testing.assert_array_equal(ours.read_level(level, *region), theirs.read_level(level, *region), err_msg=f"level {level} {region}")
