"""What the command line asks for: combinations of configs and sweeps."""

import pytest

from wavepath.errors import ConfigError
from wavepath.planning.wishes import Wish, axis, wishes


def test_one():
    assert wishes(["configs/wise_mae.py:variant=L"], ["lr=1"], "v5e:4x4", "pmap", 256, []) == [
        Wish("configs/wise_mae.py:variant=L", ("lr=1",), "v5e:4x4", "pmap", 256, "wise_mae:variant=L")
    ]


def test_all_combinations_the_last_fastest():
    found = wishes(["a.py:x=1", "b.py"], [], "", "", 0, ["topology=cpu:2,cpu:4", "batch=8,16"])
    assert [(wish.spec, wish.topology, wish.batch) for wish in found] == [
        (spec, topology, batch) for spec in ("a.py:x=1", "b.py") for topology in ("cpu:2", "cpu:4") for batch in (8, 16)
    ]


def test_fields_and_arguments_of_the_config():
    found = wishes(["configs/wise_mae.py:smoke"], ["seed=1"], "cpu:2", "", 0, ["config.model.remat=none,full", "arg.variant=S,B", "backend=jit,pmap"])
    assert len(found) == 8 and found[-1] == Wish(
        "configs/wise_mae.py:smoke,variant=B", ("seed=1", "model.remat=full"), "cpu:2", "pmap", 0, "wise_mae:smoke,variant=B model.remat=full"
    )


def test_values_with_commas_stand_in_brackets():
    assert axis("config.augment.crop_scale=(0.2,1.0),(0.6,1.0)") == ("config.augment.crop_scale", ("(0.2,1.0)", "(0.6,1.0)"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["batch"], "takes a name and values"), (["batch="], "takes a name and values"), (["topology=cpu:2,,"], "takes a name and values"),
        (["topolgy=cpu:2"], "did you mean topology"), (["lr=1"], "choose from topology"), (["batch=8", "batch=9"], "a name twice"),
        (["batch=8,many"], "whole number of examples"),
    ],
)  # fmt: skip
def test_what_is_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        wishes(["a.py"], [], "cpu:2", "", 0, given)


def test_a_topology_is_needed():
    with pytest.raises(ConfigError, match="--topology v5e:4x4"):
        wishes(["a.py"], [], "", "", 0, ["batch=8"])
