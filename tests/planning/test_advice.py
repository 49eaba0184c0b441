"""The search for what fits, against a compiler whose memory is a formula."""

import pytest

from wavepath.config import load_config
from wavepath.errors import ConfigError
from wavepath.planning.advice import MOST, advise, flags, savings
from wavepath.planning.compile import Compiled, CompilerError, Memory
from wavepath.planning.plan import changed

GIB = 2**30
LIMIT = 16 * GIB
STATE = 2 * GIB


class Compiler:
    """state / parts + batch / devices * bytes of an image, by policy; micro-batches divide what the images take."""

    def __init__(self, config, *, image, saves, devices=16, state=STATE, coupled=False, silent=False, broken=""):
        self.broken = broken
        self.config, self.image, self.saves, self.devices, self.state = config, image, saves, devices, state
        self.coupled, self.silent, self.calls = coupled, silent, []

    def __call__(self, changes):
        config = changed(self.config, changes)
        self.calls.append(dict(changes))
        parts = config.optim.accumulate
        if config.task == "mae" and config.model.mask_groups and config.batch_size % config.model.mask_groups:
            raise ConfigError("mask_groups does not divide batch_size")
        if self.broken and changes.get("model.remat") == self.broken:
            raise CompilerError("the compiler failed")
        if parts > 1 and self.coupled:
            raise ConfigError("the loss compares the examples of a batch")
        assert config.batch_size % (self.devices * parts) == 0
        state = self.state // (self.devices if config.parallel.fsdp == 0 else 1)
        used = int(state + config.batch_size / self.devices / parts * self.image * self.saves[self.policy(config)])
        if used > LIMIT:
            return Compiled(False, None, None, None if self.silent else used, LIMIT, "RESOURCE_EXHAUSTED")
        return Compiled(True, Memory(state, state, state, used - state, used), None, None, LIMIT)

    def policy(self, config):
        return str({"mae": config.model, "superres": config.superres, "stain": config.stain}[config.task].remat)


def looked(spec, overrides=(), state=STATE, **given):
    config = load_config(spec, overrides)
    compiler = Compiler(config, state=state, **given)
    refused = compiler({})
    assert refused.fits is False, "the case must not fit as it is"
    compiler.calls.clear()
    return advise(config, refused, compiler, devices=16, state=state), compiler


MAE = "configs/wise_mae.py:variant=S"
SAVES = {"none": 1.0, "dots": 0.5, "full": 0.1}


def test_the_cheapest_recomputation_that_fits():
    found, compiler = looked(MAE, ["batch_size=4096"], image=GIB // 10, saves=SAVES)
    assert found.changes == {"model.remat": "dots"} and len(compiler.calls) == 1
    assert flags(found.changes) == "--config.model.remat=dots"
    assert [trial.fits for trial in found.trials] == [True]


def test_a_policy_that_cannot_be_enough_is_not_compiled():
    found, compiler = looked(MAE, ["batch_size=4096"], image=GIB // 4, saves=SAVES)
    assert compiler.calls == [{"model.remat": "full"}] and found.changes == {"model.remat": "full"}


def test_a_policy_in_use_is_not_proposed_again():
    config = load_config(MAE, ["model.remat=dots"])
    assert savings(config, 1.5) == [{"model.remat": "full"}]
    assert savings(load_config(MAE, ["model.remat=full"]), 1.5) == []
    assert savings(load_config("configs/ceff.py"), 1.5) == [{"stain.remat": "True"}]
    assert savings(load_config("configs/cwt_net.py"), 1.5) == [{"superres.remat": "True"}]
    assert savings(load_config("configs/cwt_net.py:network=edsr"), 1.5) == []
    assert savings(load_config("configs/resnet.py"), 1.5) == []


def test_a_heavy_state_is_divided():
    found, _ = looked(MAE, ["batch_size=1024"], image=GIB // 20, saves=SAVES, state=17 * GIB)
    assert found.changes == {"parallel.fsdp": "0"}  # computing again as well would cost time
    found, compiler = looked(MAE, ["batch_size=1024"], image=GIB // 2, saves=SAVES, state=17 * GIB)
    assert found.changes == {"model.remat": "full", "parallel.fsdp": "0"}
    assert compiler.calls == [{"model.remat": "full"}, found.changes]  # by itself it cannot be enough


def test_a_batch_that_is_proposed_holds_the_groups_of_masks():
    found, _ = looked(MAE, ["batch_size=4096", "model.mask_groups=256", "model.remat=full"], image=GIB // 2, saves=SAVES | {"full": 1.0})
    assert int(found.changes["batch_size"]) == 256  # 14 GiB hold 28 rows on each of 16
    assert looked(MAE, ["batch_size=3072", "model.mask_groups=3072"], image=GIB, saves=SAVES)[0].changes is None  # no smaller one does


def test_a_compiler_that_fails_has_not_answered():
    found, _ = looked(MAE, ["batch_size=4096"], image=GIB // 10, saves=SAVES, broken="dots")
    assert found.changes == {"model.remat": "full"} and [trial.failed for trial in found.trials] == ["the compiler failed", ""]


def test_a_replicated_state_cannot_be_divided():
    """Nor does any batch help: the state alone is too large."""
    found, compiler = looked(MAE, ["batch_size=1024", "parallel.backend=pmap"], image=GIB // 20, saves=SAVES, state=17 * GIB)
    assert found.changes is None and found.alternative is None
    assert len(compiler.calls) <= MOST and all("parallel.fsdp" not in call for call in compiler.calls)


def test_the_largest_batch_and_micro_batches():
    """0.15 GiB an image and chip at full: 14 GiB hold 93 rows, 88 when rounded to the tiles of memory; 4096 = 3 x ... is not, 4 x 1024 is."""
    found, compiler = looked(MAE, ["batch_size=4096"], image=3 * GIB // 2, saves=SAVES)
    batch = int(found.changes["batch_size"])
    assert found.changes["model.remat"] == "full" and batch % (16 * 8) == 0
    assert 0.8 * 93 * 16 <= batch <= 93 * 16
    assert found.alternative == {"model.remat": "full", "optim.accumulate": "4"}
    assert len(compiler.calls) <= MOST
    assert compiler(found.changes).fits and compiler(found.alternative).fits


def test_a_refusal_without_numbers_is_halved():
    found, compiler = looked(MAE, ["batch_size=4096", "model.remat=full"], image=GIB // 2, saves={"full": 1.0}, silent=True)
    assert int(found.changes["batch_size"]) * GIB / 2 / 16 + STATE <= LIMIT
    assert len(compiler.calls) <= MOST


def test_a_loss_of_the_whole_batch_is_not_divided():
    found, _ = looked("configs/ceff.py", ["batch_size=64"], image=6 * GIB, saves={"False": 1.0, "True": 0.9}, coupled=True)
    assert found.changes == {"stain.remat": "True", "batch_size": "32"} and found.alternative is None


def test_no_batch_that_fits():
    found, compiler = looked("configs/cwt_net.py", ["batch_size=16"], image=40 * GIB, saves={"False": 1.0, "True": 0.5})
    assert found.changes is None and compiler.calls == [{"superres.remat": "True"}]
    assert [trial.fits for trial in found.trials] == [False]


@pytest.mark.parametrize("image", [GIB // 7, GIB // 3, GIB, 3 * GIB, 9 * GIB])
def test_whatever_is_said_to_fit_has_been_compiled(image):
    found, compiler = looked(MAE, ["batch_size=2048"], image=image, saves=SAVES)
    fitting = [trial.changes for trial in found.trials if trial.fits]
    assert found.changes is None or found.changes in fitting
    assert found.alternative is None or found.alternative in fitting
    assert len(found.trials) == len(compiler.calls) <= MOST
