"""Residual networks: published sizes, values and statistics equal to torch, one result on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wavepath.models.resnet import DEPTHS, BatchNorm, ResNet, resnet_flops
from wavepath.ops import collectives


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize("depth, count", [(18, 11_689_512), (50, 25_557_032)])
def test_published_sizes(depth, count):
    model = ResNet(depth, 1000)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    # Multiply-adds at 224 px as published: 1.81 and 4.09 billion.
    assert resnet_flops(depth, 224, 1000) / 2e9 == pytest.approx({18: 1.814, 50: 4.089}[depth], rel=1e-3)


def torch_forward(params, stats, x, depth, train):
    """The network by torch's functions, with the parameters of ours; returns logits and the running statistics after it."""
    import torch

    F = torch.nn.functional
    p = {name: torch.from_numpy(np.array(leaf)) for name, leaf in flat(params).items()}
    s = {name: torch.from_numpy(np.array(leaf)) for name, leaf in flat(stats).items()}

    def conv(x, name, stride=1):
        kernel = p[f"{name}/kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, name):
        return F.batch_norm(x, s[f"{name}/mean"], s[f"{name}/var"], p[f"{name}/scale"], p[f"{name}/bias"], train, 0.1, 1e-5)

    x = F.max_pool2d(F.relu(norm(conv(torch.from_numpy(x).permute(0, 3, 1, 2), "conv1", 2), "bn1")), 3, 2, 1)
    blocks, bottleneck = DEPTHS[depth]
    for stage, count in enumerate(blocks):
        for number in range(count):
            name, stride = f"layer{stage + 1}_{number}", 2 if stage and not number else 1
            steps = (1, stride, 1) if bottleneck else (stride, 1)
            y = x
            for index, step in enumerate(steps, 1):
                y = norm(conv(y, f"{name}/conv{index}", step), f"{name}/bn{index}")
                y = F.relu(y) if index < len(steps) else y
            if f"{name}/downsample/kernel" in p:
                x = norm(conv(x, f"{name}/downsample", stride), f"{name}/downsample_bn")
            x = F.relu(x + y)
    x = x.mean((2, 3))
    return (x @ p["fc/kernel"] + p["fc/bias"]).numpy(), {name: value.numpy() for name, value in s.items()}


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_equals_torch(depth):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    model = ResNet(depth, 5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return (rng.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)
        return (rng.uniform(0.5, 1.0, leaf.shape) if kind in ("scale", "var") else 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    x = rng.normal(size=(4, 40, 48, 3)).astype(np.float32)
    (logits, out), _ = model.apply(variables, jnp.asarray(x), mutable=[])
    want, _ = torch_forward(variables["params"], variables["batch_stats"], x, depth, False)
    np.testing.assert_allclose(logits, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    (logits, _), moved = jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]))(variables, jnp.asarray(x))
    want, stats = torch_forward(variables["params"], variables["batch_stats"], x, depth, True)
    np.testing.assert_allclose(logits, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    for name, value in flat(moved["batch_stats"]).items():
        np.testing.assert_allclose(value, stats[name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.multidevice
def test_statistics_and_gradients_on_eight_devices_are_those_on_one():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(16, 3, 3, 2)) * np.arange(1, 17)[:, None, None, None]).astype(np.float32)
    aim = rng.normal(size=x.shape).astype(np.float32)
    layer = BatchNorm()
    variables = layer.init(jax.random.key(0), jnp.asarray(x[:1]), False)

    def loss(params, stats, x, aim):
        y, moved = layer.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return (jnp.tanh(y) * aim).mean(), moved["batch_stats"]

    step = jax.value_and_grad(loss, has_aux=True)
    (value, stats), grads = step(variables["params"], variables["batch_stats"], jnp.asarray(x), jnp.asarray(aim))

    def body(params, stats, x, aim):
        with collectives.axis("data"):
            (value, stats), grads = step(params, stats, x, aim)
            return collectives.pmean((value, grads)), stats

    split = [part.reshape(8, 2, *part.shape[1:]) for part in (x, aim)]
    run = jax.pmap(body, axis_name="data", in_axes=(None, None, 0, 0), out_axes=None, devices=jax.devices("cpu")[:8])
    (value_8, grads_8), stats_8 = run(variables["params"], variables["batch_stats"], *split)
    for one, other in ((value, value_8), (grads, grads_8), (stats, stats_8)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.reshape(-1, 2).var(0, ddof=1), rtol=1e-4)
