"""Stain normalisation against references in NumPy, scikit-image's Lab and the outputs of another implementation on real tissue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import color

from wavepath.ops import stain_normalise as sn
from wavepath.ops.stain import to_float

# One compilation for all tests of a size; step by step each operation would be compiled on its own.
STAINS_OF, MACENKO = (jax.jit(f, static_argnames=("beta", "alpha", "luminosity")) for f in (sn.macenko_stains, sn.macenko_normalise))
STATISTICS_OF, REINHARD = jax.jit(sn.reinhard_statistics), jax.jit(sn.reinhard_normalise)
TO_LAB, FROM_LAB = jax.jit(sn.rgb_to_lab), jax.jit(sn.lab_to_rgb)

PINK = np.array([[0.55, 0.78, 0.30], [0.10, 0.90, 0.25]])
VIOLET = np.array([[0.70, 0.62, 0.35], [0.20, 0.85, 0.48]])


def tissue(seed, vectors, strength=(0.5, 0.35), side=48, glass=0.25):
    """uint8 image of two stains (rows of `vectors`), a part of its pixels of one alone, the first rows glass with a little noise."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 1.0, (side, side, 2)) * np.asarray(strength) / 2
    pure = rng.integers(0, 3, (side, side))
    amounts *= np.stack([pure != 0, pure != 1], -1)
    rgb = 255 * 10 ** -(amounts @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))
    rows = int(glass * side)
    rgb[:rows] = 244 + rng.integers(-2, 3, (rows, side, 3))
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def macenko_in_numpy(image, keep):
    """Stain matrix, maxima and concentrations in float64, from the paper: eigenvectors with signs, pseudo-inverse, boolean indexing."""
    density = -np.log10(np.maximum(image.reshape(-1, 3) / 255, 1 / 255))
    chosen = density[keep(image).ravel()]
    plane = np.linalg.eigh(np.cov(chosen.T))[1][:, [2, 1]]
    plane = plane * np.where(chosen.mean(0) @ plane < 0, -1, 1)
    projected = chosen @ plane
    low, high = np.percentile(np.arctan2(projected[:, 1], projected[:, 0]), (1, 99))
    pair = [plane @ [np.cos(a), np.sin(a)] for a in (low, high)]
    matrix = np.array(sorted(pair, key=lambda v: -v[0]))
    amounts = density @ np.linalg.pinv(matrix)
    return matrix, np.percentile(amounts, 99, axis=0), amounts


def by_density(image):
    return np.linalg.norm(-np.log10(np.maximum(image, 1) / 255), axis=-1) >= 0.15


def by_lightness(image):
    return color.rgb2lab(image)[..., 0] < 80


def normalised_in_numpy(source, target, keep):
    _, maxima, amounts = macenko_in_numpy(source, keep)
    matrix, wanted, _ = macenko_in_numpy(target, keep)
    return np.clip(10 ** -(amounts * wanted / maxima @ matrix), 0, 1).reshape(source.shape)


def reinhard_in_numpy(source, target):
    a, b = color.rgb2lab(source), color.rgb2lab(target)
    return np.clip(color.lab2rgb((a - a.mean((0, 1))) / a.std((0, 1)) * b.std((0, 1)) + b.mean((0, 1))), 0, 1)


def test_lab_equals_scikit_image_and_comes_back():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    rgb[0, :8] = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    lab = TO_LAB(to_float(rgb))
    np.testing.assert_allclose(lab, color.rgb2lab(rgb), atol=0.02)  # its white is written with five digits
    np.testing.assert_allclose(FROM_LAB(lab), rgb / 255, atol=1e-5)
    grey = TO_LAB(jnp.linspace(0, 1, 11)[:, None] * jnp.ones(3))
    np.testing.assert_allclose(grey[:, 1:], 0, atol=2e-4)
    np.testing.assert_allclose(grey[[0, -1], 0], [0, 100], atol=1e-4)
    assert float(FROM_LAB(jnp.array([50.0, 120.0, -120.0])).min()) == 0  # outside sRGB: clipped, not NaN


@pytest.mark.parametrize("count", [0, 1, 2, 37, 200])
def test_masked_percentiles_are_numpys_of_the_values_under_the_mask(count):
    rng = np.random.default_rng(count)
    values, mask = rng.normal(size=200).astype(np.float32), rng.permutation(200) < count
    got = jax.jit(sn.masked_percentiles, static_argnums=2)(jnp.asarray(values), jnp.asarray(mask), (0.0, 1.0, 50.0, 99.0, 100.0))
    expected = np.percentile(values[mask], (0, 1, 50, 99, 100)) if count else np.zeros(5)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_macenko_finds_the_stains_that_were_mixed():
    stains = STAINS_OF(to_float(tissue(0, VIOLET)))
    truth = VIOLET / np.linalg.norm(VIOLET, axis=1, keepdims=True)
    assert bool(stains.valid) and (np.asarray(stains.matrix) * truth).sum(1).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(stains.matrix, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("luminosity, keep", [(None, by_density), (0.8, by_lightness)])
def test_macenko_equals_the_equations_in_float64(luminosity, keep):
    source, target = tissue(1, PINK), tissue(2, VIOLET, (0.7, 0.3))
    stains = STAINS_OF(to_float(target), luminosity=luminosity)
    matrix, maxima, _ = macenko_in_numpy(target, keep)
    np.testing.assert_allclose(stains.matrix, matrix, atol=2e-5)
    np.testing.assert_allclose(stains.maxima, maxima, rtol=1e-4)
    got = np.asarray(MACENKO(to_float(source), stains, luminosity=luminosity))
    np.testing.assert_allclose(got, normalised_in_numpy(source, target, keep), atol=1e-4)
    assert np.abs(got - source / 255).mean() > 0.02


def test_reinhard_equals_the_equations_in_float64_and_matches_the_statistics():
    source, target = tissue(3, PINK, (0.4, 0.3)), tissue(4, VIOLET, (0.3, 0.3))
    wanted = STATISTICS_OF(to_float(target))
    got = REINHARD(to_float(source), wanted)
    np.testing.assert_allclose(got, reinhard_in_numpy(source, target), atol=1e-3)
    reached = STATISTICS_OF(got)
    np.testing.assert_allclose(reached.mean, wanted.mean, atol=0.5)  # but for the colours that were clipped
    np.testing.assert_allclose(reached.std, wanted.std, atol=0.5)


def test_an_image_normalised_to_itself_stays():
    clean = to_float(tissue(5, VIOLET, glass=0.0))
    once = MACENKO(clean, STAINS_OF(clean))
    assert float(jnp.abs(once - clean).mean()) < 2 / 255  # rounding to 8 bits is no mixture of two stains
    np.testing.assert_allclose(REINHARD(clean, STATISTICS_OF(clean)), clean, atol=1e-4)


def dirt():
    """Glass with two coloured pixels in a hundred."""
    image, rng = np.full((48, 48, 3), 241, np.uint8), np.random.default_rng(0)
    image[rng.random((48, 48)) < 0.02] = (90, 60, 120)
    image[rng.random((48, 48)) < 0.005] = (200, 90, 140)
    return image


GLASS = {
    "dirt": dirt(),
    "white": np.full((48, 48, 3), 255, np.uint8),
    "noise": 240 + np.random.default_rng(0).integers(-4, 5, (48, 48, 3)).astype(np.int16),
    "one colour": np.full((48, 48, 3), (200, 100, 160), np.uint8),
    "black": np.zeros((48, 48, 3), np.uint8),
}


@pytest.mark.parametrize("name", list(GLASS))
def test_images_without_two_stains_come_back_as_they_are(name):
    image, target = to_float(GLASS[name].astype(np.uint8)), to_float(tissue(6, VIOLET))
    stains = STAINS_OF(image)
    assert not bool(stains.valid) and all(np.isfinite(leaf).all() for leaf in stains)
    np.testing.assert_array_equal(MACENKO(image, STAINS_OF(target)), image)
    np.testing.assert_array_equal(MACENKO(target, stains), target)
    moved = REINHARD(image, STATISTICS_OF(target))
    assert np.isfinite(moved).all()
    if name in ("white", "noise", "dirt"):
        np.testing.assert_array_equal(moved, image)
        np.testing.assert_array_equal(REINHARD(target, STATISTICS_OF(image)), target)


def test_a_batch_with_glass_in_it_equals_its_images_one_by_one():
    images = jnp.stack([to_float(x) for x in (tissue(7, PINK), np.full((48, 48, 3), 243, np.uint8), tissue(8, VIOLET))])
    target = to_float(tissue(9, VIOLET))
    stains, statistics = STAINS_OF(target), STATISTICS_OF(target)

    @jax.jit
    @jax.vmap
    def both(x):
        return (sn.macenko_normalise(x, stains), sn.macenko_stains(x).valid), (sn.reinhard_normalise(x, statistics), sn.reinhard_statistics(x).valid)

    for (batch, valid), one, aim in zip(both(images), (MACENKO, REINHARD), (stains, statistics), strict=True):
        for k in range(3):
            np.testing.assert_allclose(batch[k], one(images[k], aim), atol=2e-5)
        np.testing.assert_array_equal(batch[1], images[1])
        assert list(valid) == [True, False, True]


def test_pixels_outside_the_mask_take_no_part():
    image, mask = tissue(10, PINK), jnp.arange(48)[:, None] * jnp.ones(48, int) < 40
    spoilt = image.copy()
    spoilt[40:] = np.random.default_rng(0).integers(0, 256, (8, 48, 3), np.uint8)
    for estimate in (jax.jit(sn.macenko_stains), STATISTICS_OF):
        clean, masked = estimate(to_float(image), mask=mask), estimate(to_float(spoilt), mask=mask)
        for got, expected in zip(masked, clean, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)
        assert np.abs(estimate(to_float(spoilt), mask=~mask | mask)[0] - clean[0]).max() > 0.05


def test_pixels_meet_vectors_elementwise():
    # A product with a matrix would round to bfloat16 or TF32 on an accelerator.
    image = to_float(tissue(11, PINK))
    for function in (lambda x: sn.macenko_normalise(x, sn.macenko_stains(x)), lambda x: sn.lab_to_rgb(sn.rgb_to_lab(x))):
        assert "dot_general" not in jax.jit(function).lower(image).as_text()


def read(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(
    "luminosity, mean, most",
    [(0.8, 0.03, 1), pytest.param(None, 0.07, 1, marks=pytest.mark.slow)],  # it takes tissue by lightness; by density little is otherwise
)
def test_macenko_gives_the_output_of_another_implementation(shared_data, luminosity, mean, most):
    source, target, expected = (read(shared_data / "stain" / f"{name}.png") for name in ("source_image", "target_image", "norm_macenko"))
    aim = STAINS_OF(to_float(target), luminosity=luminosity)
    got = 255 * np.asarray(MACENKO(to_float(source), aim, luminosity=luminosity))
    off = np.abs(np.floor(got) - expected)  # it cuts to 8 bits instead of rounding
    assert off.mean() < mean and off.max() <= most
    assert np.abs(got - expected).mean() < 0.55 and np.abs(source.astype(float) - expected).mean() > 10


@pytest.mark.slow
def test_real_glass_comes_back_and_real_tissue_does_not(shared_data):
    target = to_float(read(shared_data / "stain" / "source_image.png"))
    stains, statistics = STAINS_OF(target), STATISTICS_OF(target)
    for names, kept in ((("almost-white-1", "almost-white-2", "no-tissue", "no-tissue2", "no-tissue-line"), True), (("tcga-lung-rgb",), False)):
        for name in names:
            image = to_float(read(shared_data / "qc" / f"{name}.png"))
            for got in (MACENKO(image, stains), REINHARD(image, statistics)):
                assert np.isfinite(got).all() and bool((got == image).all()) == kept, name


def test_reinhard_gives_the_output_of_another_implementation(shared_data):
    source, target, expected = (read(shared_data / "stain" / f"{name}.png") for name in ("source_image", "target_image", "norm_reinhard"))
    x = to_float(source)
    got = 255 * np.asarray(REINHARD(x, STATISTICS_OF(to_float(target))))
    assert np.abs(got - expected).mean() < 1.1 < 5 < np.abs(source.astype(float) - expected).mean()
    # What is left is its 8 bits in Lab: rounded on the way in, cut on the way out.
    levels = np.array([2.55, 1, 1]), np.array([0, 128, 128])
    stats, rounded = [], []
    for image in (source, target):
        lab = (np.rint(np.asarray(TO_LAB(to_float(image))) * levels[0] + levels[1]) - levels[1]) / levels[0]
        rounded.append(lab)
        stats.append((lab.mean((0, 1)), lab.std((0, 1))))
    moved = (rounded[0] - stats[0][0]) / stats[0][1] * stats[1][1] + stats[1][0]
    cut = (np.floor(np.clip(moved * levels[0] + levels[1], 0, 255)) - levels[1]) / levels[0]
    again = np.rint(255 * np.asarray(FROM_LAB(jnp.asarray(cut, jnp.float32))))
    assert np.abs(again - expected).mean() < 0.35
