"""An encoder by itself: the task `encoder` of runs that `wavepath import` makes, and what every task with a vision transformer shares about it.

A run of this task gives features (`wavepath embed`), starts other runs (`config.init_from` of the tasks `mae` and `finetune`), and is exported.
It is not trained: an encoder has no objective of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wavepath.errors import CheckpointError, ConfigError
from wavepath.models.layers import MLPS, POSITIONS, Form
from wavepath.models.vit import Variant, ViT, variant, vit_flops
from wavepath.ops.augment import center
from wavepath.tasks.base import Batch, Metrics, State, merge_params
from wavepath.tasks.single import SingleNetwork

NETWORK = ENCODER = "encoder"
CUSTOM = "custom"
OUTPUTS = ("cls", "mean")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def encoder_size(model: Any) -> Variant:
    """Width, depth and heads that `config.model` asks for: those of `variant`, or of `variant=custom` the fields themselves.

    Raises:
        ConfigError: an unknown variant, or numbers that do not fit together.
    """
    if model.variant != CUSTOM:
        given = [name for name in ("width", "depth", "heads") if model[name]]
        if given:
            raise ConfigError(f"config.model.{given[0]}={model[given[0]]} is of config.model.variant=custom, not {model.variant!r}")
        size = variant(model.variant)
    else:
        size = Variant(int(model.width), int(model.depth), int(model.heads))
    if min(size) < 1 or size.width % size.heads:
        raise ConfigError(
            f"config.model.width={size.width}, depth={size.depth} and heads={size.heads} make no encoder; give all three, heads a divisor of width"
        )
    if model.positions == "sincos" and size.width % 4:
        raise ConfigError(f"config.model.width={size.width} must be a multiple of 4 for config.model.positions=sincos")
    return size


def encoder_form(model: Any) -> Form:
    """What `config.model` says of an encoder beside its size.

    Raises:
        ConfigError: an unknown choice or a number out of range.
    """
    for name, choices in (("mlp", MLPS), ("positions", POSITIONS)):
        if model[name] not in choices:
            raise ConfigError(f"config.model.{name}={model[name]!r} is unknown; choose one of {', '.join(choices)}")
    for name in ("mlp_hidden", "norm_eps", "layer_scale", "register_tokens", "position_grid"):
        if model[name] < 0:
            raise ConfigError(f"config.model.{name}={model[name]} must not be negative")
    return Form(
        mlp=model.mlp, hidden=int(model.mlp_hidden), norm_eps=float(model.norm_eps), qkv_bias=bool(model.qkv_bias),
        layer_scale=float(model.layer_scale), registers=int(model.register_tokens), positions=model.positions,
        grid=int(model.position_grid) or model.image_size // model.patch, final_norm=bool(model.final_norm),
    )


def encoder_dtype(name: str) -> Any:
    """The compute type that `config.model.dtype` names.

    Raises:
        ConfigError: an unknown one.
    """
    if name not in DTYPES:
        raise ConfigError(f"config.model.dtype={name!r} is unknown; choose float32 or bfloat16")
    return jnp.dtype(name)


def take_encoder(own: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[str, Any]:
    """The encoder of whatever network has one, in the layout (scanned or not) and the dtypes of `own`.

    Args:
        own: parameters of the encoder that is to be replaced.
        params: by network, as another run's `State.params`.

    Returns:
        Name of the network that it was found in, and the parameters, on the host.

    Raises:
        CheckpointError: no encoder there, or one of another form (named).
    """
    origins = [name for name, tree in params.items() if ENCODER in tree]
    if not origins:
        raise CheckpointError(
            f"the parameters to start from hold {', '.join(params) or 'nothing'}, and none of them has an encoder; give config.init_from a "
            "pretraining run such as of configs/wise_mae.py"
        )
    found = dict(params[origins[0]][ENCODER])
    found["blocks"] = arranged(found["blocks"], "scanned" in own["blocks"])
    return origins[0], merge_params(own, found, ENCODER)


def arranged(blocks: Mapping[str, Any], scanned: bool) -> dict[str, Any]:
    """A stack's parameters as `models.layers.Stack` has them with `scan`, one array for all blocks, or without, a tree for each block."""
    if ("scanned" in blocks) == scanned:
        return dict(blocks)
    if scanned:
        layers = [blocks[str(number)] for number in range(len(blocks))]
        return {"scanned": jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *layers)}
    depth = len(jax.tree.leaves(blocks["scanned"])[0])
    return {str(number): jax.tree.map(lambda leaf, n=number: np.asarray(leaf)[n], blocks["scanned"]) for number in range(depth)}


class Encoder(SingleNetwork):
    """The task `encoder`. Outputs of `predict`: `cls` (class token), `mean` (of the patch tokens), both behind the final norm where there is one."""

    networks = (NETWORK,)
    embeds = True

    def __init__(self, config: Any):
        super().__init__(config)
        model = config.model
        self.size, self.form = encoder_size(model), encoder_form(model)
        self.dtype = encoder_dtype(model.dtype)
        self.param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        if model.image_size % model.patch:
            raise ConfigError(f"config.model.patch={model.patch} does not divide config.model.image_size={model.image_size}")
        self.model = ViT(
            *self.size, patch=model.patch, attention=model.attention, scan=model.scan, remat=model.remat, dtype=self.dtype,
            param_dtype=self.param_dtype, form=self.form,
        )

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        side = self.config.prepare.tiles.size
        return {"image": jax.ShapeDtypeStruct((self.config.batch_size, side, side, 3), jnp.uint8)}

    def init(self, rng: Array) -> State:
        side = self.config.model.image_size
        params = self.model.init(rng, jnp.zeros((1, side, side, 3), self.param_dtype))["params"]
        return State(step=jnp.zeros((), jnp.int32), params={NETWORK: {ENCODER: params}}, opt={})

    def predict(self, state: State, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Features of central views.

        Args:
            state: of this task.
            batch: `image` uint8 [b, h, w, 3].
            names: of `cls`, `mean`; None: both.

        Returns:
            float32 [b, d] each.
        """
        names = set(OUTPUTS if names is None else names)
        if unknown := names - set(OUTPUTS):
            raise ValueError(f"unknown outputs {sorted(unknown)}; there are {OUTPUTS}")
        images = self.normalise(center(batch["image"], self.config.model.image_size, self.param_dtype))
        _, out = self.model.apply({"params": self.kept(state)[ENCODER]}, images)
        return {name: out[name].astype(jnp.float32) for name in OUTPUTS if name in names}

    def load(self, state: State, params: Mapping[str, Any]) -> State:
        _, encoder = take_encoder(state.params[NETWORK][ENCODER], params)
        return state.replace(params={NETWORK: {ENCODER: encoder}})

    def flops(self) -> float:
        """Of a forward pass: there is no other."""
        model = self.config.model
        return vit_flops((model.image_size // model.patch) ** 2, self.size, model.patch, form=self.form)

    def sources(self) -> Any:
        self._refuse()

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        self._refuse()

    def eval_step(self, state: State, batch: Batch) -> Metrics:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            "config.task='encoder' holds an encoder and no objective to train it; train with --config=configs/wise_mae.py or configs/finetune.py and"
            " --config.init_from=RUN"
        )
