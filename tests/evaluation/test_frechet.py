"""The Frechet distance in closed form, and features of whole images and of windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.linalg import sqrtm

from wavepath import config as configs
from wavepath.defaults import train_defaults
from wavepath.errors import CheckpointError, ConfigError, DatasetError
from wavepath.evaluation.frechet import CONVENTIONS, WHOLE, Features, another_mpp, caveat, frechet, windows
from wavepath.models import inception
from wavepath.tasks.base import build
from wavepath.training.checkpoint import Checkpointer
from wavepath.training.run_folder import RunFolder


def by_definition(a, b):
    """As the formula has it, with a root of the product of the covariances."""
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real)


def of_statistics(mean, deviations, count=64):
    """Samples with exactly this mean and a diagonal covariance."""
    columns = np.linalg.qr(np.concatenate([np.ones((count, 1)), np.random.default_rng(0).normal(size=(count, len(deviations)))], 1))[0][:, 1:]
    return mean + columns * np.sqrt(count - 1) * deviations


def test_closed_forms():
    mean, deviations = np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 3.0])
    one = of_statistics(mean, deviations)
    np.testing.assert_allclose(np.cov(one, rowvar=False), np.diag(deviations**2), atol=1e-12)
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)
    assert frechet(one, one[::-1] + [3.0, 0.0, 4.0]) == pytest.approx(25, rel=1e-12)
    wide = np.array([2.0, 1.0, 1.0])
    assert frechet(one, of_statistics(mean + 1, wide)) == pytest.approx(3 + np.square(deviations - wide).sum(), rel=1e-12)


@pytest.mark.parametrize("n, m", [(40, 60), (7, 60), (5, 4), (2, 2)])
def test_equal_to_the_definition_and_symmetric_whatever_the_number_of_samples(n, m):
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(12, 12))
    a, b = rng.normal(size=(n, 12)) @ mix, 2 * rng.normal(size=(m, 12)) + 1
    # Roots of singular matrices are good to half the digits; ours takes none.
    assert frechet(a, b) == pytest.approx(by_definition(a, b), rel=1e-9 if min(n, m) > 12 else 1e-5)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    # Turned, both of them, they are as far apart.
    turn = np.linalg.qr(mix)[0]
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-10)


def test_too_few_samples_are_said_or_refused():
    assert "64 samples of 64 features" in caveat(64, 64) and not caveat(65, 64)
    for a, b, words in (((1, 3), (5, 3), "1 and 5 samples"), ((5, 3), (5, 4), "do not compare"), ((5,), (5,), "do not compare")):
        with pytest.raises(DatasetError, match=words):
            frechet(np.zeros(a), np.zeros(b))
    with pytest.raises(DatasetError, match="not finite"):
        frechet(np.full((3, 2), np.nan), np.zeros((3, 2)))
    assert set(CONVENTIONS) == {"frechet", "inception", "run"}


def test_windows_lie_side_by_side_about_the_middle():
    image = np.arange(10 * 9 * 3, dtype=np.uint16).astype(np.uint8).reshape(10, 9, 3)
    found = windows([image, image[:3]], 4)
    assert [part.shape for part in found] == [(4, 4, 3)] * 4 + [(3, 4, 3)] * 2
    np.testing.assert_array_equal(found[0], image[1:5, :4])
    np.testing.assert_array_equal(found[3], image[5:9, 4:8])


def test_features_come_in_the_order_of_the_images_in_few_sizes_of_batch():
    sizes = []

    def encode(images):
        sizes.append(images.shape[:3])
        return images.reshape(len(images), -1, 3).mean(1)

    features = Features("mean", "mean colours", 3, WHOLE, encode, multiple=4, least=8)
    images = [np.full((8 + 8 * (number % 2), 11, 3), number, np.uint8) for number in range(19)]
    np.testing.assert_array_equal(features(images), np.arange(19.0)[:, None].repeat(3, 1))
    assert sizes == [(8, 8, 8), (2, 8, 8), (8, 16, 8), (1, 16, 8)]
    cut = Features("mean", "mean colours", 3, 8, encode, multiple=4, least=8)
    assert cut(images).shape == (9 * 2 + 10, 3) and cut.about == "mean colours, windows of 8 px"
    with pytest.raises(DatasetError, match="11 x 6 px is too small for the features of mean: they need 8 px"):
        features([images[0][:6]])
    for patches in (4, 10, "quarters"):
        with pytest.raises(ConfigError, match="neither 'whole' nor a side in px that mean takes .at least 8 and divisible by 4"):
            Features("mean", "", 3, patches, encode, multiple=4, least=8)


def test_another_resolution_than_that_of_the_training_is_said():
    features = Features("mae", "", 3, WHOLE, lambda images: images)
    assert not another_mpp(features, [0.5, 1.0]), "not known"
    features.mpp = 0.5
    assert not another_mpp(features, [0.5, 0.41, 0.62, None])
    assert "trained at 0.5 um per px, and 2 images have others (first: 0.25)" in another_mpp(features, [0.5, 0.25, 1.0])


def test_weights_that_do_not_fit_are_named(tmp_path):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in inception.parameters().items()}
    del arrays["Mixed_6a.branch3x3.bn.bias"]
    arrays["Mixed_7c.branch1x1.conv.weight"] = np.zeros((320, 1280, 1, 1), np.float32)
    save_file(arrays, tmp_path / "weights.safetensors")
    wrong = r"Mixed_6a.branch3x3.bn.bias is missing; Mixed_7c.branch1x1.conv.weight is \(320, 1280, 1, 1\) instead of \(320, 2048, 1, 1\)"
    with pytest.raises(DatasetError, match=wrong):
        Features.inception(tmp_path / "weights.safetensors")
    with pytest.raises(DatasetError, match="--inception takes"):
        Features.inception(tmp_path / "none.npz")


def test_inception_is_given_squares_of_299_px_between_minus_1_and_1(tmp_path, monkeypatch):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in inception.parameters().items()} | {"fc.bias": np.zeros(1008, np.float32)}
    save_file(arrays, tmp_path / "weights.safetensors")

    def trunk(weights, x):
        assert x.shape[1:] == (299, 299, 3) and set(weights) == set(inception.parameters())
        return jnp.tile(x.mean((1, 2)), 683)[:, :2048]

    monkeypatch.setattr(inception, "trunk", trunk)  # the true one is held against torch in its own tests
    features = Features.inception(tmp_path / "weights.safetensors")
    assert (features.name, features.dim, features.about) == ("inception", 2048, "InceptionV3 (of pytorch_fid), whole images")
    found = features([np.full(shape, grey, np.uint8) for shape, grey in (((64, 80, 3), 255), ((50, 50, 3), 0), ((64, 80, 3), 51))])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.array([[1.0], [-1.0], [-0.6]]).repeat(2048, 1), atol=1e-5)


def saved(folder, config, **constants):
    """A run of no steps."""
    folder.mkdir()
    configs.save_json(config, folder / "config.json")
    task = build(config)
    state = jax.jit(task.init)(jax.random.key(0))
    RunFolder(folder).write_constants(constants)
    checkpoints = Checkpointer(folder)
    checkpoints.save(0, state, {})
    checkpoints.close()
    return task, state


def predicted(task, state, column, output, images):
    return jax.jit(lambda state, images: task.predict(state, {column: images}, (output,))[output])(state, jnp.stack(images))


def test_a_run_without_features_is_refused(tmp_path):
    config = train_defaults()
    config.task = "superres"
    configs.save_json(config, tmp_path / "config.json")
    with pytest.raises(ConfigError, match="task 'superres', which has no features"):
        Features.of_run(tmp_path)
    with pytest.raises(CheckpointError, match="no run folder"):
        Features.of_run(tmp_path / "none")


@pytest.mark.slow
def test_features_of_the_encoder_of_immunostains(tmp_path):
    config = train_defaults()
    config.task, config.batch_size, config.train.steps, config.optim.warmup = "stain_encoders", 8, 10, "0"
    config.stain.update(dict(crop=32, margin=8, encoder_channels=4, encoder_blocks=1))
    task, state = saved(tmp_path / "run", config, mpp=0.5)
    features = Features.of_run(tmp_path / "run")
    assert (features.name, features.dim, features.patches, features.mpp) == ("stain_encoders", 64, 32, 0.5)
    image = np.random.default_rng(0).integers(0, 256, (70, 32, 3)).astype(np.uint8)
    want = predicted(task, state, "ihc", "ihc", [image[3:35], image[35:67]])
    np.testing.assert_allclose(features([image]), want, atol=1e-5)
    with pytest.raises(ConfigError, match="divisible by 4"):
        Features.of_run(tmp_path / "run", 30)
    config.stain.update(dict(crop=128, encoder_norm="instance"))  # which leaves nothing of maps of a single value
    saved(tmp_path / "instance", config)
    with pytest.raises(DatasetError, match="70 x 64 px is too small for the features of stain_encoders: they need 68 px"):
        Features.of_run(tmp_path / "instance")([np.zeros((64, 70, 3), np.uint8)])


@pytest.mark.slow
def test_features_of_a_pretraining_run(tmp_path):
    config = configs.load_config("configs/wise_mae.py:smoke", ["config.train.steps=10", "config.optim.warmup=0"])
    task, state = saved(tmp_path / "run", config)
    features = Features.of_run(tmp_path / "run")
    side = int(config.prepare.tiles.size)
    assert features.name == "mae" and features.patches == side
    image = np.random.default_rng(0).integers(0, 256, (2 * side, side, 3)).astype(np.uint8)
    want = predicted(task, state, "image", "mean", [image[:side], image[side:]])
    np.testing.assert_allclose(features([image]), want, atol=1e-4)
    assert np.isfinite(features([image[:5, :7]])).all() and features.mpp is None  # resized, as `wavepath embed` does
