"""Phantom pairs: the same again by seed, positive cells as told, brown by Beer-Lambert's law where the mask is, displaced as told."""

import csv

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from wavepath.cli import main
from wavepath.data.phantom_pairs import DAB_AREA, draw_pairs, make_phantom_pairs
from wavepath.errors import WavepathError
from wavepath.ops.stain import separate_stains, to_float


@pytest.fixture(scope="module")
def pairs():
    return draw_pairs(5, 0, 128, shift=6, local=1.0)


def test_the_truth(pairs):
    assert len(pairs) == 4 and len({pair.label for pair in pairs}) == 1
    for pair in pairs:
        assert pair.he.shape == pair.ihc.shape == (128, 128, 3) and pair.he.dtype == np.uint8 and pair.dab.shape == (128, 128)
        assert abs(pair.dx) <= 6 and abs(pair.dy) <= 6
        length = np.sqrt(np.square(pair.local).sum(0))
        assert np.sqrt(np.square(length).mean()) == pytest.approx(1.0, abs=1e-3) and np.abs(pair.local.mean((1, 2))).max() < 1e-5
        assert np.abs(np.diff(pair.local, axis=1)).max() < 0.3, "smooth: no fold, no tear"
        if pair.nuclei >= 10:
            assert abs(pair.positive - np.mean([other.positive for other in pairs])) < 0.15
    assert sum(pair.nuclei for pair in pairs) > 20 and sum(pair.dab.sum() for pair in pairs) > 500


def test_brown_is_where_the_mask_is(pairs):
    for pair in pairs:
        brown = np.asarray(separate_stains(to_float(pair.ihc)))[..., 2]
        inside = ndimage.binary_erosion(pair.dab)
        if inside.sum() > 50:
            outside = ~ndimage.binary_dilation(pair.dab, iterations=6)
            scale = 1 / -np.log(1e-6)  # amounts there are in units of full absorption
            assert brown[inside].mean() > DAB_AREA * scale and brown[outside].mean() < 0.35 * DAB_AREA * scale
        # H&E shows no brown of its own: it is redder than it is dark.
        assert pair.he[..., 0].mean() > pair.he[..., 1].mean()


def test_displaced_as_told(pairs):
    """Nuclei of both sides, moved back by the known displacement, coincide better than without it."""
    for pair in pairs:
        he, ihc = (ndimage.gaussian_filter(-np.log(np.maximum(part, 1) / 255.0)[..., 0], 1) for part in (pair.he, pair.ihc))
        rows, columns = np.mgrid[0:128, 0:128]
        back = [rows - pair.dy - pair.local[0], columns - pair.dx - pair.local[1]]
        moved = ndimage.map_coordinates(he, back, order=1)
        inside = np.s_[12:-12, 12:-12]
        true, wrong = (np.corrcoef(part[inside].ravel(), ihc[inside].ravel())[0, 1] for part in (moved, np.roll(moved, (5, 5), (0, 1))))
        assert true > 0.6 and true > wrong + 0.1


@pytest.mark.slow
def test_files_and_command(tmp_path, capsys):
    assert main(["phantom", "--pairs", "5", "--size", "96", "--out", str(tmp_path / "a"), "--seed", "1"]) == 0
    assert "wavepath pairs --folders" in capsys.readouterr().err
    make_phantom_pairs(tmp_path / "b", 6, 1, 96, progress=False)
    rows = list(csv.DictReader((tmp_path / "a/truth.csv").open()))
    assert [row["name"] for row in rows] == ["s000_0", "s000_1", "s000_2", "s000_3", "s001_0"]
    for row in rows:
        for side in ("HE", "IHC", "DAB"):
            name = f"{side}/{row['name']}.png"
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), "whatever the number of pairs"
        mask = np.asarray(Image.open(tmp_path / "a/DAB" / f"{row['name']}.png"))
        assert set(np.unique(mask)) <= {0, 255} and (mask > 0).mean() == pytest.approx(float(row["dab_area"]), abs=1e-3)
    straight = draw_pairs(1, 0, 96, count=1, shift=0, local=0.0)[0]
    assert (straight.dx, straight.dy) == (0, 0) and not straight.local.any()


@pytest.mark.parametrize("wrong", [dict(pairs=0), dict(size=32), dict(mpp=1.0), dict(seed=-1), dict(shift=100), dict(local=20)])
def test_out_of_range(tmp_path, wrong):
    with pytest.raises(WavepathError, match="give"):
        make_phantom_pairs(tmp_path, **(dict(pairs=1) | wrong))
