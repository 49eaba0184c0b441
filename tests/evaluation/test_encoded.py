"""Several encoders on the same tiles: their names, their order, and what is refused."""

import numpy as np
import pytest

from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.encoded import aligned, file_name, named_folders
from wavepath.evaluation.labels import Labelled


def labelled(tiles, values=None, labels=None, groups=None):
    names = [name.split("/") for name in tiles]
    columns = (labels or [tile[0] for _, tile in names], groups or [slide for slide, _ in names], *zip(*names, strict=True))
    return Labelled(np.asarray(values or range(len(tiles)), float)[:, None], *(np.array(column, str) for column in columns), 0, "names")


def test_folders_are_named_by_the_user_or_by_their_last_part(tmp_path):
    assert named_folders([f"ours={tmp_path}", "b/c"]) == {"ours": tmp_path, "c": tmp_path.__class__("b/c")}
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_folders([str(odd)]) == {"a=b": odd}, "a folder that is there is no name"
    assert named_folders([f"of 2={odd}"]) == {"of 2": odd}
    with pytest.raises(ConfigError, match="two encoders are called 'x'.*--features ours=a/x"):
        named_folders(["a/x", "b/x"])
    with pytest.raises(ConfigError, match="'of 2' and 'of_2' would write to the same files"):
        named_folders(["of 2=a", "of_2=b"])
    assert file_name("ours, k-NN µ") == "ours_k-NN_"


def test_rows_follow_the_first_encoder():
    first = labelled(["s/a1", "s/b1", "t/a2"], [1, 2, 3])
    second = labelled(["t/a2", "s/a1", "s/b1"], [30, 10, 20])
    found = aligned({"x": first, "y": second})
    np.testing.assert_array_equal(found["y"].features[:, 0], [10, 20, 30])
    np.testing.assert_array_equal(found["y"].tiles, found["x"].tiles)
    assert found["x"] is first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (labelled(["s/a1", "s/b1"]), r"'x' and 'y' have other tiles \(1 only in the first, 0 only in the other, such as t a2\)"),
        (labelled(["s/a1", "s/b1", "t/a2", "t/b3"]), "0 only in the first, 1 only in the other, such as t b3"),
        (labelled(["s/a1", "s/b1", "t/a2", "t/a2"]), "have other tiles .0 only in the first, 0 only in the other, 3 and 4"),
        (labelled(["s/a1", "s/b1", "t/a2"], labels=["a", "b", "c"]), "the labels or cases of 'y' are not those of 'x'"),
        (labelled(["t/a2", "s/a1", "s/b1"], groups=["t", "s", "u"]), "the labels or cases of 'y' are not those of 'x'"),
    ],
)
def test_other_tiles_labels_or_cases_are_refused(other, message):
    with pytest.raises(DatasetError, match=message):
        aligned({"x": labelled(["s/a1", "s/b1", "t/a2"]), "y": other})


def test_tiles_without_coordinates_are_compared_in_their_order():
    same = labelled(["s/s_0_0", "s/s_0_0"], [1, 2])
    assert aligned({"x": same, "y": labelled(["s/s_0_0", "s/s_0_0"], [5, 6])})["y"].features[:, 0].tolist() == [5, 6]
