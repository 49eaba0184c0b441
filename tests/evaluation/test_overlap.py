"""Slides that an encoder was pretrained on: found by id, by last part, through embed.json, its run and the runs before it; and left out."""

import numpy as np
import pytest

from wavepath.config import load_config
from wavepath.errors import DatasetError
from wavepath.evaluation.overlap import Overlap, overlap_results, pretraining_slides, split_overlap, start_slides, testable
from wavepath.files import write_json
from wavepath.interop.features import write_features

testable.__test__ = False  # not a test of pytest's


@pytest.fixture
def features(tmp_path):
    for name in ("x/S1", "S2"):
        write_features(tmp_path / "features" / f"{name}.h5", np.zeros((2, 3)), np.zeros((2, 2)), {"run": str(tmp_path / "run")})
    return tmp_path / "features"


@pytest.mark.parametrize(
    ("slides", "pretraining", "kept"),
    [
        (["a", "b", "c"], {"b"}, [0, 2]),
        (["a", "b", "a"], {"a"}, [1]),
        (["x/S1", "S2"], {"y/S1"}, [1]),  # one slide of that name on each side
        (["x/1", "y/1"], {"z/1"}, [0, 1]),  # which of the two?
        (["x/1"], {"z/1", "w/1"}, [0]),
        (["x/1", "y/1"], {"x/1", "z/1"}, [1]),
        (["S1.svs"], {"S1"}, []),
        (["TCGA-1.0d1f"], {"TCGA-1"}, [0]),  # no suffix of a slide
        (["/tiles/tumour"], {"/others/tumour"}, [0]),  # folders of images: by their whole path
        (["a", "b"], set(), [0, 1]),
    ],
)
def test_slides_are_the_same_by_id_or_by_a_last_part_of_their_own(slides, pretraining, kept):
    places, overlap = split_overlap(slides, pretraining)
    assert places.tolist() == kept
    lost = {slide for index, slide in enumerate(slides) if index not in kept}
    assert (overlap.count, overlap.of, set(overlap.names), overlap.known) == (len(lost), len(set(slides)), lost, True)


def test_what_is_not_known_is_said_and_leaves_nothing_out():
    places, overlap = split_overlap(["a", "b"], None)
    assert places.tolist() == [0, 1] and overlap == Overlap(0, 2, known=False)
    assert overlap.describe() == "unknown which of the 2 slides the encoder was pretrained on" and overlap.to_json()["count"] is None


def test_the_test_part_is_a_mask_and_an_empty_one_names_both_remedies():
    mask, overlap = testable(["a", "b", "a"], {"a"})
    assert mask.tolist() == [False, True, False] and overlap.describe() == "1 of 2 slides was pretrained on: not in the test"
    mask, overlap = testable(["a", "b", "a"], {"a", "b"}, keep=True)
    assert mask.all() and overlap.describe() == "2 of 2 slides were pretrained on: scored all the same" and overlap.to_json()["scored"]
    with pytest.raises(DatasetError, match=r"all 2 slides \(such as a\).*config.data.exclude_slides.*--keep-pretraining-slides"):
        testable(["a", "b", "a"], {"a", "b"})
    assert testable([], {"a"})[0].shape == (0,)


def test_notes_are_short_where_all_encoders_agree():
    both = overlap_results({"one": Overlap(1, 3, ("a",)), "two": Overlap(1, 3, ("a",))})
    assert both["notes"] == ["1 of 3 slides was pretrained on: not in the test"] and both["overlap"]["two"]["slides"] == ["a"]
    assert overlap_results({"one": Overlap(0, 3), "two": Overlap(0, 3, known=False)})["notes"] == [
        "two: unknown which of the 3 slides the encoder was pretrained on"
    ]
    assert overlap_results({"one": Overlap(0, 3)})["notes"] == []


def test_embed_json_goes_before_the_run_that_the_files_name(features, tmp_path):
    assert pretraining_slides(features) is None, "neither"
    write_json(tmp_path / "run" / "constants.json", {"train_slides": ["a"], "init_from": {"run": "pre", "train_slides": ["b"]}})
    assert pretraining_slides(features) == {"a", "b"}
    write_json(tmp_path / "run" / "constants.json", {"train_slides": ["a"], "init_from": {"run": "pre", "train_slides": None}})
    assert pretraining_slides(features) is None, "imported weights before it"
    write_json(features / "embed.json", {"train_slides": [], "run": str(tmp_path / "run")})
    assert pretraining_slides(features) == frozenset()
    write_json(features / "embed.json", {"train_slides": None})
    assert pretraining_slides(features) is None


def test_a_note_of_an_earlier_encoder_is_passed_over(features, tmp_path):
    """Embedding with another encoder was stopped before the note was written again."""
    for name in ("x/S1", "S2"):
        attributes = {"run": str(tmp_path / "run"), "parameters": "new"}
        write_features(features / f"{name}.h5", np.zeros((2, 3)), np.zeros((2, 2)), attributes)
    write_json(tmp_path / "run" / "constants.json", {"train_slides": ["S2"]})
    write_json(features / "embed.json", {"train_slides": ["x/S1"], "parameters": "old", "run": str(tmp_path / "other")})
    assert pretraining_slides(features) == {"S2"}
    write_json(features / "embed.json", {"train_slides": ["x/S1"], "parameters": "new", "run": str(tmp_path / "run")})
    assert pretraining_slides(features) == {"x/S1"}


def test_folders_of_images_are_known_by_their_path(features, tmp_path):
    seen = [str(tmp_path / "tiles" / "x" / "S1"), str(tmp_path / "elsewhere" / "S2"), "slide"]
    (tmp_path / "tiles" / "S2").mkdir(parents=True)
    write_json(features / "embed.json", {"train_slides": seen, "kind": "images", "source": str(tmp_path / "tiles")})
    assert pretraining_slides(features) == {"x/S1", "slide"}
    write_json(features / "embed.json", {"train_slides": seen, "kind": "prepared", "source": str(tmp_path / "tiles")})
    assert pretraining_slides(features) is None, "images may be tiles of any slide"
    write_json(features / "embed.json", {"train_slides": [str(tmp_path / "S2")], "kind": "images", "source": str(tmp_path / "S2")})
    assert pretraining_slides(features) == {"S2"}, "images in the folder itself"


def test_what_a_run_started_from():
    config = load_config("configs/finetune.py:smoke")
    assert start_slides(config, {}, False) == frozenset()
    config.init_from = "pre"
    assert start_slides(config, {}, False) is None
    constants = {"init_from": {"run": "pre", "train_slides": ["/tiles/a"]}}
    assert start_slides(config, constants, True) == {"/tiles/a"} and start_slides(config, constants, False) is None
