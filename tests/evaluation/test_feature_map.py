"""Maps of features: components against scikit-learn, what is refused, and the picture."""

import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from wavepath.cli import main
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.feature_map import draw_feature_map, feature_map, pca, write_feature_map


@pytest.mark.parametrize("shape", [(40, 8), (10, 30)])
def test_components_are_scikit_learns(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1) + 3
    model = PCA(2)
    want = model.fit_transform(StandardScaler().fit_transform(x))
    points, explained = pca(x.astype(np.float32))
    np.testing.assert_allclose(abs(points), abs(want), atol=1e-4)
    np.testing.assert_allclose(explained, model.explained_variance_ratio_, atol=1e-6)
    np.testing.assert_array_equal(points, feature_map(x.astype(np.float32)))
    assert points.dtype == np.float32 and points.shape == (shape[0], 2)


def test_scale_and_columns_without_variance_do_not_matter():
    x = np.random.default_rng(0).normal(size=(30, 5))
    still = np.column_stack([1e-3 * x, np.full(30, 0.1)])
    still[:, -1] += 1e-12 * np.arange(30)
    np.testing.assert_allclose(abs(feature_map(still)), abs(feature_map(x)), atol=1e-4)


def test_small_and_flat_sets():
    assert (feature_map(np.ones((5, 3))) == 0).all() and feature_map(np.ones((1, 3))).shape == (1, 2)
    one = feature_map(np.arange(4.0)[:, None])
    assert (one[:, 1] == 0).all() and (abs(np.diff(one[:, 0])) > 0.5).all()
    points, explained = pca(np.arange(8.0).reshape(2, 4))
    assert explained[0] == pytest.approx(1) and abs(points[0, 0] - points[1, 0]) > 1


def test_what_is_refused(monkeypatch, capsys):
    x = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.raises(ConfigError, match="pca or umap, not 'tsne'"):
        feature_map(x, "tsne")
    x[2, 1] = np.nan
    with pytest.raises(DatasetError, match="1 of 6 feature vectors"):
        feature_map(x)
    monkeypatch.setitem(sys.modules, "umap", None)
    assert main(["evaluate", "--features", "f", "--labels", "l", "--out", "o", "--map", "umap"]) == 1
    assert "pip install umap-learn" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="pip install umap-learn"):
        feature_map(x, "umap")


def _shown(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # Points let a quarter of the white beneath through.
    return lambda colour: int((abs(pixels - (0.75 * np.array(colour) + 64)).max(-1) < 12).sum())


def test_the_picture(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(["LUAD", "LUSC"], 60)
    x = rng.normal(size=(120, 6)) + 4.0 * (labels == "LUSC")[:, None]
    write_feature_map(tmp_path / "map.png", x, labels, "features")
    blue, red, green = (0, 114, 178), (213, 94, 0), (0, 158, 115)
    count = _shown(tmp_path / "map.png")
    assert count(blue) > 1500 and count(red) > 1500 and count(green) == 0
    # Of more points than are drawn, fewer and smaller ones; the legend has its own.
    write_feature_map(tmp_path / "few.png", x, labels, "features", most=10)
    assert _shown(tmp_path / "few.png")(blue) < count(blue)
    draw_feature_map(tmp_path / "umap.png", x[:, :2], labels.tolist())
    many = [f"class {index}" for index in range(12)] * 10
    draw_feature_map(tmp_path / "many.png", x[:, :2], many, explained=(0.5, 0.25))
    sizes = {name: Image.open(tmp_path / f"{name}.png").size for name in ("map", "umap", "many")}
    assert sizes["map"] == sizes["umap"] and sizes["many"][1] > sizes["map"][1]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
def test_umap_separates_what_is_apart():
    pytest.importorskip("umap", reason="pip install umap-learn")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6))
    x[:20] += 20 * np.eye(6)[0]
    x[20:] += 20 * np.eye(6)[1]
    points = feature_map(x, "umap", seed=1)
    assert points.shape == (40, 2) and np.isfinite(points).all()
    gap = np.linalg.norm(points[:20].mean(0) - points[20:].mean(0))
    assert gap > 3 * max(points[:20].std(0).max(), points[20:].std(0).max())
    with pytest.raises(DatasetError, match="at least 4"):
        feature_map(x[:3], "umap")
