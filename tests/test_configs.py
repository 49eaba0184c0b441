"""Every config file builds with each of its arguments, and says in its docstring how it is used."""

import ast
import re
from pathlib import Path

import pytest

from wavepath.config import flatten, load_config
from wavepath.defaults import prepare_defaults, train_defaults

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))


def arguments(path) -> list[str]:
    """Every boolean argument of a config file, alone, and every spec that its docstring shows."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_arg"]
    booleans = [word.arg for call in calls for word in call.keywords if isinstance(getattr(word.value, "value", None), bool)]
    shown = re.findall(rf"{path.stem}\.py:([\w=,.]+)", ast.get_docstring(tree) or "")
    return list(dict.fromkeys(["", "smoke", *booleans, *shown]))


@pytest.mark.parametrize("spec", [f"configs/{path.name}:{arg}" for path in FILES for arg in arguments(path)])
def test_config_builds(spec):
    config = load_config(spec)
    assert config.is_locked
    known = set(flatten(train_defaults())) | set(flatten(prepare_defaults()))
    assert not set(flatten(config)) - known, "fields belong into wavepath/defaults.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstring_shows_the_command(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text and "wavepath " in text and ":smoke" in text, "the docstring shows the command, and its smoke form"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_smoke_is_small(path):
    config = load_config(f"{path}:smoke")
    if "train" in config:
        assert 0 < config.train.steps <= 50 and config.batch_size <= 32 and config.model.image_size <= 64
        assert not config.train.epochs and not config.data.dir
        assert config.batch_size % 8 == 0, "the smoke run is also run on 8 devices"


def test_variants_of_wise_mae():
    small, large = load_config("wise_mae:variant=S"), load_config("wise_mae:variant=L")
    assert (small.model.decoder_width, large.model.decoder_width) == (256, 512)
    assert load_config("wise_mae:contrast").loss.contrast_weight > 0 == load_config("wise_mae").loss.contrast_weight
