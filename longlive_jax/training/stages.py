"""The stages of the small world's recipe: specs, and how each becomes a `Task`.

A later stage reads what the earlier ones wrote to the same checkpoint directory.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from longlive_jax.data.small_world import world
from longlive_jax.data.small_world.latents import (
    EncodedVideos,
    EpisodeBatches,
    EpisodeSpec,
    encode_videos,
    prompt_table,
)
from longlive_jax.data.small_world.text import world_tokenizer
from longlive_jax.io.checkpoint import (
    TOKENIZER,
    load_component,
    read_manifest,
    save_component,
)
from longlive_jax.io.models import load_model
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.umt5 import Tokenizer, UMT5Config, encode_prompts
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import GATES, DiT, DiTConfig
from longlive_jax.sampling.settings import Solver, save_settings
from longlive_jax.spec import UserError
from longlive_jax.training.ar import ARLossSpec, Episode, ar_loss
from longlive_jax.training.loop import LoopSpec, Task
from longlive_jax.training.optim import OptimSpec
from longlive_jax.training.state import Params
from longlive_jax.training.step import EMASpec
from longlive_jax.training.text import CaptionBatches, text_task
from longlive_jax.training.vae import ClipBatches, Phase, VAELossSpec, vae_task
from pallas_kernels.attention.chunks import attend_chunks

HELD_OUT_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """What every stage shares."""

    loop: LoopSpec = dataclasses.field(default_factory=LoopSpec)
    optim: OptimSpec = dataclasses.field(default_factory=OptimSpec)
    ema: EMASpec = dataclasses.field(default_factory=EMASpec)
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the exported parameters

    def task(self, out: pathlib.Path, workdir: pathlib.Path) -> Task:
        """What to train, given the checkpoint directory so far and a place for cached data."""
        raise TypeError(f"{type(self).__name__} is no stage; choose from {', '.join(STAGES)}")

    def provenance(self, stage: str) -> dict[str, Any]:
        """What the checkpoint remembers of this run."""
        return {"stage": stage, "steps": self.loop.steps, "seed": self.loop.seed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEStage(RunSpec):
    """Stage `vae`: phases of images and clips; `loop.steps` must be their sum."""

    model: VAEConfig
    phases: tuple[Phase, ...]
    loss: VAELossSpec = dataclasses.field(default_factory=VAELossSpec)
    held_out_clips: int = 8
    cut_probability: float = 0.5
    subject_weight: float = 3.0  # pixels of the subject count 1 + this

    def __post_init__(self):
        total = sum(phase.steps for phase in self.phases)
        if total != self.loop.steps:
            raise ValueError(
                f"phases have {total} steps, loop.steps is {self.loop.steps}; make them equal"
            )

    def task(self, out: pathlib.Path, workdir: pathlib.Path) -> Task:
        def clips(rng: np.random.Generator, batch: int, frames: int):
            video, cover = world.vae_clips(rng, batch, frames, self.cut_probability)
            return video, 1 + self.subject_weight * (cover > 0)[..., None].astype(np.float32)

        held_out, _ = clips(np.random.default_rng(HELD_OUT_SEED), self.held_out_clips, 61)
        batches = ClipBatches(clips, self.phases, self.loop.seed)
        return vae_task(
            self.model, batches, held_out, loss=self.loss, provenance=self.provenance("vae")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStage(RunSpec):
    """Stage `text`: the tokenizer, and the encoder trained to guess hidden words."""

    model: UMT5Config
    batch: int = 128

    def task(self, out: pathlib.Path, workdir: pathlib.Path) -> Task:
        tokenizer = world_tokenizer()
        steps, seed = self.loop.steps, self.loop.seed
        batches = CaptionBatches(tokenizer, self.batch, steps=steps, seed=seed)
        return text_task(self.model, tokenizer, batches, provenance=self.provenance("text"))


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """How many videos are encoded for the DiT, of how many chunks, with shots of how many."""

    videos: int = 800
    chunks: int = 24
    shot_chunks: tuple[int, int] = (3, 12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARStage(RunSpec):
    """Stage `ar`: the DiT by teacher forcing, on latents of the VAE and text in the checkpoint."""

    model: DiTConfig
    corpus: CorpusSpec = dataclasses.field(default_factory=CorpusSpec)
    episodes: EpisodeSpec = dataclasses.field(default_factory=EpisodeSpec)
    loss: ARLossSpec = dataclasses.field(default_factory=ARLossSpec)
    held_out_batches: int = 8
    solver: Solver = "unipc"  # of the sampler, as the checkpoint's default
    steps: int = 32  # likewise
    guidance: float = 2.0  # likewise
    unroll: int = 1
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of matrix products in training; the checkpoint keeps `model.dtype`
    )
    start: Literal["random", "checkpoint"] = "random"  # "checkpoint": from the DiT that is there
    gate: float = 0.0  # added to the gates at the start, or their blocks begin almost closed

    def task(self, out: pathlib.Path, workdir: pathlib.Path) -> Task:
        for component, stage in (("vae", "vae"), ("umt5", "text")):
            if not (out / component).is_dir():
                raise UserError(f"{out}: has no {component} yet; train the stage :{stage} into it")
        init = self._init if self.start == "random" else self._restored(out)
        past = self._past(out, workdir)
        umt5, tokenizer = load_model(out, "umt5"), Tokenizer(out / TOKENIZER)
        prompts = prompt_table()
        text = encode_prompts(umt5, tokenizer, prompts, length=self.model.text_len)
        videos = self._latents(out, workdir)
        model = dataclasses.replace(self.model, dtype=jnp.dtype(self.dtype))
        graphdef, _ = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
        loss_fn = functools.partial(
            ar_loss,
            graphdef,
            text=jnp.asarray(text),
            empty_prompt=len(prompts) - 1,
            chunk=world.CHUNK_LATENTS,
            spec=self.loss,
            attend=functools.partial(
                attend_chunks, size=self._chunk_tokens(videos), most=self.episodes.window
            ),
            unroll=self.unroll,
        )
        train, held_out = _split(videos, share=0.03)
        checks = EpisodeBatches(held_out, self.episodes, self.held_out_batches, HELD_OUT_SEED)
        measure = jax.jit(lambda params, batch, key: loss_fn(params, Episode(**batch), key))

        def evaluate(params, step, workdir):
            found = [measure(params, checks[i], jax.random.key(i))[1] for i in range(len(checks))]
            return {f"held_out_{k}": np.mean([float(m[k]) for m in found]) for k in found[0]}

        def export(params, directory):
            provenance = self.provenance("ar") | past
            save_component(
                directory, "dit", params, self.model, provenance=provenance, overwrite=True
            )
            save_settings(directory, self.sampling())

        return Task(
            init=init,
            loss_fn=lambda params, batch, key: loss_fn(params, Episode(**batch), key),
            batches=EpisodeBatches(train, self.episodes, self.loop.steps, self.loop.seed),
            evaluate=evaluate,
            export=export,
        )

    def sampling(self) -> dict[str, Any]:
        """Sampler settings that fit what was trained; the checkpoint carries them as defaults."""
        episodes = self.episodes
        return {
            "size": [world.HEIGHT, world.WIDTH],
            "chunk": world.CHUNK_LATENTS,
            "window": episodes.window,
            "global_sinks": episodes.global_sinks,
            "rope_offset": episodes.phase,
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

    def _past(self, out: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
        """What the checkpoint says of the DiT to go on from; kept, as this run replaces it."""
        if self.start == "random":
            return {}
        kept = workdir / "continues.json"
        if not kept.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(read_manifest(out)["provenance"].get("dit", {})))
        return {"continues": json.loads(kept.read_text())}

    @staticmethod
    def _chunk_tokens(videos: EncodedVideos) -> int:
        height, width = videos.latents.shape[2:4]
        return world.CHUNK_LATENTS * (height // 2) * (width // 2)

    def _latents(self, out: pathlib.Path, workdir: pathlib.Path) -> EncodedVideos:
        """The encoded corpus, from the work directory if an earlier run left it there."""
        cached = workdir / "corpus.npz"
        if cached.exists():
            with np.load(cached) as held:
                return EncodedVideos(**{k: held[k] for k in held})
        spec = self.corpus
        parts = encode_videos(
            load_model(out, "vae"),
            videos=spec.videos,
            chunks=spec.chunks,
            shot_chunks=spec.shot_chunks,
            seed=self.loop.seed,
        )
        found = list(track(parts, "encoding", total=-(-spec.videos // 8)))
        fields: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in found])
            for name in ("latents", "prompt", "shot")
        }
        workdir.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".partial.npz")
        np.savez(partial, **fields)
        partial.rename(cached)
        return EncodedVideos(**fields)


def _split(videos: EncodedVideos, *, share: float) -> tuple[EncodedVideos, EncodedVideos]:
    """Videos to train on, and a share (at least one) kept for measuring."""
    kept = max(1, round(share * len(videos.latents)))
    rest, first = (
        EncodedVideos(**{name: column[part] for name, column in vars(videos).items()})
        for part in (slice(kept, None), slice(kept))
    )
    return rest, first


STAGES: dict[str, type[RunSpec]] = {"vae": VAEStage, "text": TextStage, "ar": ARStage}
