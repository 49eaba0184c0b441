"""InceptionV3 with random weights, equal to a torch implementation written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.models.inception import CONVS, FEATURES, inception, parameters, resized, trunk


def random_weights(seed=0):
    """Deviations that keep activations of one size through all layers, and statistics that no layer could do without."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameters().items():
        if name.endswith("conv.weight"):
            values = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            values = rng.uniform(0.6, 1.4, shape) if name.endswith(("bn.weight", "var")) else 0.1 * rng.normal(size=shape)
        weights[name] = values.astype(np.float32)
    return weights


def torch_inception(weights, x):
    """The blocks of torchvision's inception_v3, written out, with the two changes of pytorch_fid. x: [b, h, w, 3] in [-1, 1]."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    w = {name: torch.from_numpy(value) for name, value in weights.items()}

    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        parts = (w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *parts, training=False, eps=0.001))

    def mean(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def dbl(m, x, stride=1):
        x = conv(f"{m}.branch3x3dbl_2", conv(f"{m}.branch3x3dbl_1", x), 1, 1)
        return conv(f"{m}.branch3x3dbl_3", x, stride, 1 if stride == 1 else 0)

    def a(m, x):
        five = conv(f"{m}.branch5x5_2", conv(f"{m}.branch5x5_1", x), 1, 2)
        return torch.cat([conv(f"{m}.branch1x1", x), five, dbl(m, x), conv(f"{m}.branch_pool", mean(x))], 1)

    def b(m, x):
        return torch.cat([conv(f"{m}.branch3x3", x, 2), dbl(m, x, 2), F.max_pool2d(x, 3, 2)], 1)

    def c(m, x):
        y = conv(f"{m}.branch7x7_1", x)
        y = conv(f"{m}.branch7x7_3", conv(f"{m}.branch7x7_2", y, 1, (0, 3)), 1, (3, 0))
        z = conv(f"{m}.branch7x7dbl_1", x)
        for number, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            z = conv(f"{m}.branch7x7dbl_{number}", z, 1, padding)
        return torch.cat([conv(f"{m}.branch1x1", x), y, z, conv(f"{m}.branch_pool", mean(x))], 1)

    def d(m, x):
        y = conv(f"{m}.branch3x3_2", conv(f"{m}.branch3x3_1", x), 2)
        z = conv(f"{m}.branch7x7x3_2", conv(f"{m}.branch7x7x3_1", x), 1, (0, 3))
        z = conv(f"{m}.branch7x7x3_4", conv(f"{m}.branch7x7x3_3", z, 1, (3, 0)), 2)
        return torch.cat([y, z, F.max_pool2d(x, 3, 2)], 1)

    def e(m, x, pool):
        y = conv(f"{m}.branch3x3_1", x)
        z = conv(f"{m}.branch3x3dbl_2", conv(f"{m}.branch3x3dbl_1", x), 1, 1)
        parts = [conv(f"{m}.branch1x1", x)]
        for name, value in (("branch3x3_2", y), ("branch3x3dbl_3", z)):
            parts += [conv(f"{m}.{name}a", value, 1, (0, 1)), conv(f"{m}.{name}b", value, 1, (1, 0))]
        return torch.cat([*parts, conv(f"{m}.branch_pool", pool(x))], 1)

    with torch.no_grad():
        x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
        x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2)), 1, 1)
        x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = a(m, x)
        x = b("Mixed_6a", x)
        for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = c(m, x)
        x = e("Mixed_7b", d("Mixed_7a", x), mean)
        return e("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, 1)).mean((2, 3)).numpy()


def test_arrays_are_those_of_the_published_network():
    shapes = parameters()
    assert len(CONVS) == 94 and len(shapes) == 5 * 94
    # torchvision's inception_v3 has 27,161,264, of which 2,049,000 are the classifier and 3,326,696 the auxiliary head.
    trained = sum(int(np.prod(shape)) for name, shape in shapes.items() if "running" not in name)
    assert trained == 27_161_264 - 2_049_000 - 3_326_696 == 21_785_568
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3) and shapes["Mixed_5b.branch1x1.conv.weight"] == (64, 192, 1, 1)
    assert shapes["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1) and shapes["Mixed_6e.branch7x7_3.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3a.conv.weight"] == (384, 384, 1, 3) and shapes["Mixed_7b.branch_pool.bn.running_var"] == (192,)


def test_any_image_gives_2048_features():
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in parameters().items()}
    image = jax.ShapeDtypeStruct((2, 130, 90, 3), jnp.float32)
    assert jax.eval_shape(inception, weights, image).shape == (2, FEATURES)
    least = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    assert jax.eval_shape(trunk, weights, least).shape == (1, FEATURES)


@pytest.mark.slow  # torch is slow to import
@pytest.mark.parametrize("shape", [(40, 64), (400, 299)])
def test_resizing_equals_torch(shape):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).random((1, *shape, 3), np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), size=(299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resized(jnp.asarray(images)), 2 * want.permute(0, 2, 3, 1).numpy() - 1, atol=5e-5)


@pytest.mark.slow
def test_features_equal_torch():
    weights = random_weights()
    images = np.random.default_rng(1).random((2, 139, 150, 3), np.float32)
    on_device = {name: jnp.asarray(value) for name, value in weights.items()}
    # Small enough to be quick and large enough that the last block has 3 x 3 positions, where borders tell.
    found = np.asarray(jax.jit(trunk)(on_device, jnp.asarray(2 * images - 1)))
    want = torch_inception(weights, 2 * images - 1)
    assert want.shape == (2, FEATURES) and np.abs(want).mean() > 0.1
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
    whole = np.asarray(jax.jit(inception)(on_device, jnp.asarray(images[:1])))
    np.testing.assert_allclose(whole, torch_inception(weights, np.asarray(resized(jnp.asarray(images[:1])))), atol=1e-4 * np.abs(want).max())
