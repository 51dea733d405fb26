"""The weights in the last save of a run, for whoever reads arrays by path."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from longlive_jax.io.arrays import ArraySpec, Path, flatten
from longlive_jax.io.checkpoint import read_manifest
from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.spec import UserError, build
from longlive_jax.training.checkpointing import restore_weights


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """Arrays of a DiT on the host."""

    arrays: Mapping[Path, np.ndarray]

    @classmethod
    def of(
        cls,
        workdir: FilePath,
        part: Literal["params", "ema"],
        checkpoint: FilePath,
        *,
        say: Callable[[str], None],
    ) -> "SavedWeights":
        """Reads the parameters, or their average, from the newest good save in `workdir`.

        Unlike a checkpoint, which is read by layers, the tree is read whole, in float32. The DiT's
        settings are those of `checkpoint`; `say` hears of saves that are damaged. Raises UserError
        if there is no save or it is of another model.
        """
        settings = read_manifest(checkpoint)["components"].get("dit")
        if settings is None:
            raise UserError(f"{checkpoint}: has no component 'dit'")
        cfg = build(DiTConfig, settings | {"param_dtype": "float32"}, path=str(checkpoint))
        _, shapes = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
        place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        like: Any = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        _, tree = restore_weights(workdir, like, group="dit", part=part, say=say)
        return cls({path: np.asarray(x) for path, x in flatten(tree).items()})

    @property
    def specs(self) -> dict[Path, ArraySpec]:
        """Shapes and types."""
        return {path: ArraySpec(x.shape, x.dtype) for path, x in self.arrays.items()}

    def read(self, path: Path) -> np.ndarray:
        """An array."""
        return self.arrays[path]

    def layers(self, path: Path) -> Iterator[np.ndarray]:
        """Its slices along the leading axis."""
        return iter(self.arrays[path])
