"""Distribution matching distillation as a run: what its stages share (paper, sections 2.2 and 4.1).

Student and critic start from one checkpoint, the teacher is another one or the same. All three are
frozen; adapters of student and critic are the groups that the trainer updates.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.io.builtin import find_checkpoint
from longlive_jax.io.checkpoint import weights_fingerprint
from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.models.wan.remat import Remat
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import AXES, check_fits
from longlive_jax.quant.frozen import with_axes
from longlive_jax.quant.lora import LoRASpec, init_adapter, with_adapter
from longlive_jax.spec import UserError, check_minimums
from longlive_jax.training.objectives.dmd.draws import RolloutSpec, ScoreSpec
from longlive_jax.training.objectives.dmd.losses import DMDSetup
from longlive_jax.training.objectives.dmd.roles import (
    CRITIC,
    GENERATOR,
    STUDENT_BACKBONE,
    CriticLoss,
    GeneratorLoss,
    Inputs,
)
from longlive_jax.training.objectives.dmd.sharded import (
    ShardedDMD,
    sharded_critic_loss,
    sharded_generator_loss,
)
from longlive_jax.training.objectives.teacher_forcing import self_attention
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.stages.adapter_files import export_adapter, read_adapters
from longlive_jax.training.stages.backbones import model_of
from longlive_jax.training.stages.dit_training import put_shards
from longlive_jax.training.stages.frozen_roles import FrozenRoles, RolePrecision
from longlive_jax.training.stages.preview import Preview, PreviewSpec
from longlive_jax.training.stages.stage import RunSpec, microbatch_size
from longlive_jax.training.update import EMASpec, Group, LossFn
from longlive_jax.typing import Params
from pallas_kernels.dispatch import Implementation

__all__ = ["DistillationSpec"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationSpec(RunSpec):
    """Settings of a distillation. `optim` and `ema` are those of the generator's adapter.

    Attributes:
      checkpoint: checkpoint directory that student and critic start from, whose VAE and text
        encoder are used; "small_world" is the built-in one.
      teacher: checkpoint directory of the teacher; None: `checkpoint`.
      lora: both adapters.
      init_adapters: directory with adapters to go on from, such as the `--out` of an earlier run.
      rollout: how the student samples.
      scores: how teacher and critic score.
      generator_every: number of updates of the critic for one of the generator.
      critic_optim: optimizer of the critic's adapter.
      precision: packed formats of the frozen models.
      share_backbones: whether roles with the same weights and precision share one frozen copy.
      batch: videos per step, over all devices.
      preview: videos sampled at every evaluation.
      preview_steps: model calls per chunk of these videos; one picture for each number.
      attention: implementation of self-attention; "auto" is the best one proven on the device.
      remat: what backward passes recompute of each layer; "attention_saved": not attention.
      unroll: layers in one step of the scan over layers, in passes with a gradient.
      ffn_chunks: number of chunks in which tokens pass the feed-forward, in passes with a gradient.
      dtype: dtype of matrix products and of frozen matrices that are not packed.
      stream_dtype: dtype of the residual stream between layers, which remat keeps for every layer.
    """

    checkpoint: str
    teacher: str | None = None
    ema: EMASpec | None = None
    lora: LoRASpec = dataclasses.field(default_factory=LoRASpec)
    init_adapters: str | None = None
    rollout: RolloutSpec = dataclasses.field(default_factory=RolloutSpec)
    scores: ScoreSpec = dataclasses.field(default_factory=ScoreSpec)
    generator_every: int = 5
    critic_optim: OptimSpec = dataclasses.field(default_factory=lambda: OptimSpec(lr=2e-6))
    precision: RolePrecision = dataclasses.field(default_factory=RolePrecision)
    share_backbones: bool = True
    batch: int = 32
    preview: PreviewSpec = dataclasses.field(default_factory=PreviewSpec)
    preview_steps: tuple[int, ...] = (4, 2)
    attention: Implementation = "auto"
    remat: Remat = "everything"
    unroll: int = 1
    ffn_chunks: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    stream_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_minimums(self, batch=1, generator_every=1, unroll=1, ffn_chunks=1)
        if any(steps < 1 for steps in self.preview_steps):
            raise ValueError(f"preview_steps must be >= 1, got {self.preview_steps}")
        if self.attention in ("cudnn", "mosaic") and self.dtype == "float32":
            raise ValueError(
                f"attention {self.attention!r} needs 16-bit inputs; set dtype=bfloat16"
            )

    # --- Models ---

    @property
    def base(self) -> Path:
        """The checkpoint of student and critic. Raises UserError if there is none."""
        return find_checkpoint(self.checkpoint)

    @property
    def teacher_base(self) -> Path:
        """The checkpoint of the teacher. Raises UserError if there is none."""
        return self.base if self.teacher is None else find_checkpoint(self.teacher)

    def computing(self) -> dict[str, Any]:
        """Settings of the models that belong to the run, not to the weights."""
        return {"dtype": self.dtype, "stream_dtype": self.stream_dtype}

    def model(self) -> DiTConfig:
        """Configuration of all three models, with the run's dtypes.

        Raises UserError for a teacher of another architecture.
        """
        student = model_of(self.base, **self.computing())
        teacher = model_of(self.teacher_base, **self.computing())
        for field in dataclasses.fields(student):
            values = [getattr(model, field.name) for model in (teacher, student)]
            if values[0] != values[1]:
                raise UserError(
                    f"config.teacher: {self.teacher_base} has {field.name} {values[0]} and "
                    f"config.checkpoint has {values[1]}; choose a teacher of the same family"
                )
        return student

    def frozen_roles(self) -> FrozenRoles:
        """The frozen models. Raises UserError for a checkpoint that does not exist."""
        return FrozenRoles.of(
            self.base,
            self.teacher_base,
            self.precision,
            dtype=self.dtype,
            share=self.share_backbones,
        )

    def frozen(self, model: DiTConfig, mesh: Mesh) -> dict[str, Params]:
        """Parameters of the frozen models on the mesh, by name."""
        return self.frozen_roles().read(self.shapes(model), mesh)

    def shapes(self, model: DiTConfig) -> Params:
        """Shapes of a model's parameters."""
        return abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[1]

    # --- Losses and updates ---

    def setup(
        self,
        model: DiTConfig,
        rollout: RolloutSpec,
        *,
        latent_shape: tuple[int, int, int],
        chunk_frames: int,
    ) -> DMDSetup:
        """What stays the same from batch to batch."""
        return DMDSetup(
            graphdef=abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[0],
            latent_shape=latent_shape,
            chunk_frames=chunk_frames,
            rollout=rollout,
            scores=self.scores,
            attention_for=functools.partial(self_attention, implementation=self.attention),
            options={"remat": self.remat, "unroll": self.unroll, "ffn_chunks": self.ffn_chunks},
        )

    def groups(
        self, model: DiTConfig, setup: DMDSetup, inputs: Inputs, mesh: Mesh
    ) -> dict[str, Group]:
        """The two adapters and how they are trained.

        Raises UserError for adapters that do not fit model or mesh.
        """
        shapes = self.shapes(model)
        specs = self._adapter_specs(shapes, mesh)
        start = {} if self.init_adapters is None else self._earlier_adapters(shapes)
        generator_updates = math.ceil(self.loop.steps / self.generator_every)
        optimizers = {
            GENERATOR: make_optimizer(self.optim, generator_updates),
            CRITIC: make_optimizer(self.critic_optim, self.loop.steps),
        }
        return {
            name: Group(
                init=functools.partial(init_adapter, params=shapes, spec=self.lora),
                restore=functools.partial(_on_mesh, start[name], mesh, specs)
                if name in start
                else None,
                loss=loss,
                tx=optimizers[name],
                ema=self.ema,
                rules=rules.ADAPTER,
            )
            for name, loss in self._losses(shapes, setup, inputs, mesh).items()
        }

    def _losses(
        self, shapes: Params, setup: DMDSetup, inputs: Inputs, mesh: Mesh
    ) -> dict[str, LossFn]:
        """The losses by group, over the mesh if it has more than one device."""
        if mesh.size == 1:
            return {
                GENERATOR: GeneratorLoss(setup, inputs, self.lora),
                CRITIC: CriticLoss(setup, inputs, self.lora),
            }
        sharded = ShardedDMD(mesh, rules.specs_for(rules.DIT, shapes))
        generator = functools.partial(sharded_generator_loss, sharded=sharded)
        critic = functools.partial(sharded_critic_loss, sharded=sharded)
        return {
            GENERATOR: GeneratorLoss(setup, inputs, self.lora, generator, AXES),
            CRITIC: CriticLoss(setup, inputs, self.lora, critic, AXES),
        }

    def _adapter_specs(self, shapes: Params, mesh: Mesh) -> Any:
        """PartitionSpecs of an adapter.

        Raises UserError if it does not fit the model, or does not divide over the mesh.
        """
        try:
            # The key is made while tracing, because the device may be absent (`longlive plan`).
            adapter = jax.eval_shape(lambda: init_adapter(jax.random.key(0), shapes, self.lora))
            specs = rules.specs_for(rules.ADAPTER, adapter)
            rules.check_divides(mesh, specs, adapter)
        except ValueError as error:
            raise UserError(f"config.{error}") from error
        return specs

    def _earlier_adapters(self, shapes: Params) -> dict[str, Params]:
        return read_adapters(Path(self.init_adapters or ""), shapes, self.lora)

    def check(self, model: DiTConfig, setup: DMDSetup) -> None:
        """Raises UserError for a batch, videos or models that do not divide over the mesh."""
        try:
            rows = microbatch_size(self.batch, self.loop.accumulate)
            check_fits(
                self.mesh,
                heads=model.heads,
                chunks=setup.rollout.chunks,
                batch=rows,
                chunk_frames=setup.chunk_frames,
            )
        except ValueError as error:
            raise UserError(f"config: {error}") from error
        _, frames, height, width, _ = setup.video_shape(1)
        tokens = rows // self.mesh.samples * frames * (height // 2) * (width // 2) // self.mesh.sp
        if tokens % self.ffn_chunks:
            raise UserError(
                f"config.ffn_chunks = {self.ffn_chunks} does not divide the {tokens} tokens of a "
                "device; choose a divisor"
            )

    def updates(self, step: int) -> tuple[str, ...]:
        """Groups to update after `step` steps: the critic always, the generator before it."""
        return (GENERATOR, CRITIC) if step % self.generator_every == 0 else (CRITIC,)

    def notes(self, model: DiTConfig) -> tuple[str, ...]:
        """Lines for the user: the frozen models, and the size of an adapter."""
        make = functools.partial(init_adapter, params=self.shapes(model), spec=self.lora)
        adapter = jax.eval_shape(make, jax.random.key(0))
        size = sum(x.size for x in jax.tree.leaves(adapter)) / 1e6
        line = f"adapters: rank {self.lora.rank}, {size:.1f} million parameters each"
        return (*self.frozen_roles().describe(self.shapes(model)), line)

    # --- Evaluation and export ---

    def evaluation(
        self, model: DiTConfig, frozen: Mapping[str, Params], settings: Mapping[str, Any]
    ) -> Callable[[Mapping[str, Params], int, Path], dict[str, float]]:
        """Samples the student; `settings` are fields of `SampleSpec`."""
        preview = Preview(self.preview, self.base, model, settings)

        def evaluate(weights: Mapping[str, Params], step: int, workdir: Path) -> dict[str, float]:
            backbone = with_axes(frozen[STUDENT_BACKBONE], ())
            student = with_adapter(backbone, weights[GENERATOR], self.lora.scale)
            preview.write(student, step, workdir, steps=self.preview_steps)
            return {}

        return evaluate

    def sample_settings(self, rollout: RolloutSpec) -> dict[str, Any]:
        """Sampling settings of the distilled model, which its adapter sets."""
        return {
            "steps": rollout.steps,
            "shift": rollout.shift,
            "solver": rollout.solver,
            "guidance": 1.0,
        }

    def origin(self) -> dict[str, Any]:
        """Identity of the models and of what decides the result, besides data and seed."""
        return {
            "batch": self.batch,
            "models": {
                "student": weights_fingerprint(self.base, "dit"),
                "teacher": weights_fingerprint(self.teacher_base, "dit"),
            },
        }

    def export(
        self,
        stage: str,
        rollout: RolloutSpec,
        origin: Mapping[str, Any],
        weights: Mapping[str, Params],
        directory: Path,
    ) -> tuple[str, ...]:
        """Writes both adapters to a directory; returns notes."""
        provenance = self.provenance(stage) | dict(origin)
        settings = {GENERATOR: self.sample_settings(rollout), CRITIC: {}}
        notes: tuple[str, ...] = ()
        for role, sampling in settings.items():
            notes = export_adapter(
                directory,
                weights[role],
                self.lora,
                base=self.base,
                sampling=sampling,
                provenance=provenance,
                role=role,
            )
        return notes


def _on_mesh(adapter: Params, mesh: Mesh, specs: Any) -> Params:
    """An adapter in host memory, divided over the mesh."""
    return jax.tree.map(lambda x, spec: put_shards(x, mesh, spec), adapter, specs)
