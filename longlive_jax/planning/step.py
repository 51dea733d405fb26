"""The train step of stage `clips` for the planner: the real step, over any devices, unallocated.

Nothing is replaced: attention is what the run selects on the chip. XLA compiles cuDNN's calls
without the library, whose workspace is therefore not counted. (cuDNN's own rule for it is not
public; a float32 copy of a call's query gradient would be 0.04 GiB for the 5B model.)
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.mesh import AXES
from longlive_jax.training.objectives.error_recycling import buffer_state
from longlive_jax.training.objectives.sharded import CHUNK_COLUMNS
from longlive_jax.training.stages.clip_batches import CLIP_BATCH_SPECS
from longlive_jax.training.stages.dit_training import DiTTraining
from longlive_jax.training.stages.wan_ar import WanARStage
from longlive_jax.training.state import TrainState, abstract_state
from longlive_jax.training.update import LossFn, Trainer, stateless

__all__ = [
    "Clip",
    "Lowerable",
    "PlannedStep",
    "lower",
    "num_bits",
    "num_parameters",
]


@dataclasses.dataclass(frozen=True)
class Clip:
    """Size of a clip's latents. Every chunk may have its own prompt.

    Attributes:
      frames: latent frames.
      chunk_frames: latent frames per chunk.
      size: height, width and channels of a latent frame.
    """

    frames: int
    chunk_frames: int
    size: tuple[int, int, int]

    @property
    def chunks(self) -> int:
        """Number of complete chunks."""
        return self.frames // self.chunk_frames

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk, clean or noisy, with 2x2 patches."""
        return self.chunk_frames * (self.size[0] // 2) * (self.size[1] // 2)


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """The train step of a stage on clips of one length, with ShapeDtypeStructs for arrays.

    Attributes:
      stage: settings of the run.
      model: settings of the DiT.
      clip: shape of a clip.
    """

    stage: WanARStage
    model: DiTConfig
    clip: Clip

    def state(self) -> tuple[TrainState, TrainState]:
        """Shapes of the train state, and its PartitionSpecs."""
        mesh = self.abstract_mesh
        trainer = self._trainer(mesh, self.trained(mesh), stateless(lambda *_: (jnp.zeros(()), {})))
        return trainer.abstract, trainer.specs

    @property
    def abstract_mesh(self) -> Any:
        """The mesh of the run, without devices."""
        return AbstractMesh(self.stage.mesh.shape, AXES, axis_types=(AxisType.Auto,) * 3)

    def trained(self, mesh: Mesh) -> DiTTraining:
        """What is trained, and its precision, as the stage decides."""
        return self.stage.trained(self.model, mesh, self.clip.chunks, self.clip.chunk_tokens)

    def _trainer(self, mesh: Mesh, trained: DiTTraining, loss: LossFn) -> Trainer:
        """State and updates with a loss."""
        stage = self.stage
        group = trained.group(loss, tx=stage.optimizer(), ema=stage.ema)
        chunk_shape = (self.clip.chunk_frames, *self.clip.size)
        buffers = buffer_state(stage.recycling, chunk_shape, stage.mesh)
        return stage.trainer({trained.name: group}, mesh, buffers)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch, as stage `clips` collates it."""
        rows, clip = self.stage.batch, self.clip
        latents = (rows, clip.frames, *clip.size)
        text_features = (rows, clip.chunks + 1, self.model.text_len, self.model.text_dim)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "context": (latents, "float32"),
            "target": (latents, "float32"),
            "mask": (latents[:2], "float32"),
            "text_features": (text_features, self.stage.dtype),
            **dict.fromkeys(CHUNK_COLUMNS, ((rows, 2 * clip.chunks), "int32")),
        }
        return {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in shapes.items()}

    def attention(self) -> str:
        """How self-attention runs on the device that is selected, as `describe` calls it."""
        return self.stage.attention_path(self.model, self.clip.chunks, self.clip.chunk_tokens)

    def jit_on(self, mesh: Mesh) -> tuple[Any, tuple[TrainState, dict[str, Any], dict[str, Any]]]:
        """The jitted step on a mesh, and its arguments as shapes with shardings."""
        # 1. Loss and update, as the stage builds them.
        stage, trained = self.stage, self.trained(mesh)
        setup = stage.setup(self.model, self.clip.chunk_frames, self.clip.chunks)
        loss = stage.teacher_forcing_loss(setup, mesh, trained.specs(training=True))
        trainer = self._trainer(mesh, trained, loss)

        # 2. Arguments: state, frozen parameters and batch.
        batch = self.batch()
        shardings = {
            k: NamedSharding(mesh, P(*CLIP_BATCH_SPECS[k][: x.ndim])) for k, x in batch.items()
        }
        arguments: Any = (
            trainer.abstract,
            trained.frozen_shapes(),
            abstract_state(batch, shardings),
        )
        return trainer.program((trained.name,)), arguments


class Lowerable(Protocol):
    """A step that can be compiled."""

    def jit_on(self, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """The jitted step on a mesh, and its arguments as shapes with shardings."""


def lower(step: Lowerable, mesh: Mesh, *, platform: str | None = None) -> jax.stages.Lowered:
    """Traces and lowers the step for a mesh, whose devices need not be present.

    `platform` lowers for another kind of device than the mesh has, to read the program.
    """
    with jax.default_device(mesh.devices.flat[0]):  # kernels read their chip from it
        jitted, arguments = step.jit_on(mesh)
        platforms = None if platform is None else (platform,)
        return jitted.trace(*arguments).lower(lowering_platforms=platforms)


def num_parameters(model: DiTConfig) -> int:
    """Number of parameters of the model."""
    _, shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(shapes))


def num_bits(dtype: Any) -> int:
    """Bits of a number on a device, where two of 4 bits share a byte."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return (jnp.finfo if floating else jnp.iinfo)(dtype).bits
