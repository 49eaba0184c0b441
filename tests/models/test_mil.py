import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.errors import ConfigError
from wavepath.models.mil import ABMIL, CLAM, PooledMIL, instance_loss

WIDTH, CLASSES = 6, 3
MODELS = {
    "mean": PooledMIL(CLASSES),
    "max": PooledMIL(CLASSES, pool="max", width=5),
    "abmil": ABMIL(CLASSES, project=5, hidden=4, gated=False),
    "abmil-gated": ABMIL(CLASSES, project=0, hidden=4),
    "clam-sb": CLAM(CLASSES, width=8, hidden=4),
    "clam-mb": CLAM(CLASSES, multi_branch=True, width=8, hidden=4),
}
QUICK = {"xla_backend_optimization_level": 0}  # compiling is all that these tests do
LENGTHS, BUCKET = (9, 5, 1, 0), 9
ORDER = np.random.default_rng(2).permutation(BUCKET)
every_model = pytest.mark.parametrize("name", MODELS)


def bags(lengths=LENGTHS, bucket=BUCKET):
    """Features [b, bucket, WIDTH], bfloat16 numbers in double precision and zero on padding, and mask."""
    rng = np.random.default_rng(0)
    mask = np.arange(bucket) < np.array(lengths)[:, None]
    features = np.where(mask[..., None], rng.normal(size=(len(lengths), bucket, WIDTH)), 0)
    return features.astype(jnp.bfloat16).astype(np.float64), mask


def parameters(model, dtype=np.float64):
    """Random, biases too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)), jnp.ones((1, 2), bool))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / max(1, leaf.shape[0]) ** 0.5).astype(dtype), shapes)


def loss(model, params, features, mask):
    """Something that all outputs have a part in."""
    out = model.apply(params, features, mask)
    total = jnp.sum(out["logits"] * jnp.arange(1.0, 1 + CLASSES)) + jnp.sum(out["attention"] ** 2)
    if "instance_logits" in out:
        total += instance_loss(out["instance_logits"], jnp.arange(len(mask)) % CLASSES, out["attention"], mask, top=2, subtyping=True).sum()
    return total, out


@partial(jax.jit, compiler_options=QUICK)
def _all_models(params, features, mask):
    results = {}
    for name, model in MODELS.items():
        wide = dataclasses.replace(model, dtype=jnp.float64, param_dtype=jnp.float64)
        take = jax.value_and_grad(lambda p, x, model=wide: loss(model, p, x, mask), (0, 1), has_aux=True)
        results[name] = take(params[name], features)
    return results


def results(params, features, mask):
    """Of every model in double precision ((loss, outputs), (gradient by parameters, by features)), from one compilation."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _all_models(params, features, mask))


@pytest.fixture(scope="module")
def params():
    return {name: parameters(model) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def base(params):
    return results(params, *bags())


@pytest.fixture(scope="module")
def spoilt(params):
    features, mask = bags()
    return results(params, np.where(mask[..., None], features, np.nan), mask)


@pytest.fixture(scope="module")
def bucket(params):
    """The same bags as bfloat16 in a larger bucket, with infinities behind them."""
    features, mask = bags()
    wide = np.pad(features, [(0, 0), (0, 4), (0, 0)])
    more = np.pad(mask, [(0, 0), (0, 4)])
    return results(params, np.where(more[..., None], wide, np.inf).astype(jnp.bfloat16), more)


@pytest.fixture(scope="module")
def shuffled(params):
    features, mask = bags()
    return results(params, features[:, ORDER], mask[:, ORDER])


def near(got, want, atol):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=0, atol=atol)


@every_model
def test_attention_sums_to_one_over_real_tiles_and_is_nought_on_the_others(base, name):
    (_, out), _ = base[name]
    _, mask = bags()
    assert out["logits"].shape == (4, CLASSES)
    assert out["attention"].shape == ((4, CLASSES, BUCKET) if name == "clam-mb" else (4, BUCKET))
    rows = out["attention"].reshape(4, -1, BUCKET)
    np.testing.assert_allclose(rows.sum(-1) - [[1], [1], [1], [0]], 0, atol=1e-12)
    assert (rows >= 0).all() and not np.where(mask[:, None], 0, rows).any()


@every_model
def test_padding_changes_neither_values_nor_gradients(base, spoilt, bucket, name):
    _, mask = bags()
    (value, out), (by_params, by_features) = base[name]
    assert not by_features[~mask].any() and np.abs(by_features[mask]).max() > 1e-3
    near(spoilt[name], base[name], 0)  # to the last bit
    (again, others), (of_params, of_features) = bucket[name]
    assert of_features.dtype == jnp.bfloat16 and not of_features[:, BUCKET:].any()
    near((again, of_params), (value, by_params), 1e-12)
    near((others["logits"], others["attention"][..., :BUCKET]), (out["logits"], out["attention"]), 1e-12)
    assert not others["attention"][..., BUCKET:].any()
    near(of_features[:, :BUCKET], by_features.astype(jnp.bfloat16), 1e-2)


@every_model
def test_the_order_of_tiles_does_not_matter(base, shuffled, name):
    (value, out), (by_params, by_features) = base[name]
    (again, moved), (of_params, of_features) = shuffled[name]
    near((again, moved["logits"], moved["attention"]), (value, out["logits"], out["attention"][..., ORDER]), 1e-12)
    near((of_params, of_features), (by_params, by_features[:, ORDER]), 1e-12)


@every_model
def test_a_bag_without_tiles_gives_the_bias_and_finite_gradients(base, params, name):
    (_, out), gradients = base[name]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
    assert not out["attention"][-1].any() and np.abs(out["logits"][0] - out["logits"][-1]).max() > 1e-2
    np.testing.assert_allclose(out["logits"][-1], params[name]["params"]["head"]["bias"], atol=1e-12)


@pytest.fixture(scope="module")
def differences(params):
    """By model the slope along a random direction, from the values at either side, and the direction."""
    features, mask = bags()
    rng = np.random.default_rng(3)
    point = params, features
    way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)
    above, below = (results(*jax.tree.map(lambda leaf, w, step=step: leaf + step * w, point, way), mask) for step in (1e-6, -1e-6))
    return {name: (above[name][0][0] - below[name][0][0]) / 2e-6 for name in MODELS}, way


@every_model
def test_gradients_are_those_of_finite_differences(base, differences, name):
    slopes, (way, by_features) = differences
    pairs = zip(jax.tree.leaves(base[name][1]), jax.tree.leaves((way[name], by_features)), strict=True)
    np.testing.assert_allclose(slopes[name], sum(np.sum(g * w) for g, w in pairs), rtol=1e-6)


def plain_loss(evidence, label, attention, n, top, subtyping, margin):
    """One bag, n real tiles in front, by loops."""

    def penalty(tile, c, answer):
        wrong, right = evidence[c][tile][1 - answer] + margin, evidence[c][tile][answer]
        return np.log(np.exp(wrong) + np.exp(right)) - right

    if n == 0:
        return 0.0
    k, total = max(1, min(top, n // 2)), 0.0
    for c in range(len(evidence)):
        row = attention[c] if attention.ndim == 2 else attention
        ranked = sorted(range(n), key=lambda tile: -row[tile])
        if c == label:
            total += np.mean([penalty(tile, c, 1) for tile in ranked[:k]] + [penalty(tile, c, 0) for tile in ranked[-k:]])
        elif subtyping:
            total += np.mean([penalty(tile, c, 0) for tile in ranked[:k]])
    return total / len(evidence) if subtyping else total


@pytest.mark.parametrize("branches", [1, CLASSES])
def test_instance_loss_is_the_loop_for_bags_of_any_size(branches):
    lengths, bucket = (20, 16, 9, 8, 3, 2, 1, 0), 20
    rng = np.random.default_rng(4)
    evidence = rng.normal(size=(len(lengths), CLASSES, bucket, 2)).astype(np.float32)
    attention = rng.uniform(size=(len(lengths), branches, bucket)).astype(np.float32)
    attention = attention[:, 0] if branches == 1 else attention
    labels, mask = rng.integers(0, CLASSES, len(lengths)), np.arange(bucket) < np.array(lengths)[:, None]
    cases = [(8, False, 0.0), (8, True, 0.0), (30, True, 1.0)]  # of B above the bucket's size too

    @partial(jax.jit, compiler_options=QUICK)
    def run(*arrays):
        return [instance_loss(*arrays, top=top, subtyping=subtyping, margin=margin) for top, subtyping, margin in cases]

    for got, case in zip(run(evidence, labels, attention, mask), cases, strict=True):
        want = [plain_loss(*bag, *case) for bag in zip(evidence, labels, attention, lengths, strict=True)]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_cannot_be_is_refused():
    features, mask = jnp.zeros((1, 3, WIDTH)), jnp.ones((1, 3), bool)
    with pytest.raises(ConfigError, match="top=0"):
        instance_loss(jnp.zeros((1, 2, 3, 2)), jnp.array([1]), jnp.zeros((1, 3)), mask, top=0)
    with pytest.raises(ConfigError, match="mean, max"):
        PooledMIL(2, pool="sum").init(jax.random.key(0), features, mask)


def test_pools_are_the_mean_and_the_maximum(base, params):
    features, mask = bags()
    for i, n in enumerate(LENGTHS[:-1]):
        for name, reduce in (("mean", np.mean), ("max", np.max)):
            p = params[name]["params"]
            h = features[i, :n] if name == "mean" else np.maximum(features[i, :n] @ p["embed"]["kernel"] + p["embed"]["bias"], 0)
            want = reduce(h, axis=0) @ p["head"]["kernel"] + p["head"]["bias"]
            np.testing.assert_allclose(base[name][0][1]["logits"][i], want, atol=1e-12)


def test_dropout_acts_in_training_by_its_key(params):
    features, mask = (jnp.asarray(x) for x in bags())
    names = ("max", "clam-sb", "clam-mb")
    weights = jax.tree.map(np.float32, params)

    @partial(jax.jit, compiler_options=QUICK)
    def drawn(key):
        return [MODELS[k].apply(weights[k], features, mask, train=True, rngs={"dropout": key})["logits"] for k in names]

    runs = [[np.asarray(x) for x in drawn(jax.random.key(key))] for key in (0, 0, 1)]
    for first, again, other in zip(*runs, strict=True):
        assert first.dtype == np.float32 and np.array_equal(first, again) and np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb", "abmil", "abmil-gated"])
def test_attention_models_are_the_published_layout_in_torch(base, params, name):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
    p, (features, _), ((_, out), _) = params[name]["params"], bags(), base[name]
    clam = name.startswith("clam")

    def layer(params, columns=slice(None)):
        kernel, bias = (torch.from_numpy(params[k][..., columns].copy()) for k in ("kernel", "bias"))
        module = torch.nn.Linear(*kernel.shape, dtype=torch.float64)
        module.load_state_dict({"weight": kernel.T, "bias": bias})
        return module

    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tanh = torch.nn.Sequential(layer(p["attention"]["tanh"]), torch.nn.Tanh())
            self.sigmoid = torch.nn.Sequential(layer(p["attention"]["sigmoid"]), torch.nn.Sigmoid()) if name != "abmil" else None
            self.score = layer(p["attention"]["score"])

        def forward(self, h):
            return torch.softmax(self.score(self.tanh(h) * (self.sigmoid(h) if self.sigmoid else 1)).T, dim=1)

    first = {"abmil": lambda: layer(p["project"]), "abmil-gated": torch.nn.Identity}
    embed = torch.nn.Sequential(layer(p["embed"]), torch.nn.ReLU()) if clam else first[name]()
    gate, heads = Gate(), [layer(p["head"], slice(c, c + 1)) for c in range(CLASSES)]
    for i, n in enumerate(LENGTHS[:-1]):
        h = embed(torch.from_numpy(features[i, :n]))
        attention = gate(h)
        z = (attention @ h).expand(CLASSES, -1)
        near(out["attention"][i, ..., :n], (attention if name == "clam-mb" else attention[0]).detach(), 1e-12)
        near(out["logits"][i], torch.cat([head(row) for head, row in zip(heads, z, strict=True)]).detach(), 1e-12)
        if clam:
            instances = torch.stack([layer(p["instance"], slice(2 * c, 2 * c + 2))(h) for c in range(CLASSES)])
            near(out["instance_logits"][i, :, :n], instances.detach(), 1e-12)
            assert not out["instance_logits"][i, :, n:].any()


def test_published_sizes_and_types():
    features, mask = jnp.zeros((1, 4, 1024), jnp.bfloat16), jnp.ones((1, 4), bool)
    out, shapes = jax.eval_shape(lambda x: CLAM(2, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x, mask), features)
    assert {leaf.dtype for leaf in out.values()} == {jnp.dtype("float32")}
    shapes = shapes["params"]
    assert shapes["embed"]["kernel"].shape == (1024, 512) and shapes["attention"]["tanh"]["kernel"].shape == (512, 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 524800 + 2 * 131328 + 257 + 1026 + 2 * 1026
