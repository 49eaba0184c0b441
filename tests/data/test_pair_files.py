"""Which pictures belong together: folders, halves, tables, patterns, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from wavepath.data.pair_files import PairFiles, from_ab, from_csv, from_folders, read_pair, with_patterns
from wavepath.errors import ConfigError, DatasetError


def save(path, value=0, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)
    return path


def test_folders(tmp_path, capsys):
    for name in ("a.png", "deep/b.png", "lonely.png"):
        save(tmp_path / "HE" / name)
    for name in ("a.tif", "deep/b.png", "other.png"):
        save(tmp_path / "IHC" / name, 9)
    pairs = from_folders(tmp_path)
    assert [(pair.name, pair.he.suffix, pair.ihc.suffix, pair.slide) for pair in pairs] == [
        ("a", ".png", ".tif", "a"), ("deep/b", ".png", ".png", "deep/b"),
    ]
    said = capsys.readouterr().err
    assert "lonely" in said and "other" in said
    he, ihc = read_pair(pairs[0])
    assert he.shape == (40, 48, 3) and not he.any() and (ihc == 9).all()
    save(tmp_path / "HE/a.tif")
    with pytest.raises(DatasetError, match="suffix alone"):
        from_folders(tmp_path)
    with pytest.raises(DatasetError, match="no folder .*HE"):
        from_folders(tmp_path / "HE")
    save(tmp_path / "x/HE/1.png"), save(tmp_path / "x/IHC/2.png")
    with pytest.raises(DatasetError, match="has the name of one"):
        from_folders(tmp_path / "x")


def test_halves(tmp_path):
    both = np.zeros((30, 64, 3), np.uint8)
    both[:, 32:] = 200
    Image.fromarray(both).save(tmp_path / "1.png")
    Image.fromarray(both[:, :63]).save(tmp_path / "2.png")
    first, second = from_ab(tmp_path)
    he, ihc = read_pair(first)
    assert he.shape == ihc.shape == (30, 32, 3) and not he.any() and (ihc == 200).all()
    with pytest.raises(ValueError, match="63 px wide"):
        read_pair(second)
    with pytest.raises(DatasetError, match="no folder"):
        from_ab(tmp_path / "none")


def test_table(tmp_path):
    save(tmp_path / "x/he 1.png"), save(tmp_path / "x/ihc.png", size=(48, 41))
    table = tmp_path / "pairs.csv"
    table.write_text("he,ihc,slide,label,split\nx/he 1.png,x/ihc.png,S1,2+,train\n../y/b.png,z.png,,,test\n", encoding="utf-8")
    first, second = from_csv(table)
    assert (first.name, first.slide, first.label, first.split) == ("x/he 1", "S1", "2+", "train")
    assert second.name == second.slide == "y/b", "a name leads nowhere out of the folder that it is used in"
    with pytest.raises(ValueError, match="48 x 40 px, IHC 48 x 41"):
        read_pair(first)
    with pytest.raises(ValueError, match="b.png cannot be read: No such file"):
        read_pair(second)
    for text, message in (
        ("he,ihc\na,b\na,c\n", "line 3: a is in line 2"), ("he,ihc\na,\n", "line 2"), ("he\na\n", "'ihc'"), ("he,ihc,colour\na,b,c\n", "'colour'"),
        ("he,ihc,split\na,b,val\n", "'val'"), ("he,ihc\n", "lists no pairs"),
    ):
        table.write_text(text)
        with pytest.raises(DatasetError, match=message):
            from_csv(table)
    with pytest.raises(DatasetError, match="cannot read"):
        from_csv(tmp_path / "none.csv")


def test_patterns(tmp_path):
    pairs = [PairFiles(name, tmp_path, None, name) for name in ("00001_train_3+", "00002_test_0")]
    found = with_patterns(pairs, label="_([0-3][+]?)$", split="_(train|test)_", group="^0*([1-9])")
    assert [(pair.slide, pair.label, pair.split) for pair in found] == [("1", "3+", "train"), ("2", "0", "test")]
    for patterns, message in (
        (dict(group="^(x)"), "finds nothing"), (dict(group="("), "no regular expression"), (dict(group="^0"), "no group"),
        (dict(split="_(tr|te)"), "finds 'tr'"), (dict(label="(zzz)"), "finds nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_patterns(pairs, **patterns)
