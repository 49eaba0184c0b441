"""Which slides a network has learnt from."""

from types import SimpleNamespace

import pytest

from wavepath.config import load_config
from wavepath.tasks import lineage
from wavepath.tasks.base import build


def test_slides_are_ids_and_image_folders_whole_paths(tmp_path):
    (tmp_path / "tiles" / "tumour").mkdir(parents=True)
    assert lineage.slides_of(SimpleNamespace(slides=["b", "a", "b"], kind="prepared", name="x")) == ["a", "b"]
    source = SimpleNamespace(slides=["tumour", "tiles"], kind="images", name=str(tmp_path / "tiles"))
    assert lineage.slides_of(source) == [str(tmp_path / "tiles"), str(tmp_path / "tiles" / "tumour")], "the second lies in the folder itself"
    assert lineage.slides_of(object()) == []


@pytest.mark.parametrize(
    ("constants", "seen"),
    [
        ({}, None),
        ({"train_slides": []}, []),
        ({"train_slides": ["b", "a"]}, ["a", "b"]),
        ({"train_slides": ["b"], "init_from": {"run": "x", "train_slides": ["a", "b"]}}, ["a", "b"]),
        ({"train_slides": ["b"], "init_from": {"run": "x", "train_slides": None}}, None),
        ({"train_slides": ["b"], "init_from": {"run": "x"}}, None),
    ],
)
def test_all_that_came_before_counts(constants, seen):
    assert lineage.seen(constants) == seen


def test_pretraining_records_its_slides():
    task = build(load_config("configs/wise_mae.py:smoke", ["config.optim.warmup=0"]))
    assert task.measure(SimpleNamespace(slides=["b", "a"], kind="prepared", name="x")) == {"train_slides": ["a", "b"]}
