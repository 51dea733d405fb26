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

from longlive_jax.data.clips.frames import FrameRuns
from longlive_jax.io.checkpoint import load_component, read_manifest, save_component
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.vae import VAE, VAEConfig, decode, encode
from longlive_jax.parallel.hosts import gather_to_hosts, is_first_process
from longlive_jax.sampling.settings import checkpoint_settings
from longlive_jax.small_world import world
from longlive_jax.spec import UserError, build
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.stages.base_checkpoint import BaseCheckpoint
from longlive_jax.training.stages.stage import HELD_OUT_SEED, RunSpec
from longlive_jax.training.task import Task, global_batches
from longlive_jax.training.update import Group, stateless
from longlive_jax.typing import Array, Float, Params

ClipSampler = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
"""(rng, batch, frames) -> video [b, f, h, w, 3] in [-1, 1], weight [b, f, h, w, 1] of pixels."""


VIDEO_FRAMES = 13
"""Frames of the clips of `VAEStage.videos` on which reconstruction is measured."""


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
      model: architecture; None: that of `checkpoint`.
      phases: phases of the run; their steps must sum to `loop.steps`.
      checkpoint: checkpoint whose VAE is trained further; its latents keep their mean and standard
        deviation. None: a new VAE.
      videos: dataset of videos to train on; None: videos of the small world.
      size: height and width of frames of `videos`, in pixels.
      loss: weights of the loss.
      held_out_clips: number of clips for evaluation and for the latents' statistics.
      cut_probability: probability that a clip has a cut.
      subject_weight: weight of the subject's pixels in addition to the 1 of every pixel.
    """

    phases: tuple[Phase, ...]
    model: VAEConfig | None = None
    checkpoint: str | None = None
    videos: str | None = None
    size: tuple[int, int] = (64, 64)
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
        if (self.model is None) == (self.checkpoint is None):
            raise ValueError(
                "set either model (a new VAE) or checkpoint (its VAE is trained further)"
            )

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`. Raises UserError for a checkpoint or videos that cannot be used."""
        # 1. Model and data.
        base = None
        if self.checkpoint is not None:
            if self.videos is None:
                raise UserError(
                    "config.videos is not set; give a folder of clips with captions (a.mp4, a.txt) "
                    "by --config.videos=FOLDER"
                )
            base = BaseCheckpoint.open(self.checkpoint, out, "vae")
        model = self._model(base)
        graphdef, _ = abstract(lambda: VAE(model, rngs=nnx.Rngs(0)))
        clips = self._clips if self.videos is None else self._video_clips(model)
        batches = ClipBatches(clips, self.phases, self.loop.seed)
        frames = 61 if self.videos is None else VIDEO_FRAMES
        held_out, _ = clips(np.random.default_rng(HELD_OUT_SEED), self.held_out_clips, frames)
        # 2. Updates.
        group = Group(
            init=functools.partial(self._init, model, base),
            loss=stateless(functools.partial(vae_loss, graphdef, spec=self.loss)),
            tx=self.optimizer(),
            ema=self.ema,
        )
        return Task(
            trainer=self.trainer({"vae": group}, mesh),
            batches=global_batches(feed_in_order(batches), mesh),
            evaluate=self._evaluation(graphdef, held_out),
            export=functools.partial(self._export, graphdef, model, base, held_out),
        )

    def _model(self, base: BaseCheckpoint | None) -> VAEConfig:
        """The architecture; the checkpoint's if there is one."""
        if base is None:
            assert self.model is not None
            return self.model
        settings = read_manifest(base.folder)["components"]["vae"]
        run = {"dtype": "float32", "param_dtype": "float32"}
        return build(VAEConfig, settings | run, path=f"{base.folder}: vae")

    def _init(self, model: VAEConfig, base: BaseCheckpoint | None, key: jax.Array) -> Params:
        if base is None:
            return params_of(VAE(model, rngs=nnx.Rngs(key)))
        return load_component(base.folder, "vae", dtype=np.float32)[0]

    def _video_clips(self, model: VAEConfig) -> ClipSampler:
        """Clips of `videos`, all of whose pixels have weight 1."""
        if any(side <= 0 or side % (2 * model.spatial_stride) for side in self.size):
            raise UserError(
                f"config.size must be multiples of {2 * model.spatial_stride}, got {self.size}"
            )
        assert self.videos is not None
        runs = FrameRuns.read(self.videos, self.size)
        runs.check_length(max(VIDEO_FRAMES, *(phase.frames for phase in self.phases)))

        def sample(rng: np.random.Generator, batch: int, frames: int):
            video = runs.draw(rng, batch, frames)
            return video, np.ones((*video.shape[:-1], 1), np.float32)

        return sample

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
        cfg: VAEConfig,
        base: BaseCheckpoint | None,
        held_out: np.ndarray,
        weights: Mapping[str, Params],
        directory: pathlib.Path,
    ) -> tuple[str, ...]:
        """Writes the VAE; a new one with the statistics of its latents on the held-out clips."""
        params, provenance = weights["vae"], self.provenance("vae")
        if base is not None:
            sampling = checkpoint_settings(base.folder)
            notes = base.export(directory, params, cfg, provenance=provenance, sampling=sampling)
            again = "its DiT was trained on the latents of the former VAE: train it further with "
            return (*notes, again + f"--config=own_clips --config.checkpoint={directory}")
        encode_clips = jax.jit(lambda p, x: encode(with_params(graphdef, p), x, chunk_frames=4))
        z = encode_clips(params, held_out)
        mean, std = z.mean((0, 1, 2, 3)), z.std((0, 1, 2, 3))
        old_mean, old_std = jnp.array(cfg.latent_mean), jnp.array(cfg.latent_std)
        final = dataclasses.replace(
            cfg,
            latent_mean=tuple(map(float, mean * old_std + old_mean)),
            latent_std=tuple(map(float, std * old_std)),
        )
        save_component(directory, "vae", params, final, provenance=provenance, overwrite=True)
        return ()


def _save_frames(frames: np.ndarray, path: pathlib.Path) -> None:
    """Writes two rows of frames: the originals above, their reconstructions below."""
    from PIL import Image

    top, bottom = np.split(np.clip(frames * 127.5 + 127.5, 0, 255).astype(np.uint8), 2)
    rows = [np.concatenate(list(row), axis=1) for row in (top, bottom)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)
