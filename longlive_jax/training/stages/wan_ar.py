"""Stage `clips`: trains a DiT to be autoregressive on video clips (paper, sections 2.1 and 4.1)."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.data.clips.encoders import check_encoded_by
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.interop.components import RUN_FIELDS
from longlive_jax.io.builtin import find_checkpoint
from longlive_jax.io.completeness import require_components
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.models.wan.remat import Remat
from longlive_jax.parallel import rules
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import AXES, check_fits
from longlive_jax.quant.lora import LoRASpec
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.spec import UserError, build
from longlive_jax.training.objectives.batch import ARLossSpec, num_loss_frames
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    buffer_notes,
    buffer_state,
    check_recycling,
)
from longlive_jax.training.objectives.quantized import quantized
from longlive_jax.training.objectives.sharded import ShardedLoss, sharded_forward
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    TeacherForcingLoss,
    self_attention,
)
from longlive_jax.training.stages.adapted_dit import AdaptedDiT
from longlive_jax.training.stages.adapter_files import export_adapter
from longlive_jax.training.stages.attention_path import attention_note, attention_path
from longlive_jax.training.stages.base_checkpoint import BaseCheckpoint
from longlive_jax.training.stages.clip_batches import (
    ClipBatchSpec,
    ClipData,
    clip_data,
    collated_batches,
    split_inputs,
)
from longlive_jax.training.stages.dit_training import DiTTraining, WholeDiT, load_shards
from longlive_jax.training.stages.evaluation import evaluation
from longlive_jax.training.stages.flops import clip_update_cost
from longlive_jax.training.stages.preview import Preview, PreviewSpec
from longlive_jax.training.stages.sample_defaults import SampleDefaults, autoregressive
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec, microbatch_size
from longlive_jax.training.stages.video_clips import CutSpec, clip_notes, encoded_videos
from longlive_jax.training.task import About, StepCost, Task
from longlive_jax.training.update import Group
from longlive_jax.typing import Params
from pallas_kernels.dispatch import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanARStage(RunSpec):
    """Teacher forcing on full clips: every chunk is denoised given its clean past.

    Attributes:
      checkpoint: checkpoint directory with the initial DiT, and with the VAE and text encoder that
        encoded the clips; "small_world" is the built-in one.
      clips: folder written by `longlive data encode`. None: `videos` are encoded once, into the
        work directory.
      videos: dataset of videos. With `clips`, they are decoded and encoded while training instead
        of reading latents from `clips`, which then only supplies the joining rules and text
        features.
      cut: how `videos` are cut into clips, without `clips`.
      anywhere: whether clips of `videos` start at random frames, drawn each time; otherwise
        they start with their sample, as the first clip of `data encode` does.
      held_out: folder of held-out clips for evaluation, or None.
      held_out_batches: number of batches of an evaluation.
      preview: videos sampled at every evaluation.
      sampling: sampler settings stored in the checkpoint.
      batch: clips per step, over all devices.
      workers: number of additional processes that read clips (0: threads of this one).
      window: chunks that a chunk attends to, itself and the sinks included (None: its full past).
      shot_rope_offset: latent frames added to temporal positions at every cut.
      loss: teacher-forcing loss settings.
      recycling: error recycling (appendix C), or None to disable.
      attention: implementation of self-attention; "auto" is the best one proven on the device.
      remat: what the backward pass recomputes of each layer; "attention_saved": not attention.
      ffn_chunks: number of chunks in which a device's tokens pass the feed-forward, one by one.
      dtype: dtype of matrix products and of all-gathered parameters.
      stream_dtype: dtype of the residual stream between layers, which remat keeps for every layer.
      quant: precision of the blocks' matrix products.
      lora: trains only an adapter of this form, over the frozen DiT; None: all parameters.
    """

    checkpoint: str
    clips: str | None = None
    videos: str | None = None
    cut: CutSpec = dataclasses.field(default_factory=CutSpec)
    anywhere: bool = True
    held_out: str | None = None
    held_out_batches: int = 4
    preview: PreviewSpec = dataclasses.field(default_factory=PreviewSpec)
    sampling: SampleDefaults = dataclasses.field(default_factory=autoregressive)
    batch: int = 8
    workers: int = 0
    window: int | None = None
    shot_rope_offset: int = 0
    loss: ARLossSpec = dataclasses.field(default_factory=ARLossSpec)
    recycling: RecyclingSpec | None = None
    attention: Implementation = "auto"
    remat: Remat = "everything"
    ffn_chunks: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    stream_dtype: Literal["float32", "bfloat16"] = "float32"
    quant: QuantSpec = dataclasses.field(default_factory=QuantSpec)
    lora: LoRASpec | None = None

    def __post_init__(self) -> None:
        if self.ffn_chunks < 1:
            raise ValueError(f"ffn_chunks must be >= 1, got {self.ffn_chunks}")
        least = 1 + max(1, self.loss.global_sinks + 1)
        if self.window is not None and self.window < least:
            raise ValueError(
                f"window must be >= {least} with {self.loss.global_sinks} global sinks and a shot "
                f"sink, got {self.window}; or set none for the whole past"
            )
        if self.attention in ("cudnn", "mosaic") and self.dtype == "float32":
            raise ValueError(
                f"attention {self.attention!r} needs 16-bit inputs; set dtype=bfloat16"
            )

    def task(self, out: Path, workdir: Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`.

        Raises UserError for clips of another checkpoint, or that do not fit model and mesh.
        """
        # 1. Model and data.
        base = BaseCheckpoint.open(self.checkpoint, out, complete=self.lora is None)
        model, clips = self.model(), self._clips(workdir)
        check_encoded_by(clips, base.folder)
        data = clip_data(
            clips,
            None if self.clips is None else self.videos,
            str(base.folder),
            mesh,
            anywhere=self.anywhere,
            batch_size=self.batch,
        )
        self._check(model, data, mesh)

        # 2. Loss, precision and updates.
        tokens = data.chunk_tokens
        trained = self.trained(model, mesh, data.chunks, tokens)
        setup = self.setup(model, data.chunk_shape[0], data.num_prompts)
        loss, evaluated = (
            self.teacher_forcing_loss(setup, mesh, trained.specs(training=training))
            for training in (True, False)
        )
        frozen, group = trained.frozen(), self.group(trained, loss)
        buffers = buffer_state(self.recycling, data.chunk_shape, self.mesh)
        attention = self.attention_path(model, data.chunks, tokens)
        note = attention_note(attention, 2 * data.chunks * tokens, self.dtype)
        notes = self._notes((trained.describe(), note), data, mesh, clips)
        batches = self._batch_spec(self.loop.seed)
        sampling = self._sample_settings(base, clips)
        evaluate = self._evaluation(evaluated.without_recycling(), mesh, trained, frozen, sampling)
        return Task(
            trainer=self.trainer({trained.name: group}, mesh, buffers),
            batches=collated_batches(
                data.source, clips.empty_text_features, mesh, batches, data.put
            ),
            evaluate=evaluate,
            export=functools.partial(self._export, model, clips, base, attention),
            frozen=frozen,
            about=About(self._origin(clips), notes, self._cost(model, data, trained)),
        )

    @property
    def base(self) -> Path:
        """The checkpoint directory to start from. Raises UserError if there is none."""
        return find_checkpoint(self.checkpoint)

    def _clips(self, workdir: Path) -> EncodedClips:
        """The clips to train on, encoded now if only videos are given."""
        if self.clips is not None:
            return EncodedClips(self.clips)
        if self.videos is None:
            raise UserError(
                "config.videos is not set; give a folder of clips with captions (a.mp4, a.txt) by "
                "--config.videos=FOLDER, or one written by `longlive data encode` by "
                "--config.clips=FOLDER"
            )
        return encoded_videos(self.videos, self.cut, self.base, workdir)

    def group(self, trained: DiTTraining, loss: TeacherForcingLoss) -> Group:
        """What is trained, and how."""
        chunk_frames = loss.setup.chunk_frames
        return trained.group(
            loss,
            tx=self.optimizer(),
            ema=self.ema,
            microbatch_weight=lambda arrays: num_loss_frames(
                split_inputs(arrays)[0], chunk_frames, self.loss
            ),
        )

    def _cost(self, model: DiTConfig, data: ClipData, trained: DiTTraining) -> StepCost:
        sizes: Any = {"chunks": data.chunks, "chunk_tokens": data.chunk_tokens}
        sizes |= {"window": self.window, "adapter": trained.adapter}
        return clip_update_cost(model, batch=self.batch, **sizes)

    def _origin(self, clips: EncodedClips) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "clips": clips.manifest.identity["dataset"],
            "from videos": self.videos is not None and self.clips is not None,
        }

    def _notes(
        self, first: tuple[str, ...], data: ClipData, mesh: Mesh, clips: EncodedClips
    ) -> tuple[str, ...]:
        """Lines printed before the first step: these, and on error buffers and data."""
        buffers = buffer_notes(self.recycling, data.chunk_shape, mesh.shape)
        return (*first, *buffers, *data.notes, *clip_notes(clips, self.base))

    def model(self) -> DiTConfig:
        """Configuration of the checkpoint's DiT, with the run's dtypes."""
        stored = require_components(self.base, "dit")["components"]["dit"]
        settings = {k: v for k, v in stored.items() if k not in RUN_FIELDS} | self.computing()
        return build(DiTConfig, settings, path=f"{self.base}: dit")

    def computing(self) -> dict[str, Any]:
        """Settings of the model that belong to the run, not to the weights."""
        return {"dtype": self.dtype, "stream_dtype": self.stream_dtype}

    def setup(self, model: DiTConfig, chunk_frames: int, num_prompts: int) -> ARSetup:
        """Setup for clips with `num_prompts` rows of text features before the empty prompt's."""
        return ARSetup(
            graphdef=abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[0],
            chunk_frames=chunk_frames,
            empty_prompt=num_prompts,
            spec=self.loss,
            attention_for=functools.partial(self_attention, implementation=self.attention),
            full_history=self.window is None,
            remat=self.remat,
            ffn_chunks=self.ffn_chunks,
        )

    def attention_path(self, model: DiTConfig, chunks: int, chunk_tokens: int) -> str:
        """How self-attention of such clips runs on the current device."""
        rows = self.batch // self.loop.accumulate // self.mesh.samples
        shape = rows, 2 * chunks * chunk_tokens, model.heads // self.mesh.sp, model.head_dim
        return attention_path(
            jax.ShapeDtypeStruct(shape, model.dtype),
            chunks=chunks,
            full_history=self.window is None,
            implementation=self.attention,
        )

    def trained(self, model: DiTConfig, mesh: Mesh, chunks: int, chunk_tokens: int) -> DiTTraining:
        """What is trained of the model on clips of these chunks and tokens, and its precision.

        Raises UserError for settings that do not fit model, clips and mesh.
        """
        shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[1]
        specs = rules.specs_for(rules.DIT, shapes)
        if self.lora is not None:
            axes = AXES if mesh.size > 1 else ()
            return AdaptedDiT(
                self.lora, self.quant, self.dtype, shapes, mesh, self.checkpoint, axes
            )
        rows = {
            "clean or noisy tokens": chunks * chunk_tokens,
            "text tokens": chunks * model.text_len,
        }
        return WholeDiT(
            shapes,
            specs,
            quantized(self.quant, shapes, specs, mesh, rows),
            init=lambda key: params_of(DiT(model, rngs=nnx.Rngs(key))),
            restore=lambda: load_shards(self.base, mesh, specs),
        )

    def teacher_forcing_loss(self, setup: ARSetup, mesh: Mesh, specs: Any) -> TeacherForcingLoss:
        """The loss over the mesh; `specs` are those of its (perhaps quantized) parameters."""
        gather = Gather(specs, dtype=jnp.dtype(self.dtype))
        forward = functools.partial(sharded_forward, sharded=ShardedLoss(mesh, specs, gather))
        return TeacherForcingLoss(setup, split_inputs, forward, self.recycling)

    def check(self, model: DiTConfig, chunks: int, chunk_tokens: int) -> None:
        """Raises ValueError if clips of these chunks and tokens do not fit batch and mesh."""
        rows = microbatch_size(self.batch, self.loop.accumulate)
        check_fits(self.mesh, heads=model.heads, chunks=chunks, batch=rows)
        if self.recycling is not None:
            check_recycling(self.recycling, self.mesh, chunks=(chunks,), batch=rows)
        tokens = self.device_tokens(chunks, chunk_tokens)
        if tokens % self.ffn_chunks:
            raise ValueError(
                f"ffn_chunks = {self.ffn_chunks} does not divide the {tokens} tokens of a device; "
                "choose a divisor"
            )

    def device_tokens(self, chunks: int, chunk_tokens: int) -> int:
        """Clean and noisy tokens of a device's microbatch."""
        rows = self.batch // self.loop.accumulate // self.mesh.samples
        return 2 * rows * chunks * chunk_tokens // self.mesh.sp

    def _check(self, model: DiTConfig, data: ClipData, mesh: Mesh) -> None:
        """Raises UserError for clips, or parameters, that do not fit model and mesh."""
        shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[1]
        channels = data.shape[-1]
        if channels != model.in_channels:
            raise UserError(
                f"{self.clips}: latents have {channels} channels, the model takes "
                f"{model.in_channels}"
            )
        try:
            self.check(model, data.chunks, data.chunk_tokens)
            rules.check_divides(mesh, rules.specs_for(rules.DIT, shapes), shapes)
        except ValueError as error:
            raise UserError(f"config: {error}") from error

    def _batch_spec(self, seed: int) -> ClipBatchSpec:
        columns = {
            "shot_rope_offset": self.shot_rope_offset,
            "window": self.window,
            "global_sinks": self.loss.global_sinks,
        }
        return ClipBatchSpec(self.batch, seed, self.workers, columns)

    def _evaluation(
        self,
        loss: TeacherForcingLoss,
        mesh: Mesh,
        trained: DiTTraining,
        frozen: Mapping[str, Params],
        sample_settings: Mapping[str, Any],
    ):
        """A preview, and metrics on the held-out clips, which are the same every time."""
        preview = Preview(self.preview, self.base, self.model(), sample_settings)
        if self.held_out is None:
            return evaluation(trained, frozen, loss, preview, lambda: iter(()))
        clips = EncodedClips(self.held_out)
        check_encoded_by(clips, self.base)
        # Held-out clips may have another number of rows of text features.
        setup = dataclasses.replace(loss.setup, empty_prompt=clips.manifest.texts_per_clip)
        batches = collated_batches(
            clips, clips.empty_text_features, mesh, self._batch_spec(HELD_OUT_SEED)
        )

        def held_out() -> Iterator[Any]:
            with batches.feed(0) as feed:
                for batch in itertools.islice(feed, self.held_out_batches):
                    yield batches.put(batch)

        loss = dataclasses.replace(loss, setup=setup)
        return evaluation(trained, frozen, loss, preview, held_out)

    def _sample_settings(self, base: BaseCheckpoint, clips: EncodedClips) -> dict[str, Any]:
        """Sampler settings that match the training, stored in the checkpoint as its defaults."""
        return base.sample_settings(
            clips,
            window=self.window,
            global_sinks=self.loss.global_sinks,
            shot_rope_offset=self.shot_rope_offset,
            shift=self.loss.shift,
            **self.sampling.settings(),
        )

    def _export(
        self,
        model: DiTConfig,
        clips: EncodedClips,
        base: BaseCheckpoint,
        attention: str,
        weights: Mapping[str, Params],
        directory: Path,
    ) -> tuple[str, ...]:
        dataset = clips.manifest.identity["dataset"]
        provenance = self.provenance("clips") | {"clips": dataset, "attention": attention}
        settings: Any = {
            "provenance": provenance,
            "sampling": self._sample_settings(base, clips),
        }
        if self.lora is not None:
            adapter = weights["adapter"]
            return export_adapter(directory, adapter, self.lora, base=base.folder, **settings)
        return base.export(directory, weights["dit"], model, **settings)
