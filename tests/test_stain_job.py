"""Virtual staining from nothing given to a stained image, through the command line: both stages on made pairs, both evaluations, a resume."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from wavepath.cli import main


@pytest.mark.slow
def test_smoke_trains_both_stages_evaluates_and_stains(tmp_path, capsys):
    encoders, run, out = (tmp_path / name for name in ("encoders", "run", "out"))
    one = ["--config.parallel.devices=1", "--config.writers.tensorboard=false"]
    assert main(["train", "--config=configs/ceff_encoders.py:smoke", f"--workdir={encoders}", *one]) == 0
    assert f"--config.encoders={encoders}" in capsys.readouterr().err
    pairs = next(encoders.rglob("pairs.csv")).parent
    assert main(["evaluate", "--stain-encoders", str(encoders), "--out", str(out / "encoders")]) == 0
    assert (out / "encoders" / "encoders.png").is_file() and (out / "encoders" / "results.json").is_file()

    second = [
        "train", "--config=configs/ceff.py:smoke", f"--workdir={run}", f"--config.encoders={encoders}", f"--config.data.dir={pairs}",
        *one, "--config.train.eval_every=5",
    ]
    assert main([*second, "--config.train.steps=5"]) == 0
    assert main([*second, "--config.train.steps=10"]) == 0
    assert f"wavepath stain SLIDE --checkpoint {run}" in capsys.readouterr().err
    known = json.loads((run / "constants.json").read_text())
    assert known["encoders"]["run"] == str(encoders) and known["encoders"]["step"] == 10
    assert known["encoders"]["train_slides"] == known["train_slides"] and len(known["frozen"]) > 50
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_psnr" in row] == [5, 10]
    assert Image.open(run / "panels" / "step_000010.png").info["columns"] == "input,output,target"

    assert main(["evaluate", "--stain", str(run), "--out", str(out / "stain"), "--max-images", "2"]) == 0
    results = json.loads((out / "stain" / "results.json").read_text())
    assert set(results["probes"]) == {"copy-input", "mean-colour", "ceff"} and results["images"] == 2

    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, (96, 130, 3), np.uint8))
    picture.save(tmp_path / "tissue.png")
    assert main(["stain", str(tmp_path / "tissue.png"), "--checkpoint", str(run), "--out", str(tmp_path / "ihc.tiff")]) == 0
    with tifffile.TiffFile(tmp_path / "ihc.tiff") as file:
        assert file.pages[0].shape == (96, 130, 3) and "irtual" in file.pages[0].description
