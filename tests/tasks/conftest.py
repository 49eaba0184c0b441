"""A network of seconds, and batches for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from wavepath.defaults import train_defaults
from wavepath.models.vit import VARIANTS, Variant


@pytest.fixture(autouse=True)
def tiny_variant(monkeypatch):
    monkeypatch.setitem(VARIANTS, "test", Variant(16, 2, 2))


@pytest.fixture
def config():
    config = train_defaults()
    config.model.variant = "test"
    config.model.patch, config.model.image_size, config.model.dtype = 4, 16, "float32"
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = 8, 1, 2
    config.batch_size, config.lr = 16, 0.1
    config.prepare.tiles.size = 16
    config.optim.name, config.optim.warmup = "sgd", "0"
    config.train.steps = 10
    return config


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (16, 4, 4, 3), dtype=np.uint8)
    batch = {
        "image": coarse.repeat(4, 1).repeat(4, 2), "example_id": np.arange(16, dtype=np.int32) * 3, "epoch": np.ones(16, np.int32),
        "position": np.arange(32, 48, dtype=np.uint32),
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}
