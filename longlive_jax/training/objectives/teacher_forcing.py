"""Autoregressive training by teacher forcing (paper, section 2.1).

One sequence holds clean context chunks and, after them, the chunks to denoise. Who sees whom
follows from the chunks' numbers, window and sinks, so full-history training (the reference) and
training with exactly the sampler's window are the same code on other numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.diffusion.flow import TIMESTEPS, FlowSchedule, corrupt, velocity_target
from longlive_jax.models.params import with_params
from longlive_jax.models.wan.dit import DiT, Materialize, identity
from longlive_jax.typing import Array, Bool, Float, Int, Key, Params
from pallas_kernels.attention import AttentionFn, attention, lay_out
from pallas_kernels.dispatch import Implementation
from pallas_kernels.tokens import Tokens, make


@flax.struct.dataclass
class TeacherForcingBatch:
    """A batch for `ar_loss`: `j` context chunks and `k` target chunks of `m` latent frames each.

    The last axis of the integer columns runs over context chunks, then target chunks.
    """

    context: Float[Array, "b jm h w c"]
    target: Float[Array, "b km h w c"]
    mask: Float[Array, "b km"]  # 1 where a target frame counts, 0 where it is padding
    chunk_index: Int[Array, "b j+k"]  # number in the video; EMPTY for context that is not there
    start: Int[Array, "b j+k"]  # temporal position of the chunk's first frame, shot phase included
    window_start: Int[Array, "b j+k"]  # see `Tokens`
    sink: Int[Array, "b j+k"]
    prompt: Int[Array, "b j+k"]  # row of the table of text embeddings
    noisy: Bool[Array, "b j+k"] | None = None  # which are targets; None: those after the context


@dataclasses.dataclass(frozen=True)
class ARLossSpec:
    """How targets are corrupted and context is roughened.

    Attributes:
      shift: of the noise levels' table (paper: 5).
      weighting: of the errors by noise level. "bell" is the reference's, which suits fine-tuning:
        it hardly counts the noisiest levels, where a model from scratch learns to heed its text.
      global_sinks: first chunks that every later one sees.
      context_noise: context latents get noise of a level uniform in [0, this], per chunk: what the
        sampler feeds back is never quite clean either.
      context_noise_told: the model is told that level; else the context's timestep stays 0.
      text_dropout: share of samples whose prompts are all replaced by the empty one, for guidance.
      image_to_video: the video's first latent frame is given: clean, at timestep 0, in context and
        target alike, and not counted.
    """

    shift: float = 5.0
    weighting: Literal["bell", "uniform"] = "bell"
    global_sinks: int = 1
    context_noise: float = 0.0
    context_noise_told: bool = False
    text_dropout: float = 0.0
    image_to_video: bool = False


@flax.struct.dataclass
class Draws:
    """All that is random in one evaluation of the loss.

    Fields: `noise` of the target frames, their levels `sigma`, the `timestep` that the model is
    told and the `weight` of their errors; `context` latents as the model sees them and the timestep
    it is told of these; `dropped` samples have all their prompts replaced by the empty one; `given`
    target frames are not to be learnt.
    """

    noise: Float[Array, "b km h w c"]
    sigma: Float[Array, "b km"]
    timestep: Float[Array, "b km"]
    weight: Float[Array, "b km"]
    context: Float[Array, "b jm h w c"]
    context_timestep: Float[Array, "b jm"]
    dropped: Bool[Array, "b"]
    given: Bool[Array, "b km"]


def laid_out(tokens: Tokens, *, implementation: Implementation = "auto") -> AttentionFn:
    """Self-attention of a sequence of these tokens."""
    return lay_out(tokens, tokens, implementation=implementation)


@dataclasses.dataclass(frozen=True)
class ARSetup:
    """What stays the same from batch to batch.

    Attributes:
      graphdef: of the model.
      chunk_frames: latent frames of a chunk.
      empty_prompt: row of the empty prompt in the text.
      spec: of the loss.
      attention_for: tokens -> attention over sequences of them; called once a step.
      attend_text: attention to the texts.
      unroll: layers in one step of the scan over layers.
      remat: recompute each layer in the backward pass, keeping only its input.
      ffn_parts: parts of the sequence that go through the feed-forward one after the other.
    """

    graphdef: nnx.GraphDef[DiT]
    chunk_frames: int
    empty_prompt: int
    spec: ARLossSpec
    attention_for: Callable[[Tokens], AttentionFn] = laid_out
    attend_text: AttentionFn = attention
    unroll: int = 1
    remat: bool = False
    ffn_parts: int = 1


_LEVELS = {
    "error_low_noise": (0.0, 0.5),
    "error_mid_noise": (0.5, 0.85),
    "error_high_noise": (0.85, 1.01),
}
"""Metrics of the velocity's error, and the noise levels that they are of."""

type Text = Float[Array, "*b p t e"]
"""Rows of the text encoder: a table of prompts for all samples, or one for each."""

type LossOutput = tuple[Float[Array, ""], dict[str, Float[Array, ""]], Float[Array, "b km h w c"]]
"""Loss, metrics and velocity."""


def ar_loss(
    setup: ARSetup, params: Params, batch: TeacherForcingBatch, key: Key[Array, ""], text: Text
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted flow-matching loss of the target chunks, one noise level a chunk.

    Returns the loss and metrics: the plain velocity error, also by tercile of the noise level.
    """
    draws = draw(key, batch, chunk_frames=setup.chunk_frames, spec=setup.spec)
    loss, metrics, _ = forward(setup, params, batch, batch, draws, text)
    return loss, metrics


def forward(
    setup: ARSetup,
    params: Params,
    batch: TeacherForcingBatch,
    shown: TeacherForcingBatch,
    draws: Draws,
    text: Text,
) -> LossOutput:
    """The model's prediction for `shown`, judged by `batch`; they differ by recycled errors."""
    velocity = predict(setup, with_params(setup.graphdef, params), shown, draws, text)
    return *flow_loss(velocity, batch, draws), velocity


def draw(
    key: Key[Array, ""], batch: TeacherForcingBatch, *, chunk_frames: int, spec: ARLossSpec
) -> Draws:
    """One level a chunk, uniform over the table; noise; roughened context; dropped prompts."""
    keys = jax.random.split(key, 5)
    b, frames = batch.target.shape[:2]
    level_key, rough_key = jax.random.split(keys[2])
    level = jax.random.uniform(level_key, (b, batch.context.shape[1] // chunk_frames))
    return draws_of(
        batch,
        noise=jax.random.normal(keys[1], batch.target.shape),
        index=FlowSchedule(spec.shift).draw(keys[0], (b, frames // chunk_frames)),
        level=spec.context_noise * level,
        rough=jax.random.normal(rough_key, batch.context.shape) if spec.context_noise else None,
        dropped=jax.random.uniform(keys[3], (b, 1))[:, 0] < spec.text_dropout,
        chunk_frames=chunk_frames,
        spec=spec,
    )


def draws_of(
    batch: TeacherForcingBatch,
    *,
    noise: Float[Array, "b km h w c"],
    index: Int[Array, "b k"],
    level: Float[Array, "b j"],
    rough: Float[Array, "b jm h w c"] | None,
    dropped: Bool[Array, "b"],
    chunk_frames: int,
    spec: ARLossSpec,
) -> Draws:
    """What random numbers make of a batch: `index` is every target chunk's entry of the table,
    `rough` the noise of the context and `level` how much of it, chunk by chunk; None is none."""
    schedule = FlowSchedule(spec.shift)
    index, level = (jnp.repeat(x, chunk_frames, axis=1) for x in (index, level))
    known, given = _cut(_given(batch, chunk_frames, spec), batch.context.shape[1])
    context = batch.context if rough is None else corrupt(batch.context, rough, level)
    told = TIMESTEPS * level if spec.context_noise_told and rough is not None else 0 * level
    return Draws(
        noise=noise,
        sigma=jnp.where(given, 0.0, jnp.asarray(schedule.sigmas)[index]),
        timestep=jnp.where(given, 0.0, jnp.asarray(schedule.timesteps)[index]),
        weight=_weight(spec, schedule, index),
        context=jnp.where(known[:, :, None, None, None], batch.context, context),
        context_timestep=jnp.where(known, 0.0, told),
        dropped=dropped,
        given=given,
    )


def counted(batch: TeacherForcingBatch, chunk_frames: int, spec: ARLossSpec) -> Float[Array, ""]:
    """Target frames that the loss is the mean of."""
    _, given = _cut(_given(batch, chunk_frames, spec), batch.context.shape[1])
    return jnp.sum(batch.mask * ~given)


def _given(
    batch: TeacherForcingBatch, chunk_frames: int, spec: ARLossSpec
) -> Bool[Array, "b jm+km"]:
    """Which frames of context and target are the image that a video begins with."""
    first = jnp.repeat(batch.chunk_index == 0, chunk_frames, axis=1)
    return first & (jnp.arange(first.shape[1]) % chunk_frames == 0) & spec.image_to_video


def _weight(spec: ARLossSpec, schedule: FlowSchedule, index: Array) -> Array:
    if spec.weighting == "uniform":
        return jnp.ones(index.shape)
    return jnp.asarray(schedule.weights)[index]


def predict(
    setup: ARSetup,
    dit: DiT,
    batch: TeacherForcingBatch,
    draws: Draws,
    text: Text,
    *,
    whole: Callable[[Tokens], Tokens] = lambda tokens: tokens,
    wrap: Callable[[AttentionFn], AttentionFn] = lambda attend: attend,
    materialize: Materialize = identity,
) -> Float[Array, "b km h w c"]:
    """The model's velocity for the target frames, corrupted as drawn, behind their context.

    Where a sequence is shared out, `batch` and `draws` are one device's part of it, `whole` makes
    the tokens of all parts, and `wrap` attention that is given a part from attention over all.
    """
    chunk_frames = setup.chunk_frames
    noisy = corrupt(batch.target, draws.noise, draws.sigma)
    prompts = jnp.where(draws.dropped[:, None], setup.empty_prompt, batch.prompt)
    context_chunks = batch.context.shape[1] // chunk_frames
    tokens = sequence_tokens(batch, chunk_frames, setup.spec.global_sinks)
    per_chunk = len(tokens) // prompts.shape[1]
    packing = Packing(batch.context.shape[0], context_chunks * per_chunk)
    everything = whole(tokens)
    attend = wrap(setup.attention_for(everything))
    velocity, _ = dit(
        packing.join(draws.context, noisy),
        packing.join(draws.context_timestep, draws.timestep),
        dit.text_rows(packing.join(*_cut(_rows(text, prompts), context_chunks))),
        jax.tree.map(lambda x: packing.join(*_cut(x, packing.context)), tokens),
        attend=packing.wrap(attend, everything),
        attend_text=setup.attend_text,
        noisy_from=batch.context.shape[0] * batch.context.shape[1],
        unroll=setup.unroll,
        remat=setup.remat,
        ffn_parts=setup.ffn_parts,
        materialize=materialize,
    )
    assert velocity is not None  # only a call with output=False gives none
    return velocity.reshape(noisy.shape)


@dataclasses.dataclass(frozen=True)
class Packing:
    """A batch as one long sequence: the context of all samples, then the targets of all.

    Every matrix product then has a single axis of rows, which the gradient of a weight on CPUs is
    about twice as fast for, and the head runs on one slice. Samples meet nowhere but in attention,
    which `wrap` gives them apart.

    Attributes:
      batch: samples.
      context: context tokens of a sample.
    """

    batch: int
    context: int

    def join(self, context: Array, target: Array) -> Array:
        """[b, i, ...] and [b, j, ...] to [1, b i + b j, ...]."""
        both = (context, target)  # either may be empty
        parts = (x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in both)
        return jnp.concatenate(list(parts), axis=1)

    def split(self, x: Array) -> Array:
        """[1, b l, ...] back to [b, l, ...]."""
        parts = _cut(x, self.batch * self.context)
        return jnp.concatenate([p.reshape(self.batch, -1, *x.shape[2:]) for p in parts], axis=1)

    def wrap(self, attend: AttentionFn, tokens: Tokens) -> AttentionFn:
        """`attend` on each sample of a packed sequence; `tokens` [b, l] are the samples' own."""

        def packed(q: Array, k: Array, v: Array, *_: Tokens) -> Array:
            out = attend(*map(self.split, (q, k, v)), tokens, tokens)
            return self.join(*_cut(out, self.context))

        return packed


def _rows(text: Float[Array, "*b p t e"], prompts: Int[Array, "b s"]) -> Array:
    """[b, s, t, e] from the table of all samples, or from each sample's own."""
    if text.ndim == 3:
        return text[prompts]
    return jnp.take_along_axis(text, prompts[:, :, None, None], axis=1)


def _cut(x: Array, at: int) -> tuple[Array, Array]:
    return x[:, :at], x[:, at:]


def flow_loss(
    velocity: Float[Array, "b km h w c"],
    batch: TeacherForcingBatch,
    draws: Draws,
    *,
    total: Callable[[Any], Any] = lambda sums: sums,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted squared error of a velocity over the frames that count, and metrics.

    The error of a noise level that no frame has is NaN. `total` adds up sums and counts over all
    devices before they are divided, so that every frame weighs the same wherever it is.
    """
    wanted = velocity_target(batch.target, draws.noise)
    error = jnp.mean((velocity - wanted) ** 2, axis=(2, 3, 4))
    mask = batch.mask * ~draws.given
    shares = {
        "loss": (error * draws.weight, mask),
        "velocity_error": (error, mask),
        **{
            name: (error, mask * (draws.sigma >= low) * (draws.sigma < high))
            for name, (low, high) in _LEVELS.items()
        },
    }
    sums = {k: (jnp.sum(x * here), jnp.sum(here)) for k, (x, here) in shares.items()}
    found = total(sums)
    means = {k: x / jnp.maximum(count, 1) for k, (x, count) in found.items()}
    levels = {k: jnp.where(found[k][1] > 0, means[k], jnp.nan) for k in means if k in _LEVELS}
    return means.pop("loss"), means | levels


def sequence_tokens(batch: TeacherForcingBatch, chunk_frames: int, global_sinks: int) -> Tokens:
    """Tokens of context and target chunks, patches of a frame in row-major order."""
    height, width = batch.target.shape[2:4]
    rows, columns = height // 2, width // 2
    frame, row, column = (
        x.reshape(-1) for x in jnp.mgrid[:chunk_frames, :rows, :columns].astype(jnp.int32)
    )

    def each(values: Array) -> Array:
        return jnp.repeat(values, len(frame), axis=-1)

    chunks = batch.chunk_index.shape[-1]
    place = each(batch.start) + jnp.tile(frame, chunks)
    pos = jnp.stack(
        [place, *(jnp.broadcast_to(jnp.tile(x, chunks), place.shape) for x in (row, column))], -1
    )
    noisy = batch.noisy
    if noisy is None:
        noisy = jnp.arange(chunks) >= batch.context.shape[1] // chunk_frames
    return make(
        pos,
        each(batch.chunk_index),
        each(noisy),
        window_start=each(batch.window_start),
        sink=each(batch.sink),
        global_sinks=global_sinks,
    )
