"""The generator: published size and shapes, its switches, what it must not read, operations and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wavepath.errors import ConfigError
from wavepath.models.stain_encoder import StainEncoder
from wavepath.models.stain_layers import fresh_parameters, quadrant_features
from wavepath.models.staining import StainGenerator, generator_flops, pix2pix_generator


def image(side, batch=1):
    return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)


def features(side, width=256):
    return jax.ShapeDtypeStruct((1, side // 4, side // 4, width), jnp.float32)


def shapes(model, *inputs):
    return jax.eval_shape(lambda key, *x: model.init(key, *x), jax.random.key(0), *inputs)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_published_size_and_shapes(norm):
    model = StainGenerator(norm=norm)
    variables = shapes(model, image(512), features(512))
    assert count(variables["params"]["encoder"]) == 1_234_304
    assert count(variables["params"]) == 1_234_304 + 12_888_963
    made, out = jax.eval_shape(model.apply, variables, image(512), features(512))
    assert made.shape == (1, 512, 512, 3) and out["x1"].shape == (1, 512, 512, 64) and out["x2"].shape == (1, 256, 256, 128)
    assert all(out[name].shape == (1, 128, 128, 256) for name in ("x3", "h3", "h2", "h1", "fused", "body"))


def test_switches():
    whole = count(shapes(StainGenerator(), image(32), features(32))["params"])
    # What is switched off leaves no parameter behind.
    without = count(shapes(StainGenerator(coa=False), image(32))["params"])
    assert whole - without == 4 * (256 * 256 + 256) + 2 * 256
    parts = shapes(StainGenerator(msfpm=False), image(32), features(32))["params"]
    assert "msfpm" not in parts and "coa" in parts
    assert count(shapes(StainGenerator(encoder="plain"), image(32), features(32))["params"]["encoder"]) == 2_665_728
    assert count(shapes(pix2pix_generator(), image(32))["params"]) == 11_383_427
    # Other widths, and an encoder of another width than the generator.
    small = StainGenerator(channels=16, blocks=4)
    assert shapes(small, image(32), features(32, 24))["params"]["coa"]["key"]["kernel"].shape == (1, 1, 24, 64)


@pytest.mark.parametrize(
    ("model", "side", "given", "message"),
    [
        (StainGenerator(), 30, True, "divisible by 4"),
        (StainGenerator(encoder="unet"), 32, True, "choose one of vmfe, plain, resnet"),
        (StainGenerator(blocks=3), 32, True, "config.stain.msfpm=False"),
        (StainGenerator(), 32, False, "if and only if config.stain.coa=True"),
        (StainGenerator(coa=False), 32, True, "if and only if config.stain.coa=True"),
    ],
)
def test_errors_name_the_fix(model, side, given, message):
    with pytest.raises(ConfigError, match=message):
        shapes(model, image(side), *[features(32)] * given)


@pytest.mark.slow
def test_an_image_from_end_to_end():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(2, 32, 32, 3)).astype(np.float32))
    # Group norm: with batch norm a fresh network in use, normalised by nothing yet, gives next to nothing.
    encoder = StainEncoder(channels=4, blocks=1, norm="group")
    frozen = jax.jit(lambda key: fresh_parameters(encoder, key, x))(jax.random.key(1))
    model = StainGenerator(channels=4, blocks=4, norm="group")
    found = jax.jit(lambda v, x: quadrant_features(lambda part: encoder.apply(v, part)[1]["features"], x))(frozen, x)
    assert found.shape == (2, 8, 8, 16)
    variables = jax.jit(lambda key: fresh_parameters(model, key, x, found))(jax.random.key(0))
    # At such a width fresh weights attend evenly to all places; norms of single channels then leave nothing of it.
    variables = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim == 4 else leaf, variables)

    @jax.jit
    def run(x, found):
        return model.apply(variables, x, found)[0]

    made = run(x, found)
    assert made.shape == x.shape and 0 <= float(made.min()) and float(made.max()) <= 1
    # Images do not see each other, and both image and features are looked at.
    np.testing.assert_allclose(run(x.at[1].set(0), found)[0], made[0], atol=1e-6)
    assert float(jnp.abs(run(x, found[::-1]) - made).max()) > 1e-3 and float(jnp.abs(run(x[::-1], found) - made).max()) > 1e-3


@pytest.mark.slow
def test_recomputing_and_types_change_nothing_else():
    rng = np.random.default_rng(0)
    x, found = (jnp.asarray(rng.uniform(size=shape).astype(np.float32)) for shape in ((1, 16, 16, 3), (1, 4, 4, 16)))
    settings = dict(channels=4, blocks=4, norm="group")
    model = StainGenerator(**settings)
    params = fresh_parameters(model, jax.random.key(0), x, found)["params"]

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, x, found, True)[0]).mean()))(params)

    want = traverse_util.flatten_dict(gradient(model), sep="/")
    for name, leaf in traverse_util.flatten_dict(gradient(StainGenerator(**settings, remat=True)), sep="/").items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-3, atol=1e-7, err_msg=name)
    half = jax.jit(StainGenerator(**settings, dtype=jnp.bfloat16).apply)({"params": params}, x, found)[0]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, model.apply({"params": params}, x, found)[0], atol=0.02)


@pytest.mark.parametrize("model", [StainGenerator(), StainGenerator(encoder="plain", channels=32), pix2pix_generator()])
def test_operations(model):
    inputs = (image(256), features(256)) if model.coa else (image(256),)
    model = model.clone(attention="dense")  # the compiler does not multiply the bodies of loops
    variables = shapes(model, *inputs)
    counted = jax.jit(lambda v, *x: model.apply(v, *x)[0]).lower(variables, *inputs).cost_analysis()["flops"]
    assert generator_flops(model, 256) == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "limit"), [(512, 4e9), (1024, 15e9)])
def test_memory_of_a_step(side, limit):
    """Value and gradient of the published network, by the compiler and without running."""
    model = StainGenerator(norm="group")
    variables = shapes(model, image(side), features(side))
    step = jax.jit(jax.value_and_grad(lambda v, *x: jnp.abs(model.apply(v, *x)[0]).mean()))
    assert step.lower(variables, image(side), features(side)).compile().memory_analysis().temp_size_in_bytes < limit
