"""Super-resolution from nothing given to a trained run, through the command line: made pyramids, metrics of both modes, pictures, a resume."""

import json

import pytest
from PIL import Image

from wavepath.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_smoke_trains_evaluates_draws_and_resumes(tmp_path, scale, capsys):
    run = tmp_path / "run"
    argv = ["train", f"--config=configs/cwt_net.py:scale={scale},smoke", "--workdir", str(run), "--config.parallel.devices=1"]
    assert main([*argv, "--config.train.steps=10"]) == 0
    assert main([*argv, "--config.writers.tensorboard=false"]) == 0
    assert f"wavepath superres SLIDE --checkpoint {run} --scale {scale}" in capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row for row in rows if "eval_psnr" in row}
    assert list(evaluated) == [10, 20]
    for prefix in ("", "ref_", "bicubic_"):
        assert evaluated[20][f"eval_{prefix}psnr"] > 15 and 0 < evaluated[20][f"eval_{prefix}ssim"] < 1
    assert evaluated[20]["eval_bicubic_psnr"] == pytest.approx(evaluated[10]["eval_bicubic_psnr"])
    # It starts as plain enlargement and has twenty steps to learn or to go wrong in.
    assert abs(evaluated[20]["eval_psnr"] - evaluated[20]["eval_bicubic_psnr"]) < 2
    assert json.loads((run / "constants.json").read_text())["mean"] == pytest.approx([0.8, 0.6, 0.75], abs=0.2)
    panel = Image.open(run / "panels" / "step_000020.png")
    assert panel.info["columns"] == "input,bicubic,output,target"
