"""Settings that only tests of many compilations want."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """Half the time of a compilation or less, for programs that run a few steps: the same partition and collectives, plainer machine code."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
