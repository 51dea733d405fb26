"""The weights in the last checkpoint of a training run, read by array path."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from longlive_jax.io.arrays import ArraySpec, TreePath, flatten
from longlive_jax.io.checkpoint import read_manifest
from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.spec import UserError, build
from longlive_jax.training.checkpointing import restore_weights


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """A DiT's arrays on the host.

    Attributes:
      arrays: array of each path.
    """

    arrays: Mapping[TreePath, np.ndarray]

    @classmethod
    def load(
        cls,
        workdir: Path,
        part: Literal["params", "ema"],
        checkpoint: Path,
        *,
        notify: Callable[[str], None],
    ) -> "TrainedWeights":
        """Loads parameters or their EMA from the newest intact training checkpoint in `workdir`.

        All arrays are loaded at once, in float32, unlike those of a checkpoint directory, which is
        read layer by layer. The DiT's config is that of the checkpoint directory `checkpoint`.
        Corrupt training checkpoints are reported through `notify`.

        Raises:
          UserError: there is no training checkpoint, or it belongs to a different model.
        """
        settings = read_manifest(checkpoint)["components"].get("dit")
        if settings is None:
            raise UserError(f"{checkpoint}: has no component 'dit'")
        cfg = build(DiTConfig, settings | {"param_dtype": "float32"}, path=str(checkpoint))
        _, shapes = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        target: Any = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu), shapes
        )
        _, tree = restore_weights(workdir, target, group="dit", part=part, notify=notify)
        return cls({path: np.asarray(x) for path, x in flatten(tree).items()})

    @property
    def specs(self) -> dict[TreePath, ArraySpec]:
        """Shape and dtype of each array."""
        return {path: ArraySpec(x.shape, x.dtype) for path, x in self.arrays.items()}

    def read(self, path: TreePath) -> np.ndarray:
        """The array at `path`."""
        return self.arrays[path]

    def layers(self, path: TreePath) -> Iterator[np.ndarray]:
        """The slices of the array at `path` along its leading (layer) axis."""
        return iter(self.arrays[path])
