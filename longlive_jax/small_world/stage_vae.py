"""Stage `vae`: trains the VAE to reconstruct images, then clips.

Images are a cheap way to learn space. The past taps of causal convolutions start at zero, so the
same parameters can then be trained on clips. A little noise is added to latents before decoding, so
that the decoder tolerates the small errors of a generator.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.vae import VAE, VAEConfig, decode, encode
from longlive_jax.parallel.hosts import gather_to_hosts, is_first_process
from longlive_jax.small_world import world
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec
from longlive_jax.training.task import Task, global_batches
from longlive_jax.training.update import Group, stateless
from longlive_jax.typing import Array, Float, Params

ClipSampler = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
"""(rng, batch, frames) -> video [b, f, h, w, 3] in [-1, 1], weight [b, f, h, w, 1] of pixels."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the run with one clip length.

    Attributes:
      steps: number of training steps.
      batch: clips per step.
      frames: frames per clip (1: images).
    """

    steps: int
    batch: int
    frames: int


@dataclasses.dataclass(frozen=True)
class VAELossSpec:
    """Weights of the reconstruction loss: absolute error + `square` x squared error per pixel.

    Attributes:
      square: weight of the squared error; that of the absolute error is 1.
      noise: standard deviation of the noise added to latents before decoding.
      size: weight of the mean squared latent, which keeps latents near unit size.
    """

    square: float = 2.0
    noise: float = 0.1
    size: float = 3e-4


@dataclasses.dataclass(frozen=True)
class ClipBatches(Sequence):
    """The batches of the run; batch i is a function of i."""

    source: ClipSampler
    phases: tuple[Phase, ...]
    seed: int

    def __len__(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def __getitem__(self, i):
        left = int(i)
        for phase in self.phases:
            if left < phase.steps:
                break
            left -= phase.steps
        rng = np.random.default_rng((self.seed, int(i)))
        video, weight = self.source(rng, phase.batch, phase.frames)
        return {"video": video, "weight": weight}


def vae_loss(graphdef: nnx.GraphDef, params: Params, batch, key, *, spec: VAELossSpec):
    """Weighted reconstruction loss of one batch; also reports the plain PSNR in dB."""
    vae = with_params(graphdef, params)
    video, weight = batch["video"], batch["weight"]
    z = encode(vae, video)
    noisy = z + spec.noise * jax.random.normal(key, z.shape)
    error = decode(vae, noisy) - video
    cost = weight * (jnp.abs(error) + spec.square * error**2)
    metrics = {"psnr": psnr(error), "latent_std": jnp.std(z)}
    return jnp.mean(cost) + spec.size * jnp.mean(z**2), metrics


def psnr(error: Float[Array, "..."]) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB for pixels in [-1, 1]."""
    return 10 * jnp.log10(4 / jnp.mean(error**2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEStage(RunSpec):
    """Stage `vae`: the VAE, by reconstruction in phases of images and clips.

    Attributes:
      model: architecture.
      phases: phases of the run; their steps must sum to `loop.steps`.
      loss: weights of the loss.
      held_out_clips: number of clips for evaluation and for the latents' statistics.
      cut_probability: probability that a clip has a cut.
      subject_weight: weight of the subject's pixels in addition to the 1 of every pixel.
    """

    model: VAEConfig
    phases: tuple[Phase, ...]
    loss: VAELossSpec = dataclasses.field(default_factory=VAELossSpec)
    held_out_clips: int = 8
    cut_probability: float = 0.5
    subject_weight: float = 3.0

    def __post_init__(self):
        self.check_data_parallel(*(phase.batch for phase in self.phases))
        total = sum(phase.steps for phase in self.phases)
        if total != self.loop.steps:
            raise ValueError(
                f"phases have {total} steps, loop.steps is {self.loop.steps}; make them equal"
            )

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`."""
        graphdef, _ = abstract(lambda: VAE(self.model, rngs=nnx.Rngs(0)))
        batches = ClipBatches(self._clips, self.phases, self.loop.seed)
        held_out, _ = self._clips(np.random.default_rng(HELD_OUT_SEED), self.held_out_clips, 61)
        group = Group(
            init=lambda key: params_of(VAE(self.model, rngs=nnx.Rngs(key))),
            loss=stateless(functools.partial(vae_loss, graphdef, spec=self.loss)),
            tx=self.optimizer(),
            ema=self.ema,
        )
        return Task(
            trainer=self.trainer({"vae": group}, mesh),
            batches=global_batches(feed_in_order(batches), mesh),
            evaluate=self._evaluation(graphdef, held_out),
            export=functools.partial(self._export, graphdef, held_out),
        )

    def _clips(
        self, rng: np.random.Generator, batch: int, frames: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Videos and the weights of their pixels; a `ClipSampler`."""
        video, cover = world.vae_clips(rng, batch, frames, self.cut_probability)
        return video, 1 + self.subject_weight * (cover > 0)[..., None].astype(np.float32)

    def _evaluation(self, graphdef: nnx.GraphDef[VAE], held_out: np.ndarray):
        """PSNR on the held-out clips, overall and of the worst frame; also writes a picture."""

        @jax.jit
        def round_trip(params: Params, video: Array) -> Array:
            vae = with_params(graphdef, params)
            return decode(vae, encode(vae, video, chunk_frames=4), chunk_frames=4)

        def evaluate(
            weights: Mapping[str, Params], step: int, workdir: pathlib.Path
        ) -> dict[str, float]:
            rebuilt = jnp.clip(round_trip(gather_to_hosts(weights["vae"]), held_out), -1, 1)
            frames = np.concatenate([np.asarray(held_out[0, ::8]), np.asarray(rebuilt[0, ::8])])
            if is_first_process():
                _save_frames(frames, workdir / f"reconstruction_{step:06d}.png")
            worst = jnp.mean((rebuilt - held_out) ** 2, axis=(2, 3, 4)).max()
            metrics = {
                "held_out_psnr": psnr(rebuilt - held_out),
                "worst_psnr": 10 * jnp.log10(4 / worst),
            }
            return {name: float(value) for name, value in metrics.items()}

        return evaluate

    def _export(
        self,
        graphdef: nnx.GraphDef[VAE],
        held_out: np.ndarray,
        weights: Mapping[str, Params],
        directory: pathlib.Path,
    ) -> None:
        """Writes the VAE with the statistics of its latents on the held-out clips."""
        cfg, params = self.model, weights["vae"]
        encode_clips = jax.jit(lambda p, x: encode(with_params(graphdef, p), x, chunk_frames=4))
        z = encode_clips(params, held_out)
        mean, std = z.mean((0, 1, 2, 3)), z.std((0, 1, 2, 3))
        old_mean, old_std = jnp.array(cfg.latent_mean), jnp.array(cfg.latent_std)
        final = dataclasses.replace(
            cfg,
            latent_mean=tuple(map(float, mean * old_std + old_mean)),
            latent_std=tuple(map(float, std * old_std)),
        )
        provenance = self.provenance("vae")
        save_component(directory, "vae", params, final, provenance=provenance, overwrite=True)


def _save_frames(frames: np.ndarray, path: pathlib.Path) -> None:
    """Writes two rows of frames: the originals above, their reconstructions below."""
    from PIL import Image

    top, bottom = np.split(np.clip(frames * 127.5 + 127.5, 0, 255).astype(np.uint8), 2)
    rows = [np.concatenate(list(row), axis=1) for row in (top, bottom)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)
