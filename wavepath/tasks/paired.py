"""The part of a task that both stages of virtual staining share: windows of an H&E image and of its immunostain, cut at one place."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wavepath.errors import ConfigError
from wavepath.ops.augment import aligned_windows
from wavepath.tasks.base import Batch, Task, kept_out, trained_on

HE, IHC = SIDES = ("he", "ihc")  # columns of the data, and their encoders


class PairTask(Task):
    """A task on stained pairs. Subclasses set `crop` (px, from `config.stain.crop`) and `param_dtype`."""

    coupled = True
    crop: int
    param_dtype: Any

    def sources(self) -> Any:
        """The pairs that the config names.

        Raises:
            ConfigError: settings that training on pairs would not follow. (Whoever only restores a run does not mind them.)
        """
        self._check_training()
        return super().sources()

    def _check_training(self) -> None:
        config, augment = self.config, self.config.augment
        for problem, message in (
            (
                float(augment.stain_jitter) != 0,
                f"config.augment.stain_jitter={augment.stain_jitter}: task {config.task!r} learns how two stains belong together, and their colours"
                " are not changed; set config.augment.stain_jitter=0",
            ),
            (
                tuple(map(float, augment.crop_scale)) != (1.0, 1.0),
                f"config.augment.crop_scale={tuple(augment.crop_scale)}: task {config.task!r} cuts crops of config.stain.crop px and does not resize"
                " them; set config.augment.crop_scale=(1.0, 1.0)",
            ),
            (
                int(config.data.fold) != 0 and "{fold}" not in config.encoders,
                f"config.data.fold={config.data.fold}: pairs are divided into train and test where they are made, not by folds; make a folder of"
                " pairs for each fold, `wavepath pairs --csv` with a table whose column split says what is held out, and leave config.data.fold at 0",
            ),
        ):
            if problem:
                raise ConfigError(message)

    def held_out(self, source: Any) -> Any:
        """The test part of the pairs: other slides than those trained on.

        Raises:
            DatasetError: there is none, and the run is to be evaluated or drawn.
        """
        # Imported here: reading data brings TensorFlow, which building a task must not.
        from wavepath.data.pair_source import open_pairs

        return kept_out(self.config, open_pairs(self.config, "test"), source, "pair", "see its pairs.csv, divide anew with `wavepath pairs`")

    def measure(self, source: Any) -> dict[str, Any]:
        """`train_slides` and `mpp` of the training pairs, as far as they are known."""
        return trained_on(source)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, side = self.config.batch_size, self.crop + int(self.config.stain.margin)
        shape = jax.ShapeDtypeStruct
        return {
            **{name: shape((b, side, side, 3), jnp.uint8) for name in SIDES},
            "example_id": shape((b,), jnp.int32), "epoch": shape((b,), jnp.int32), "position": shape((b,), jnp.uint32),
        }

    def views(self, batch: Batch, keys: Array | None = None) -> dict[str, Array]:
        """`he` and `ihc` [b, crop, crop, 3] in [0, 1], of one place: random, flipped and turned by the examples' keys, or central without keys."""
        sides = batch[HE].shape[1:3]
        if min(sides) < self.crop:
            raise ConfigError(f"the windows have {sides[0]} x {sides[1]} px; config.stain.crop={self.crop} is more")
        return aligned_windows({name: batch[name] for name in SIDES}, keys, self.crop, self.config.augment, dtype=self.param_dtype)
