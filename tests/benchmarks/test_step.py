"""`wavepath bench step`: which contenders there are, what their numbers mean, and that the peer is the same network."""

import math

import pytest

from wavepath import cli
from wavepath.benchmarks import step, torch_mae
from wavepath.errors import ConfigError

SMOKE = "configs/wise_mae.py:smoke"


def test_variants_are_every_combination():
    assert step.variants([]) == [("", [])]
    made = step.variants(["config.model.remat=none,full", "augment.crop_scale=(1,1)"])
    assert made == [
        ("model.remat=none augment.crop_scale=(1,1)", ["model.remat=none", "augment.crop_scale=(1,1)"]),
        ("model.remat=full augment.crop_scale=(1,1)", ["model.remat=full", "augment.crop_scale=(1,1)"]),
    ]
    for wrong in (["model.remat"], ["model.remat="], ["a=1", "config.a=2"]):
        with pytest.raises(ConfigError, match="--vary"):
            step.variants(wrong)


def test_contenders_by_backend_variant_and_augmentation():
    configs = {name: step.load(SMOKE, overrides, 8) for name, overrides in step.variants(["model.remat=none,full"])}
    found = step.contenders(configs, ("jit", "pmap"), peer=False)
    assert list(found) == [f"wavepath {backend} model.remat={value}" for value in ("none", "full") for backend in ("jit", "pmap")]
    assert found["wavepath pmap model.remat=full"].parallel.backend == "pmap" and found["wavepath pmap model.remat=full"].model.remat == "full"
    config = step.load(SMOKE, [], 8)
    with_peer = step.contenders({"": config}, (), peer=True)
    assert list(with_peer) == ["wavepath", "wavepath, no augmentation"]
    assert not step.is_plain(config) and step.is_plain(with_peer["wavepath, no augmentation"]) and config.batch_size == 8
    # What takes tiles as they are is not measured twice.
    assert list(step.contenders({"": step.without_augmentation(config)}, (), peer=True)) == ["wavepath"]


def row(name, milliseconds, **more):
    facts = dict(batch=8, devices=2, device_kind="cpu", dtype="float32", flops=1e9, parameters=10**6, scratch=10**6, planned=3 * 10**6)
    median = sorted(milliseconds)[len(milliseconds) // 2]
    rate = 1e3 * 8 / median
    return {
        "name": name, **facts, "milliseconds": milliseconds, "median_ms": median, "cpu_ms": 2 * median, "images_per_second": rate,
        "images_per_second_per_device": rate / 2, "flops_per_second": 1e9 * rate, **more,
    }  # fmt: skip


def test_the_table_says_what_shares_are_of():
    ours, torch = row("wavepath", [100.0, 110.0, 90.0], share_of_product=0.5, rate_over_base=[0.9, 0.8, 1.0]), row("torch", [90.0, 90.0, 90.0])
    report = {"rows": [ours, torch], "base": "torch", "product": {"flops_per_second": 1.6e11, "each": {"matrix product": 1.6e11}}}
    header, body = step.table_of(report)
    assert {len(cells) for cells in body} == {len(header)} and "of the product" in header and "MFU" not in header
    found = dict(zip(header, body[0], strict=True))
    assert found["images/s"] == "80" and found["per device"] == "40" and found["of the product"] == "50.0 %" and found["GFLOP/s"] == "80"
    assert found["rate over torch"] == "0.90 (0.80 to 1.00)" and body[1][header.index("rate over torch")] == "1"
    assert any("GFLOP/s of one large square product" in line for line in step.lines(report))
    alone = {"rows": [row("wavepath", [100.0], mfu=0.4)], "base": "wavepath"}
    header, body = step.table_of(alone)
    assert "MFU" in header and "40.0 %" in body[0] and not any(name.startswith("rate over") for name in header)
    lost = {"rows": [row("wavepath", [1.0], loss=math.nan)], "base": "wavepath"}
    assert any("may not be that of real training" in line for line in step.lines(lost))


def test_the_peer_refuses_what_it_does_not_train():
    torch_mae.check(step.load(SMOKE, [], 8))
    for overrides, said in (
        (["loss.contrast_weight=0.1"], "squared error"), (["ema=0.9"], "config.ema=0"), (["model.drop_path=0.1"], "drop_path"),
        (["prepare.tiles.size=128"], "tiles.size"), (["optim.name=adam"], "adamw"),
    ):
        with pytest.raises(ConfigError, match=said):
            torch_mae.check(step.load(SMOKE, overrides, 8))
    with pytest.raises(ConfigError, match="config.task='superres' has no peer"):
        torch_mae.check(step.load("configs/cwt_net.py:smoke", [], 8))


def test_what_the_peer_computes_beyond_us():
    # ViT-S at 224 px: 196 patches of 768 numbers, 49 of them visible; forward and gradient by the weights, of the head by its input too.
    config = step.load("configs/wise_mae.py:variant=S", [], 8)
    projected, predicted = 2 * 2 * 147 * 768 * 384, 3 * 2 * 50 * 256 * 768
    assert torch_mae.extra_flops(config) == projected + predicted


def test_settings_are_checked_first(monkeypatch):
    monkeypatch.setattr("wavepath.benchmarks.timing.restart_with_huge_pages", lambda: pytest.fail("checked too late"))
    for flags, said in ((["--runs", "0"], "--runs"), (["--vary", "lr"], "--vary")):
        args, module = cli.parse("bench", ["step", "--config", SMOKE, *flags])
        with pytest.raises(ConfigError, match=said):
            module.run(args)
    args, module = cli.parse("bench", ["ops", "--config.lr=1"])
    with pytest.raises(ConfigError, match="bench ops has no config"):
        module.run(args)


@pytest.mark.slow
def test_a_step_is_measured(monkeypatch):
    monkeypatch.setitem(step._SIDES, "cpu", 128)
    config = step.load(SMOKE, ["parallel.devices=2", "model.scan=true"], 4)
    report = step.measure(step.contenders({"": config}, ("pmap",), peer=False), 2, False, 1)
    (found,) = report["rows"]
    assert found["name"] == report["base"] == "wavepath" and found["backend"] == "pmap" and found["devices"] == 2
    assert 0.1 < found["loss"] < 3 and found["share_of_product"] > 0 and found["scratch"] > 0 and found["median_ms"] > 0
    # State: parameters and two moments, in float32.
    assert 12 * found["parameters"] < found["arguments"] < 13 * found["parameters"] + 200_000
    assert found["images_per_second"] == pytest.approx(1e3 * 4 / found["median_ms"]) == pytest.approx(2 * found["images_per_second_per_device"])


@pytest.mark.slow
def test_the_peer_is_the_same_network_and_learns():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = step.without_augmentation(step.load(SMOKE, ["lr=0.05", "optim.warmup=0", "train.steps=100"], 4))
    peer = torch_mae.make_step(config, 1)  # as many parameters, or it raises
    losses = []
    for _ in range(12):
        peer.call()
        losses.append(float(peer.metrics["loss"][0]))
    assert peer.facts["parameters"] > 500_000 and 0.8 < losses[0] < 2 and losses[-1] < 0.97 * losses[0]
