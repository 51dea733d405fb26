"""Stage `clips`: a DiT made autoregressive on clips of videos (paper, sections 2.1 and 4.1)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips.batches import collate
from longlive_jax.data.clips.encoders import check_made_by
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec, Source
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.interop.components import RUN_FIELDS
from longlive_jax.io.checkpoint import load_component, read_manifest, save_component
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import BATCH, check_fits
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.quant.training import QuantizedTraining
from longlive_jax.spec import UserError, build
from longlive_jax.training.feed import Feed, own_rows, placed
from longlive_jax.training.loop import Task
from longlive_jax.training.metrics import mean_of
from longlive_jax.training.objectives import sharded
from longlive_jax.training.objectives.build import judged, objective, remembered
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    bytes_held,
    check_recycling,
)
from longlive_jax.training.objectives.quantized import quantized
from longlive_jax.training.objectives.sharded import ShardedLoss, sharded_forward
from longlive_jax.training.objectives.teacher_forcing import (
    ARLossSpec,
    ARSetup,
    TeacherForcingBatch,
    counted,
    laid_out,
)
from longlive_jax.training.stages.flops import step_work
from longlive_jax.training.stages.online_encoding import count_dropped, live_clips, placer
from longlive_jax.training.stages.preview import Preview, PreviewSpec
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec, part_of
from longlive_jax.training.state import Params
from longlive_jax.training.step import LossFn
from longlive_jax.typing import Array
from pallas_kernels.dispatch import Implementation

BATCH_SPECS = sharded.BATCH_SPECS | {"text": P(BATCH)}
"""How a batch lies on a mesh: episodes, and each sample's own texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanARStage(RunSpec):
    """Every chunk of a clip is learnt behind its clean past, one prompt a chunk.

    Attributes:
      checkpoint: with the DiT to begin from, and the VAE and text encoder that made the clips.
      clips: folder that `longlive data encode` made.
      videos: dataset to decode and encode while training, in the place of the latents in `clips`,
        which say what a clip is and have the texts. None: the latents are used.
      anywhere: clips of `videos` begin at random places, drawn anew for every visit; else at the
        beginning of each sample, as the first that `data encode` makes of it.
      held_out: another such folder, for evaluations; None: there are none.
      held_out_batches: how many batches of it are measured.
      preview: what to sample at every evaluation, with the checkpoint's settings.
      batch: clips of an update, over all devices.
      workers: processes that read clips, beside this one; 0: threads.
      window: chunks that a chunk sees, itself and the sinks included; None: all before it.
      phase: latent frames added to temporal positions at every cut.
      loss: of the objective.
      recycling: of errors; None: there is none.
      attention: implementation; "auto" takes the best that is proven for the device.
      remat: recompute layers in the backward pass.
      ffn_parts: parts of a device's tokens that go through the feed-forward one after the other.
      dtype: of matrix products, and of parameters on their way between devices.
      stream_dtype: of the stream between layers, which remat keeps of every layer.
      quant: precision of the blocks' matrix products.
    """

    checkpoint: str
    clips: str
    videos: str | None = None
    anywhere: bool = True
    held_out: str | None = None
    held_out_batches: int = 4
    preview: PreviewSpec = dataclasses.field(default_factory=PreviewSpec)
    batch: int = 8
    workers: int = 0
    window: int | None = None
    shot_rope_offset: int = 0
    loss: ARLossSpec = dataclasses.field(default_factory=ARLossSpec)
    recycling: RecyclingSpec | None = None
    attention: Implementation = "auto"
    remat: bool = True
    ffn_parts: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    stream_dtype: Literal["float32", "bfloat16"] = "float32"
    quant: QuantSpec = dataclasses.field(default_factory=QuantSpec)

    def __post_init__(self) -> None:
        if self.ffn_parts < 1:
            raise ValueError(f"ffn_parts is {self.ffn_parts}; give at least 1")
        least = 1 + max(1, self.loss.global_sinks + 1)
        if self.window is not None and self.window < least:
            raise ValueError(
                f"window is {self.window}; with {self.loss.global_sinks} global sinks and a shot "
                f"sink give at least {least}, or none for the whole past"
            )
        if self.attention in ("cudnn", "mosaic") and self.dtype == "float32":
            raise ValueError(
                f"attention is {self.attention!r}, which takes 16-bit numbers; give dtype=bfloat16"
            )

    def task(self, out: Path, workdir: Path, mesh: Mesh) -> Task:
        """Raises UserError for clips of another checkpoint, or that do not fit model and mesh."""
        model, clips = self.model(), EncodedClips(self.clips)
        check_made_by(clips, self.checkpoint)
        data = self._data(clips, mesh)
        shape, chunks = data.shape, data.chunks
        chunk = shape[0] // chunks
        shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[1]
        self._check(model, shape, chunks, shapes, mesh)
        setup = self.setup(model, chunk, data.texts)
        specs = rules.specs_for(rules.DIT, shapes)
        tokens = chunk * (shape[1] // 2) * (shape[2] // 2)
        quant = self.precision(shapes, specs, mesh, (chunks * tokens, chunks * model.text_len))
        dressed = quant.specs(specs, shapes)
        return Task(
            init=lambda key: params_of(DiT(model, rngs=nnx.Rngs(key))),
            start=lambda: self._restored(mesh, specs),
            loss_fn=self.loss_fn(setup, mesh, dressed),
            prepare=quant.prepare,
            weigh=lambda batch: counted(_taken(batch)[0], chunk, self.loss),
            origin={
                "batch": self.batch,
                "clips": clips.manifest.identity["dataset"],
                "from videos": self.videos is not None,
            },
            notes=(
                quant.describe(shapes),
                self._attends(),
                *self._buffers((chunk, *shape[1:]), mesh),
                *data.notes,
            ),
            feed=functools.partial(self._feed, data.source, clips.empty, mesh, self.loop.seed),
            place=data.place,
            evaluate=self._evaluation(setup, mesh, dressed, quant),
            export=functools.partial(self._export, model),
            rules=rules.DIT,
            batch_specs=BATCH_SPECS,
            rows=self.batch,
            work=step_work(
                model, batch=self.batch, chunks=chunks, chunk_tokens=tokens, window=self.window
            ),
            **remembered(self.recycling, (chunk, *shape[1:]), self.mesh),
        )

    def _data(self, clips: EncodedClips, mesh: Mesh) -> "_Data":
        """Where rows come from: the store, or a dataset of videos."""
        if self.videos is None:
            return _Data(clips, clips.shape, clips.chunks, clips.manifest.texts_per_clip)
        live = live_clips(self.videos, clips, self.checkpoint, mesh, anywhere=self.anywhere)
        place = placer(live, self.checkpoint, mesh, BATCH_SPECS, self.batch)
        left_out = f"{live.left_out} samples of {self.videos} cannot be used: `longlive data check`"
        notes = (left_out,) if live.left_out else ()
        return _Data(live.source, live.shape, live.chunks, live.source.texts, notes, place)

    def _attends(self) -> str:
        """What attention runs. Clips differ in their tokens, and cuDNN takes no mask of each."""
        if self.attention != "auto":
            return f"attention: {self.attention}"
        return (
            "attention: xla, block by block; config.attention=mosaic takes the sparse kernels for "
            "Hopper and Blackwell, compiled but not run on a chip yet"
        )

    def _buffers(self, chunk: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
        """What the error buffers take; groups that do not split over the mesh lie whole on all."""
        if self.recycling is None:
            return ()
        held = bytes_held(self.recycling, chunk, mesh.shape) / 2**30
        groups, ranks = self.recycling.buffer.groups, self.mesh.samples
        whole = groups > 1 and groups % ranks != 0
        why = f", all {groups} groups: they do not split over data * fsdp = {ranks}" * whole
        return (f"error buffers: {held:.3g} GiB a device{why}",)

    def model(self) -> DiTConfig:
        """Of the checkpoint's DiT, computing as this run does."""
        held = read_manifest(self.checkpoint)["components"].get("dit")
        if held is None:
            raise UserError(f"{self.checkpoint}: has no DiT to begin from")
        settings = {k: v for k, v in held.items() if k not in RUN_FIELDS} | self.computing()
        return build(DiTConfig, settings, path=f"{self.checkpoint}: dit")

    def computing(self) -> dict[str, Any]:
        """Settings of the model that are the run's, not the weights'."""
        return {"dtype": self.dtype, "stream_dtype": self.stream_dtype}

    def setup(self, model: DiTConfig, chunk: int, texts: int) -> ARSetup:
        """For clips with room for so many texts, behind which the empty one comes."""
        return ARSetup(
            graphdef=abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[0],
            chunk_frames=chunk,
            empty_prompt=texts,
            spec=self.loss,
            attention_for=functools.partial(laid_out, implementation=self.attention),
            remat=self.remat,
            ffn_parts=self.ffn_parts,
        )

    def precision(
        self, shapes: Params, specs: Any, mesh: Mesh, rows: tuple[int, int]
    ) -> QuantizedTraining:
        """How products are quantized; `rows`: tokens and words of a clip, clean or noisy."""
        named = dict(zip(("clean or noisy tokens", "text rows"), rows, strict=True))
        return quantized(self.quant, shapes, specs, mesh, named)

    def loss_fn(self, setup: ARSetup, mesh: Mesh, specs: Any) -> LossFn:
        """The loss over the mesh, with error recycling if there is any; `specs` are those of the
        parameters as it sees them."""
        run = functools.partial(sharded_forward, setup, self._shared(mesh, specs))
        return objective(setup, run, _taken, self.recycling)

    def _shared(self, mesh: Mesh, specs: Any) -> ShardedLoss:
        return ShardedLoss(mesh, specs, Gather(specs, dtype=jnp.dtype(self.dtype)))

    def check(self, model: DiTConfig, chunks: int, chunk_tokens: int) -> None:
        """ValueError if clips of so many chunks and tokens a chunk do not fit batch and mesh."""
        part = part_of(self.batch, self.loop.accumulate)
        check_fits(self.mesh, heads=model.heads, chunks=chunks, batch=part)
        if self.recycling is not None:
            check_recycling(self.recycling, self.mesh, chunks=(chunks,), batch=part)
        tokens = self.device_tokens(chunks, chunk_tokens)
        if tokens % self.ffn_parts:
            raise ValueError(
                f"ffn_parts = {self.ffn_parts} does not divide the {tokens} tokens of a device; "
                "choose a divisor"
            )

    def device_tokens(self, chunks: int, chunk_tokens: int) -> int:
        """Clean and noisy tokens that one device has at once."""
        rows = self.batch // self.loop.accumulate // self.mesh.samples
        return 2 * rows * chunks * chunk_tokens // self.mesh.sp

    def _check(
        self, model: DiTConfig, shape: tuple[int, ...], chunks: int, shapes: Any, mesh: Mesh
    ) -> None:
        """UserError for clips of latents `shape`, or parameters `shapes`, that do not fit."""
        if shape[-1] != model.in_channels:
            raise UserError(
                f"{self.clips}: latents of {shape[-1]} channels for a model of {model.in_channels}"
            )
        try:
            self.check(model, chunks, shape[0] // chunks * (shape[1] // 2) * (shape[2] // 2))
            rules.check_divides(mesh, rules.specs_for(rules.DIT, shapes), shapes)
        except ValueError as error:
            raise UserError(f"config: {error}") from error

    def _restored(self, mesh: Mesh, specs: Any) -> Params:
        """Float32 masters, every device's part read from disk to it; one array at a time."""

        def put(path: tuple[str, ...], value: np.ndarray) -> jax.Array:
            spec = functools.reduce(lambda tree, key: tree[key], path, specs)
            place = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

        return load_component(self.checkpoint, "dit", dtype=np.float32, put=put)[0]

    def _feed(self, source: Source, empty: np.ndarray, mesh: Mesh, seed: int, start: int) -> Feed:
        rows = own_rows(mesh, self.batch)
        spec = FeedSpec(
            batch=self.batch,
            rank=rows.start // len(rows),
            count=self.batch // len(rows),
            seed=seed,
            workers=self.workers,
        )
        return _Collated(ClipFeed(source, spec, start=start), self._collate(empty))

    def _collate(self, empty: np.ndarray) -> Callable[[dict], dict[str, np.ndarray]]:
        sinks = self.loss.global_sinks

        def collated(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            batch, text = collate(
                rows,
                empty,
                shot_rope_offset=self.shot_rope_offset,
                window=self.window,
                global_sinks=sinks,
            )
            undecoded = {k: rows[k] for k in ("video", "dropped") if k in rows}
            return batch | {"text": text} | undecoded

        return collated

    def _evaluation(self, setup: ARSetup, mesh: Mesh, specs: Any, quant: QuantizedTraining):
        """A preview, and held-out errors of the averaged parameters in the run's precision, the
        same clips and draws every time."""
        window = {} if self.window is None else {"window": self.window}
        settings = {"shift": self.loss.shift, "shot_rope_offset": self.shot_rope_offset, **window}
        preview = Preview(self.preview, Path(self.checkpoint), self.model(), settings)
        clips = None if self.held_out is None else EncodedClips(self.held_out)
        if clips is not None:
            check_made_by(clips, self.checkpoint)
            # Its tables of texts may be longer or shorter.
            setup = dataclasses.replace(setup, empty_prompt=clips.manifest.texts_per_clip)
        run = functools.partial(sharded_forward, setup, self._shared(mesh, specs))

        @jax.jit
        def measure(params: Params, batch: dict[str, Array], key: Array):
            return judged(setup, run, _taken, quant.prepare(params)(params, key), batch, key)

        def evaluate(params: Params, step: int, workdir: Path) -> dict[str, float]:
            preview.write(params, step, workdir)
            if clips is None:
                return {}
            first, found = own_rows(mesh, self.batch).start, []
            with self._feed(clips, clips.empty, mesh, HELD_OUT_SEED, 0) as feed:
                for i, batch in zip(range(self.held_out_batches), feed, strict=False):
                    there = placed(batch, BATCH_SPECS, mesh, rows=self.batch, first=first)
                    found.append(measure(params, there, jax.random.key(i))[1])
            return {f"held_out_{k}": x for k, x in mean_of(found).items()}

        return evaluate

    def _export(self, model: DiTConfig, params: Params, directory: Path) -> None:
        provenance = self.provenance("clips") | {
            "continues": read_manifest(self.checkpoint)["provenance"].get("dit", {}),
            "clips": EncodedClips(self.clips).manifest.identity["dataset"],
        }
        save_component(directory, "dit", params, model, provenance=provenance, overwrite=True)


@dataclasses.dataclass(frozen=True)
class _Data:
    """Clips to train on; `place` is `Task.place`."""

    source: Source
    shape: tuple[int, ...]
    chunks: int
    texts: int
    notes: tuple[str, ...] = ()
    place: Callable[[Any], Any] | None = None


class _Collated(Feed):
    """Batches of a `ClipFeed` as episodes."""

    def __init__(self, clips: ClipFeed, collated: Callable[[dict], dict[str, np.ndarray]]):
        def made() -> Iterator[dict[str, np.ndarray]]:
            for rows in clips:
                self.skipped += int(rows.pop("skipped").sum())
                if "dropped" in rows:
                    self.skipped += count_dropped(rows["dropped"])
                yield collated(rows)

        super().__init__(made(), clips.close)


def _taken(batch: dict[str, Array]) -> tuple[TeacherForcingBatch, Array]:
    """The episode and the texts of a batch."""
    columns = dict(batch)
    text = columns.pop("text")
    return TeacherForcingBatch(**columns), text
