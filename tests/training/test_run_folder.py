"""Whether a command that is run again means the same run."""

import pytest
from hard_task import FakeSource, hard_config

from wavepath.config import save_json
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError
from wavepath.training.run_folder import RunFolder, identity_of


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_configs(hard_config(), hard_config(), identity_of(FakeSource()))
    return folder


def test_the_same_config_goes_on(run):
    assert run.check_given(hard_config()) == []
    assert RunFolder(run.folder / "new").check_given(hard_config()) == []


def test_fields_that_change_what_is_learnt_are_refused_by_name_and_value(run):
    with pytest.raises(ConfigError, match=r"config.augment.crop_scale was \(0.2, 1.0\), now \(0.5, 1.0\); config.lr was 0.05, now 0.1"):
        run.check_given(hard_config(lr=0.1, augment__crop_scale=(0.5, 1.0)))
    with pytest.raises(ConfigError, match=r"config.seed was 0, now 1; give the old values"):
        run.check_given(hard_config(seed=1, train__steps=99))


def test_how_long_how_often_and_where_may_change(run):
    changed = run.check_given(hard_config(99, train__log_every=7, parallel__backend="pmap", writers__wandb="p", profile="1:2", data__threads=9))
    assert "train.steps 6 -> 99" in changed and len(changed) == 6
    assert run.check_given(hard_config(data__dir="/moved/to")) == ["data.dir made -> /moved/to"]


def test_a_field_that_came_with_a_new_version_is_no_other_config(run):
    newer = hard_config().copy_and_resolve_references()
    with newer.unlocked():
        newer.loss.novel = 0.0
    assert run.check_given(newer) == ["loss.novel None -> 0.0"]


def test_a_newer_field_was_at_its_default_when_the_run_began(run):
    folder, config = run.folder, train_defaults()
    old = train_defaults()
    del old["loss"]["ssim"]
    save_json(old, folder / "given.json")
    assert run.check_given(config) == []
    config.loss.ssim = 1.0
    with pytest.raises(ConfigError, match="config.loss.ssim was 0.0, now 1.0"):
        run.check_given(config)


@pytest.mark.parametrize("step, start", [(50, 50), (49, 150)])
def test_a_longer_run_does_not_go_back_to_its_first_phase(run, step, start):
    resolved, longer = train_defaults(), train_defaults()
    for config, number in ((resolved, 50), (longer, 150)):
        with config.loss.second.ignore_type():
            config.loss.second.start = number
    save_json(resolved, run.folder / "config.json")
    run.keep_phase(longer, step)
    assert longer.loss.second.start == start
    plain = train_defaults()
    run.keep_phase(plain, step)
    assert plain.loss.second.start == ""


def test_other_data_behind_the_same_path_are_refused(run):
    run.check_source(identity_of(FakeSource()))
    with pytest.raises(ConfigError, match=r"other data \(examples were 40, now 41"):
        run.check_source(identity_of(FakeSource(41)))

    class Shifted(FakeSource):
        def meta(self, index):
            return {**super().meta(index), "x": index + 1}

    with pytest.raises(ConfigError, match="40 of 40 examples looked at come from other places"):
        run.check_source(identity_of(Shifted()))


def test_an_example_that_cannot_be_read_makes_no_other_data(run):
    class Holed(FakeSource):
        def meta(self, index):
            if index == 3:
                raise DatasetError("shard 0 is damaged")
            return super().meta(index)

    assert identity_of(Holed())["places"].count(None) == 1
    run.check_source(identity_of(Holed()))


def test_the_order_of_the_data_is_that_of_the_start(run):
    """What `auto` means may depend on memory; a resume with more of it goes on in the order it began with."""
    resolved = hard_config().copy_and_resolve_references()
    resolved.data.order = "blocks"
    run.write_configs(hard_config(), resolved, identity_of(FakeSource()))
    assert run.kept_order() == "blocks"
