"""Windows of stained pairs: both sides at one place, whole pairs, labels and shifts; opened from a config; the embedded default."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_pairs import SHIFTS, given, settings, write_pair

from wavepath.data import pipeline
from wavepath.data.default import ensure_phantom_data
from wavepath.data.pair_source import PairSource, open_pairs
from wavepath.data.pairs import make_pairs
from wavepath.data.sources import open_source
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, out = tmp_path_factory.mktemp("stained"), tmp_path_factory.mktemp("out") / "pairs"
    for seed, (name, (dx, dy)) in enumerate(SHIFTS.items()):
        write_pair(root, name, seed, dx, dy, size=160 if name != "s3_a" else 130)
    make_pairs(given(root), root, out, settings(on_shift="correct"), mpp=0.5)
    return out


def config_of(folder, **stain) -> ConfigDict:
    config = train_defaults()
    config.task = "stain"
    config.data.dir = str(folder)
    config.stain.update(stain)
    return config


def test_windows_are_parts_of_whole_pairs(folder):
    source = PairSource(folder, "all", window=64, stride=40)
    assert source.column_names == ("he", "ihc") and source.kind == "pairs" and len(source.samples) == 4 and source.best_order == "global"
    columns = source.columns(np.arange(len(source)))
    seen = [np.zeros(source.whole(number)["he"].shape[:2], bool) for number in range(4)]
    for index in range(len(source)):
        meta = source.meta(index)
        top, left = map(int, meta["name"].split("_")[-2:])
        seen[meta["region"]][top : top + 64, left : left + 64] = True
        for side in ("he", "ihc"):
            whole = source.whole(meta["region"])[side]
            assert columns[side].dtype == np.uint8 and np.array_equal(columns[side][index], whole[top : top + 64, left : left + 64])
    assert all(part.all() for part in seen) and source.mpps == (0.5,)
    facts = {sample["name"]: sample for sample in source.samples}
    assert (facts["s1_b"]["dx"], facts["s1_b"]["dy"]) == (5, -3) and (facts["s2_a"]["dx"], facts["s2_a"]["width"]) == (0, 136)
    assert np.array_equal(source.images([3]), columns["he"][[3]]) and "4 pairs" in source.describe()


def test_bounded_memory(folder):
    pair = 2 * 3 * 160 * 160
    source = PairSource(folder, "all", window=64, cache_mb=1.5 * pair / (1 << 20))
    assert source.best_order == "blocks"
    for number in (0, 1, 2, 3, 0):
        source.whole(number)
        assert source._held <= 1.5 * pair and sum(image.nbytes for each in source._cache.values() for image in each.values()) == source._held


def test_opened_from_a_config(folder):
    config = config_of(folder, crop=48, margin=16)
    train, test = open_source(config), open_pairs(config, "test")
    assert train.image_shape == (64, 64, 3) and not set(train.slides) & set(test.slides) and len(train) and len(test)
    batch = next(iter(pipeline.batches(train, batch_size=3, seed=0)))
    assert batch["he"].shape == batch["ihc"].shape == (3, 64, 64, 3) and "example_id" in batch
    config.task = "stain_encoders"
    config.data.max_tiles = 2
    assert len(open_source(config)) == 2


def test_refused(folder, tmp_path):
    with pytest.raises(DatasetError, match="every sample .*less than 200 px.*stain.crop"):
        open_source(config_of(folder, crop=200, margin=0))
    with pytest.raises(DatasetError, match="there are none in it"):
        open_pairs(config_of(tmp_path))
    with pytest.raises(ConfigError, match="wavepath pairs"):
        open_pairs(config_of(""))
    with pytest.raises(ConfigError, match="split"):
        PairSource(folder, "val")
    config = config_of(folder)
    config.task = "mae"
    with pytest.raises(DatasetError, match="holds stained pairs"):
        open_source(config)
    (tmp_path / "out.txt").write_text("nothing\n")
    config = config_of(folder, crop=48)
    config.data.exclude_slides = str(tmp_path / "out.txt")
    with pytest.raises(DatasetError, match="names none"):
        open_source(config)


def test_a_damaged_pair_is_named(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "pairs")
    path = next((tmp_path / "pairs").glob("pairs-test*"))
    data = bytearray(path.read_bytes())
    at = data.find(b"\x89PNG")
    data[at + 1000] ^= 255
    path.write_bytes(bytes(data))
    source = PairSource(tmp_path / "pairs", "test", window=64)
    with pytest.raises(DatasetError, match="wavepath pairs"):
        source.whole(0)


@pytest.mark.slow
def test_the_embedded_default(tmp_path):
    config = config_of("", crop=32, margin=8)
    made = ensure_phantom_data(config, tmp_path)
    assert made.data.dir == str(tmp_path / "phantom" / "pairs")
    train, test = open_source(made), open_pairs(made, "test")
    assert len(set(train.slides)) == 2 and len(set(test.slides)) == 1 and len(train) >= 16 and all(sample["label"] == "" for sample in test.samples)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "phantom/stained/HE").iterdir()}
    ensure_phantom_data(config, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}
