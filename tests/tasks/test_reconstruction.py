"""The terms of the reconstruction error: their values, phases, ranges and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from wavepath.config import load_config
from wavepath.errors import ConfigError
from wavepath.ops.patches import Masking, gather_patches, patchify
from wavepath.ops.stain import hematoxylin_od
from wavepath.tasks import metrics
from wavepath.tasks.base import build
from wavepath.tasks.reconstruction import CHANNELS, Reconstruction

CONSTANTS = {"pixel_range": [-2.0, 2.5], "value_range": [-2.0, 2.5]}


@pytest.fixture
def texture_config(config):
    """Patches of 16 px in images of 32: 4 patches, one visible."""
    config.model.patch, config.model.image_size = 16, 32
    config.loss.norm_pix = False
    config.loss.cooccurrence.levels, config.loss.cooccurrence.sharpness = 8, 30.0
    return config


@pytest.fixture
def case():
    """(prediction [b, m, p], images [b, h, w, 3], masking)."""
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(3, 32, 32, 3)), jnp.float32)
    masking = Masking(order=jnp.asarray([[2, 0, 3, 1]], jnp.int32), keep=1)
    target = gather_patches(patchify(images, 16), masking.masked)
    return target + 0.3 * jnp.asarray(rng.normal(size=target.shape), jnp.float32), images, masking


def error(config, case, step=0, constants=CONSTANTS):
    total, terms = Reconstruction(config)(*case, step, constants)
    return np.asarray(total), {name: (np.asarray(each), float(active)) for name, (each, active) in terms.items()}


def test_squared_error_alone_is_the_plain_autoencoder(texture_config, case):
    total, terms = error(texture_config, case, constants={})
    prediction, images, masking = case
    target = np.asarray(gather_patches(patchify(images, 16), masking.masked))
    np.testing.assert_allclose(total, ((np.asarray(prediction) - target) ** 2).mean(axis=(1, 2)), rtol=1e-6)
    assert list(terms) == ["mse"] and not Reconstruction(texture_config).needs_range


def test_ssim_term_by_scikit_image(texture_config, case):
    """Each image brought to [0, 1] by its own values, then 1 - SSIM of each patch (METHODS 2.3)."""
    texture_config.loss.mse, texture_config.loss.ssim = 0.0, 0.5
    total, terms = error(texture_config, case)
    prediction, images, masking = case
    want = []
    for a, b in zip(np.asarray(prediction, np.float64), np.asarray(gather_patches(patchify(images, 16), masking.masked), np.float64), strict=True):
        a, b = (np.clip(x, -2.0, 2.5) for x in (a, b))
        a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
        pairs = zip(a.reshape(-1, 16, 16, 3), b.reshape(-1, 16, 16, 3), strict=True)
        options = {"channel_axis": -1, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        want.append(np.mean([1 - structural_similarity(x, y, **options) for x, y in pairs]))
    np.testing.assert_allclose(terms["ssim"][0], want, rtol=1e-4)
    np.testing.assert_allclose(total, 0.5 * np.array(want), rtol=1e-4)


def test_glcm_term_by_hand(texture_config, case):
    """Membership of a steep slope: counts by np.add.at, re-weighted, squared distance, mean over matrices and patches (METHODS 2.2)."""
    texture_config.loss.mse, texture_config.loss.glcm = 0.0, 1.0
    texture_config.loss.cooccurrence.sharpness = 1e6  # a sigmoid as steep as a step
    _, terms = error(texture_config, case)
    prediction, images, masking = case
    target = gather_patches(patchify(images, 16), masking.masked)

    def matrices(patch):
        levels = np.clip(np.floor((np.asarray(patch).reshape(16, 16, 3)[..., 0] + 2.0) / 4.5 * 8), 0, 7).astype(int)
        found = []
        for first, second in ((levels[:, :-1], levels[:, 1:]), (levels[:-1], levels[1:])):
            counts = np.zeros((8, 8))
            np.add.at(counts, (first.ravel(), second.ravel()), 1)
            found.append(counts * (1 - counts / counts.sum()))
        return np.stack(found)

    want = [np.mean([((matrices(p) - matrices(t)) ** 2).mean() for p, t in zip(a, b, strict=True)]) for a, b in zip(prediction, target, strict=True)]
    np.testing.assert_allclose(terms["glcm"][0], want, rtol=1e-4)


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_perfect_reconstruction_costs_nothing_and_gradients_are_finite(texture_config, case, channel):
    texture_config.loss.ssim, texture_config.loss.glcm = 1.0, 1.0
    texture_config.loss.cooccurrence.channel = channel
    constants = CONSTANTS if channel in ("first", "rgb") else {**CONSTANTS, "value_range": [0.0, 1.0]}
    prediction, images, masking = case
    exact = gather_patches(patchify(images, 16), masking.masked)
    total, terms = error(texture_config, (exact, images, masking), constants=constants)
    np.testing.assert_allclose(total, 0, atol=1e-5)
    assert set(terms) == {"mse", "ssim", "glcm"}
    term = Reconstruction(texture_config)
    gradient = jax.grad(lambda x: term(x, images, masking, 0, constants)[0].sum())
    for values in (prediction, exact, jnp.zeros_like(exact)):
        assert np.isfinite(gradient(values)).all()
    texture_config.loss.mse = texture_config.loss.ssim = 0.0
    term = Reconstruction(texture_config)
    assert np.abs(jax.grad(lambda x: term(x, images, masking, 0, constants)[0].sum())(prediction)).max() > 0, "the term teaches nothing"


def test_two_phases(texture_config, case):
    texture_config.train.steps, texture_config.loss.second.start = 10, "4"
    before, terms = error(texture_config, case, step=3)
    assert terms["glcm"][1] == terms["ssim"][1] == 0 and terms["mse"][1] == 1
    np.testing.assert_allclose(before, terms["mse"][0], rtol=1e-6)
    after, parts = error(texture_config, case, step=4)
    np.testing.assert_allclose(after, 0.1 * parts["mse"][0] + parts["ssim"][0] + parts["glcm"][0], rtol=1e-5)
    assert all(active == 1 for _, active in parts.values())
    np.testing.assert_allclose(parts["mse"][0], terms["mse"][0], rtol=1e-6)
    texture_config.loss.second.start = "0"
    np.testing.assert_allclose(error(texture_config, case)[0], after, rtol=1e-5)


def test_curriculum_of_sharpness(texture_config):
    texture_config.train.steps = 100
    glcm = texture_config.loss.cooccurrence
    glcm.sharpness_start, glcm.sharpness = 5.0, 38.0
    texture_config.loss.second.start = "50"
    term = Reconstruction(texture_config)
    found = [float(term._sharpness(step)["sharpness"]) for step in (0, 50, 75, 100)]
    np.testing.assert_allclose(found, [5, 5, 21.5, 38])
    assert len({term._sharpness(step)["window"] for step in (0, 75, 100)}) == 1
    glcm.sharpness_start = 0.0
    assert Reconstruction(texture_config)._sharpness(10) == {"sharpness": 38.0}


def test_curriculum_trains_in_the_compiled_step(texture_config, case):
    texture_config.loss.glcm, texture_config.loss.cooccurrence.sharpness_start = 1.0, 5.0
    term = Reconstruction(texture_config)
    compiled = jax.jit(lambda step: term(*case, step, CONSTANTS)[1]["glcm"][0])
    early, late = compiled(0), compiled(10)
    texture_config.loss.cooccurrence.sharpness_start = 0.0
    np.testing.assert_allclose(late, error(texture_config, case)[1]["glcm"][0], rtol=1e-4)
    assert np.abs(np.asarray(early - late)).max() > 0


def batches_of(images, size=2):
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padded = np.zeros((size, *images.shape[1:]), np.uint8)
        padded[: len(part)] = part
        yield {"image": padded, "mask": (np.arange(size) < len(part)).astype(np.float32)}


def test_ranges_are_measured_over_all_images_and_not_over_padding(texture_config):
    texture_config.loss.glcm = 1.0
    images = np.random.default_rng(0).integers(40, 200, (5, 8, 8, 3), dtype=np.uint8)
    images[4, 3, 3] = (250, 100, 100)
    mean, std = np.array(texture_config.model.mean), np.array(texture_config.model.std)
    normal = (images / 255 - mean) / std
    found = Reconstruction(texture_config).measure(batches_of(images), 5)
    np.testing.assert_allclose(found["pixel_range"], [normal.min(), normal.max()], rtol=1e-5)
    assert found["value_range"] == found["pixel_range"]
    texture_config.loss.cooccurrence.channel = "hematoxylin"
    density = np.asarray(hematoxylin_od(jnp.asarray(images / 255, jnp.float32)))
    found = Reconstruction(texture_config).measure(batches_of(images), 5)
    np.testing.assert_allclose(found["value_range"], [density.min(), density.max()], atol=1e-5)
    texture_config.loss.cooccurrence.clip_percentile = 5.0
    low, high = Reconstruction(texture_config).measure(batches_of(images), 5)["value_range"]
    np.testing.assert_allclose([low, high], np.percentile(density, [5, 95]), atol=0.01)


def test_blank_images_are_refused(texture_config):
    texture_config.loss.glcm = 1.0
    with pytest.raises(ConfigError, match="no texture to learn from"):
        texture_config.model.mean, texture_config.model.std = (0.5,) * 3, (0.5,) * 3
        Reconstruction(texture_config).measure(batches_of(np.full((2, 8, 8, 3), 255, np.uint8)), 2)


def test_an_unmeasured_range_is_an_error(texture_config, case):
    texture_config.loss.ssim = 1.0
    with pytest.raises(ConfigError, match="measures over its training images"):
        error(texture_config, case, constants={})


@pytest.mark.parametrize("field, value, message", [
    ("mse", 0.0, "all weights"), ("ssim", -1.0, "negative"), ("second.start", "50%", "durations.resolve"),
    ("ssim_window.kind", "box", "gaussian or uniform"),
    ("ssim_window.size", 17, "fit into config.model.patch=16"), ("cooccurrence.channel", "red", "choose one of"),
    ("cooccurrence.value_range", (1.0, 0.0), "two rising numbers"), ("cooccurrence.clip_percentile", 60.0, "below 50"),
    ("cooccurrence.membership", "hard", "no gradient"), ("cooccurrence.sharpness_start", 0.1, "sharpness"),
    ("cooccurrence.membership", "gauss", "membership"), ("cooccurrence.distance", "l3", "distance"), ("cooccurrence.levels", 1, "levels"),
    ("cooccurrence.offsets", ((0, 20),), "offset"),
])
def test_refused_settings(texture_config, field, value, message):
    texture_config.loss.ssim = 0.0 if field == "mse" else 1.0
    texture_config.loss.glcm = 0.0 if field == "mse" else 1.0
    *groups, name = field.split(".")
    node = texture_config.loss
    for group in groups:
        node = node[group]
    with node.ignore_type():
        node[name] = value
    with pytest.raises(ConfigError, match=message):
        Reconstruction(texture_config)


def test_normalised_targets_do_not_go_with_texture_terms(texture_config):
    texture_config.loss.glcm, texture_config.loss.norm_pix = 1.0, True
    with pytest.raises(ConfigError, match="norm_pix=False"):
        Reconstruction(texture_config)


@pytest.mark.slow
def test_the_task_trains_and_reports_its_terms(config):
    """A step in each phase through the whole task, and the evaluation's."""
    config.model.patch, config.model.image_size, config.loss.norm_pix = 16, 32, False
    config.batch_size, config.prepare.tiles.size = 4, 32
    config.loss.second.start, config.loss.cooccurrence.levels = "1", 8
    task = build(config)
    task.constants = CONSTANTS
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)), "example_id": jnp.arange(4, dtype=jnp.int32),
        "epoch": jnp.zeros(4, jnp.int32), "position": jnp.arange(4, dtype=jnp.uint32),
    }
    state = jax.jit(task.init)(jax.random.key(0))
    step = jax.jit(task.train_step)
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert float(first["glcm"][1]) == float(first["one_minus_ssim"][1]) == 0 and float(second["glcm"][1]) == 4
    values = metrics.compute(second)
    np.testing.assert_allclose(values["loss"], 0.1 * values["mse"] + values["one_minus_ssim"] + values["glcm"], rtol=1e-5)
    assert values["grad_norm"] > 0 and set(values) == {"loss", "mse", "one_minus_ssim", "glcm", "grad_norm", "lr"}
    shown = metrics.compute(jax.jit(task.eval_step)(state, {**batch, "mask": jnp.asarray([1.0, 1.0, 1.0, 0.0])}))
    assert set(shown) == {"loss", "mse", "one_minus_ssim", "glcm"} and all(np.isfinite(value) for value in shown.values())


def test_the_published_setting():
    config = load_config("glcm_mae")
    glcm = config.loss.cooccurrence
    assert (glcm.levels, glcm.sharpness, glcm.membership, glcm.reweight, glcm.distance) == (256, 30.0, "sigmoid", True, "squared")
    assert glcm.offsets == ((0, 1), (1, 0)) and dict(config.loss.second) == {"start": "50%", "mse": 0.1, "ssim": 1.0, "glcm": 1.0}
    assert (config.loss.mse, config.loss.ssim, config.loss.glcm, config.loss.norm_pix) == (1.0, 0.0, 0.0, False)
    assert config.augment.crop_scale == (1.0, 1.0) and not config.augment.hflip
