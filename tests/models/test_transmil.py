import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from wavepath.models.transmil import PPEG, NystromAttention, TransMIL, pseudo_inverse

SMALL = TransMIL(classes=3, width=8, heads=2, head_width=4, landmarks=4)
DOUBLE = dataclasses.replace(SMALL, dtype=jnp.float64, param_dtype=jnp.float64)
WIDTH = 5
LENGTHS, BUCKET = (21, 16, 10, 5, 2, 1, 0), 21
QUICK = {"xla_backend_optimization_level": 0}  # compiling is all that these tests do


def bags(lengths=LENGTHS, bucket=BUCKET, dtype=np.float64):
    """Features [b, bucket, WIDTH], zero on padding, and mask."""
    rng = np.random.default_rng(0)
    mask = np.arange(bucket) < np.array(lengths)[:, None]
    features = rng.normal(size=(len(lengths), max(BUCKET, bucket), WIDTH))[:, :bucket]
    return np.where(mask[..., None], features, 0).astype(dtype), mask


def parameters(model, dtype=np.float64):
    """Random, biases too, and large enough for attention to be uneven."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *bags(dtype=np.float32))
    rng = np.random.default_rng(1)

    def leaf(path, leaf):
        taps = leaf.shape[0] * leaf.shape[1] if path[-1].key.startswith(("kernel", "residual")) and len(leaf.shape) == 4 else leaf.shape[0]
        return (rng.normal(size=leaf.shape) * (1.5 / taps**0.5 if len(leaf.shape) > 1 else 0.5)).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def oracle(torch, params, tiles, heads=2, landmarks=4, iterations=6):
    """The published network on one unpadded bag [n, d], step by step; logits [c] and the class token's attention, tile by tile [n]."""
    p = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), params)["params"]

    def affine(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def norm(x, layer):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], layer["scale"], layer["bias"])

    def attention(x, layer):
        n, width = len(x), layer["qkv"]["kernel"].shape[1] // 3 // heads
        x = torch.cat([torch.zeros(-n % landmarks, x.shape[1], dtype=x.dtype), x])
        q, k, v = affine(x, layer["qkv"]).reshape(len(x), 3, heads, width).permute(1, 2, 0, 3)
        q = q / width**0.5
        q_mean, k_mean = (y.reshape(heads, landmarks, -1, width).mean(2) for y in (q, k))
        one, two, three = (torch.softmax(a @ b.transpose(1, 2), -1) for a, b in ((q, k_mean), (q_mean, k_mean), (q_mean, k)))
        z, eye = two.transpose(1, 2) / (two.abs().sum(2).max() * two.abs().sum(1).max()), torch.eye(landmarks, dtype=x.dtype)
        for _ in range(iterations):
            product = two @ z
            z = z @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
        whole = one @ z @ three
        filters = layer["residual"][:, 0, 0].T[:, None, :, None]
        out = whole @ v + torch.nn.functional.conv2d(v[None], filters, padding=(filters.shape[2] // 2, 0), groups=heads)[0]
        return affine(out.transpose(0, 1).reshape(len(x), -1), layer["proj"])[-n:], whole.mean(0)[-n, -n:]

    def ppeg(x, layer, side):
        image = x.T.reshape(1, -1, side, side)
        out = image
        for size in (7, 5, 3):
            filters = layer[f"kernel{size}"].permute(3, 2, 0, 1)
            out = out + torch.nn.functional.conv2d(image, filters, layer[f"bias{size}"], padding=size // 2, groups=x.shape[1])
        return out.reshape(x.shape[1], -1).T

    h = torch.relu(affine(torch.from_numpy(np.array(tiles)), p["embed"]))
    n = len(h)
    side = int(np.ceil(np.sqrt(n)))
    h = torch.cat([p["cls"][0], h, h[: side * side - n]])
    h = h + attention(norm(h, p["norm1"]), p["attention1"])[0]
    h = torch.cat([h[:1], ppeg(h[1:], p["ppeg"], side)])
    change, row = attention(norm(h, p["norm2"]), p["attention2"])
    row = row[1:].clone()
    row[: side * side - n] += row[n:]
    row = torch.clamp(row[:n], min=0)
    return affine(norm((h + change)[0], p["norm"]), p["head"]), row / row.sum() if row.sum() > 0 else torch.full_like(row, 1 / n)


def loss(model, params, features, mask):
    out = model.apply(params, features, mask)
    return jnp.sum(out["logits"] * jnp.array([1.0, -2.0, 3.0])) + jnp.sum(out["attention"] ** 2), out


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def value_and_gradients(model, params, features, mask):
    """((loss, outputs), (gradient by parameters, by features))."""
    return jax.value_and_grad(lambda p, x: loss(model, p, x, mask), (0, 1), has_aux=True)(params, features)


def near(got, want, atol):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def double():
    """Parameters, a batch whose features are bfloat16 numbers, and what comes of them in double precision."""
    with jax.enable_x64(True):
        params, (features, mask) = parameters(SMALL), bags()
        features = features.astype(jnp.bfloat16).astype(np.float64)
        return params, features, mask, jax.tree.map(np.asarray, value_and_gradients(DOUBLE, params, features, mask))


def test_every_bag_of_a_bucket_is_the_published_network_on_the_bag_alone(double):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    params, features, _, ((_, out), _) = double
    for i, n in enumerate(LENGTHS[:-1]):
        logits, attention = oracle(torch, params, features[i, :n])
        np.testing.assert_allclose(out["logits"][i], logits, atol=1e-10)
        np.testing.assert_allclose(out["attention"][i, :n], attention, atol=1e-10)
        assert not out["attention"][i, n:].any()


def test_another_bucket_in_single_precision_with_padding_between_the_tiles(double):
    params, features, mask, ((_, want), _) = double
    places = np.flatnonzero(np.arange(40) % 7 % 2 == 0)[:BUCKET]
    wide, real = np.full((len(LENGTHS), 40, WIDTH), np.nan), np.zeros((len(LENGTHS), 40), bool)
    wide[:, places], real[:, places] = features, mask
    wide = np.where(real[..., None], wide, np.nan).astype(jnp.bfloat16)
    params = jax.tree.map(np.float32, params)
    out = jax.jit(SMALL.apply, compiler_options=QUICK)(params, wide, real)
    assert out["logits"].dtype == out["attention"].dtype == jnp.float32
    near((out["logits"], out["attention"][:, places]), (want["logits"], want["attention"]), 1e-5)
    assert not np.asarray(out["attention"])[~real].any()


def test_rubbish_on_padding_is_not_read(double):
    params, features, mask, (_, (_, by_features)) = double
    with jax.enable_x64(True):
        spoilt = value_and_gradients(DOUBLE, params, np.where(mask[..., None], features, np.nan), mask)
    near(spoilt, double[-1], 0)
    assert not by_features[~mask].any() and (np.abs(by_features).max((1, 2))[:-1] > 1e-3).all()


def test_attention_sums_to_one_and_an_empty_bag_gives_the_class_token(double):
    _, _, _, ((_, out), gradients) = double
    np.testing.assert_allclose(out["attention"].sum(1), [1] * (len(LENGTHS) - 1) + [0], atol=1e-12)
    assert (out["attention"] >= 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))


def test_gradients_are_those_of_finite_differences(double):
    params, features, mask, (_, gradient) = double
    rng = np.random.default_rng(3)
    way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, features))
    along = sum(float(np.sum(g * w)) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))

    def value(step):
        with jax.enable_x64(True):
            point = jax.tree.map(lambda leaf, w: leaf + step * w, (params, features), way)
            return float(value_and_gradients(DOUBLE, *point, mask)[0][0])

    np.testing.assert_allclose((value(1e-6) - value(-1e-6)) / 2e-6, along, rtol=1e-6)


def test_bags_do_not_know_of_each_other_and_the_order_of_tiles_matters(double):
    params, features, mask, ((_, before), _) = double
    with jax.enable_x64(True):
        (_, after), _ = jax.tree.map(np.asarray, value_and_gradients(DOUBLE, params, np.concatenate([features[:1, ::-1], features[1:]]), mask))
    np.testing.assert_allclose(after["logits"][1:], before["logits"][1:], atol=1e-12)
    assert np.abs(after["logits"][0] - before["logits"][0]).max() > 1e-2


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_bucket(double):
    params, features, mask, ((value, out), (by_params, by_features)) = double
    wide = [(0, 0), (0, 9)]
    with jax.enable_x64(True):
        (again, others), (of_params, of_features) = value_and_gradients(
            DOUBLE, params, np.pad(features, [*wide, (0, 0)]).astype(jnp.bfloat16), np.pad(mask, wide)
        )
    near((again, others["logits"], others["attention"][:, :BUCKET]), (value, out["logits"], out["attention"]), 1e-10)
    near(of_params, by_params, 1e-9)
    near(of_features[:, :BUCKET], by_features.astype(jnp.bfloat16), 1e-9)
    assert of_features.dtype == jnp.bfloat16


def test_a_type_of_sixteen_bits_keeps_wide_outputs():
    model = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    features, mask = map(jnp.asarray, bags(dtype=np.float32))
    out = jax.eval_shape(lambda key: model.init_with_output(key, features, mask)[0], jax.random.key(0))
    assert out["logits"].dtype == out["attention"].dtype == jnp.float32


def test_pseudo_inverse_inverts_and_converges():
    x = np.exp(5 * np.eye(6) + np.random.default_rng(0).normal(size=(2, 3, 6, 6)))
    x /= x.sum(-1, keepdims=True)
    with jax.enable_x64(True):
        inverses = jax.jit(lambda x: [pseudo_inverse(x, steps) for steps in (1, 6, 10)], compiler_options=QUICK)(x)
    errors = [np.abs(np.asarray(z) @ x - np.eye(6)).max() for z in inverses]
    assert errors[0] > 0.1 and errors[1] < 1e-2 and errors[2] < 1e-10


def test_with_a_landmark_for_every_token_attention_is_exact_and_dropout_acts_in_training():
    """m runs of one token: the product of the three softmaxes is the full softmax."""
    with jax.enable_x64(True):
        model = NystromAttention(heads=2, head_width=4, landmarks=6, iterations=30, dropout=0.5, dtype=jnp.float64, param_dtype=jnp.float64)
        x, count = np.random.default_rng(0).normal(size=(1, 6, 8)), jnp.array([6])
        shapes = jax.eval_shape(model.init, jax.random.key(1), x, count)
        params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape) / leaf.shape[0] ** 0.5, shapes)
        params["params"]["residual"] = np.zeros((33, 1, 1, 2))

        @partial(jax.jit, compiler_options=QUICK)
        def run(x, key):
            return model.apply(params, x, count), model.apply(params, x, count, train=True, rngs={"dropout": key})[0]

        ((out, first), once), (_, again), (_, other) = (jax.tree.map(np.asarray, run(x, jax.random.key(key))) for key in (0, 0, 1))
    for drawn in (once, other):
        np.testing.assert_allclose(drawn[drawn != 0], 2 * out[drawn != 0], rtol=1e-12)
        assert 0 < np.mean(drawn == 0) < 1
    assert np.array_equal(once, again) and not np.array_equal(once, other)
    q, k, v = (x @ params["params"]["qkv"]["kernel"]).reshape(6, 3, 2, 4).transpose(1, 2, 0, 3)
    weights = np.exp(q @ k.transpose(0, 2, 1) / 2)
    weights /= weights.sum(-1, keepdims=True)
    want = (weights @ v).transpose(1, 0, 2).reshape(1, 6, 8) @ params["params"]["proj"]["kernel"] + params["params"]["proj"]["bias"]
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(first[0], weights[:, 0].mean(0), atol=1e-6)


def test_training_asks_for_a_key_and_evaluation_does_not():
    params, (features, mask) = parameters(SMALL, np.float32), map(jnp.asarray, bags((3, 2), 4, np.float32))
    with pytest.raises(InvalidRngError, match="dropout"):
        jax.eval_shape(lambda x: SMALL.apply(params, x, mask, train=True), features)
    jax.eval_shape(lambda x: SMALL.apply(params, x, mask), features)


def test_published_sizes():
    features, mask = jnp.zeros((1, 10, 1024)), jnp.ones((1, 10), bool)
    shapes = jax.eval_shape(lambda x: TransMIL(2).init(jax.random.key(0), x, mask), features)["params"]
    one = 512 * 1536 + 512 * 512 + 512 + 8 * 33 + 2 * 512
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1025 * 512 + 512 + 2 * one + 512 * (49 + 25 + 9 + 3) + 1024 + 1026
    assert shapes["ppeg"]["kernel7"].shape == (7, 7, 1, 512) and PPEG().dtype == jnp.float32


@pytest.mark.slow
def test_the_published_size_is_the_published_network():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    model, rng = TransMIL(2), np.random.default_rng(5)
    features, mask = jnp.asarray(rng.normal(size=(1, 384, 64)), jnp.float32), jnp.arange(384)[None] < 300
    params = jax.jit(model.init)(jax.random.key(0), features, mask)
    out = jax.jit(model.apply)(params, features, mask)
    logits, attention = oracle(torch, params, features[0, :300], heads=8, landmarks=256)
    np.testing.assert_allclose(out["logits"][0], logits, atol=1e-5)
    np.testing.assert_allclose(out["attention"][0, :300], attention, atol=1e-5)
