"""Stage `ar`: trains the small world's DiT by teacher forcing, on one device or over a mesh."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.io.arrays import flatten
from longlive_jax.io.checkpoint import (
    CHECKPOINT_MANIFEST,
    TOKENIZER,
    load_component,
    open_component,
    read_manifest,
    save_component,
)
from longlive_jax.io.completeness import require_components
from longlive_jax.io.models import load_model
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.models.wan import GATES, DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.hosts import is_first_process
from longlive_jax.parallel.mesh import AXES, check_fits
from longlive_jax.quant.lora import LoRASpec
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.sampling.settings import save_settings
from longlive_jax.small_world import world
from longlive_jax.small_world.corpus import CorpusSpec, encoded_corpus
from longlive_jax.small_world.windows import (
    EncodedVideos,
    WindowBatches,
    WindowSpec,
    prompt_table,
)
from longlive_jax.spec import UserError
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    TeacherForcingBatch,
    num_loss_frames,
)
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    buffer_state,
    check_recycling,
)
from longlive_jax.training.objectives.quantized import quantized
from longlive_jax.training.objectives.sharded import BATCH_SPECS, ShardedLoss, sharded_forward
from longlive_jax.training.objectives.teacher_forcing import ARSetup, TeacherForcingLoss
from longlive_jax.training.stages.adapted_dit import AdaptedDiT
from longlive_jax.training.stages.adapter_files import export_adapter
from longlive_jax.training.stages.dit_training import DiTTraining, WholeDiT
from longlive_jax.training.stages.evaluation import evaluation
from longlive_jax.training.stages.flops import window_update_cost
from longlive_jax.training.stages.preview import Preview, PreviewSpec
from longlive_jax.training.stages.sample_defaults import SampleDefaults
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec, microbatch_size
from longlive_jax.training.task import About, StepCost, Task, global_batches
from longlive_jax.typing import Array, Params
from pallas_kernels.attention.chunks import attend_chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTStage(RunSpec):
    """Stage `ar`: trains the DiT by teacher forcing, on the checkpoint's latents and text features.

    Attributes:
      model: architecture.
      corpus: encoded videos to train on.
      windows: windows cut from them.
      loss: teacher-forcing loss settings.
      recycling: error recycling (appendix C), or None to disable; the buffers' rows are chunk
        indices, since windows start anywhere.
      held_out_batches: number of batches of an evaluation.
      preview: videos sampled at every evaluation.
      sampling: sampler settings stored in the checkpoint.
      unroll: layers in one step of the scan over layers.
      dtype: dtype of matrix products in training; the checkpoint keeps `model.dtype`.
      start: "random" for new parameters, or "checkpoint" to train the checkpoint's DiT further.
      gate: offset of the blocks' initial gates, which would otherwise start almost closed.
      quant: precision of the blocks' matrix products.
      lora: trains only an adapter of this form, over the checkpoint's DiT, and adds it to the
        checkpoint; None: all parameters.
    """

    name: ClassVar[str] = "ar"
    """Name of the stage in a config."""

    model: DiTConfig
    corpus: CorpusSpec = dataclasses.field(default_factory=CorpusSpec)
    windows: WindowSpec = dataclasses.field(default_factory=WindowSpec)
    loss: ARLossSpec = dataclasses.field(default_factory=ARLossSpec)
    recycling: RecyclingSpec | None = None
    held_out_batches: int = 8
    preview: PreviewSpec = dataclasses.field(default_factory=PreviewSpec)
    sampling: SampleDefaults = dataclasses.field(default_factory=SampleDefaults)
    unroll: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    start: Literal["random", "checkpoint"] = "random"
    gate: float = 0.0
    quant: QuantSpec = dataclasses.field(default_factory=QuantSpec)
    lora: LoRASpec | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.start != "checkpoint":
            raise ValueError("lora needs start='checkpoint': it adapts the checkpoint's DiT")
        spec, heads = self.windows, self.model.heads
        counts = (spec.context_chunks, spec.target_chunks)
        rows = microbatch_size(spec.batch, self.loop.accumulate)
        for chunks in counts:
            check_fits(self.mesh, heads=heads, chunks=chunks, batch=rows)
        if self.recycling is not None:
            check_recycling(self.recycling, self.mesh, chunks=counts, batch=rows)

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`. Raises UserError for a checkpoint without VAE or text encoder."""
        # 1. From the checkpoint: encoders and text features.
        self._check_encoders(out)
        provenance, text = self._provenance(out, workdir), self._text_features(out)

        # 2. Data.
        videos = encoded_corpus(self.corpus, seed=self.loop.seed, checkpoint=out, workdir=workdir)
        train, held_out = _split(videos, share=0.03)
        batches = self.batches(train, self.loop.steps, self.loop.seed)

        # 3. Loss, precision and updates.
        tokens = self._chunk_tokens(videos)
        graphdef, trained = self._trained(out, mesh, tokens)
        frozen = trained.frozen()
        loss = TeacherForcingLoss(
            self._setup(graphdef, len(text) - 1, tokens),
            lambda arrays: (TeacherForcingBatch(**arrays), text),
            recycling=self.recycling,
        )
        group = trained.group(
            self._sharded(loss, mesh, trained.specs(training=True)),
            tx=self.optimizer(),
            ema=self.ema,
            microbatch_weight=self._num_loss_frames,
        )
        chunk_shape = (world.CHUNK_LATENTS, *videos.latents.shape[2:])
        buffers = buffer_state(self.recycling, chunk_shape, self.mesh)
        preview = Preview(self.preview, out, self.model, self.sample_settings())
        return Task(
            trainer=self.trainer({trained.name: group}, mesh, buffers),
            batches=global_batches(feed_in_order(batches), mesh, BATCH_SPECS),
            evaluate=evaluation(
                trained.on_one_device(),
                frozen,
                loss.without_recycling(),
                preview,
                functools.partial(self._held_out, held_out),
                one_device=True,
            ),
            export=functools.partial(self._export, out, provenance),
            frozen=frozen,
            about=self._about(trained, tokens),
        )

    def _about(self, trained: DiTTraining, chunk_tokens: int) -> About:
        cost = self._cost(chunk_tokens, trained.adapter)
        return About({"batch": self.windows.batch}, (trained.describe(),), cost)

    def batches(self, videos: EncodedVideos, steps: int, seed: int) -> Sequence:
        """Batches of windows of the videos, by step."""
        return WindowBatches(videos, self.windows, steps, seed)

    def _check_encoders(self, out: pathlib.Path) -> None:
        """Raises UserError if the checkpoint lacks a part that encodes, or has another width."""
        if not (out / CHECKPOINT_MANIFEST).is_file():
            raise UserError(
                f"{out}: has no VAE and no text encoder yet; make them with `longlive train "
                f"--config=small_world:vae --workdir=DIR --out={out}`, then the same with :text"
            )
        settings = require_components(out, "vae", "umt5", TOKENIZER)["components"]
        for part, width, name, expected in (
            ("VAE", settings["vae"]["z_dim"], "in_channels", self.model.in_channels),
            ("text encoder", settings["umt5"]["dim"], "text_dim", self.model.text_dim),
        ):
            if width != expected:
                raise UserError(
                    f"config.model.{name} must be {width}, as the {part} of {out}, got {expected}"
                )

    def _setup(self, graphdef: nnx.GraphDef[DiT], empty_prompt: int, chunk_tokens: int) -> ARSetup:
        attend = functools.partial(attend_chunks, size=chunk_tokens, most=self.windows.window)
        return ARSetup(
            graphdef,
            world.CHUNK_LATENTS,
            empty_prompt,
            spec=self.loss,
            attention_for=lambda _: attend,
            unroll=self.unroll,
        )

    def _sharded(self, loss: TeacherForcingLoss, mesh: Mesh, specs: Any) -> TeacherForcingLoss:
        """The loss over the mesh, if it has more than one device."""
        if mesh.size == 1:
            return loss
        forward = functools.partial(sharded_forward, sharded=ShardedLoss(mesh, specs))
        return dataclasses.replace(loss, forward=forward)

    def _num_loss_frames(self, arrays: dict[str, Array]) -> Array:
        return num_loss_frames(TeacherForcingBatch(**arrays), world.CHUNK_LATENTS, self.loss)

    def _cost(self, chunk_tokens: int, adapter: Params | None) -> StepCost:
        windows = self.windows
        return window_update_cost(
            self.model,
            batch=windows.batch,
            context=windows.context_chunks,
            target=windows.target_chunks,
            chunk_tokens=chunk_tokens,
            window=windows.window,
            adapter=adapter,
        )

    def _trained(
        self, out: pathlib.Path, mesh: Mesh, chunk_tokens: int
    ) -> tuple[nnx.GraphDef[DiT], DiTTraining]:
        """Structure of the model as it is trained, and what of it is trained.

        Raises UserError for a mesh or settings that do not fit it.
        """
        model = dataclasses.replace(self.model, dtype=jnp.dtype(self.dtype))
        graphdef, shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
        specs = rules.specs_for(rules.DIT, shapes)
        try:
            rules.check_divides(mesh, specs, shapes)
        except ValueError as error:
            raise UserError(f"config: {error}") from error
        if self.start == "checkpoint":
            self._check_stored(out, shapes)
        if self.lora is not None:
            axes = AXES if mesh.size > 1 else ()
            settings = (self.lora, self.quant, self.dtype, shapes, mesh, str(out))
            return graphdef, AdaptedDiT(*settings, axes)
        init = self._init if self.start == "random" else self._restored(out)
        quant = quantized(self.quant, shapes, specs, mesh, self._rows(chunk_tokens))
        return graphdef, WholeDiT(shapes, specs, quant, init)

    def _text_features(self, out: pathlib.Path) -> Array:
        """Features [p, t, e] of every prompt, the empty one last."""
        umt5, tokenizer = load_model(out, "umt5"), Tokenizer(out / TOKENIZER)
        length = self.model.text_len
        return jnp.asarray(encode_prompts(umt5, tokenizer, prompt_table(), length=length))

    def _held_out(self, videos: EncodedVideos) -> Iterator[dict[str, np.ndarray]]:
        """The batches of an evaluation, always the same."""
        batches = self.batches(videos, self.held_out_batches, HELD_OUT_SEED)
        yield from (batches[i] for i in range(len(batches)))

    def _rows(self, chunk_tokens: int) -> dict[str, int]:
        """Number of rows that a sample has in the linears' inputs, by kind."""
        counts = {
            "context": self.windows.context_chunks,
            "target": self.windows.target_chunks,
        }
        tokens = {f"{name} tokens": n * chunk_tokens for name, n in counts.items()}
        text_rows = {
            f"text tokens of {name}": n * self.model.text_len for name, n in counts.items()
        }
        return tokens | text_rows

    def sample_settings(self) -> dict[str, Any]:
        """Sampler settings that match the training, stored in the checkpoint as its defaults."""
        windows = self.windows
        return {
            "size": [world.HEIGHT, world.WIDTH],
            "chunk_frames": world.CHUNK_LATENTS,
            "window": windows.window,
            "global_sinks": windows.global_sinks,
            "shot_rope_offset": windows.shot_rope_offset,
            "shift": self.loss.shift,
            **self.sampling.settings(),
        }

    def _init(self, key: jax.Array) -> Params:
        dit = DiT(self.model, rngs=nnx.Rngs(key))
        table = dit.blocks.modulation
        table[...] = table[...].at[:, GATES].add(self.gate)
        return params_of(dit)

    def _restored(self, out: pathlib.Path) -> Callable[[jax.Array], Params]:
        params, _ = load_component(out, "dit", dtype=jnp.float32)
        return lambda key: params

    def _check_stored(self, out: pathlib.Path, shapes: Params) -> None:
        """Raises UserError if the checkpoint's DiT is another model than that of the config."""
        stored = {path: spec.shape for path, spec in open_component(out, "dit")[0].specs.items()}
        if stored != {path: x.shape for path, x in flatten(shapes).items()}:
            raise UserError(
                f"{out}: its DiT is not config.model; see the settings in longlive.json"
            )

    def _export(
        self,
        out: pathlib.Path,
        provenance: dict[str, Any],
        weights: Mapping[str, Params],
        directory: pathlib.Path,
    ) -> tuple[str, ...]:
        sampling = self.sample_settings()
        settings: Any = {"provenance": provenance}
        if self.lora is not None:
            settings |= {"base": out, "sampling": sampling}
            return export_adapter(directory, weights["adapter"], self.lora, **settings)
        save_component(directory, "dit", weights["dit"], self.model, overwrite=True, **settings)
        save_settings(directory, sampling)
        return ()

    def _provenance(self, out: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
        """What the checkpoint records of this run, and of the DiT that it trains further.

        The latter is copied to the work directory, as the export replaces it in the checkpoint.
        """
        provenance = self.provenance(self.name)
        if self.start == "random":
            return provenance
        path = workdir / "continues.json"
        if path.exists():
            return provenance | {"continues": json.loads(path.read_text())}
        continues = read_manifest(out)["provenance"].get("dit", {})
        if is_first_process():
            workdir.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(continues))
            partial.replace(path)
        return provenance | {"continues": continues}

    @staticmethod
    def _chunk_tokens(videos: EncodedVideos) -> int:
        height, width = videos.latents.shape[2:4]
        return world.CHUNK_LATENTS * (height // 2) * (width // 2)


def _split(videos: EncodedVideos, *, share: float) -> tuple[EncodedVideos, EncodedVideos]:
    """Videos to train on, and a share (at least one) held out for evaluation."""
    count = max(1, round(share * len(videos.latents)))
    train, held_out = (
        EncodedVideos(**{name: column[rows] for name, column in vars(videos).items()})
        for rows in (slice(count, None), slice(count))
    )
    return train, held_out
