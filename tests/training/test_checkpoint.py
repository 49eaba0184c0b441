"""Checkpoints: bit-equal round trips, and damage of every kind found and passed over."""

import json

import jax
import numpy as np
import pytest
from hard_task import HardTask, hard_config, leaves
from ml_collections import ConfigDict

from wavepath.config import save_json
from wavepath.errors import CheckpointError
from wavepath.training import parallel
from wavepath.training.checkpoint import Checkpointer, checksums, restore_run, saved_steps

# TensorStore leaves futures behind when a read fails; they are nobody's to await.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def devices():
    return parallel.make(ConfigDict({"backend": "jit", "devices": 1}))


class Weighty(HardTask):
    """With an array so large that the middle of the largest file lies inside it."""

    def init(self, rng):
        state = super().init(rng)
        return state.replace(extra={**state.extra, "large": jax.random.bits(rng, (50_000,)).astype(np.float32)})


@pytest.fixture(scope="module")
def task():
    return Weighty(hard_config())


@pytest.fixture(scope="module")
def states(devices, task):
    """Three states that differ in every float."""
    return {step: devices.place(jax.tree.map(lambda leaf, step=step: leaf + step, devices.init(task, 0))) for step in (2, 4, 6)}


@pytest.fixture
def run(tmp_path, task, states):
    """A run folder with three checkpoints."""
    save_json(task.config, tmp_path / "config.json")
    checkpoints = Checkpointer(tmp_path, keep=3)
    for step, state in states.items():
        checkpoints.save(step, state, {"chrono": {"seconds": step}})
    checkpoints.close()
    return tmp_path


def same(one, other):
    return all(np.array_equal(value, leaves(other)[name]) for name, value in leaves(one).items())


def arrays(run, step):
    """The largest array file of a checkpoint."""
    return max((run / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def test_a_round_trip_is_bit_equal_and_says_what_was_saved(run, devices, task, states):
    checkpoints = Checkpointer(run)
    step, state, meta = checkpoints.restore(devices.abstract_state(task))
    checkpoints.close()
    assert step == 6 and same(state, states[6]) and meta["chrono"] == {"seconds": 6}
    assert jax.tree.structure(state) == jax.tree.structure(states[6])
    assert saved_steps(run) == [2, 4, 6]


def test_only_the_newest_stay(tmp_path, states):
    checkpoints = Checkpointer(tmp_path, keep=2)
    for step, state in states.items():
        checkpoints.save(step, state, {})
    checkpoints.close()
    assert saved_steps(tmp_path) == [4, 6]
    assert sorted(json.loads((tmp_path / "checkpoints.json").read_text())) == ["4", "6"]


@pytest.mark.multidevice
def test_a_checkpoint_of_one_device_is_restored_on_eight(run, task, states):
    eight = parallel.make(ConfigDict({"backend": "pmap", "devices": 8}))
    checkpoints = Checkpointer(run, read_only=True)
    _, state, _ = checkpoints.restore(eight.abstract_state(task))
    checkpoints.close()
    assert same(state, states[6])
    assert len(state.params["g"]["Conv_0"]["kernel"].sharding.device_set) == 8
    assert checksums(state) == checksums(states[6])


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")], ids=["cut", "flip", "gone", "empty"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(run, devices, task, states, capsys, damage, recorded):
    damage(arrays(run, 6))
    if not recorded:  # as after a kill between commit and record
        (run / "checkpoints.json").unlink()
    checkpoints = Checkpointer(run)
    step, state, _ = checkpoints.restore(devices.abstract_state(task))
    assert step == 4 and same(state, states[4])
    message = capsys.readouterr().err
    assert "checkpoint 6" in message and "going back to step 4" in message
    if damage is flip:  # Orbax alone would have taken it
        assert "checksum of extra['large'] differs" in message
    # The damaged one is out of the way, so that its step can be saved again.
    assert saved_steps(run) == [2, 4] and (run / "checkpoints_damaged" / "6").is_dir()
    checkpoints.save(6, states[6], {})
    checkpoints.close()
    reader = Checkpointer(run, read_only=True)
    step, state, _ = reader.restore(devices.abstract_state(task))
    reader.close()
    assert step == 6 and same(state, states[6])


def test_when_none_is_whole_each_reason_is_given_and_nothing_moved(run, devices, task):
    for step in (2, 4, 6):
        cut(arrays(run, step))
    checkpoints = Checkpointer(run)
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be restored \(step 6: .* bytes instead of .*step 4: .*step 2: "):
        checkpoints.restore(devices.abstract_state(task))
    checkpoints.close()
    assert saved_steps(run) == [2, 4, 6]


def test_reading_tools_move_nothing(run, task, states, capsys):
    flip(arrays(run, 6))
    before = sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))
    config, restored, state = restore_run(run, task_factory=Weighty)
    assert same(state, states[4]) and "going back to step 4" in capsys.readouterr().err
    assert config.batch_size == task.config.batch_size and isinstance(restored, Weighty)
    assert sorted(path.relative_to(run).as_posix() for path in run.rglob("*")) == before


def test_a_step_can_be_asked_for(run, states):
    assert same(restore_run(run, 2, task_factory=Weighty)[2], states[2])
    with pytest.raises(CheckpointError, match=r"no step 3; it has 6, 4, 2"):
        restore_run(run, 3, task_factory=Weighty)


def test_no_run_and_no_checkpoint_yet_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="is no run folder"):
        restore_run(tmp_path)
    save_json(hard_config(), tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        restore_run(tmp_path)


def test_the_half_written_checkpoint_of_a_killed_process_does_not_count(run, devices, task):
    half = run / "checkpoints" / "8.orbax-checkpoint-tmp"
    half.mkdir()
    assert saved_steps(run) == [2, 4, 6]
    checkpoints = Checkpointer(run)
    assert checkpoints.restore(devices.abstract_state(task))[0] == 6
    checkpoints.close()
    assert not half.exists()


def test_another_model_is_no_match(run, devices):
    class Wider(Weighty):
        def init(self, rng):
            state = super().init(rng)
            return state.replace(extra={**state.extra, "more": np.float32(0)})

    checkpoints = Checkpointer(run, read_only=True)
    with pytest.raises(CheckpointError, match="can be restored"):
        checkpoints.restore(devices.abstract_state(Wider(hard_config())))
    checkpoints.close()
