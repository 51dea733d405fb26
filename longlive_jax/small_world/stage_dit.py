"""Stage `ar`: trains the small world's DiT by teacher forcing, on one device or over a mesh."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.io.checkpoint import (
    CHECKPOINT_MANIFEST,
    TOKENIZER,
    load_component,
    read_manifest,
    save_component,
)
from longlive_jax.io.completeness import require_components
from longlive_jax.io.models import load_model
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.models.wan import GATES, DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.hosts import gather_to_hosts, is_first_process
from longlive_jax.parallel.mesh import check_fits
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.quant.training import QuantizedTraining
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
from longlive_jax.training.metrics import mean_metrics
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
from longlive_jax.training.stages.flops import window_update_cost
from longlive_jax.training.stages.preview import Preview, PreviewSpec
from longlive_jax.training.stages.sample_defaults import SampleDefaults
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec, microbatch_size
from longlive_jax.training.task import About, StepCost, Task, global_batches
from longlive_jax.training.update import Group
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
    """

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

    def __post_init__(self) -> None:
        spec, heads = self.windows, self.model.heads
        counts = (spec.context_chunks, spec.target_chunks)
        rows = microbatch_size(spec.batch, self.loop.accumulate)
        for chunks in counts:
            check_fits(self.mesh, heads=heads, chunks=chunks, batch=rows)
        if self.recycling is not None:
            check_recycling(self.recycling, self.mesh, chunks=counts, batch=rows)

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`. Raises UserError for a checkpoint without VAE or text encoder."""
        # 1. From the checkpoint: encoders, text features, the DiT to train further.
        self._check_encoders(out)
        graphdef, shapes, specs = self._shapes(mesh)
        init = self._init if self.start == "random" else self._restored(out)
        provenance, text = self._provenance(out, workdir), self._text_features(out)

        # 2. Data.
        videos = encoded_corpus(self.corpus, seed=self.loop.seed, checkpoint=out, workdir=workdir)
        train, held_out = _split(videos, share=0.03)
        batches = WindowBatches(train, self.windows, self.loop.steps, self.loop.seed)

        # 3. Loss, precision and updates.
        tokens = self._chunk_tokens(videos)
        loss = TeacherForcingLoss(
            self._setup(graphdef, len(text) - 1, tokens),
            lambda arrays: (TeacherForcingBatch(**arrays), text),
            recycling=self.recycling,
        )
        quant = quantized(self.quant, shapes, specs, mesh, self._rows(tokens))
        group = self._group(init, self._sharded(loss, mesh, quant.specs(specs, shapes)), quant)
        chunk_shape = (world.CHUNK_LATENTS, *videos.latents.shape[2:])
        buffers = buffer_state(self.recycling, chunk_shape, self.mesh)
        return Task(
            trainer=self.trainer({"dit": group}, mesh, buffers),
            batches=global_batches(feed_in_order(batches), mesh, BATCH_SPECS),
            evaluate=self._evaluation(
                loss.without_recycling(),
                held_out,
                Preview(self.preview, out, self.model, self.sample_settings()),
                dataclasses.replace(quant, axes=()),
            ),
            export=functools.partial(self._export, provenance),
            about=About(
                {"batch": self.windows.batch}, (quant.describe(shapes),), self._cost(tokens)
            ),
        )

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

    def _group(
        self,
        init: Callable[[Array], Params],
        loss: TeacherForcingLoss,
        quant: QuantizedTraining,
    ) -> Group:
        """The DiT and how it is trained."""
        return Group(
            init=init,
            loss=loss,
            tx=self.optimizer(),
            ema=self.ema,
            rules=rules.DIT,
            prepare=quant.prepare,
            microbatch_weight=self._num_loss_frames,
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

    def _cost(self, chunk_tokens: int) -> StepCost:
        windows = self.windows
        return window_update_cost(
            self.model,
            batch=windows.batch,
            context=windows.context_chunks,
            target=windows.target_chunks,
            chunk_tokens=chunk_tokens,
            window=windows.window,
        )

    def _shapes(self, mesh: Mesh) -> tuple[nnx.GraphDef[DiT], Params, Any]:
        """Structure, parameter shapes and PartitionSpecs of the model as it is trained.

        Raises UserError for a mesh that does not divide them.
        """
        model = dataclasses.replace(self.model, dtype=jnp.dtype(self.dtype))
        graphdef, shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
        specs = rules.specs_for(rules.DIT, shapes)
        try:
            rules.check_divides(mesh, specs, shapes)
        except ValueError as error:
            raise UserError(f"config: {error}") from error
        return graphdef, shapes, specs

    def _text_features(self, out: pathlib.Path) -> Array:
        """Features [p, t, e] of every prompt, the empty one last."""
        umt5, tokenizer = load_model(out, "umt5"), Tokenizer(out / TOKENIZER)
        length = self.model.text_len
        return jnp.asarray(encode_prompts(umt5, tokenizer, prompt_table(), length=length))

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

    def _evaluation(
        self,
        loss: TeacherForcingLoss,
        held_out: EncodedVideos,
        preview: Preview,
        quant: QuantizedTraining,
    ):
        """Held-out metrics of the EMA in the run's precision, and a preview.

        Batches and draws are the same every time.
        """
        batches = WindowBatches(held_out, self.windows, self.held_out_batches, HELD_OUT_SEED)

        @jax.jit
        def measure(params: Params, batch: dict[str, Array], key: Array):
            _, (metrics, _) = loss(quant.prepare(params)(params, key), batch, key)
            return metrics

        def evaluate(
            weights: Mapping[str, Params], step: int, workdir: pathlib.Path
        ) -> dict[str, float]:
            preview.write(weights["dit"], step, workdir)
            params = gather_to_hosts(weights["dit"])
            metrics = [measure(params, batches[i], jax.random.key(i)) for i in range(len(batches))]
            return {f"held_out_{k}": x for k, x in mean_metrics(metrics).items()}

        return evaluate

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
        want = jax.eval_shape(self._init, jax.random.key(0))
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, want):
            raise UserError(
                f"{out}: its DiT is not config.model; see the settings in longlive.json"
            )
        return lambda key: params

    def _export(
        self, provenance: dict[str, Any], weights: Mapping[str, Params], directory: pathlib.Path
    ) -> None:
        save_component(
            directory, "dit", weights["dit"], self.model, provenance=provenance, overwrite=True
        )
        save_settings(directory, self.sample_settings())

    def _provenance(self, out: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
        """What the checkpoint records of this run, and of the DiT that it trains further.

        The latter is copied to the work directory, as the export replaces it in the checkpoint.
        """
        provenance = self.provenance("ar")
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
