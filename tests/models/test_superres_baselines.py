"""The baselines have the published sizes, and the config group builds each of them."""

import jax
import numpy as np
import pytest

from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError
from wavepath.models.superres_baselines import build_superres, superres_flops


def settings(**changed):
    group = train_defaults().superres
    with group.unlocked():
        group.update(changed)
    return group


def shapes(model, side=8):
    lr = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), lr)
    return sum(leaf.size for leaf in jax.tree.leaves(params)), jax.eval_shape(model.apply, params, lr)[0].shape


@pytest.mark.parametrize(
    ("network", "scale", "parameters"),
    [("edsr", 2, 1_369_859), ("edsr", 4, 1_517_571), ("srcnn", 2, 20_099), ("edsr", 8, 1_665_283)],
)
def test_parameters_are_the_published_ones(network, scale, parameters):
    """EDSR-baseline 1.37 M and 1.52 M; SRCNN 9-1-5 with three channels."""
    group = settings(network=network, scale=scale)
    assert shapes(build_superres(group)) == (parameters, (1, 8 * scale, 8 * scale, 3))


def test_rcan_has_the_published_parameters():
    """15.4 M at 2x, from small ones: base + groups (convolution + blocks x block)."""
    one, longer, more = (
        shapes(build_superres(settings(network="rcan", rcan=dict(groups=groups, blocks=blocks))))[0] for groups, blocks in [(1, 1), (1, 2), (2, 1)]
    )
    block = longer - one
    assert one + 9 * (more - one - block) + 199 * block == 15_444_643


def test_flops_are_those_that_the_compiler_counts():
    for changed in (
        dict(network="srcnn", patch=32), dict(network="edsr", patch=32, scale=4),
        dict(network="cwt-net", patch=32, blocks=2, channels=16, wavelet_branch=False),
    ):  # fmt: skip
        group = settings(**changed)
        model, lr = build_superres(group), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), lr)
        counted = jax.jit(model.apply).lower(params, lr).cost_analysis()["flops"]
        # The compiler leaves out products with the zeros of the border, and counts activations and the bicubic skip.
        assert superres_flops(group) == pytest.approx(counted, rel=0.12)
    whole, alone = (superres_flops(settings(wavelet_branch=branch)) for branch in (True, False))
    assert whole - alone > 12 * 2 * 4096**2 * 576  # the scores of twelve blocks


def test_what_does_not_fit_is_refused():
    for changed, said in [
        (dict(network="vdsr"), "network"), (dict(scale=3), "scale"), (dict(mean=(0.5,)), "mean"), (dict(growth="x"), "growth"),
        (dict(network="srcnn", srcnn=dict(kernels=(9, 5), channels=(64, 32))), "kernels"), (dict(skip="nearest"), "skip"),
        (dict(reduction=7), "reduction"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            shapes(build_superres(settings(**changed)))
    assert build_superres(settings(), mean=(0.7, 0.4, 0.6)).mean == (0.7, 0.4, 0.6)
