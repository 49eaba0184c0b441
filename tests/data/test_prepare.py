"""`prepare` on small synthetic slides: bad input, reuse, crashes at every rename, limits, the command; and on real slides (slow)."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from wavepath.data import manifest as mf
from wavepath.data import prepare as module
from wavepath.data import records, tiles
from wavepath.data.prepare import prepare
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError, LockedError, SlideError, WavepathError
from wavepath.files import folder_lock
from wavepath.interop.tiff import write_pyramid


def texture(seed: int, width: int = 640, height: int = 512) -> np.ndarray:
    """Something like H&E: purple grains of several sizes on pink, with a strip of glass to the right."""
    rng = np.random.default_rng(seed)
    grain = sum(ndimage.gaussian_filter(rng.standard_normal((height, width)), sigma) * sigma for sigma in (1.0, 2.0, 4.0))
    mix = np.clip(grain * 0.8 + np.linspace(0, 0.8, width), 0, 1)[..., None]
    rgb = np.array([225, 160, 190]) * (1 - mix) + np.array([90, 50, 130]) * mix + rng.normal(0, 4, (height, width, 1))
    rgb[:, -128:] = 243 + rng.normal(0, 1, (height, 128, 1))
    return np.clip(rgb, 0, 255).astype(np.uint8)


def settings(**changes):
    """Regions of 128 px and tiles of 32 px at 1 mpp."""
    config = prepare_defaults()
    config.screen.mpp, config.screen.region_um, config.screen.min_region_um = 2.0, 128.0, 128.0
    config.tiles.mpp, config.tiles.size, config.select.top = 1.0, 32, 0.3
    for name, value in changes.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two good slides of one name in different folders, one with a space and an umlaut in its path. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a/case.tiff", "b ü/case.tiff")):
        (folder / name).parent.mkdir()
        write_pyramid(folder / name, texture(seed), 1.0, codec="deflate")
    return folder


@pytest.fixture(scope="session")
def finished(pair, tmp_path_factory):
    """The pair, prepared without interruption."""
    out = tmp_path_factory.mktemp("finished") / "out"
    prepare(pair, out, settings())
    return out


def tree(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, without the seconds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != mf.TIMINGS}


def test_two_good_slides(finished):
    rows = mf.read_manifest(finished)
    assert [(row.slide_id, row.path, row.status) for row in rows] == [("a/case", "a/case.tiff", "ok"), ("b ü/case", "b ü/case.tiff", "ok")]
    for row in rows:
        # 5 x 4 regions of 4 x 4 tiles; the strip of glass is one column wide.
        assert row.regions == 20 and row.regions_tissue == 16 and row.regions_selected == 5 and row.tiles == 5 * 16 and row.mpp == 1.0
        assert row.energy_selected > row.energy_tissue > 0 and row.pixels_tiles == row.tiles * 32 * 32
        own = finished / "slides" / row.slide_id
        assert {path.name for path in own.iterdir()} == {"regions.csv", "tissue.npz", "thumbnail.jpg", "selection.csv", "screening.json", "info.json"}
        with open(own / "selection.csv", newline="") as file:
            chosen = [line for line in csv.DictReader(file) if line["selected"] == "1"]
        assert [int(line["tiles"]) for line in chosen] == [16] * 5
    assert {path.name for path in finished.iterdir()} == {
        "dataset_info.json", "features.json", "manifest.csv", "settings.json", "timings.csv", "slides", *(row.shard for row in rows),
    }
    with open(finished / "timings.csv", newline="") as file:
        assert [line["slide_id"] for line in csv.DictReader(file)] == ["a/case", "b ü/case"]


def test_tiles_are_the_slides_pixels(pair, finished):
    import tensorflow_datasets as tfds

    from wavepath.data.slides import open_slide

    source = tfds.builder_from_directory(finished).as_data_source(split="train")
    shards = records.TileShards(finished)
    assert len(source) == len(shards) == 160
    with open_slide(pair / "b ü/case.tiff") as slide:
        for index in (80, 123, 159):
            example = source[index]
            assert example["slide"].decode() == "b ü/case" and float(example["mpp"]) == 1.0
            x, y = int(example["x"]), int(example["y"])
            assert int(example["id"]) == records.example_id("b ü/case", x, y, 1.0)
            exact = slide.read_level(0, x, y, 32, 32)
            np.testing.assert_array_equal(example["tile"], tiles.decode_tile(tiles.encode_tile(exact, "jpeg", 90)))
            assert np.abs(example["tile"].astype(int) - exact).mean() < 4


def test_bad_slides_are_listed_and_the_rest_goes_on(pair, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(pair, folder)
    (folder / "text.svs").write_text("not a slide")
    (folder / "zero.tiff").touch()
    whole = (pair / "a/case.tiff").read_bytes()
    (folder / "cut.tiff").write_bytes(whole[: len(whole) // 2])
    write_pyramid(folder / "glass.tiff", np.full((512, 512, 3), 244, np.uint8), 1.0, codec="deflate")
    write_pyramid(folder / "no_mpp.tiff", texture(3), None, codec="deflate")
    write_pyramid(folder / "given.tiff", texture(4), None, codec="deflate")
    write_pyramid(folder / "tiny.tiff", texture(5)[:1, :1], 1.0, codec="deflate")
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\ngiven,1.0\n")
    labels = tmp_path / "labels.csv"
    labels.write_text("case_id,slide_id,label\np1,a/case,yes\np2,given,no\n")
    result = prepare(folder, tmp_path / "out", settings(), mpp_csv=table, labels=labels)
    rows = {row.slide_id: row for row in mf.read_manifest(tmp_path / "out")}
    status = {slide_id: row.status for slide_id, row in rows.items()}
    assert status == {
        "a/case": "ok", "b ü/case": "ok", "given": "ok", "text": "failed", "zero": "failed", "cut": "failed", "no_mpp": "failed",
        "glass": "empty", "tiny": "empty",
    }
    assert (result.total, result.ok, result.failed, result.empty, result.exit_code) == (9, 3, 4, 2, 3)
    assert all(row.reason and "\n" not in row.reason for row in rows.values() if row.status != "ok")
    assert all(way in rows["no_mpp"].reason for way in ("metadata", "--mpp-csv", "--slide-mpp")) and rows["no_mpp"].width == 640
    assert "smaller than one tile" in rows["tiny"].reason and "tissue" in rows["glass"].reason
    assert rows["given"].mpp_source == "given" and rows["a/case"].label == "yes" and rows["given"].case_id == "p2" and rows["cut"].label == ""
    assert len(records.TileShards(tmp_path / "out")) == result.tiles == sum(row.tiles for row in rows.values())
    # The failed ones are tried again, the empty and the whole ones are kept.
    again = prepare(folder, tmp_path / "out", settings(), mpp_csv=table, labels=labels)
    assert again.reused == 5 and again.exit_code == 3


def test_strict_stops(pair, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(pair, folder)
    (folder / "a/bad.svs").write_text("not a slide")
    with pytest.raises(WavepathError, match=r"a/bad: failed.*leave out --strict"):
        prepare(folder, tmp_path / "out", settings(), strict=True)
    assert not (tmp_path / "out" / "dataset_info.json").exists() and not (tmp_path / "out" / "prepare.lock").exists()


def test_nothing_done_is_exit_code_one(tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/bad.svs").write_text("not a slide")
    result = prepare(tmp_path / "slides", tmp_path / "out", settings())
    assert result.exit_code == 1 and result.failed == 1 and not (tmp_path / "out/dataset_info.json").exists()
    assert mf.read_manifest(tmp_path / "out")[0].status == "failed"


def test_an_unforeseen_exception_is_reported_with_its_type(pair, tmp_path, monkeypatch):
    real = tiles.map_tiles

    def fail(slide, *args):
        if "b ü" in str(slide.path):
            raise ZeroDivisionError("three over\nnothing")
        return real(slide, *args)

    monkeypatch.setattr(tiles, "map_tiles", fail)
    result = prepare(pair, tmp_path / "out", settings())
    assert [row.reason for row in result.rows] == ["", "ZeroDivisionError: three over nothing"] and result.exit_code == 3
    assert not list((tmp_path / "out").rglob(mf.SHARD))


def test_whole_slides_are_kept_to_the_byte(pair, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = tree(out)
    monkeypatch.setattr(module, "_process", None)  # nothing may be processed
    result = prepare(pair, out, settings())
    assert result.reused == 2 and tree(out) == before


def test_another_selection_needs_no_second_screening(pair, finished, tmp_path, monkeypatch):
    from wavepath.data import screening

    out, fresh = tmp_path / "out", tmp_path / "fresh"
    prepare(pair, fresh, settings(select__top=0.5, tiles__size=64))
    shutil.copytree(finished, out)
    monkeypatch.setattr(screening, "screen", None)
    result = prepare(pair, out, settings(select__top=0.5, tiles__size=64))
    assert result.reused == 0 and [row.regions_selected for row in result.rows] == [8, 8]
    assert tree(out) == tree(fresh)
    monkeypatch.undo()
    # But another region size does.
    prepare(pair, out, settings(screen__region_um=256.0, screen__min_region_um=256.0))
    assert [row.regions for row in mf.read_manifest(out)] == [6, 6]


def test_a_changed_slide_alone_is_done_again(pair, tmp_path, capsys):
    folder, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(pair, folder)
    prepare(folder, out, settings())
    before = tree(out)
    write_pyramid(folder / "a/case.tiff", texture(7), 1.0, codec="deflate")
    result = prepare(folder, out, settings())
    after = tree(out)
    assert result.reused == 1 and "1 done again, since the slide, the settings or the version changed: a/case" in capsys.readouterr().err
    assert {name for name in after if after[name] != before[name]} >= {records.shard_name(0, 2), "slides/a/case/regions.csv"}
    assert after[records.shard_name(1, 2)] == before[records.shard_name(1, 2)]
    # A lost shard is made again, to the byte.
    (out / records.shard_name(1, 2)).unlink()
    assert prepare(folder, out, settings()).reused == 1 and tree(out) == after


def test_slides_come_and_go(pair, finished, tmp_path):
    folder, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(pair, folder)
    prepare(folder, out, settings())
    before = tree(out)
    write_pyramid(folder / "A first.tiff", texture(9), 1.0, codec="deflate")
    result = prepare(folder, out, settings())
    assert (result.reused, result.ok) == (2, 3)
    assert (out / records.shard_name(1, 3)).read_bytes() == before[records.shard_name(0, 2)]
    with pytest.raises(DatasetError, match="holds tiles of other slides"):
        prepare(folder / "A first.tiff", out, settings())
    (folder / "A first.tiff").unlink()
    assert prepare(folder, out, settings()).reused == 2
    # Seen from the outside, nothing has happened.
    assert tree(out) == before
    with pytest.raises(DatasetError, match="holds tiles of other slides"):
        prepare(pair / "b ü", out, settings())
    assert tree(out) == before


class Killed(BaseException):
    """Stands for kill -9: no handler of ours catches it."""


RENAMES = 22  # 1 + 2 x 7 for the slides + 2 shards, 4 tables, and the timings at last


@pytest.mark.parametrize("stage", range(RENAMES))
def test_killed_at_any_rename_and_run_again(pair, finished, tmp_path, monkeypatch, stage):
    """Nothing is whole but by a rename: so dying at each one of them (or at the one after) is dying anywhere."""
    out, count, real = tmp_path / "out", [0], os.replace

    def replace(source, target):
        if count[0] == stage:
            raise Killed
        count[0] += 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        prepare(pair, out, settings())
    if stage < RENAMES - 1:
        with pytest.raises(DatasetError):
            records.TileShards(out)
    monkeypatch.undo()
    # kill -9 would have left the lock of a dead process and temporary files behind.
    (out / "prepare.lock").write_text(json.dumps({"pid": 999999999, "host": os.uname().nodename}))
    (out / ".manifest.csv.xyz.tmp").touch()
    prepare(pair, out, settings())
    assert tree(out) == tree(finished)


def test_killed_between_the_renames_of_shards(pair, finished, tmp_path, monkeypatch):
    """A third slide ahead of the two shifts their numbers; dying in the middle of that must not mix them up."""
    folder, out, fresh = tmp_path / "slides", tmp_path / "out", tmp_path / "fresh"
    shutil.copytree(pair, folder)
    write_pyramid(folder / "A first.tiff", texture(9), 1.0, codec="deflate")
    prepare(folder, fresh, settings())
    for stage in range(5):
        shutil.rmtree(out, ignore_errors=True)
        (folder / "A first.tiff").rename(tmp_path / "aside.tiff")
        prepare(folder, out, settings())
        (tmp_path / "aside.tiff").rename(folder / "A first.tiff")
        count, real = [0], Path.replace

        def replace(self, target, count=count, stage=stage, real=real):
            if count[0] == stage:
                raise Killed
            count[0] += 1
            return real(self, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", replace)
            prepare(folder, out, settings())
        with pytest.raises(DatasetError):
            records.TileShards(out)
        assert prepare(folder, out, settings()).reused == 3
        assert tree(out) == tree(fresh)


def test_a_full_disk_stops_everything_and_loses_nothing(pair, finished, tmp_path, monkeypatch):
    out, real = tmp_path / "out", records.ShardWriter.write

    def write(self, record):
        if "b ü" in str(self.path):
            with records._storage(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, record)

    monkeypatch.setattr(records.ShardWriter, "write", write)
    with pytest.raises(records.StorageError, match="No space left on device; free space.*finished slides are kept"):
        prepare(pair, out, settings())
    assert [path.parent.name for path in out.rglob(mf.SHARD)] == ["case"] and not list(out.rglob(".*.tmp"))
    monkeypatch.undo()
    assert prepare(pair, out, settings()).reused == 1
    assert tree(out) == tree(finished)


def test_any_other_file_on_a_full_disk(pair, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "selection.csv")

    monkeypatch.setattr(module, "_write_selection", full)
    with pytest.raises(records.StorageError, match="cannot write selection.csv: No space left"):
        prepare(pair, tmp_path / "out", settings())


def test_the_lock_refuses_a_second_prepare(pair, tmp_path):
    (tmp_path / "out").mkdir()
    with folder_lock(tmp_path / "out", module.LOCK), pytest.raises(LockedError, match="is working in"):
        prepare(pair, tmp_path / "out", settings())


def test_unusable_folders(pair, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WavepathError, match="cannot write to"):
        prepare(pair, tmp_path / "file" / "out", settings())
    for wrong in (pair, pair.parent):
        with pytest.raises(WavepathError, match="folder of the slides"):
            prepare(pair, wrong, settings())
    with pytest.raises(SlideError, match="no slides"):
        prepare(tmp_path / "nowhere", tmp_path / "out", settings())


def test_an_output_among_the_slides_is_not_read_as_slides(pair, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(pair, folder)
    for _ in range(2):
        assert prepare(folder, folder / "tiles", settings()).total == 2


@pytest.mark.parametrize("change", [dict(tiles__codec="webp"), dict(select__mode="best"), dict(select__top=0.0), dict(tiles__quality=0)])
def test_unusable_settings_are_one_error(pair, tmp_path, change):
    with pytest.raises(ConfigError):
        prepare(pair, tmp_path / "out", settings(**change))
    assert not (tmp_path / "out").exists()


def test_resolution(pair, tmp_path):
    result = prepare(pair, tmp_path / "coarser", settings(tiles__mpp=0.5))
    assert {row.tile_mpp for row in result.rows} == {1.0} and result.exit_code == 0
    strict = prepare(pair, tmp_path / "required", settings(tiles__mpp=0.5, tiles__require_mpp=True))
    assert strict.exit_code == 1 and "coarser than the 0.5 asked for" in strict.rows[0].reason
    finer = prepare(pair, tmp_path / "finer", settings(tiles__mpp=1.3))
    shards = records.TileShards(tmp_path / "finer")
    assert {row.tile_mpp for row in finer.rows} == {1.3} and abs(shards.meta(0)["mpp"] - 1.3) < 1e-6
    corners = {shards.meta(index)["x"] for index in range(len(shards))}
    assert corners <= {round(i * 32 * 1.3) for i in range(20)}
    given = prepare(pair, tmp_path / "given", settings(), slide_mpp=0.8)
    assert {(row.mpp, row.mpp_source, row.tile_mpp) for row in given.rows} == {(0.8, "given", 1.0)}


def test_selections_and_limits(pair, tmp_path, finished):
    drawn = prepare(pair, tmp_path / "random", settings(select__mode="random"))
    assert [row.regions_selected for row in drawn.rows] == [row.regions_selected for row in mf.read_manifest(finished)]
    assert all(row.energy_selected < other.energy_selected for row, other in zip(drawn.rows, mf.read_manifest(finished), strict=True))
    every = prepare(pair, tmp_path / "all", settings(select__mode="all", tiles__max_per_slide=40, tiles__codec="png"))
    assert [(row.regions_selected, row.tiles) for row in every.rows] == [(16, 40), (16, 40)]
    assert records.TileShards(tmp_path / "all").tiles([0])[0][:4] == b"\x89PNG"


def test_workers_do_not_change_the_bytes(pair, finished, tmp_path):
    prepare(pair, tmp_path / "out", settings(), workers=4)
    assert tree(tmp_path / "out") == tree(finished)


def test_the_command(pair, tmp_path, capsys):
    from wavepath.cli import main

    (tmp_path / "slides").mkdir()
    shutil.copy(pair / "a/case.tiff", tmp_path / "slides/one.tiff")
    (tmp_path / "slides/two.svs").write_text("not a slide")
    flags = ["--mpp=1.0", "--top=0.5", "--codec=png", "--config.tiles.size=32", "--config.screen.region_um=128", "--config.screen.min_region_um=128"]
    where = [f"--slides={tmp_path / 'slides'}", f"--out={tmp_path / 'out'}"]
    assert main(["prepare", *where, *flags]) == 3
    said = capsys.readouterr().err
    assert "1 of 2 gave tiles" in said and "failed: two:" in said and f"--config.data.dir={tmp_path / 'out'}" in said
    assert records.TileShards(tmp_path / "out").codec == "png" and mf.read_manifest(tmp_path / "out")[0].regions_selected == 8
    assert main(["prepare", *where, *flags, "--strict"]) == 1
    assert main(["prepare", *where, "--config.tiles.sise=32"]) == 1 and "tiles.size" in capsys.readouterr().err
    assert main(["prepare", *where, "--workers=0"]) == 1


@pytest.mark.slow
def test_killed_for_real_at_several_points(tmp_path):
    """SIGKILL while slides are screened, tiles extracted, shards renamed; the tree after a second run equals an uninterrupted run's."""
    folder, plain = tmp_path / "slides", tmp_path / "plain"
    folder.mkdir()
    for seed in range(3):
        write_pyramid(folder / f"{seed}.tiff", texture(seed, 1536, 1536), 1.0, codec="deflate")
    command = [
        sys.executable, "-m", "wavepath", "prepare", f"--slides={folder}", "--mpp=1.0", "--select=all", "--codec=png", "--config.tiles.size=32",
        "--config.screen.region_um=128", "--config.screen.min_region_um=128",
    ]
    subprocess.run([*command, f"--out={plain}"], check=True, capture_output=True)
    wanted, killed = tree(plain), 0
    for trial, (pattern, after, pause) in enumerate([
        ("prepare.lock", 1, 0.0), ("slides/0/regions.csv", 1, 0.0), ("slides/0/.tiles.array_record*", 1, 0.3), ("slides/*/info.json", 1, 0.05),
        ("slides/*/.tiles.array_record*", 1, 0.1), ("slides/*/info.json", 3, 0.0), ("tiles-train*", 1, 0.0),
    ]):
        out = tmp_path / f"out {trial}"
        process = subprocess.Popen([*command, f"--out={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob(pattern))) < after:
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if process.returncode == -signal.SIGKILL and not (out / "dataset_info.json").exists():
            with pytest.raises(DatasetError):
                records.TileShards(out)
        subprocess.run([*command, f"--out={out}"], check=True, capture_output=True)
        assert tree(out) == wanted, f"trial {trial}"
    assert killed >= 5


@pytest.mark.slow
def test_real_slides(shared_data, tmp_path):
    out, table = tmp_path / "out", tmp_path / "mpp.csv"
    config = prepare_defaults()
    first = prepare(shared_data / "slides", out, config)
    rows = {row.slide_id: row for row in first.rows}
    assert {row.slide_id: row.status for row in first.rows} == {
        "CMU-1-Small-Region": "ok", "TCGA-CR-7395-01A-01-TS1": "failed", "cmu-1-dicom": "ok",
    }
    assert "--mpp-csv" in rows["TCGA-CR-7395-01A-01-TS1"].reason and first.exit_code == 3
    # The requested 0.25 is an upper resolution: tiles at the slide's own.
    assert abs(rows["CMU-1-Small-Region"].tile_mpp - 0.499) < 1e-3 and rows["cmu-1-dicom"].tiles > 0
    table.write_text("slide,mpp\nTCGA-CR-7395-01A-01-TS1,0.25\n")
    second = prepare(shared_data / "slides", out, config, mpp_csv=table)
    assert second.exit_code == 0 and second.reused == 2 and second.rows[1].tile_mpp == 0.25
    assert len(records.TileShards(out)) == second.tiles
