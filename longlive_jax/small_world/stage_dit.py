"""Stage `ar`: the small world's DiT by teacher forcing, on one device or over a mesh."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.io.checkpoint import TOKENIZER, load_component, read_manifest, save_component
from longlive_jax.io.models import load_model
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.models.wan import GATES, DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.hosts import first_process, readable
from longlive_jax.parallel.mesh import check_fits
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.quant.training import QuantizedTraining
from longlive_jax.sampling.settings import Solver, save_settings
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
from longlive_jax.training.loop import Task, Work
from longlive_jax.training.metrics import mean_of
from longlive_jax.training.objectives.build import objective, remembered
from longlive_jax.training.objectives.error_recycling import RecyclingSpec, check_recycling
from longlive_jax.training.objectives.quantized import quantized
from longlive_jax.training.objectives.sharded import BATCH_SPECS, ShardedLoss, sharded_forward
from longlive_jax.training.objectives.teacher_forcing import (
    ARLossSpec,
    ARSetup,
    TeacherForcingBatch,
    ar_loss,
    counted,
    forward,
)
from longlive_jax.training.stages.flops import episode_work
from longlive_jax.training.stages.preview import Preview, PreviewSpec
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec, part_of
from longlive_jax.training.state import Params
from longlive_jax.training.step import LossFn
from longlive_jax.typing import Array
from pallas_kernels.attention.chunks import attend_chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTStage(RunSpec):
    """Stage `ar`: the DiT by teacher forcing, on latents of the VAE and text in the checkpoint."""

    model: DiTConfig
    corpus: CorpusSpec = dataclasses.field(default_factory=CorpusSpec)
    windows: WindowSpec = dataclasses.field(default_factory=WindowSpec)
    loss: ARLossSpec = dataclasses.field(default_factory=ARLossSpec)
    recycling: RecyclingSpec | None = None  # its rows are chunk numbers: windows start anywhere
    held_out_batches: int = 8
    preview: PreviewSpec = dataclasses.field(default_factory=PreviewSpec)
    solver: Solver = "unipc"  # of the sampler, as the checkpoint's default
    steps: int = 32  # likewise
    guidance: float = 2.0  # likewise
    unroll: int = 1
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of matrix products in training; the checkpoint keeps `model.dtype`
    )
    start: Literal["random", "checkpoint"] = "random"  # "checkpoint": from the DiT that is there
    gate: float = 0.0  # added to the gates at the start, or their blocks begin almost closed
    quant: QuantSpec = dataclasses.field(default_factory=QuantSpec)  # of the blocks' products

    def __post_init__(self) -> None:
        spec, heads = self.windows, self.model.heads
        counts = (spec.context_chunks, spec.target_chunks)
        part = part_of(spec.batch, self.loop.accumulate)
        for chunks in counts:
            check_fits(self.mesh, heads=heads, chunks=chunks, batch=part)
        if self.recycling is not None:
            check_recycling(self.recycling, self.mesh, chunks=counts, batch=part)

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        for component, stage in (("vae", "vae"), ("umt5", "text")):
            if not (out / component).is_dir():
                raise UserError(f"{out}: has no {component} yet; train the stage :{stage} into it")
        graphdef, shapes, specs = self._shapes(mesh)
        init = self._init if self.start == "random" else self._restored(out)
        past = self._past(out, workdir)
        text = self._texts(out)
        videos = encoded_corpus(self.corpus, seed=self.loop.seed, checkpoint=out, workdir=workdir)
        size = self._chunk_tokens(videos)
        chunkwise = functools.partial(attend_chunks, size=size, most=self.windows.window)
        setup = ARSetup(
            graphdef,
            world.CHUNK_LATENTS,
            empty_prompt=len(text) - 1,
            spec=self.loss,
            attention_for=lambda _: chunkwise,
            unroll=self.unroll,
        )
        quant = quantized(self.quant, shapes, specs, mesh, self._rows(size))
        train, held_out = _split(videos, share=0.03)
        return Task(
            init=init,
            loss_fn=self._loss_fn(setup, mesh, quant.specs(specs, shapes), text),
            prepare=quant.prepare,
            weigh=self._frames_counted,
            origin={"batch": self.windows.batch},
            notes=(quant.describe(shapes),),
            feed=feed_in_order(WindowBatches(train, self.windows, self.loop.steps, self.loop.seed)),
            evaluate=self._evaluation(
                setup,
                text,
                held_out,
                Preview(self.preview, out, self.model, self.sampling()),
                dataclasses.replace(quant, axes=()),
            ),
            export=functools.partial(self._export, past),
            rules=rules.DIT,
            batch_specs=BATCH_SPECS,
            work=self._work(size),
            **remembered(
                self.recycling, (world.CHUNK_LATENTS, *videos.latents.shape[2:]), self.mesh
            ),
        )

    def _frames_counted(self, batch: dict[str, Array]) -> Array:
        return counted(TeacherForcingBatch(**batch), world.CHUNK_LATENTS, self.loss)

    def _work(self, chunk_tokens: int) -> Work:
        windows = self.windows
        return episode_work(
            self.model,
            batch=windows.batch,
            context=windows.context_chunks,
            target=windows.target_chunks,
            chunk_tokens=chunk_tokens,
            window=windows.window,
        )

    def _shapes(self, mesh: Mesh) -> tuple[nnx.GraphDef[DiT], Params, Any]:
        """Of the model as it is trained: its graph, parameters' shapes, and how these are split.

        UserError for a mesh that does not divide them.
        """
        model = dataclasses.replace(self.model, dtype=jnp.dtype(self.dtype))
        graphdef, shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
        specs = rules.specs_for(rules.DIT, shapes)
        try:
            rules.check_divides(mesh, specs, shapes)
        except ValueError as error:
            raise UserError(f"config: {error}") from error
        return graphdef, shapes, specs

    def _texts(self, out: pathlib.Path) -> Array:
        """Features [p, t, e] of every prompt, the empty one last."""
        umt5, tokenizer = load_model(out, "umt5"), Tokenizer(out / TOKENIZER)
        length = self.model.text_len
        return jnp.asarray(encode_prompts(umt5, tokenizer, prompt_table(), length=length))

    def _loss_fn(self, setup: ARSetup, mesh: Mesh, specs: Any, text: Array) -> LossFn:
        """The loss on one device or over the mesh, with error recycling if there is any."""
        run = functools.partial(forward, setup)
        if mesh.size > 1:
            run = functools.partial(sharded_forward, setup, ShardedLoss(mesh, specs))
        return objective(
            setup, run, lambda batch: (TeacherForcingBatch(**batch), text), self.recycling
        )

    def _rows(self, chunk_tokens: int) -> dict[str, int]:
        """Rows that a sample gives to the linears."""
        counts = {
            "context": self.windows.context_chunks,
            "target": self.windows.target_chunks,
        }
        tokens = {f"{name} tokens": n * chunk_tokens for name, n in counts.items()}
        words = {f"text rows of {name}": n * self.model.text_len for name, n in counts.items()}
        return tokens | words

    def _evaluation(
        self,
        setup: ARSetup,
        text: Array,
        held_out: EncodedVideos,
        preview: Preview,
        quant: QuantizedTraining,
    ):
        """Held-out errors of the averaged parameters, in the precision of the run, the same batches
        and draws every time."""
        checks = WindowBatches(held_out, self.windows, self.held_out_batches, HELD_OUT_SEED)

        @jax.jit
        def measure(params, batch, key):
            params = quant.prepare(params)(params, key)
            return ar_loss(setup, params, TeacherForcingBatch(**batch), key, text)

        def evaluate(params, step, workdir):
            preview.write(params, step, workdir)
            params = readable(params)
            found = [measure(params, checks[i], jax.random.key(i))[1] for i in range(len(checks))]
            return {f"held_out_{k}": x for k, x in mean_of(found).items()}

        return evaluate

    def sampling(self) -> dict[str, Any]:
        """Sampler settings that fit what was trained; the checkpoint carries them as defaults."""
        windows = self.windows
        return {
            "size": [world.HEIGHT, world.WIDTH],
            "chunk_frames": world.CHUNK_LATENTS,
            "window": windows.window,
            "global_sinks": windows.global_sinks,
            "shot_rope_offset": windows.shot_rope_offset,
            "shift": self.loss.shift,
            "solver": self.solver,
            "steps": self.steps,
            "guidance": self.guidance,
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

    def _export(self, past: dict[str, Any], params: Params, directory: pathlib.Path) -> None:
        provenance = self.provenance("ar") | past
        save_component(directory, "dit", params, self.model, provenance=provenance, overwrite=True)
        save_settings(directory, self.sampling())

    def _past(self, out: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
        """What the checkpoint says of the DiT to go on from; kept, as this run replaces it."""
        if self.start == "random":
            return {}
        kept = workdir / "continues.json"
        if kept.exists():
            return {"continues": json.loads(kept.read_text())}
        continues = read_manifest(out)["provenance"].get("dit", {})
        if first_process():
            workdir.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(continues))
            partial.replace(kept)
        return {"continues": continues}

    @staticmethod
    def _chunk_tokens(videos: EncodedVideos) -> int:
        height, width = videos.latents.shape[2:4]
        return world.CHUNK_LATENTS * (height // 2) * (width // 2)


def _split(videos: EncodedVideos, *, share: float) -> tuple[EncodedVideos, EncodedVideos]:
    """Videos to train on, and a share (at least one) kept for measuring."""
    kept = max(1, round(share * len(videos.latents)))
    rest, first = (
        EncodedVideos(**{name: column[part] for name, column in vars(videos).items()})
        for part in (slice(kept, None), slice(kept))
    )
    return rest, first
