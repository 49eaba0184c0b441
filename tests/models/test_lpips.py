"""LPIPS with random weights, equal to a torch implementation written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.models.lpips import SCALE, SHIFT, Conv, lpips, parameters

torch = pytest.importorskip("torch")


def random_weights(network, seed=0):
    """Deviations that keep activations of one size through all layers."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameters(network).items():
        values = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.1 * rng.normal(size=shape)
        weights[name] = (np.abs(values) if name.startswith("lin") else values).astype(np.float32)
    return weights


def torch_lpips(weights, a, b, network):
    F = torch.nn.functional
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    # torchvision's feature stacks as (index, stride, padding) or a pooling; "t" is tapped behind its ReLU.
    alex = [(0, 4, 2, "t"), 3, (3, 1, 2, "t"), 3, (6, 1, 1, "t"), (8, 1, 1, "t"), (10, 1, 1, "t")]
    vgg = [(0, 1, 1, ""), (2, 1, 1, "t"), 2, (5, 1, 1, ""), (7, 1, 1, "t"), 2, (10, 1, 1, ""), (12, 1, 1, ""), (14, 1, 1, "t"), 2]
    vgg += [(17, 1, 1, ""), (19, 1, 1, ""), (21, 1, 1, "t"), 2, (24, 1, 1, ""), (26, 1, 1, ""), (28, 1, 1, "t")]

    def taps(x):
        x = torch.from_numpy(x).permute(0, 3, 1, 2) * 2 - 1
        x = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        for layer in {"alex": alex, "vgg": vgg}[network]:
            if isinstance(layer, int):
                x = F.max_pool2d(x, layer, 2)
                continue
            index, stride, padding, tap = layer
            x = F.relu(F.conv2d(x, w[f"features.{index}.weight"], w[f"features.{index}.bias"], stride, padding))
            if tap:
                yield x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    parts = [F.conv2d((x - y) ** 2, w[f"lin{k}.model.1.weight"]).mean((1, 2, 3)) for k, (x, y) in enumerate(zip(taps(a), taps(b), strict=True))]
    return sum(parts).numpy()


@pytest.mark.parametrize("network, shape", [("alex", (2, 71, 64, 3)), ("vgg", (2, 21, 32, 3))])
def test_equals_torch(network, shape):
    rng = np.random.default_rng(1)
    a, b = (rng.random(shape, np.float32) for _ in range(2))
    weights = random_weights(network)
    on_device = {name: jnp.asarray(value) for name, value in weights.items()}
    distance = jax.jit(lpips, static_argnames="network")
    found = distance(on_device, jnp.asarray(a), jnp.asarray(b), network)
    assert (found > 0.05).all()
    np.testing.assert_allclose(found, torch_lpips(weights, a, b, network), rtol=1e-4)
    assert float(distance(on_device, jnp.asarray(a), jnp.asarray(a), network).max()) < 1e-9


def test_published_sizes():
    """Convolutions of torchvision's networks: 2,469,696 of AlexNet, 14,714,688 of VGG-16."""
    for network, count in (("alex", 2_469_696), ("vgg", 14_714_688)):
        assert sum(int(np.prod(shape)) for name, shape in parameters(network).items() if name.startswith("features")) == count
    assert Conv(0, 3, 64, 11, 4, 2, True).tap
