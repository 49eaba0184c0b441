"""The main job through the command line: phantom, prepare, train, embed, evaluate, report, each on the output of the one before."""

import csv
import json
import re
import shutil

import h5py
import numpy as np
import pytest

from wavepath.cli import main
from wavepath.interop.features import read_features


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job with späces")
    (folder / "tiles").mkdir()
    smoke = ["--config=configs/prepare.py:smoke"]
    assert main(["phantom", "--out", str(folder / "slides"), "--slides", "3", "--size", "1024", "--seed", "5"]) == 0
    assert main(["prepare", "--slides", str(folder / "slides"), "--out", str(folder / "tiles"), *smoke]) == 0
    train = ["train", "--config=configs/wise_mae.py:smoke", f"--workdir={folder / 'run'}", f"--config.data.dir={folder / 'tiles'}"]
    assert main([*train, "--config.train.steps=6", "--config.train.log_every=2", "--config.train.save_every=3", "--config.train.panels_every=6"]) == 0
    assert main(["embed", "--checkpoint", str(folder / "run"), "--data", str(folder / "tiles"), "--out", str(folder / "features")]) == 0
    return folder


def test_features_are_those_of_every_tile(job):
    with open(job / "tiles" / "manifest.csv", newline="") as file:
        tiles = {row["slide_id"]: int(row["tiles"]) for row in csv.DictReader(file)}
    found = {path.stem: read_features(path) for path in (job / "features").glob("*.h5")}
    assert {name: len(slide) for name, slide in found.items()} == tiles and sum(tiles.values()) > 20
    slide = found["phantom_000"]
    assert slide.features.shape[1] == 96 and slide.extra["features_mean"].shape == slide.features.shape
    assert np.isfinite(slide.features).all() and slide.features.std(0).mean() > 1e-3
    assert len(np.unique(slide.coords, axis=0)) == len(slide)
    with h5py.File(job / "features" / "phantom_000.h5") as file:
        attributes = dict(file["coords"].attrs)
    # TRIDENT's reader takes the footprint in level-0 pixels from these three.
    footprint = attributes["patch_size"] * attributes["level0_magnification"] / attributes["target_magnification"]
    assert footprint == pytest.approx(attributes["patch_size_level0"]) == 64


def test_embedding_again_keeps_whole_files_and_redoes_damaged_ones(job, capfd):
    files = sorted((job / "features").glob("*.h5"))
    before = [path.read_bytes() for path in files]
    stamps = [path.stat().st_mtime_ns for path in files]
    files[1].write_bytes(before[1][:700])
    assert main(["embed", "--checkpoint", str(job / "run"), "--data", str(job / "tiles"), "--out", str(job / "features")]) == 0
    assert "3, 2 whole already" in capfd.readouterr().err
    again = read_features(files[1])
    assert [path.stat().st_mtime_ns for path in (files[0], files[2])] == [stamps[0], stamps[2]]
    assert len(again) > 0 and files[1].stat().st_size == len(before[1])


def test_a_run_of_a_machine_with_more_devices_can_be_embedded(job, tmp_path):
    run = shutil.copytree(job / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["parallel"]["devices"] = 64
    (run / "config.json").write_text(json.dumps(config))
    for number, more in enumerate(([], ["--devices", "1"])):
        assert main(["embed", "--checkpoint", str(run), "--data", str(job / "tiles"), "--out", str(tmp_path / str(number)), *more]) == 0


def test_a_batch_size_changes_no_feature(job, tmp_path):
    assert main(["embed", "--checkpoint", str(job / "run"), "--data", str(job / "tiles"), "--out", str(tmp_path), "--batch-size", "16"]) == 0
    for path in (job / "features").glob("*.h5"):
        np.testing.assert_allclose(read_features(tmp_path / path.name).features, read_features(path).features, atol=2e-5)


def test_streamed_tiles_of_the_slides_have_the_features_of_prepared_ones(job, tmp_path):
    given = ["--slides", str(job / "slides"), "--select", "wavelet"]
    assert main(["embed", "--checkpoint", str(job / "run"), *given, "--out", str(tmp_path)]) == 0
    for path in (job / "features").glob("*.h5"):
        streamed, stored = read_features(tmp_path / path.name), read_features(path)
        np.testing.assert_array_equal(streamed.coords, stored.coords)
        np.testing.assert_allclose(streamed.features, stored.features, atol=2e-5)


def test_floors_and_encoders_in_one_table(job, tmp_path, capfd):
    """The encoder before its training, and colours alone; slides of the pretraining are left out for all of them."""
    known = json.loads((job / "features" / "embed.json").read_text())
    assert known["train_slides"] == json.loads((job / "run" / "constants.json").read_text())["train_slides"] == [f"phantom_00{i}" for i in range(3)]
    for name, flags in (("untrained", ["--checkpoint", str(job / "run"), "--untrained"]), ("colours", ["--colour-statistics"])):
        assert main(["embed", *flags, "--data", str(job / "tiles"), "--out", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name / "embed.json").read_text())["train_slides"] == []
    trained, before = (read_features(folder / "phantom_001.h5") for folder in (job / "features", tmp_path / "untrained"))
    np.testing.assert_array_equal(trained.coords, before.coords)
    assert before.attributes["encoder"].endswith("-untrained") and np.abs(trained.features - before.features).max() > 1e-3
    assert main(["embed", "--checkpoint", str(job / "run"), "--untrained", "--step", "3", "--data", str(job / "tiles"), "--out", str(tmp_path)]) == 1
    assert "--untrained is from before it" in capfd.readouterr().err

    ours = shutil.copytree(job / "features", tmp_path / "ours")
    (ours / "embed.json").write_text(json.dumps({**known, "train_slides": ["phantom_002"]}))
    folders = [f"{name}={tmp_path / name}" for name in ("ours", "untrained", "colours")]
    flags = ["--labels", str(job / "slides" / "regions"), "--min-cases", "2", "--probe", "simpleshot", "--out", str(tmp_path / "table")]
    assert main(["evaluate", "--features", *folders, *flags]) == 0
    shown = capfd.readouterr()
    results = json.loads((tmp_path / "table" / "results.json").read_text())
    assert set(results["probes"]) == {"ours, simpleshot", "untrained, simpleshot", "colours, simpleshot"} and results["groups"] == 2
    assert "ours: 1 of 3 slides was pretrained on: not in the test" in shown.err and "colours, simpleshot" in shown.out


def test_probes_and_report(job, capfd):
    out = job / "run" / "evaluation"
    flags = ["--features", str(job / "features"), "--labels", str(job / "slides" / "regions"), "--min-cases", "2", "--out", str(out)]
    assert main(["evaluate", *flags]) == 1 and "pretrained on all 3 slides" in capfd.readouterr().err
    assert main(["evaluate", *flags, "--keep-pretraining-slides"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["overlap"]["features"]["count"] == 3
    assert "3 of 3 slides were pretrained on: scored all the same" in (out / "results.md").read_text()
    assert results["label_kind"] == "regions" and set(results["classes"]) <= {"tumour", "gland", "stroma", "lymphocytes", "fat"}
    assert 0 < results["probes"]["knn"]["accuracy"]["value"] <= 1
    page = job / "report.html"
    assert main(["report", str(job / "run"), "--out", str(page)]) == 0
    text = page.read_text()
    for heading in ("Slides", "phantom_002", "highest energies", "lowest energies", "Training", "Reconstructions", "Probes", "Config"):
        assert heading in text
    # Self-contained: pictures are inside, and nothing is fetched from anywhere.
    assert text.count("data:image/") >= 3 * 7 + 4
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_report_of_a_prepared_folder_alone(job):
    assert main(["report", str(job / "tiles"), "--out", str(job / "screening.html")]) == 0
    text = (job / "screening.html").read_text()
    assert "wavelet energy by rank" in text and "<h2>Training</h2>" not in text


def test_report_without_the_slides_says_so(job, tmp_path):
    moved = job / "slides" / "phantom_001.tiff"
    target = moved.rename(tmp_path / "gone.tiff")
    try:
        assert main(["report", str(job / "run"), "--out", str(job / "report2.html")]) == 0
    finally:
        target.rename(moved)
    assert "no longer readable" in (job / "report2.html").read_text()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["report", "{job}/slides", "--out", "{job}/x.html"], "neither config.json"),
        (["embed", "--checkpoint", "{job}/slides", "--data", "{job}/tiles", "--out", "{job}/f"], "no run folder"),
        (["evaluate", "--features", "{job}/slides", "--labels", "{job}/slides/labels.csv", "--out", "{job}/e"], "no feature file"),
        (["embed", "--checkpoint", "{job}/run", "--data", "{job}/nowhere", "--out", "{job}/f"], "there is no folder"),
    ],
)
def test_wrong_folders_are_one_clear_line(job, argv, message, capfd):
    assert main([text.format(job=job) for text in argv]) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("wavepath: error: ") and message in error
