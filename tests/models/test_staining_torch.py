"""The networks of virtual staining equal those that torch's functions make, written from METHODS 3.2 to 3.4, on the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wavepath.models.patchgan import PatchGAN
from wavepath.models.stain_encoder import StainEncoder
from wavepath.models.staining import StainGenerator, pix2pix_generator

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch==2.13.0")
F = torch.nn.functional


def draw(model, *inputs, seed=0):
    """Parameters and running statistics at random, scaled so that no value dies or explodes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key, *x: model.init(key, *x, train=False), jax.random.key(0), *inputs)

    def leaf(path, leaf):
        kind = path[-1].key
        if kind in ("scale", "var") or kind.startswith("wavelet_scale"):
            return rng.uniform(0.5, 1.0, leaf.shape).astype(np.float32)
        if "kernel" in kind:
            return (rng.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)
        return (0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def nchw(x):
    return torch.from_numpy(np.array(x, np.float32).transpose(0, 3, 1, 2).copy())


class Oracle:
    """The networks as functions of NCHW images; `p` and `s` hold parameters and running statistics under our names, joined by slashes."""

    def __init__(self, variables, norm="batch", train=False):
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        self.p = {name: torch.tensor(np.asarray(leaf), requires_grad=True) for name, leaf in flat.items()}
        stats = traverse_util.flatten_dict(variables.get("batch_stats", {}), sep="/")
        self.s = {name: torch.tensor(np.asarray(leaf)) for name, leaf in stats.items()}
        self.kind, self.train = norm, train

    def conv(self, x, name, stride=1, reflect=False):
        kernel = self.p[f"{name}/kernel"].permute(3, 2, 0, 1)
        margin = (kernel.shape[-1] - 1) // 2
        if reflect:
            x, margin = F.pad(x, (margin,) * 4, mode="reflect"), 0
        return F.conv2d(x, kernel, self.p.get(f"{name}/bias"), stride=stride, padding=margin)

    def norm(self, x, name):
        name = f"{name}/norm"
        scale, bias = self.p[f"{name}/scale"], self.p[f"{name}/bias"]
        if self.kind == "batch":
            return F.batch_norm(x, self.s[f"{name}/mean"], self.s[f"{name}/var"], scale, bias, self.train, 0.1, 1e-5)
        if self.kind == "instance":
            return F.instance_norm(x, weight=scale, bias=bias)
        return F.group_norm(x, np.gcd(32, x.shape[1]), scale, bias)

    def wavelet(self, x, name, levels):
        """The cascade with torch's own convolutions: strided with fixed Haar filters down, transposed with the same up."""
        half, channels = 0.5, x.shape[1]
        signs = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
        filters = (half * torch.tensor(signs, dtype=torch.float32))[:, None].repeat(channels, 1, 1, 1)

        def depthwise(x, end):
            weight = self.p[f"{name}/{end}"].permute(3, 2, 0, 1)
            return F.conv2d(x, weight, padding="same", groups=weight.shape[0])

        coarse, stack = x, []
        for level in range(1, levels + 1):
            bands = F.conv2d(coarse, filters, stride=2, groups=channels).unflatten(1, (channels, 4)).transpose(1, 2).flatten(1, 2)
            stack.append(depthwise(bands, f"wavelet_kernel_{level}") * self.p[f"{name}/wavelet_scale_{level}"][:, None, None])
            coarse = bands[:, :channels]
        z = 0
        for y in reversed(stack):
            y = torch.cat([y[:, :channels] + z, y[:, channels:]], 1).unflatten(1, (4, channels)).transpose(1, 2).flatten(1, 2)
            z = F.conv_transpose2d(y, filters, stride=2, groups=channels)
        base = depthwise(x, "kernel") + self.p[f"{name}/bias"][:, None, None]
        return base * self.p[f"{name}/scale"][:, None, None] + z

    def resnet_block(self, x, name):
        y = F.relu(self.norm(self.conv(x, f"{name}/conv1", reflect=True), f"{name}/norm1"))
        return x + self.norm(self.conv(y, f"{name}/conv2", reflect=True), f"{name}/norm2")

    def resnet_down(self, x, name):
        maps = []
        for number in (1, 2, 3):
            x = self.conv(x, f"{name}/conv{number}", 1 if number == 1 else 2, number == 1)
            x = F.relu(self.norm(x, f"{name}/norm{number}"))
            maps.append(x)
        return maps

    def encoder(self, images, blocks):
        x = self.resnet_down(2 * images - 1, "down")[-1]
        for number in range(blocks):
            x = self.resnet_block(x, f"block_{number}")
        features = x
        for number in range(1, 5):
            x = F.relu(self.norm(self.conv(x, f"deep_conv{number}", 2), f"norm{number}"))
        return F.adaptive_avg_pool2d(x, 2).flatten(1) @ self.p["fc/kernel"] + self.p["fc/bias"], features

    def second(self, x, name, levels, wavelet):
        return self.wavelet(x, f"{name}wavelet", levels) if wavelet else self.conv(x, f"{name}conv2")

    def vmfe(self, x, wavelet=True):
        x = F.relu(self.norm(self.conv(x, "encoder/conv1", reflect=True), "encoder/norm1"))
        maps = [F.relu(self.norm(self.second(x, "encoder/", 3, wavelet), "encoder/norm2"))]
        for level in (1, 2):
            x = maps[-1]
            for number in (0, 1):
                name = f"encoder/level{level}_{number}"
                y = F.relu(self.norm(self.conv(x, f"{name}/conv1", 2 - number), f"{name}/norm1"))
                y = self.norm(self.second(y, f"{name}/", 1, wavelet), f"{name}/norm2")
                if number == 0:
                    x = self.norm(self.conv(x, f"{name}/shortcut", 2), f"{name}/shortcut_norm")
                x = F.relu(x + y)
            maps.append(x)
        return maps

    def gru(self, h, x):
        z, r = (torch.sigmoid(self.conv(torch.cat([h, x], 1), f"msfpm/gru/{name}")) for name in ("update", "reset"))
        return (1 - z) * h + z * torch.tanh(self.conv(torch.cat([r * h, x], 1), "msfpm/gru/candidate"))

    def msfpm(self, x1, x2, x3):
        h3 = torch.tanh(self.conv(x3, "msfpm/coarse", reflect=True))
        e2 = F.leaky_relu(self.conv(x2, "msfpm/middle1", 2, True), 0.01)
        h2 = self.gru(h3, torch.tanh(self.conv(e2, "msfpm/middle2", 1, True)))
        e1 = F.leaky_relu(self.conv(x1, "msfpm/fine1", 2, True), 0.01)
        return h3, h2, self.gru(h2, torch.tanh(self.conv(e1, "msfpm/fine2", 2, True)))

    def coa(self, x, features, fusion=0.2):
        q, k, v = (self.conv(y, f"coa/{name}").flatten(2) for y, name in ((x, "query"), (features, "key"), (features, "value")))
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, -1)
        found = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return x + fusion * self.norm(self.conv(found, "coa/out"), "coa/norm")

    def generator(self, images, features=None, blocks=6, encoder="vmfe", msfpm=True):
        x = 2 * images - 1
        x1, x2, x3 = self.resnet_down(x, "encoder") if encoder == "resnet" else self.vmfe(x, encoder == "vmfe")
        states = self.msfpm(x1, x2, x3) if msfpm else ()
        x = x3 if features is None else self.coa(x3, features)
        for number in range(blocks):
            x = self.resnet_block(x + states[number - 1] if 1 <= number <= len(states) else x, f"block_{number}")
        for number in (1, 2):
            kernel = self.p[f"up{number}/kernel"].permute(2, 3, 0, 1)
            x = F.conv_transpose2d(x, kernel, stride=2, padding=1, output_padding=1)
            x = F.relu(self.norm(x, f"norm{number}"))
        return (torch.tanh(self.conv(x, "tail", reflect=True)) + 1) / 2

    def patchgan(self, source, target):
        x = 2 * torch.cat([source, target], 1) - 1
        for number in (1, 2, 3, 4):
            x = self.conv(x, f"conv{number}", 2 if number < 4 else 1)
            x = F.leaky_relu(self.norm(x, f"norm{number}") if number > 1 else x, 0.2)
        return self.conv(x, "head")[:, 0]


def close(got, want, spread=1e-4):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=spread, atol=spread * np.abs(want).max())


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def images(*shape, seed=1):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def check_statistics(oracle, moved):
    for name, value in traverse_util.flatten_dict(moved, sep="/").items():
        np.testing.assert_allclose(value, oracle.s[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("norm", "train", "side"), [("batch", True, 96), slow("instance", True, 128), slow("group", False, 32), slow("batch", False, 64)]
)
def test_encoder(norm, train, side):
    model, x = StainEncoder(channels=4, blocks=2, norm=norm), images(2, side, side + 32, 3)
    variables = draw(model, x)
    oracle = Oracle(variables, norm, train)
    embedding, features = oracle.encoder(nchw(x), 2)
    (got, out), moved = jax.jit(lambda v, x: model.apply(v, x, train, mutable=["batch_stats"]))(variables, x)
    close(got, embedding, 1e-3)
    close(out["features"].transpose(0, 3, 1, 2), features, 1e-3)
    check_statistics(oracle, moved.get("batch_stats", {}))


def generator_case(settings, norm):
    model = StainGenerator(channels=8, blocks=4, norm=norm, attention="chunked", attention_chunk=13, **settings)
    x, features = images(2, 24, 32, 3), images(2, 6, 8, 12, seed=2)
    return model, x, features, draw(model, x, features)


@pytest.mark.parametrize(("norm", "train"), [("batch", True), slow("batch", False)])
def test_generator(norm, train):
    model, x, features, variables = generator_case({}, norm)
    oracle = Oracle(variables, norm, train)
    want = oracle.generator(nchw(x), nchw(features), 4)
    (got, _), moved = jax.jit(lambda v, *x: model.apply(v, *x, train, mutable=["batch_stats"]))(variables, x, features)
    close(got.transpose(0, 3, 1, 2), want)
    check_statistics(oracle, moved["batch_stats"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "norm", "train"), [({}, "batch", True), ({}, "instance", False), ({"encoder": "plain", "msfpm": False}, "group", True)]
)
def test_gradients_of_the_generator(settings, norm, train):
    model, x, features, variables = generator_case(settings, norm)
    weights, stats = images(2, 24, 32, 3, seed=3), variables.get("batch_stats", {})
    oracle = Oracle(variables, norm, train)
    want = oracle.generator(nchw(x), nchw(features), 4, **settings)
    (want * nchw(weights)).sum().backward()
    inputs = jnp.asarray(x), jnp.asarray(features)

    @jax.jit
    def run(params):
        def loss(params):
            (image, _), moved = model.apply({"params": params, "batch_stats": stats}, *inputs, train, mutable=["batch_stats"])
            return (image * weights).sum(), (image, moved)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (image, moved) = run(variables["params"])
    close(image.transpose(0, 3, 1, 2), want, 1e-4)
    check_statistics(oracle, moved.get("batch_stats", {}))
    gradient = traverse_util.flatten_dict(gradient, sep="/")
    assert gradient.keys() == oracle.p.keys()
    largest = max(float(np.abs(leaf).max()) for leaf in gradient.values())
    for name, leaf in gradient.items():
        theirs = oracle.p[name].grad.numpy()
        np.testing.assert_allclose(leaf, theirs, rtol=1e-2, atol=1e-3 * np.abs(theirs).max() + 1e-6 * largest, err_msg=name)


def test_pix2pix_generator():
    model, x = pix2pix_generator(3, channels=8), images(1, 16, 24, 3)
    variables = draw(model, x)
    want = Oracle(variables).generator(nchw(x), None, 3, "resnet", False)
    close(jax.jit(model.apply)(variables, x)[0].transpose(0, 3, 1, 2), want)


@pytest.mark.parametrize(("norm", "train"), [("batch", True), ("batch", False), ("instance", True)])
def test_discriminator(norm, train):
    model, source, target = PatchGAN(channels=8, norm=norm), images(2, 40, 48, 3), images(2, 40, 48, 3, seed=2)
    variables = draw(model, source, target)
    oracle = Oracle(variables, norm, train)
    want = oracle.patchgan(nchw(source), nchw(target))
    (got, _), moved = jax.jit(lambda v, *x: model.apply(v, *x, train, mutable=["batch_stats"]))(variables, source, target)
    assert got.shape == (2, 3, 4)
    close(got, want, 1e-3)
    check_statistics(oracle, moved.get("batch_stats", {}))
