"""Batches of distribution matching distillation, its settings, and everything random in a loss."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.diffusion.flow import TIMESTEPS, FlowSchedule, shifted
from longlive_jax.diffusion.solvers import SOLVERS, Solver
from longlive_jax.models.wan.packed_cache import KVFormat, Storage
from longlive_jax.typing import Array, Bool, Float, Int, Key


@flax.struct.dataclass
class PromptBatch:
    """What `b` videos of `n` chunks show; no videos are needed.

    Attributes:
      prompt: row of each chunk's prompt in the text features, whose last row is the negative one.
      cut: whether the chunk begins a shot other than the first.
      first_frame: latents of the first frame (image to video), or None.
    """

    prompt: Int[Array, "b n"]
    cut: Bool[Array, "b n"]
    first_frame: Float[Array, "b h w c"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """How the student samples while it is trained (paper, section 4.1).

    Attributes:
      steps: model calls per chunk of the distilled model.
      shift: shift of the noise levels towards the noisy end.
      solver: deterministic solver between the steps.
      chunks: chunks of a video.
      exit: step whose estimate of the clean video is trained: drawn uniformly for every update (and
        microbatch), or always the "last".
      window: chunks in the attention window, the current one and all sinks included; None: all.
      global_sinks: number of first chunks that stay in the window.
      shot_sinks: whether the first chunk of the current shot stays in the window.
      shot_rope_offset: latent frames added to temporal positions at every cut.
      context: whether finished chunks enter the cache as they are ("exact", as the sampler does) or
        with the noise of the lowest training level ("noised", as the reference does).
      gradients: "detached" cuts the gradient at the cache. "reference" lets a chunk's loss reach
        the keys and values of earlier chunks, as the original's code does.
      tail: number of last chunks that carry a gradient; None: all.
      kv: storage of the cache's keys and values.
    """

    steps: int = 4
    shift: float = 5.0
    solver: Literal["unipc", "euler"] = "unipc"
    chunks: int = 4
    exit: Literal["uniform", "last"] = "uniform"
    window: int | None = None
    global_sinks: int = 1
    shot_sinks: bool = True
    shot_rope_offset: int = 8
    context: Literal["exact", "noised"] = "exact"
    gradients: Literal["detached", "reference"] = "detached"
    tail: int | None = None
    kv: Storage = "model"

    def __post_init__(self) -> None:
        for name in ("steps", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be >= 1, got {getattr(self, name)}")
        least = 1 + max(1, self.global_sinks + self.shot_sinks)
        if self.window is not None and self.window < least:
            raise ValueError(
                f"rollout.window must be >= {least} for {self.global_sinks} global sinks and "
                f"{int(self.shot_sinks)} shot sinks, got {self.window}; or set none for all chunks"
            )
        if self.tail is not None and not 1 <= self.tail <= self.chunks:
            raise ValueError(
                f"rollout.tail must be in [1, rollout.chunks = {self.chunks}], got {self.tail}"
            )
        if self.gradients == "reference" and self.kv != "model":
            raise ValueError(
                "rollout.gradients=reference needs the cache in the model's dtype; set "
                "rollout.kv=model"
            )

    def table(self) -> Solver:
        """The solver's coefficients, one row per step."""
        return SOLVERS[self.solver](self.steps, shift=self.shift)

    def exit_sigmas(self) -> np.ndarray:
        """The noise level [steps] with which a step's velocity becomes an estimate of x0.

        It is the level of the training table nearest to the step's integer timestep.
        """
        schedule, timestep = FlowSchedule(self.shift), np.asarray(self.table().timestep)
        nearest = np.argmin(np.abs(schedule.timesteps - timestep[:, None]), axis=1)
        return schedule.sigmas[nearest]

    @property
    def leaks(self) -> bool:
        """Whether gradients pass the cache.

        The original's cache holds `window + tail` chunks. Where that is fewer than the video has,
        it moves its contents, which cuts the gradient.
        """
        tail = self.chunks if self.tail is None else self.tail
        capacity = self.chunks if self.window is None else self.window + tail
        return self.gradients == "reference" and capacity >= self.chunks

    @property
    def format(self) -> KVFormat:
        """Storage of keys and values."""
        return KVFormat(self.kv)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """How teacher and critic score a video (paper, section 4.1; reference facts, 9.3).

    Attributes:
      context: what the scores see: "noisy", one noisy sequence under the block-causal mask, or
        "clean", every noisy chunk after the clean chunks before it (teacher forcing).
      guidance: scale of the teacher's classifier-free guidance; 1 is off and saves a third of the
        scores.
      shift: shift of the timesteps towards the noisy end.
      timesteps: smallest and largest timestep.
      per_chunk: whether every chunk of a video has a timestep of its own.
      shot_rope_offset: latent frames added to temporal positions at every cut.
    """

    context: Literal["noisy", "clean"] = "noisy"
    guidance: float = 4.0
    shift: float = 5.0
    timesteps: tuple[float, float] = (20.0, 980.0)
    per_chunk: bool = False
    shot_rope_offset: int = 0

    def __post_init__(self) -> None:
        low, high = self.timesteps
        if not 0 < low < high <= TIMESTEPS:
            raise ValueError(
                f"scores.timesteps must be two rising numbers in (0, {TIMESTEPS}], got "
                f"{self.timesteps}"
            )
        if self.guidance < 0:
            raise ValueError(f"scores.guidance must be >= 0, got {self.guidance}")


@flax.struct.dataclass
class RolloutDraws:
    """Everything random in a rollout.

    Attributes:
      noise: the pure noise that every frame starts from.
      context_noise: noise of finished chunks, or None where they enter the cache as they are.
      exit_step: the step whose estimate is trained; one for all chunks, samples and devices.
    """

    noise: Float[Array, "b f h w c"]
    context_noise: Float[Array, "b f h w c"] | None
    exit_step: Int[Array, ""]


@flax.struct.dataclass
class ScoreDraws:
    """Everything random in an evaluation of the scores.

    Attributes:
      timestep: timestep that the scores are given for each frame.
      sigma: noise level of each frame.
      noise: noise added to the video.
    """

    timestep: Float[Array, "b f"]
    sigma: Float[Array, "b f"]
    noise: Float[Array, "b f h w c"]


def draw_rollout(
    key: Key[Array, ""], spec: RolloutSpec, shape: tuple[int, int, int, int, int]
) -> RolloutDraws:
    """Draws for a rollout of latents of `shape` [b, f, h, w, c]."""
    noise_key, context_key, exit_key = jax.random.split(key, 3)
    exit_step = jnp.asarray(spec.steps - 1, jnp.int32)
    if spec.exit == "uniform":
        exit_step = jax.random.randint(exit_key, (), 0, spec.steps)
    context_noise = None
    if spec.context == "noised":
        context_noise = jax.random.normal(context_key, shape)
    return RolloutDraws(jax.random.normal(noise_key, shape), context_noise, exit_step)


def draw_scores(
    key: Key[Array, ""],
    spec: ScoreSpec,
    shape: tuple[int, int, int, int, int],
    *,
    chunk_frames: int,
    image_to_video: bool,
) -> ScoreDraws:
    """Draws for the scores of latents of `shape` [b, f, h, w, c]."""
    time_key, noise_key = jax.random.split(key)
    b, frames = shape[:2]
    drawn = frames // chunk_frames if spec.per_chunk else 1
    raw = jax.random.randint(time_key, (b, drawn), 0, TIMESTEPS)
    raw = jnp.repeat(raw, frames // drawn, axis=1)
    return score_draws_of(
        raw, jax.random.normal(noise_key, shape), spec, image_to_video=image_to_video
    )


def score_draws_of(
    raw: Int[Array, "b f"],
    noise: Float[Array, "b f h w c"],
    spec: ScoreSpec,
    *,
    image_to_video: bool,
) -> ScoreDraws:
    """`ScoreDraws` from integers in [0, 1000), so that the reference's draws can be replayed.

    The first frame of image to video is given: its timestep is 0, and its level the lowest one.
    """
    timestep = TIMESTEPS * shifted(raw.astype(jnp.float32) / TIMESTEPS, spec.shift)
    timestep = jnp.clip(timestep, *spec.timesteps)
    if image_to_video:
        timestep = jnp.where(jnp.arange(raw.shape[1]) == 0, 0.0, timestep)
    schedule = FlowSchedule(spec.shift)
    sigma = jnp.asarray(schedule.sigmas)[schedule.index(timestep)]
    return ScoreDraws(timestep, sigma, noise)
