"""`wavepath bench step`: which contenders there are, what their numbers mean, and that the peer is the same network."""

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


def test_one_peer_stands_beside_variants_of_its_own_size():
    configs = [step.load(SMOKE, overrides, 8) for overrides in ([], ["model.remat=full"], ["lr=1"])]
    torch_mae.check_all(configs)
    for overrides, batch, said in ((["model.variant=S"], 8, "hidden_size"), ([], 4, "batch_size"), (["model.dtype=bfloat16"], 8, "dtype")):
        with pytest.raises(ConfigError, match=f"differ in {said}"):
            torch_mae.check_all([*configs, step.load(SMOKE, overrides, batch)])
    with pytest.raises(ConfigError, match="squared error"):
        torch_mae.check_all([*configs, step.load(SMOKE, ["loss.contrast_weight=0.1"], 8)])


def test_a_peak_is_that_of_the_contender_alone():
    def memory(now, peak):
        return {"bytes_in_use": now, "peak_bytes_in_use": peak}

    # The first, with 100 bytes of state: its step takes 250 more. The second holds 30, of which its step, with all others' 100, takes 170 more.
    assert step.own_peak(memory(0, 0), memory(100, 120), memory(100, 350)) == {"device_peak": 350, "device_peak_is_bound": False}
    assert step.own_peak(memory(100, 350), memory(130, 350), memory(130, 350)) == {"device_peak": 250, "device_peak_is_bound": True}
    assert step.own_peak(memory(100, 350), memory(130, 350), memory(130, 500)) == {"device_peak": 400, "device_peak_is_bound": False}
    assert step.own_peak({}, {}, {}) == {}


def test_what_the_peer_computes_beyond_us():
    # ViT-S at 224 px: 196 patches of 768 numbers, 49 of them visible; forward and gradient by the weights, of the head by its input too.
    config = step.load("configs/wise_mae.py:variant=S", [], 8)
    projected, predicted = 2 * 2 * 147 * 768 * 384, 3 * 2 * 50 * 256 * 768
    assert torch_mae.extra_flops(config) == projected + predicted


def test_settings_are_checked_first(monkeypatch):
    monkeypatch.setattr("wavepath.benchmarks.timing.restart_with_huge_pages", lambda: pytest.fail("checked too late"))
    twice = "--batch 4 and batch_size=8: give one"
    for flags, said in (
        (["--runs", "0"], "--runs"), (["--vary", "lr"], "--vary"), (["--batch", "0"], "--batch is at least 1"),
        (["--batch", "4", "--vary", "batch_size=8,16"], twice), (["--batch", "4", "--config.batch_size=8"], twice),
    ):
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
