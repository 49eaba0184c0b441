"""What a run would read from its data, replaced by stand-ins: durations in steps, measured constants, frozen encoders, a batch of random pixels.

For whoever compiles or times a step without any data. None of it changes a shape, and so neither memory nor time; the losses mean nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wavepath.tasks.base import Task, build
from wavepath.training import durations

EXAMPLES = 1_000_000  # of an epoch, where the data are not known
_CLASSES = 2  # where the labels would say
_MEAN_RGB = (0.7204, 0.4298, 0.6379)  # METHODS 4.7


def resolved(config: ConfigDict, *, examples: int = EXAMPLES, batch: int | None = None) -> ConfigDict:
    """A locked copy with its durations in steps, of another batch size where one is given; staining without encoders takes random ones.

    Args:
        config: a training config.
        examples: of an epoch.
        batch: examples of a step; None: the config's.

    Raises:
        ConfigError: durations that do not fit together.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if batch is not None:
            config.batch_size = int(batch)
        if config.task == "stain" and not config.encoders:
            config.encoders = "random"  # of the same form as those of a first stage
    return durations.resolve(config, examples)


def constants(task: Task) -> dict[str, Any]:
    """Stand-ins for what `task.measure` finds in the training source: ranges of normalised values, classes, a mean colour."""
    config = task.config
    low, high = (
        float(extreme((value - mean) / std for mean, std in zip(config.model.mean, config.model.std, strict=True)))
        for extreme, value in ((min, 0.0), (max, 1.0))
    )
    return {
        "pixel_range": [low, high], "value_range": [low, high], "classes": [str(number) for number in range(config.finetune.classes or _CLASSES)],
        "mean": list(_MEAN_RGB),
    }


def build_task(config: ConfigDict) -> Task:
    """The task of a resolved config, ready to be compiled: its constants are the stand-ins."""
    task = build(config)
    task.constants = constants(task)
    return task


def host_batch(task: Task, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch in the shapes that the task asks for: random pixels, examples numbered from 0, labels of the first two classes."""
    rng = np.random.default_rng(seed)

    def fill(name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        if spec.dtype == jnp.uint8:
            return rng.integers(0, 256, spec.shape, np.uint8)
        if jnp.issubdtype(spec.dtype, jnp.floating):
            return rng.random(spec.shape).astype(spec.dtype)
        numbers = np.arange(int(np.prod(spec.shape)), dtype=spec.dtype).reshape(spec.shape)
        return numbers % _CLASSES if name == "label" else np.zeros_like(numbers) if name == "epoch" else numbers

    return {name: fill(name, spec) for name, spec in task.batch_spec().items()}
