"""The embedded default: phantoms made and prepared where no data are given, once."""

import pytest

from wavepath.config import load_config
from wavepath.data import records
from wavepath.data.default import ensure_phantom_data, ensure_phantom_tiles
from wavepath.data.pyramid_source import open_pyramids
from wavepath.data.sources import open_source


def test_the_embedded_default(tmp_path):
    config = load_config("configs/wise_mae.py:smoke")
    folder = ensure_phantom_tiles(config, tmp_path)
    shards = records.TileShards(folder)
    assert folder == tmp_path / "phantom" / "tiles" and len(shards) >= 16 and shards.image_shape == (64, 64, 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "phantom/slides").iterdir()}
    ensure_phantom_tiles(config, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_the_embedded_default_of_super_resolution(tmp_path):
    config = load_config("configs/cwt_net.py:smoke,scale=8", ["superres.lr_source=pyramid"])
    given = ensure_phantom_data(config, tmp_path)
    assert given.is_locked and given.data.dir == str(tmp_path / "phantom" / "pyramids") and not given.data.labels
    train, test = open_source(given), open_pyramids(given, "test")
    assert len(train) >= 16 and len(test) >= 8 and len(set(train.slides)) == 2 and len(test.slides) == 1
    assert train.columns([0])["lr"].shape[1] * 8 == train.columns([0])["hr"].shape[1]
