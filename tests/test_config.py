"""Config files, typed arguments, overrides: right values in, one-line errors with the nearest name out."""

import sys

import pytest
from ml_collections import ConfigDict

from wavepath import config as wp
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError

CONFIG = '''
from ml_collections import ConfigDict
from wavepath.config import parse_arg

def get_config(arg=""):
    arg = parse_arg(arg, variant="B", depth=2, smoke=False, choices={"variant": ("S", "B")})
    return ConfigDict(dict(lr=1e-3, steps=10, name="x", flag=False, size=(1.0, 2.0), note=None, variant=arg.variant,
                           train=dict(steps=arg.depth, epochs=0.5, smoke=arg.smoke), model=dict(width=64)))
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def error(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parse_arg_types():
    text = "variant=L, smoke ,rate=1e-3,depth=4,flag=false,size=(3,4)"
    arg = wp.parse_arg(text, variant="B", smoke=False, rate=1.0, depth=1, flag=True, size=(1, 2))
    assert vars(arg) == dict(variant="L", smoke=True, rate=1e-3, depth=4, flag=False, size=(3, 4))
    assert vars(wp.parse_arg("", a=1)) == vars(wp.parse_arg(None, a=1)) == {"a": 1}


@pytest.mark.parametrize(("text", "part"), [
    ("smok", "did you mean smoke?"), ("smoke=yes", "true or false"), ("depth=2.5", "whole number"), ("variant", "needs a value"),
    ("smoke,smoke", "twice"), ("rate=fast", "is a number"), ("size=(1,2", "not closed"), ("variant=Q", "S, B"), ("zzz=1", "variant, smoke"),
])
def test_parse_arg_errors(text, part):
    assert part in error(wp.parse_arg, text, variant="B", smoke=False, depth=1, rate=1.0, size=(1, 2), choices={"variant": ("S", "B")})


def test_split_list():
    assert wp.split_list("1,(2,3),'a,b',[4,{5,6}]") == ["1", "(2,3)", "'a,b'", "[4,{5,6}]"]
    assert wp.split_list("") == [""]


def test_load_with_argument_and_overrides(config_file):
    config = wp.load_config(f"{config_file}:variant=S,smoke", ["lr=1", "config.train.steps=2e2", "name=7", "flag=TRUE", "size=0.5,3", "note=[1]"])
    assert (config.variant, config.train.smoke) == ("S", True)
    assert config.lr == 1.0 and isinstance(config.lr, float)
    assert config.train.steps == 200 and isinstance(config.train.steps, int)
    assert (config.name, config.flag, config.size, config.note) == ("7", True, (0.5, 3.0), [1])
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.train.stepz = 1


@pytest.mark.parametrize(("override", "part"), [
    ("trian.steps=2", "did you mean config.train.steps"), ("width=2", "config.model.width"), ("config.stesp=2", "config.steps"),
    ("steps=1.5", "whole number"), ("flag=2", "true or false"), ("train=3", "is a group"), ("train.steps.x=3", "no field"), ("lr", "needs a value"),
    ("size=a,b", "size[0]"), ("train.epochs=half", "a number"),
])
def test_override_errors(config_file, override, part):
    assert part in error(wp.load_config, str(config_file), [override])


def test_the_last_override_counts(config_file):
    assert wp.load_config(str(config_file), ["lr=1", "lr=2"]).lr == 2.0


@pytest.mark.parametrize("spec", ["configs/wise_mae.py:smoke", "wise_mae:smoke", "wise_mae.py:smoke", "configs/wise_mae:smoke"])
def test_named_configs_are_found_from_anywhere(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert wp.load_config(spec).model.image_size == 64


def test_missing_file_proposes_the_nearest(config_file):
    assert "configs/wise_mae.py?" in error(wp.load_config, "configs/wise_ma.py:smoke")
    assert "tiny.py?" in error(wp.load_config, str(config_file.with_name("tinny.py")))
    assert "wise_mae" in error(wp.load_config, "qqqqqqq")  # nothing near: the list
    assert "needs a file" in error(wp.load_config, ":smoke")


def test_defects_of_a_config_file_name_its_line(tmp_path):
    def write(text):
        path = tmp_path / "bad.py"
        path.write_text(text)
        return str(path)

    assert "bad.py:2: KeyError: 'q'" in error(wp.load_config, write("def get_config(arg=''):\n    return {}['q']\n"))
    assert "bad.py:1" in error(wp.load_config, write("def get_config(:\n"))
    assert "no get_config" in error(wp.load_config, write("x = 1\n"))
    assert "returns a dict" in error(wp.load_config, write("def get_config(arg=''):\n    return {}\n"))


def test_loading_leaves_nothing_behind(config_file):
    (config_file.parent / "neighbour.py").write_text(
        "from dataclasses import dataclass\nfrom tiny import get_config as base\n\n@dataclass\nclass A:\n    x: int = 1\n\n"
        "def get_config(arg=''):\n    config = base(arg)\n    config.steps = A().x\n    return config\n"
    )
    modules, path = set(sys.modules), list(sys.path)
    assert wp.load_config(str(config_file.parent / "neighbour.py")).steps == 1
    assert set(sys.modules) == modules and sys.path == path
    assert not (config_file.parent / "__pycache__").exists()


def test_json_round_trip(config_file, tmp_path):
    config = wp.load_config(str(config_file))
    wp.save_json(config, tmp_path / "run" / "config.json")
    back = wp.load_json(tmp_path / "run" / "config.json")
    assert back == config and back.is_locked and back.size == (1.0, 2.0) and isinstance(back.size, tuple)
    assert wp.diff(config, back) == {}
    assert "no saved config" in error(wp.load_json, tmp_path / "config.json")


def test_diff_and_flatten(config_file):
    a, b = wp.load_config(str(config_file)), wp.load_config(str(config_file), ["train.steps=7", "lr=2"])
    assert wp.diff(a, b) == {"lr": (1e-3, 2.0), "train.steps": (2, 7)}
    assert wp.diff(ConfigDict({"x": 1}), ConfigDict({"y": 2})) == {"x": (1, None), "y": (None, 2)}
    assert wp.flatten(a)["train.epochs"] == 0.5


def test_a_config_of_an_older_version_gets_the_newer_fields(tmp_path):
    defaults = train_defaults()
    old = train_defaults()
    del old["loss"]["second"], old["loss"]["mse"], old["ema"]
    old.lr = 0.125
    wp.save_json(old, tmp_path / "config.json")
    whole = wp.complete(wp.load_json(tmp_path / "config.json"), defaults)
    assert wp.diff(whole, defaults) == {"lr": (0.125, defaults.lr)} and whole.is_locked
