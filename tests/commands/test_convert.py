"""The command `convert`, and `embed --coords`: from tiles to TRIDENT's coordinates to features in their order, by colour statistics alone."""

import numpy as np
import pytest
from test_prepare import settings, texture

from wavepath.cli import main
from wavepath.data.prepare import prepare
from wavepath.interop.coords import find_coords, read_coords
from wavepath.interop.features import list_features, read_features
from wavepath.interop.tiff import write_pyramid


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two slides at 0.265 um per pixel in `slides`, their tiles in `tiles`, these as TRIDENT's coordinates in `trident`."""
    folder = tmp_path_factory.mktemp("job")
    for seed, name in enumerate(("one", "two")):
        write_pyramid(folder / f"slides/{name}.tiff", texture(seed), 0.265, codec="deflate")
    config = settings(tiles__mpp=0.5, select__top=0.4)
    config.screen.mpp, config.screen.region_um, config.screen.min_region_um, config.tissue.mpp = 1.0, 64.0, 64.0, 4.0
    prepare(folder / "slides", folder / "tiles", config)
    assert main(["convert", str(folder / "tiles"), "--to=trident", f"--out={folder / 'trident'}"]) == 0
    return folder


def embed(job, out, *flags):
    return main(["embed", "--colour-statistics", f"--slides={job / 'slides'}", f"--out={out}", "--devices=1", *flags])


def test_features_are_in_the_order_of_the_coordinates(job, tmp_path, capsys):
    assert embed(job, tmp_path / "out", f"--coords={job / 'trident'}") == 0
    for slide_id, path in find_coords(job / "trident").items():
        wanted, found = read_coords(path), read_features(tmp_path / f"out/{slide_id}.h5")
        np.testing.assert_array_equal(found.coords, wanted.coords)
        said = found.attributes
        assert (said["patch_size"], said["overlap"], said["level0_width"], said["level0_mpp"], said["mpp"]) == (32, 0, 640, 0.265, 0.5)
        assert round(said["patch_size"] * said["level0_magnification"] / said["target_magnification"]) == said["patch_size_level0"] == 60
    # The same features as of the tiles that were stored from those places.
    assert main(["embed", "--colour-statistics", f"--data={job / 'tiles'}", f"--out={tmp_path / 'stored'}", "--devices=1"]) == 0
    for slide_id, path in list_features(tmp_path / "stored"):
        np.testing.assert_allclose(read_features(tmp_path / f"out/{slide_id}.h5").features, read_features(path).features, atol=1e-6)
    capsys.readouterr()
    assert embed(job, tmp_path / "out", f"--coords={job / 'trident'}") == 0 and "2 whole already" in capsys.readouterr().err


def test_other_coordinates_are_other_features(job, tmp_path, capsys):
    from wavepath.interop.coords import write_trident_coords

    given = tmp_path / "patches"
    for slide_id, path in find_coords(job / "trident").items():
        found = read_coords(path)
        write_trident_coords(given / f"{slide_id}_patches.h5", found.coords[::-1], found.attributes)
        assert len(found) > 2
    assert embed(job, tmp_path / "out", f"--coords={given}") == 0
    first = read_features(tmp_path / "out/one.h5")
    found = read_coords(given / "one_patches.h5")
    write_trident_coords(given / "one_patches.h5", found.coords[::-1], found.attributes)
    (given / "two_patches.h5").write_bytes(b"\x89HDF")
    capsys.readouterr()
    assert embed(job, tmp_path / "out", f"--coords={given}") == 3
    told = capsys.readouterr().err
    assert "two: left out, cannot read" in told and "other tiles" in told
    # Features at the coordinates of before must not pass for those of these.
    assert "two: its features of an earlier run are removed" in told and not (tmp_path / "out/two.h5").exists()
    second = read_features(tmp_path / "out/one.h5")
    np.testing.assert_array_equal(second.coords, first.coords[::-1])
    np.testing.assert_allclose(second.features, first.features[::-1], atol=1e-6)
    write_trident_coords(given / "two_patches.h5", found.coords, found.attributes)
    write_trident_coords(given / "one_patches.h5", found.coords[:0], found.attributes)
    assert embed(job, tmp_path / "out", f"--coords={given}") == 0
    assert (tmp_path / "out/two.h5").exists() and not (tmp_path / "out/one.h5").exists()


def test_there_and_back_by_the_commands(job, tmp_path, capsys):
    assert embed(job, tmp_path / "features", f"--coords={job / 'trident'}") == 0
    assert main(["convert", str(tmp_path / "features"), "--to=clam", f"--out={tmp_path / 'clam'}"]) == 0
    told = capsys.readouterr().err
    assert "60.3774 level-0 px are written as 60 px of level 0" in told and str(tmp_path / "clam/pt_files") in told
    # CLAM's patches are 60 px of 0.265 um; stored at 32 px their mpp is that of 60 px, and no longer 0.5.
    assert main([
        "prepare", f"--slides={job / 'slides'}", f"--out={tmp_path / 'back'}", f"--coords={tmp_path / 'clam'}", "--tile-size=32",
        "--config.screen.mpp=1.0", "--config.tissue.mpp=4.0",
    ]) == 0  # fmt: skip
    told = capsys.readouterr().err
    assert "0.4969 um/px (2 slides)" in told and " with tiles, " in told and "selected of" not in told  # nothing was selected
    assert [name for name, _ in list_features(tmp_path / "clam")] == ["one", "two"]


@pytest.mark.parametrize(("flags", "said"), [
    (["--to=trident", "--labels=L"], "--labels goes with --to clam"), (["--to=geojson", "--layers=cells"], "no layer 'cells'"),
    (["--to=stamp"], "invalid choice: 'stamp'"), (["--to=clam", "--labels=nothing.csv"], "nothing.csv"),
])  # fmt: skip
def test_flags_that_cannot_be(job, tmp_path, capsys, flags, said):
    assert main(["convert", str(job / "tiles"), f"--out={tmp_path / 'out'}", *flags]) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


@pytest.mark.parametrize(("flags", "said"), [
    (["--data=T", "--coords=C"], "--coords needs --slides"), (["--slides=S", "--strict"], "go with --coords"),
    (["--slides=S", "--coords=C", "--select=wavelet"], "--select has no meaning beside it"),
])  # fmt: skip
def test_flags_of_embed_that_cannot_be(tmp_path, capsys, flags, said):
    assert main(["embed", "--colour-statistics", f"--out={tmp_path / 'out'}", *flags]) == 1
    assert said in capsys.readouterr().err
