"""The README's python examples run as they stand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_example(block):
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.random(shape), jnp.float32)

    names = {
        "images": random(2, 32, 32, 3), "others": random(2, 32, 32, 3), "grey": random(2, 32, 32), "signals": random(2, 64),
        "predicted": random(5, 16, 16), "target": random(5, 16, 16),
    }
    exec(block, names)
    np.testing.assert_allclose(names["again"], names["images"], atol=1e-5)
    assert len(names["nodes"]) == 16 and names["matrices"].shape == (2, 4, 32, 32) and names["loss"].shape == (5,)
    assert names["energy"].shape == (2, 3) and names["scalogram"].shape == (3, 2, 64) and names["alike"].shape == (2,)
    layer = names["layer"]
    out = layer.apply(layer.init(jax.random.key(0), names["images"]), names["images"])
    assert out.shape == names["images"].shape
