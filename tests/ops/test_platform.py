"""Operators choose their form for the kind of device that they are traced for, not for the one that traces."""

import jax
import jax.numpy as jnp
import pytest

from wavepath.ops.depthwise import depthwise_conv
from wavepath.ops.glcm import default_formulation
from wavepath.ops.platform import platform, traced_for


def test_the_default_is_where_jax_computes():
    assert platform() == jax.default_backend()
    with traced_for(None):
        assert platform() == jax.default_backend()


def test_a_name_holds_inside_its_block():
    with traced_for("tpu"):
        assert platform() == "tpu"
        with traced_for("gpu"):
            assert platform() == "gpu"
        assert platform() == "tpu"
    assert platform() == jax.default_backend()


def test_a_trace_for_one_kind_is_not_used_for_another():
    x, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 1, 2))
    inner = jax.jit(lambda x: depthwise_conv(x, kernel))
    assert "conv_general" not in str(jax.make_jaxpr(inner)(x))
    with traced_for("tpu"):
        assert "conv_general" in str(jax.make_jaxpr(inner)(x))
    assert "conv_general" not in str(jax.make_jaxpr(inner)(x))


@pytest.mark.parametrize(("kind", "form"), [("cpu", "scatter"), ("tpu", "matmul")])
def test_co_occurrence_takes_the_form_of_the_kind(kind, form):
    from wavepath.ops.glcm_membership import make_membership

    with traced_for(kind):
        assert default_formulation(make_membership("triangular", 16, None, None), 1, 64, 4) == form
