"""The embedded default: phantoms made and prepared where no data are given, once."""

from wavepath.config import load_config
from wavepath.data import records
from wavepath.data.default import ensure_phantom_tiles


def test_the_embedded_default(tmp_path):
    config = load_config("configs/wise_mae.py:smoke")
    folder = ensure_phantom_tiles(config, tmp_path)
    shards = records.TileShards(folder)
    assert folder == tmp_path / "phantom" / "tiles" and len(shards) >= 16 and shards.image_shape == (64, 64, 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "phantom/slides").iterdir()}
    ensure_phantom_tiles(config, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}
