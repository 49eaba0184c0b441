"""Bad input through the command line: one clear message each, nothing lost, the rest processed, the right exit code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wavepath.cli import main
from wavepath.data.manifest import read_manifest
from wavepath.data.records import TileShards
from wavepath.interop.features import read_features
from wavepath.interop.tiff import write_pyramid
from wavepath.training.checkpoint import restore_run, saved_steps

PREPARE = ["prepare", "--config=configs/prepare.py:smoke", "--config.tiles.max_per_slide=40"]
# A network that compiles in a second or two: 4 tokens of 32 px, its layers one loop.
TRAIN = [
    "train", "--config=configs/wise_mae.py:smoke", "--config.model.patch=32", "--config.model.scan=True", "--config.batch_size=8",
    "--config.parallel.devices=1", "--config.train.steps=6", "--config.train.save_every=2", "--config.train.log_every=1",
    "--config.train.panels_every=0", "--config.writers.tensorboard=False",
]
EMBED = ["embed", "--devices=1", "--batch-size=32"]


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Two phantom slides, their tiles, and a run of 6 steps with checkpoints at 2, 4 and 6. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("job")
    assert main(["phantom", f"--out={folder / 'slides'}", "--slides=2", "--size=1024", "--seed=5"]) == 0
    assert main([*PREPARE, f"--slides={folder / 'slides'}", f"--out={folder / 'tiles'}"]) == 0
    assert main([*TRAIN, f"--workdir={folder / 'run'}", f"--config.data.dir={folder / 'tiles'}"]) == 0
    assert saved_steps(folder / "run") == [2, 4, 6]
    return folder


@pytest.fixture(scope="session")
def bad_slides(job, tmp_path_factory):
    """A folder with everything in it that users have sent to programs like this one, and three good slides among it."""
    folder = tmp_path_factory.mktemp("bad")
    whole = (job / "slides/phantom_000.tiff").read_bytes()
    for name in ("one/case.tiff", "two/case.tiff", "päth with späces/日本 ü.tiff"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(whole)
    (folder / "cut.svs").write_bytes(whole[: len(whole) * 6 // 10])
    (folder / "text.svs").write_text("Case 17: see the other folder")
    (folder / "zero.svs").touch()
    Image.new("RGB", (1, 1), (200, 100, 150)).save(folder / "pixel.png")
    write_pyramid(folder / "white.tiff", np.full((1024, 1024, 3), 244, np.uint8), 0.25)
    write_pyramid(folder / "no mpp.tiff", np.full((1024, 1024, 3), 200, np.uint8), None)
    return folder


REASONS = {  # slide -> status, and what its message must name: the trouble and what to do
    "cut": ("failed", "truncated", "copy it again"),
    "text": ("failed", "no slide or image", "remove it"),
    "zero": ("failed", "empty (0 bytes)", "copy it again"),
    "pixel": ("failed", "no usable pixel size", "--mpp-csv"),
    "no mpp": ("failed", "no usable pixel size", "--slide-mpp"),
    "white": ("empty", "no tissue", "glass"),
}
GOOD = ("one/case", "two/case", "päth with späces/日本 ü")


def complaint(argv, capfd, code=1) -> str:
    """The one line of an error, which is the last that is said and comes without a traceback."""
    capfd.readouterr()
    assert main([str(word) for word in argv]) == code
    said = capfd.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("wavepath: error: ")
    return last


def test_a_folder_of_bad_slides(bad_slides, tmp_path, capfd):
    command = [*PREPARE, f"--slides={bad_slides}", f"--out={tmp_path / 'tiles'}"]
    assert main(command) == 3
    said = capfd.readouterr().err
    assert "Traceback" not in said and "3 of 9 gave tiles" in said
    rows = {row.slide_id: row for row in read_manifest(tmp_path / "tiles")}
    assert set(rows) == {*REASONS, *GOOD}
    for name, (status, *words) in REASONS.items():
        assert rows[name].status == status and not rows[name].tiles, name
        assert all(word in rows[name].reason for word in words), rows[name].reason
        assert f"warning: {name}: {status}, {rows[name].reason}" in said.splitlines()
    assert {(rows[name].status, rows[name].tiles) for name in GOOD} == {("ok", 40)}
    shards = TileShards(tmp_path / "tiles")
    assert sorted({shards.meta(index)["slide"] for index in range(len(shards))}) == sorted(GOOD)
    # The broken file is put right: its slide is all that is done again.
    capfd.readouterr()
    shutil.copytree(bad_slides, tmp_path / "slides", copy_function=shutil.copy2)
    shutil.copy(bad_slides / "one/case.tiff", tmp_path / "slides/cut.svs")
    assert main([*PREPARE, f"--slides={tmp_path / 'slides'}", f"--out={tmp_path / 'tiles'}"]) == 3
    assert "4 of 9 gave tiles (4 kept from before)" in capfd.readouterr().err


def test_bad_slides_in_a_stream(job, bad_slides, tmp_path, capfd):
    argv = [*EMBED, f"--checkpoint={job / 'run'}", f"--slides={bad_slides}", "--select=wavelet", f"--out={tmp_path}"]
    assert main(argv) == 3
    said = capfd.readouterr().err
    assert "Traceback" not in said and "WARNING" not in said and "white: gives no tiles" in said
    failed = {name for name, (status, *_) in REASONS.items() if status == "failed"}
    report = json.loads((tmp_path / "embed.json").read_text())
    assert set(report["failed"]) == failed
    for name in failed:
        assert f"warning: {name}: left out, {report['failed'][name]}" in said.splitlines()
    one, other = (read_features(tmp_path / f"{name}.h5").features for name in GOOD[:2])
    assert len(one) > 40 and len(list(tmp_path.rglob("*.h5"))) == 3
    np.testing.assert_array_equal(one, other)


def test_a_slide_cut_anywhere(job, tmp_path, capfd):
    (tmp_path / "slides").mkdir()
    whole = (job / "slides/phantom_000.tiff").read_bytes()
    for percent in (1, 30, 90, 99):
        (tmp_path / "slides" / f"{percent}.svs").write_bytes(whole[: len(whole) * percent // 100])
    (tmp_path / "slides" / "less_1.svs").write_bytes(whole[:-1])
    assert main([*PREPARE, f"--slides={tmp_path / 'slides'}", f"--out={tmp_path / 'tiles'}"]) == 1
    assert "nothing prepared" in capfd.readouterr().err
    rows = read_manifest(tmp_path / "tiles")
    assert len(rows) == 5 and all(row.status == "failed" and "truncated" in row.reason for row in rows)
    assert not (tmp_path / "tiles/dataset_info.json").exists()


@pytest.mark.parametrize("command", [
    ["phantom", "--slides=1", "--size=512", "--out={out}"],
    ["prepare", "--slides={job}/slides", "--out={out}"],
    ["train", "--config=configs/wise_mae.py:smoke", "--workdir={out}"],
    ["embed", "--checkpoint={job}/run", "--data={job}/tiles", "--out={out}"],
    ["evaluate", "--features={job}/tiles", "--labels={job}/slides/labels.csv", "--out={out}"],
    ["report", "{job}/run", "--out={out}/report.html"],
    ["compare", "{job}/run", "--out={out}"],
    ["sweep", "--config=configs/wise_mae.py:smoke", "--workdir={out}"],
], ids=lambda command: command[0])
@pytest.mark.parametrize("place", ["{job}/slides/labels.csv/out", "/proc/wavepath/out"])
def test_an_output_folder_that_cannot_be_written(job, command, place, capfd):
    out = place.format(job=job)
    line = complaint([word.format(job=job, out=out) for word in command], capfd)
    assert f"cannot write to {out}" in line and "choose another folder" in line


def test_an_impossible_mpp_costs_no_tiles(job, capfd):
    before = (job / "tiles/manifest.csv").read_bytes()
    for value in ("96", "0", "-1"):
        line = complaint([*PREPARE, f"--slides={job / 'slides'}", f"--out={job / 'tiles'}", f"--slide-mpp={value}"], capfd)
        assert "cannot be right" in line and "micrometres per pixel" in line
    assert (job / "tiles/manifest.csv").read_bytes() == before and len(TileShards(job / "tiles")) == 80


def test_an_output_among_or_above_the_slides(job, tmp_path, capfd):
    slides = tmp_path / "all" / "slides"
    shutil.copytree(job / "slides", slides)
    for wrong in (slides, slides.parent, tmp_path):
        assert "folder of the slides" in complaint([*PREPARE, f"--slides={slides}", f"--out={wrong}"], capfd)
    # Among the slides is fine: a second call does not take the pictures in it for slides.
    for _ in range(2):
        assert main([*PREPARE, f"--slides={slides}", f"--out={slides / 'tiles'}"]) == 0
    assert "2 of 2 gave tiles (2 kept from before)" in capfd.readouterr().err


@pytest.fixture(scope="session")
def damaged(job, tmp_path_factory):
    """The tiles with some bytes flipped inside one record: (folder, file name of the shard, record, example)."""
    folder = tmp_path_factory.mktemp("damaged") / "tiles"
    shutil.copytree(job / "tiles", folder)
    shards = TileShards(folder)
    example = shards.lengths[0] + 7
    path = shards.shards[1]
    content = bytearray(path.read_bytes())
    image = shards.tiles([example])[0]
    at = content.find(image[len(image) // 2 :])
    assert at > 0
    content[at : at + 20] = bytes(byte ^ 0x55 for byte in content[at : at + 20])
    path.write_bytes(content)
    return folder, path.name, 7, example


def test_a_corrupt_record_in_training(damaged, tmp_path, capfd):
    folder, shard, record, example = damaged
    argv = [*TRAIN, f"--workdir={tmp_path / 'run'}", f"--config.data.dir={folder}", "--config.train.steps=10"]
    line = complaint(argv, capfd)  # 80 examples are one epoch: every record is wanted
    assert f"{folder / shard}: record {record} (example {example}) is damaged" in line
    assert "wavepath prepare" in line and "--config.data.on_corrupt=replace" in line
    # The same run goes on with the next example in its place.
    assert main([*argv, "--config.data.on_corrupt=replace"]) == 0
    said = capfd.readouterr().err
    assert f"(example {example}) is damaged" in said and "could not be read; the next readable ones took their places" in said
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 10 and last["replaced"] == 1


def test_a_corrupt_record_in_embedding(job, damaged, tmp_path, capfd):
    folder, shard, record, example = damaged
    argv = [*EMBED, f"--checkpoint={job / 'run'}", f"--out={tmp_path}"]
    assert main([*argv, f"--data={folder}"]) == 3
    said = capfd.readouterr().err
    assert "Traceback" not in said and f"{shard}: record {record} (example {example}) is damaged" in said and "--on-corrupt=skip" in said
    assert [path.stem for path in tmp_path.glob("*.h5")] == ["phantom_000"]
    assert main([*argv, f"--data={folder}", "--on-corrupt=skip"]) == 3
    assert "phantom_001: 1 of 40 tiles cannot be read and are left out" in capfd.readouterr().err
    found = read_features(tmp_path / "phantom_001.h5")
    # The shard is mended: only this slide is embedded again, now whole, and the rows that were there are as they were.
    assert main([*argv, f"--data={job / 'tiles'}"]) == 0
    assert "1 whole already" in capfd.readouterr().err
    whole = read_features(tmp_path / "phantom_001.h5")
    assert len(whole) == 40
    np.testing.assert_array_equal(np.delete(whole.coords, record, 0), found.coords)
    np.testing.assert_allclose(np.delete(whole.features, record, 0), found.features, atol=2e-5)


def cut_short(checkpoint: Path, everything: bool) -> None:
    """What a full or failing disk leaves: all files cut, or the largest alone."""
    files = sorted((path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size), key=lambda path: path.stat().st_size)
    for path in files if everything else files[-1:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


@pytest.mark.parametrize("everything", [False, True])
def test_a_checkpoint_cut_short(job, tmp_path, capfd, everything):
    run = tmp_path / "run"
    shutil.copytree(job / "run", run)
    cut_short(run / "checkpoints/6", everything)
    assert main([*EMBED, f"--checkpoint={run}", f"--data={job / 'tiles'}", f"--out={tmp_path / 'features'}"]) == 0
    said = capfd.readouterr().err
    assert "checkpoint 6 of" in said and "going back to step 4" in said and "Traceback" not in said and "absl" not in said
    assert json.loads((tmp_path / "features/embed.json").read_text())["step"] == 4
    if not everything:
        return
    # As if it had been killed just after that save.
    (run / "status.json").write_text((run / "status.json").read_text().replace('"done"', '"running"'))
    assert main([*TRAIN, f"--workdir={run}", f"--config.data.dir={job / 'tiles'}"]) == 0
    said = capfd.readouterr().err
    assert "checkpoint 6 of" in said and "going back to step 4" in said and "at step 4 of 6" in said and "Traceback" not in said
    assert saved_steps(run)[-1] == 6 and (run / "checkpoints_damaged/6").is_dir()
    assert_equal_states(run, job / "run")


def assert_equal_states(one: Path, other: Path) -> None:
    import jax

    (_, _, first), (_, _, second) = restore_run(one), restore_run(other)
    assert int(first.step) == int(second.step)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_every_checkpoint_cut_short(job, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(job / "run", run)
    for step in saved_steps(run):
        cut_short(run / "checkpoints" / str(step), False)
    line = complaint([*EMBED, f"--checkpoint={run}", f"--data={job / 'tiles'}", f"--out={tmp_path / 'features'}"], capfd)
    assert "no checkpoint in" in line and all(f"step {step}:" in line for step in (2, 4, 6))


@pytest.mark.parametrize(("argv", "words"), [
    (["train", "--config=configs/wise_mae.py:smoke", "--config.optim.warmpu=3"], "did you mean config.optim.warmup?"),
    (["train", "--config=configs/wise_mea.py:smoke"], "did you mean configs/wise_mae.py?"),
    (["train", "--config=configs/wise_mae.py:smok"], "did you mean smoke?"),
    (["train", "--config=configs/wise_mae.py:variant=Z"], "Ti, S, B, L, H"),
    (["train", "--config=configs/wise_mae.py:smoke", "--config.lr=fast"], "config.lr is a number"),
    (["train", "--config=configs/wise_mae.py:smoke", "--config.train.steps=many"], "config.train.steps"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_typo_in_a_config(argv, words, tmp_path, capfd):
    assert words in complaint([*argv, f"--workdir={tmp_path / 'run'}"], capfd)
    assert not (tmp_path / "run").exists()


def test_a_typo_in_a_flag_of_prepare(job, tmp_path, capfd):
    where = [f"--slides={job / 'slides'}", f"--out={tmp_path / 'tiles'}"]
    assert "did you mean --top?" in complaint(["prepare", *where, "--tpo=0.1"], capfd)
    assert "did you mean config.tiles.mpp?" in complaint(["prepare", *where, "--config.tiles.mmp=0.5"], capfd)
    assert "select.top is a share" in complaint(["prepare", *where, "--top=20"], capfd)
    assert not (tmp_path / "tiles").exists()
