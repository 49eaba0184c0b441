"""The main job on real slides: SVS with JPEG, a DICOM pyramid, SVS with JPEG 2000 that carries no mpp."""

import csv

import pytest
from scipy.stats import spearmanr

from wavepath.cli import main
from wavepath.data.screening import RegionTable
from wavepath.interop.features import read_features

SETTINGS = ["--config=configs/prepare.py:smoke", "--mpp", "0.5"]


def rows_of(tiles):
    with open(tiles / "manifest.csv", newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_real_slides_from_prepare_to_report(shared_data, tmp_path):
    slides, tiles, run = shared_data / "slides", tmp_path / "tiles", tmp_path / "run"
    tcga = "TCGA-CR-7395-01A-01-TS1"
    assert main(["prepare", "--slides", str(slides), "--out", str(tiles), *SETTINGS]) == 3
    rows = rows_of(tiles)
    assert rows[tcga]["status"] == "failed" and all(way in rows[tcga]["reason"] for way in ("mpp", "--mpp-csv", "--slide-mpp"))
    assert {name: row["status"] for name, row in rows.items() if name != tcga} == {"CMU-1-Small-Region": "ok", "cmu-1-dicom": "ok"}

    (tmp_path / "mpp.csv").write_text(f"slide,mpp\n{tcga},0.5\n")
    assert main(["prepare", "--slides", str(slides), "--out", str(tiles), "--mpp-csv", str(tmp_path / "mpp.csv"), *SETTINGS]) == 0
    rows = rows_of(tiles)
    assert all(row["status"] == "ok" and int(row["tiles"]) > 20 for row in rows.values())
    # The DICOM pyramid and the SVS are the same glass: their regions rank alike. (Not their energies: the DICOM's own 2-mpp level is
    # sharper than one averaged from the full resolution, by a factor of two.)
    svs, pyramid = (RegionTable.from_csv(tiles / "slides" / name / "regions.csv") for name in ("CMU-1-Small-Region", "cmu-1-dicom"))
    both = svs.eligible & pyramid.eligible
    assert both.sum() > 0.9 * svs.eligible.sum()
    assert spearmanr(svs.energy[both], pyramid.energy[both]).statistic > 0.9
    # A pyramid is screened on its coarse level: under a tenth of the pixels that all its tiles have.
    dicom = rows["cmu-1-dicom"]
    assert int(dicom["pixels_screened"]) < 0.1 * int(dicom["width"]) * int(dicom["height"])

    train = ["train", "--config=configs/wise_mae.py:smoke", f"--workdir={run}", f"--config.data.dir={tiles}", "--config.train.steps=10"]
    assert main(train) == 0
    assert main(["embed", "--checkpoint", str(run), "--data", str(tiles), "--out", str(tmp_path / "features")]) == 0
    for name, row in rows.items():
        assert len(read_features(tmp_path / "features" / f"{name}.h5")) == int(row["tiles"])
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert all(f"<h3>{name}</h3>" in text for name in rows) and text.count("highest energies") == 3
