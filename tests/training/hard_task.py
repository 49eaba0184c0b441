"""The hardest tenant of the training loop, for tests only: a small GAN in which everything couples with everything.

Two networks with an optimiser each, batch normalisation whose statistics are those of the whole batch, InfoNCE over the whole batch, noise
and dropout from per-example keys, a coin from the step's key, an average of the generator's weights. Run as a program it trains, so that
tests can kill it:

    python hard_task.py WORKDIR --steps 12 --backend pmap --devices 8
"""

import argparse
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavepath.data.order import GlobalOrder
from wavepath.defaults import train_defaults
from wavepath.ops import collectives, random
from wavepath.tasks.base import State, Task

SIDE, WIDTH = 8, 8
INIT = nn.initializers.lecun_uniform()  # a normal draw compiles for seconds


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the whole batch, however many shards it has; running statistics in the collection `stats`."""

    @nn.compact
    def __call__(self, x, train: bool):
        width = x.shape[-1:]
        mean = self.variable("stats", "mean", jnp.zeros, width, x.dtype)
        var = self.variable("stats", "var", jnp.ones, width, x.dtype)
        scale = self.param("scale", nn.initializers.ones, width, x.dtype)
        bias = self.param("bias", nn.initializers.zeros, width, x.dtype)
        m, v = mean.value, var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            m = collectives.pmean(x.mean(axes))
            v = collectives.pmean(((x - m) ** 2).mean(axes))
            if not self.is_initializing():
                mean.value, var.value = 0.9 * mean.value + 0.1 * m, 0.9 * var.value + 0.1 * v
        return (x - m) * jax.lax.rsqrt(v + 1e-3) * scale + bias


class Generator(nn.Module):
    """Image and noise to image; the drop mask comes ready-made, one for each example."""

    @nn.compact
    def __call__(self, x, noise, keep, train: bool):
        dtype = x.dtype
        x = nn.Conv(WIDTH, (3, 3), param_dtype=dtype, kernel_init=INIT)(jnp.concatenate([x, noise], -1))
        x = nn.tanh(GlobalBatchNorm()(x, train)) * keep
        return nn.sigmoid(nn.Conv(3, (3, 3), param_dtype=dtype, kernel_init=INIT)(x))


class Discriminator(nn.Module):
    """Image to a logit and an embedding [b, 8]."""

    @nn.compact
    def __call__(self, x, train: bool):
        dtype = x.dtype
        x = nn.tanh(GlobalBatchNorm()(nn.Conv(WIDTH, (3, 3), strides=2, param_dtype=dtype, kernel_init=INIT)(x), train))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(1, param_dtype=dtype, kernel_init=INIT)(x)[:, 0], nn.Dense(8, param_dtype=dtype, kernel_init=INIT)(x)


def info_nce(a, b, temperature=0.2):
    """Per-row InfoNCE [b] of a against the rows of b in the whole batch."""
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    logits = a @ collectives.all_gather(b).T / temperature
    own = jnp.arange(a.shape[0]) + collectives.index() * a.shape[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, own)


class HardTask(Task):
    """See the module. `poison` is a step (from 1) whose loss becomes NaN."""

    networks = ("g", "d")
    coupled = True
    poison = 0
    slow = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.g, self.d = Generator(), Discriminator()
        make = {"sgd": optax.sgd, "adamw": optax.adamw}[config.optim.name]
        self.tx = {"g": make(config.lr), "d": make(2 * config.lr)}

    def batch_spec(self):
        b = self.config.batch_size
        return {
            "image": jax.ShapeDtypeStruct((b, SIDE, SIDE, 3), jnp.uint8), "example_id": jax.ShapeDtypeStruct((b,), jnp.int32),
            "epoch": jax.ShapeDtypeStruct((b,), jnp.int32), "position": jax.ShapeDtypeStruct((b,), jnp.uint32),
        }

    def init(self, rng):
        one = jnp.zeros((1, SIDE, SIDE, 3), jnp.result_type(float))
        noise, keep = one[..., :1], jnp.ones((1, 1, 1, WIDTH), one.dtype)
        g = self.g.init(random.named(rng, "g"), one, noise, keep, False)
        d = self.d.init(random.named(rng, "d"), one, False)
        params = {"g": g["params"], "d": d["params"]}
        return State(
            step=jnp.zeros((), jnp.int32), params=params, opt={name: self.tx[name].init(params[name]) for name in params},
            stats={"g": g["stats"], "d": d["stats"]}, ema={"g": jax.tree.map(jnp.copy, params["g"])}, extra={"seen": jnp.zeros((), jnp.int32)},
        )

    def _inputs(self, state, batch):
        x = batch["image"].astype(jnp.result_type(float)) / 255
        keys = random.example_keys(self.config.seed, batch["example_id"], batch["epoch"])
        noise = jax.vmap(lambda key: jax.random.normal(key, (SIDE, SIDE, 1), jnp.float32))(random.named(keys, "noise")).astype(x.dtype)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (1, 1, WIDTH)))(random.named(keys, "dropout")).astype(x.dtype) / 0.8
        flip = random.coin(random.step_key(self.config.seed, state.step), 0.5)
        return jnp.where(flip, x[:, :, ::-1], x), noise, keep

    def train_step(self, state, batch):
        x, noise, keep = self._inputs(state, batch)
        variables = {name: {"params": state.params[name], "stats": state.stats[name]} for name in self.networks}

        def d_loss(params):
            fake, _ = self.g.apply(variables["g"], x, noise, keep, True, mutable=["stats"])
            (real_logit, _), _ = self.d.apply({**variables["d"], "params": params}, x, True, mutable=["stats"])
            (fake_logit, _), new = self.d.apply({**variables["d"], "params": params}, jax.lax.stop_gradient(fake), True, mutable=["stats"])
            return (nn.softplus(-real_logit) + nn.softplus(fake_logit)).mean(), new["stats"]

        def g_loss(params):
            fake, new = self.g.apply({**variables["g"], "params": params}, x, noise, keep, True, mutable=["stats"])
            (logit, embedded), _ = self.d.apply(variables["d"], fake, True, mutable=["stats"])
            (_, anchor), _ = self.d.apply(variables["d"], x, True, mutable=["stats"])
            nce = info_nce(embedded, anchor)
            rows = nn.softplus(-logit) + nce + 4 * jnp.abs(fake - x).mean((1, 2, 3))
            return rows.mean(), (new["stats"], rows, nce)

        (lost_d, stats_d), grad_d = jax.value_and_grad(d_loss, has_aux=True)(state.params["d"])
        (_, (stats_g, rows, nce)), grad_g = jax.value_and_grad(g_loss, has_aux=True)(state.params["g"])
        grads = collectives.pmean({"g": grad_g, "d": grad_d})
        params, opt = {}, {}
        for name in self.networks:
            updates, opt[name] = self.tx[name].update(grads[name], state.opt[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        state = state.replace(
            step=state.step + 1, params=params, opt=opt, stats={"g": stats_g, "d": stats_d},
            ema={"g": jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema["g"], params["g"])},
            extra={"seen": state.extra["seen"] + collectives.psum(jnp.int32(x.shape[0]))},
        )
        count = x.shape[0]
        if self.poison:
            rows = jnp.where(state.step == self.poison, jnp.nan, rows)
        return state, {
            "loss": (rows.sum(), count), "d_loss": (lost_d * count, count), "nce": (nce.sum(), count),
            "grad_norm": (optax.global_norm(grads) * count, count), "lr": (self.config.lr * count, count),
            # Which examples stand where: small whole numbers, so the same to the bit in any division of the batch.
            "order": ((batch["example_id"] * (batch["position"] % 61 + 1).astype(jnp.int32)).sum(), count),
        }

    def eval_step(self, state, batch):
        x, noise, keep = self._inputs(state, batch)
        fake = self.g.apply({"params": state.ema["g"], "stats": state.stats["g"]}, x, noise, jnp.ones_like(keep), False)
        return {"loss": ((jnp.abs(fake - x).mean((1, 2, 3)) * batch["mask"]).sum(), batch["mask"].sum())}

    def predict(self, state, batch, names=None):
        x, noise, keep = self._inputs(state, batch)
        fake = self.g.apply({"params": state.ema["g"], "stats": state.stats["g"]}, x, noise, jnp.ones_like(keep), False)
        outputs = {"input": x, "masked": x * 0.5, "reconstruction": fake, "mean": fake.mean((1, 2)), "example_id": batch["example_id"]}
        return {name: value for name, value in outputs.items() if names is None or name in names}

    def flops(self):
        return 1e6

    def sources(self):
        return FakeSource(slow=self.slow)


class FakeSource:
    """Forty images that are a function of their index."""

    name, image_shape, blocks = "forty made images", (SIDE, SIDE, 3), [40]

    def __init__(self, count=40, slow=0.0):
        self.count, self.slow = count, slow

    def __len__(self):
        return self.count

    def images(self, ids):
        time.sleep(self.slow)
        return np.stack([np.random.default_rng(int(i)).integers(0, 256, self.image_shape, np.uint8) for i in ids])

    def meta(self, index):
        return {"slide": "made", "x": index, "y": 0, "mpp": 0.25}


def share(positions, host):
    """The rows of one process."""
    return np.split(positions, host[1])[host[0]]


class FakePipeline:
    """The contract of `wavepath.data.pipeline` without TensorFlow."""

    @staticmethod
    def batches(source, *, batch_size, seed, start_position=0, host=(0, 1), **_):
        order, start = GlobalOrder(len(source), seed), start_position
        while True:
            positions = share(np.arange(start, start + batch_size), host)
            ids, epochs = order.example(positions)
            yield {
                "image": source.images(ids), "example_id": ids.astype(np.int32), "epoch": epochs.astype(np.int32),
                "position": positions.astype(np.uint32),
            }
            start += batch_size

    @staticmethod
    def eval_batches(source, batch_size, *, limit=0, host=(0, 1), **_):
        count = min(limit or len(source), len(source))
        for start in range(0, count, batch_size):
            positions = share(np.arange(start, start + batch_size), host)
            ids = np.minimum(positions, count - 1)
            yield {
                "image": source.images(ids), "example_id": ids.astype(np.int32), "epoch": np.zeros(len(ids), np.int32),
                "position": positions.astype(np.uint32), "mask": (positions < count).astype(np.float32),
            }


def hard_config(steps=6, **fields):
    """A config for the hard task; `fields` are dotted names with `__` for the dot."""
    config = train_defaults()
    config.task, config.batch_size, config.lr = "hard", 16, 0.05
    config.optim.name, config.optim.warmup = "sgd", "0"
    config.train.steps, config.train.log_every, config.train.save_every = steps, 1, 2
    config.train.panels_every, config.train.eval_every, config.train.eval_examples = 0, 0, 24
    config.writers.tensorboard = False
    config.parallel.devices = 1
    config.data.dir = "made"  # no phantoms are wanted
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config.lock()


def leaves(state):
    """A state's arrays on the host, by path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--backend", default="jit")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that each batch takes, so that a test can hit a step")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--look", action="store_true", help="evaluate and draw at the end")
    parser.add_argument("--save-seconds", type=float, default=0.0)
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--process", type=int, default=-1)
    args = parser.parse_args()
    from wavepath.errors import EXIT_PREEMPTED
    from wavepath.training import distributed
    from wavepath.training.loop import train

    if args.coordinator:
        distributed.start(args.coordinator, args.processes, args.process)
    HardTask.slow = args.slow
    looks = dict(train__panels_every=args.steps, train__eval_every=args.steps) if args.look else {}
    config = hard_config(
        args.steps, optim__name="adamw", parallel__backend=args.backend, parallel__devices=args.devices, parallel__fsdp=args.fsdp,
        parallel__fsdp_min_size=8, train__save_seconds=args.save_seconds, **looks,
    )
    result = train(config, args.workdir, task_factory=HardTask, pipeline=FakePipeline)
    return EXIT_PREEMPTED if result.status == "preempted" else 0


if __name__ == "__main__":
    sys.exit(main())
