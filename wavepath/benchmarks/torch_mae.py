"""The peer of `wavepath bench step`: the masked autoencoder of transformers in PyTorch, of the same sizes, as one would train it there.

Same widths, depths, heads, patch, mask ratio, loss, optimiser; its own initial values and masks. A step takes the same uint8 batch, normalises it,
and updates; fused scaled-dot-product attention, fused AdamW. Two differences in arithmetic remain and are counted: it projects all patches before it
masks, and it predicts the visible ones too. It augments nothing, measures no gradient norm and keeps no average.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from wavepath.errors import ConfigError

INSTALL = 'pip install "wavepath[bench]"'


def require(names: Sequence[str] = ("torch", "transformers")) -> None:
    """Refuses at once where a peer is not installed.

    Raises:
        ConfigError: it is not.
    """
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--peer torch needs {' and '.join(missing)}: {INSTALL}")


def check(config: Any) -> None:
    """Refuses configs whose step the peer does not take.

    Raises:
        ConfigError: naming the field, and the value that the peer has.
    """
    if config.task != "mae":
        raise ConfigError(f"--peer torch is a masked autoencoder, and config.task={config.task!r} has no peer; leave it out")
    loss, model = config.loss, config.model
    for wrong, fix in (
        (loss.ssim or loss.glcm or loss.contrast_weight or loss.second.start or loss.mse != 1, "squared error alone (config.loss)"),
        (model.drop_path, "config.model.drop_path=0"),
        (config.optim.accumulate != 1, "config.optim.accumulate=1"),
        (config.optim.name not in ("adamw",), "config.optim.name=adamw"),
        (config.ema, "config.ema=0"),
        (model.dtype not in ("float32", "bfloat16"), "config.model.dtype=float32 or bfloat16"),
        (config.prepare.tiles.size != model.image_size, "config.prepare.tiles.size equal to config.model.image_size"),
    ):
        if wrong:
            raise ConfigError(f"--peer torch trains with {fix}; change it, or leave the peer out")


def check_all(configs: Iterable[Any]) -> None:
    """Refuses variants that one peer cannot stand beside.

    Raises:
        ConfigError: one that `check` refuses, or two of different sizes, batches or dtypes.
    """
    configs = list(configs)
    for config in configs:
        check(config)
    first, *others = ({**sizes(config), "batch_size": config.batch_size, "dtype": config.model.dtype} for config in configs)
    for other in others:
        if wrong := [name for name in first if first[name] != other[name]]:
            raise ConfigError(
                f"--peer torch is one network and one batch, and the variants differ in {wrong[0]} ({first[wrong[0]]} and {other[wrong[0]]}); "
                "measure each by a command of its own"
            )


def sizes(config: Any) -> dict[str, Any]:
    """What transformers calls the sizes of a config: keywords of `ViTMAEConfig`."""
    from wavepath.models.vit import variant

    model = config.model
    width, depth, heads = variant(model.variant)
    return dict(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width, hidden_act="gelu",
        image_size=model.image_size, patch_size=model.patch, num_channels=3, qkv_bias=True, mask_ratio=model.mask_ratio,
        decoder_hidden_size=model.decoder_width, decoder_num_hidden_layers=model.decoder_depth, decoder_num_attention_heads=model.decoder_heads,
        decoder_intermediate_size=4 * model.decoder_width, norm_pix_loss=bool(config.loss.norm_pix), layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def extra_flops(config: Any) -> float:
    """What the peer computes beyond our step, for one image: patches projected and then masked, and visible ones predicted, with their gradients."""
    from wavepath.models.vit import variant

    model = config.model
    patches = (model.image_size // model.patch) ** 2
    keep = int(patches * (1.0 - model.mask_ratio) + 1e-6)
    pixels, width = 3 * model.patch**2, variant(model.variant).width
    # The gradient by the pixels is not computed by either.
    return 2.0 * pixels * (2 * (patches - keep) * width + 3 * (keep + 1) * model.decoder_width)


def make_step(config: Any, threads: int) -> Any:
    """The peer's step on a synthetic batch, in the form of ours.

    Args:
        config: resolved; `check` has accepted it. threads: of PyTorch's pool.

    Raises:
        ConfigError: PyTorch does not see the accelerator that JAX computes on, or the parameters are not as many as ours.
    """
    import jax
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from wavepath.benchmarks.step import Step
    from wavepath.planning.standins import build_task, host_batch

    torch.set_num_threads(threads)
    device = _device()
    task = build_task(config)
    torch.manual_seed(config.seed)
    settings = ViTMAEConfig(**sizes(config))
    settings._attn_implementation = "sdpa"
    model = ViTMAEForPreTraining(settings).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    ours = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)).params))
    if count != ours:
        raise ConfigError(f"the peer has {count} trained parameters and our network {ours}, so it is not the same network")
    rate = float(task.rate(int(config.train.steps) // 2))
    optim = config.optim
    groups = [
        {"params": [parameter for parameter in trained if (parameter.ndim > 1) == decays], "weight_decay": optim.weight_decay if decays else 0.0}
        for decays in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(optim.b1, optim.b2), fused=True)
    images = torch.from_numpy(host_batch(task)["image"]).to(device)
    mean, std = (torch.tensor(np.asarray(config.model[name], np.float32), device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    half = config.model.dtype == "bfloat16"

    def call() -> None:
        pixels = (images.permute(0, 3, 1, 2).float().div_(255) - mean) / std
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = model(pixel_values=pixels).loss
        loss.backward()
        if optim.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        optimiser.step()
        made.metrics = {"loss": (loss.detach(), 1.0)}
        _wait(device)

    share = extra_flops(config) / float(task.flops())
    facts = {
        "batch": int(config.batch_size), "devices": 1, "device_kind": str(device), "backend": "torch", "dtype": config.model.dtype,
        "flops": float(task.flops()), "parameters": count,
        "notes": [
            f"{type(model).__name__} with {model.config._attn_implementation} attention, fused AdamW, {torch.get_num_threads()} threads; as many"
            f" trained parameters; it computes {100 * share:.1f} % more FLOPs than are counted (all patches projected, all predicted)"
        ],
    }  # fmt: skip
    made = Step(call, facts)
    return made


def product_call(side: int) -> tuple[Callable[[], Any], float]:
    """A square matrix product in PyTorch, as a call, and its FLOPs."""
    import torch

    device = _device()
    a = torch.full((side, side), 0.5, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)

    def call() -> None:
        torch.mm(a, a)
        _wait(device)

    return call, 2.0 * side**3


def _device() -> Any:
    """Where JAX computes, as PyTorch calls it.

    Raises:
        ConfigError: PyTorch cannot compute there.
    """
    import jax
    import torch

    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    kind = jax.default_backend()
    raise ConfigError(f"--peer torch: this PyTorch does not see the {kind} that JAX computes on; install one that does, or leave the peer out")


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
