"""Autoregressive training by teacher forcing (paper, section 2.1): the loss, top to bottom.

One sequence holds clean context chunks and, after them, the chunks to denoise. The attention mask
follows from the chunks' indices, windows and sinks, so full-history training (the reference) and
training with exactly the sampler's window are the same code with different values of these.

    TeacherForcingLoss -> forward -> predict -> DiT
                                  -> flow_loss
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.diffusion.flow import corrupt, velocity_target
from longlive_jax.layout import full_history
from longlive_jax.models.params import with_params
from longlive_jax.models.wan.dit import DiT, Materialize, identity
from longlive_jax.models.wan.remat import Remat
from longlive_jax.training.objectives.batch import ARLossSpec, Draws, TeacherForcingBatch, draw
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    draw_recycling_for,
    prediction_errors,
    record_errors,
    recycle,
)
from longlive_jax.training.update import Metrics
from longlive_jax.typing import Array, Float, Int, Key, Params
from pallas_kernels.attention import AttentionFn, attention, make_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.tokens import Tokens, make

type TextFeatures = Float[Array, "*b p t e"]
"""Text encoder features: a table of prompts for all samples, or one for each."""

type LossOutput = tuple[Float[Array, ""], Metrics, Float[Array, "b km h w c"]]
"""Loss, metrics and velocity."""

type Forward = Callable[..., LossOutput]
"""`(setup, params, target_batch, model_batch, draws, text_features) -> LossOutput`: `forward` on
one device, `sharded.sharded_forward` over a mesh."""

_LEVELS = {
    "error_low_noise": (0.0, 0.5),
    "error_mid_noise": (0.5, 0.85),
    "error_high_noise": (0.85, 1.01),
}
"""Metrics of the velocity error by noise level, and their ranges of levels."""


def self_attention(tokens: Tokens, *, implementation: Implementation = "auto") -> AttentionFn:
    """Self-attention over a sequence of these tokens."""
    return make_attention(tokens, tokens, implementation=implementation)


@dataclasses.dataclass(frozen=True)
class ARSetup:
    """Everything that stays the same from batch to batch.

    Attributes:
      graphdef: structure of the model.
      chunk_frames: latent frames of a chunk.
      empty_prompt: row of the empty prompt in the text features.
      spec: settings of the loss.
      attention_for: tokens -> self-attention over sequences of them; called once per step.
      attend_text: attention to the text.
      full_history: whether all batches are full clips whose chunks attend to their whole past, with
        the mask columns of `layout.full_history`. The mask is then known when tracing.
      unroll: layers in one step of the scan over layers.
      remat: what the backward pass recomputes of each layer.
      ffn_chunks: number of chunks in which the sequence passes the feed-forward, one by one.
    """

    graphdef: nnx.GraphDef[DiT]
    chunk_frames: int
    empty_prompt: int
    spec: ARLossSpec
    attention_for: Callable[[Tokens], AttentionFn] = self_attention
    attend_text: AttentionFn = attention
    full_history: bool = False
    unroll: int = 1
    remat: Remat = "none"
    ffn_chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Shards:
    """How devices divide a sequence; by default there is one device.

    Attributes:
      count: number of shards.
      order: a column [2k] of all context chunks, then all target chunks -> the same in the order of
        the shards.
      gather_tokens: tokens of a shard -> tokens of all shards.
      wrap_attention: turns attention over the whole sequence into one that takes shards.
    """

    count: int = 1
    order: Callable[[np.ndarray], np.ndarray] = lambda column: column
    gather_tokens: Callable[[Tokens], Tokens] = lambda tokens: tokens
    wrap_attention: Callable[[AttentionFn], AttentionFn] = lambda attend: attend


@dataclasses.dataclass(frozen=True)
class TeacherForcingLoss:
    """Weighted flow-matching loss of the target chunks, one noise level per chunk: a `LossFn`.

    Its loss state is the buffers of error recycling (appendix C), or () without it.

    Attributes:
      setup: everything that stays the same.
      inputs: arrays of a batch -> the batch and its text features.
      forward: prediction and loss, on one device (None) or over a mesh.
      recycling: error recycling, or None to disable.
    """

    setup: ARSetup
    inputs: Callable[[Mapping[str, Array]], tuple[TeacherForcingBatch, TextFeatures]]
    forward: Forward | None = None
    recycling: RecyclingSpec | None = None

    def __call__(
        self,
        params: Params,
        batch: Mapping[str, Array],
        key: Key[Array, ""],
        loss_state: Any = (),
        frozen: Mapping[str, Params] | None = None,
    ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        """`(loss, (metrics, loss_state))`; `frozen` is not used.

        Metrics are the plain velocity error, also by range of noise levels, and with recycling the
        number of stored latent errors.
        """
        # 1. Noise levels, noise and dropped prompts: the same with and without recycling.
        setup, recycling = self.setup, self.recycling
        run = partial(self.forward or forward, setup)
        target_batch, text_features = self.inputs(batch)
        draws = draw(key, target_batch, chunk_frames=setup.chunk_frames, spec=setup.spec)
        if recycling is None:
            loss, metrics, _ = run(params, target_batch, target_batch, draws, text_features)
            return loss, (metrics, loss_state)

        # 2. Inject past errors into what the model sees.
        options: Any = {"chunk_frames": setup.chunk_frames, "spec": recycling, "loss": setup.spec}
        drawn = draw_recycling_for(key, target_batch, chunk_frames=setup.chunk_frames)
        used = recycle(drawn, target_batch, draws, loss_state, **options)

        # 3. Predict, and compare with the original targets.
        loss, metrics, velocity = run(
            params, target_batch, used.model_batch, used.draws, text_features
        )

        # 4. Store the errors of this prediction.
        errors = prediction_errors(velocity, target_batch, used)
        options["is_finite"] = jnp.isfinite(loss)
        buffers = record_errors(drawn, errors, target_batch, used, loss_state, **options)
        count = jnp.sum(buffers.latent.counts).astype(jnp.float32)
        return loss, (metrics | {"stored_errors": count}, buffers)

    def without_recycling(self) -> "TeacherForcingLoss":
        """The loss without error recycling, for evaluation."""
        return dataclasses.replace(self, recycling=None)


def teacher_forcing_loss(
    setup: ARSetup,
    params: Params,
    batch: TeacherForcingBatch,
    key: Key[Array, ""],
    text_features: TextFeatures,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of one batch on one device, without recycling."""
    draws = draw(key, batch, chunk_frames=setup.chunk_frames, spec=setup.spec)
    loss, metrics, _ = forward(setup, params, batch, batch, draws, text_features)
    return loss, metrics


def forward(
    setup: ARSetup,
    params: Params,
    target_batch: TeacherForcingBatch,
    model_batch: TeacherForcingBatch,
    draws: Draws,
    text_features: TextFeatures,
) -> LossOutput:
    """Prediction for `model_batch` and its loss against `target_batch`.

    The two batches differ by recycled errors.
    """
    velocity = predict(
        setup, with_params(setup.graphdef, params), model_batch, draws, text_features
    )
    return *flow_loss(velocity, target_batch, draws), velocity


def predict(
    setup: ARSetup,
    dit: DiT,
    batch: TeacherForcingBatch,
    draws: Draws,
    text_features: TextFeatures,
    *,
    shards: Shards = Shards(),
    materialize: Materialize = identity,
) -> Float[Array, "b km h w c"]:
    """Velocity of the corrupted target frames, given their context.

    With a sharded sequence, `batch` and `draws` are those of one shard.
    """
    # 1. Targets at their noise levels, and every chunk's prompt.
    noisy = corrupt(batch.target, draws.noise, draws.sigma)
    prompts = jnp.where(draws.dropped[:, None], setup.empty_prompt, batch.prompt)
    context_chunks = batch.context.shape[1] // setup.chunk_frames

    # 2. One packed sequence [1, all contexts; all targets], and attention that unpacks it.
    tokens = sequence_tokens(batch, setup.chunk_frames, setup.spec.global_sinks)
    tokens_per_chunk = len(tokens) // prompts.shape[1]
    packing = Packing(batch.context.shape[0], context_chunks * tokens_per_chunk)
    all_tokens = _tokens_of_all(setup, shards, tokens, tokens_per_chunk)
    attend = shards.wrap_attention(setup.attention_for(all_tokens))

    # 3. The model.
    velocity, _ = dit(
        packing.join(draws.context, noisy),
        packing.join(draws.context_timestep, draws.timestep),
        dit.embed_text(packing.join(*_split_at(_lookup(text_features, prompts), context_chunks))),
        jax.tree.map(lambda x: packing.join(*_split_at(x, packing.context)), tokens),
        attend=packing.wrap(attend, all_tokens),
        attend_text=setup.attend_text,
        noisy_from=batch.context.shape[0] * batch.context.shape[1],
        unroll=setup.unroll,
        remat=setup.remat,
        ffn_chunks=setup.ffn_chunks,
        materialize=materialize,
    )
    assert velocity is not None  # only a call with output=False returns None
    return velocity.reshape(noisy.shape)


def _tokens_of_all(setup: ARSetup, shards: Shards, tokens: Tokens, per_chunk: int) -> Tokens:
    """Tokens of all shards for attention: known when tracing, or gathered."""
    if not setup.full_history:
        return shards.gather_tokens(tokens)
    chunks = shards.count * len(tokens) // per_chunk // 2
    return full_history_tokens(chunks, per_chunk, order=shards.order)


@dataclasses.dataclass(frozen=True)
class Packing:
    """A batch as one long sequence: the contexts of all samples, then the targets of all.

    Every matrix product then has a single axis of rows, which makes the gradient of a weight about
    twice as fast on CPUs, and the head runs on one slice. Samples only interact in attention, and
    `wrap` separates them there.

    Attributes:
      batch: number of samples.
      context: context tokens of a sample.
    """

    batch: int
    context: int

    def join(self, context: Array, target: Array) -> Array:
        """[b, i, ...] and [b, j, ...] to [1, b i + b j, ...]; either may be empty."""
        flat = [x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in (context, target)]
        return jnp.concatenate(flat, axis=1)

    def split(self, x: Array) -> Array:
        """[1, b l, ...] back to [b, l, ...]."""
        pieces = _split_at(x, self.batch * self.context)
        return jnp.concatenate([p.reshape(self.batch, -1, *x.shape[2:]) for p in pieces], axis=1)

    def wrap(self, attend: AttentionFn, tokens: Tokens) -> AttentionFn:
        """`attend` on each sample of a packed sequence, whose tokens are `tokens` [b, l]."""

        def packed(q: Array, k: Array, v: Array, *_: Tokens) -> Array:
            out = attend(*map(self.split, (q, k, v)), tokens, tokens)
            return self.join(*_split_at(out, self.context))

        return packed


def _lookup(text_features: Float[Array, "*b p t e"], prompts: Int[Array, "b s"]) -> Array:
    """Features [b, s, t, e] of prompts, from one table or from one table per sample."""
    if text_features.ndim == 3:
        return text_features[prompts]
    return jnp.take_along_axis(text_features, prompts[:, :, None, None], axis=1)


def _split_at(x: Array, at: int) -> tuple[Array, Array]:
    return x[:, :at], x[:, at:]


def flow_loss(
    velocity: Float[Array, "b km h w c"],
    batch: TeacherForcingBatch,
    draws: Draws,
    *,
    reduce_sums: Callable[[Any], Any] = lambda sums: sums,
) -> tuple[Float[Array, ""], Metrics]:
    """Weighted mean squared error of a velocity over the frames in the loss, and metrics.

    The error of a range of noise levels that no frame has is NaN. `reduce_sums` adds up sums and
    counts over devices before division, so that every frame has the same weight on any mesh.
    """
    target = velocity_target(batch.target, draws.noise)
    error = jnp.mean((velocity - target) ** 2, axis=(2, 3, 4))
    mask = batch.mask * ~draws.conditioning_frame
    terms = {
        "loss": (error * draws.weight, mask),
        "velocity_error": (error, mask),
        **{
            name: (error, mask * (draws.sigma >= low) * (draws.sigma < high))
            for name, (low, high) in _LEVELS.items()
        },
    }
    sums = {k: (jnp.sum(x * weight), jnp.sum(weight)) for k, (x, weight) in terms.items()}
    sums = reduce_sums(sums)
    means = {k: x / jnp.maximum(count, 1) for k, (x, count) in sums.items()}
    levels = {k: jnp.where(sums[k][1] > 0, means[k], jnp.nan) for k in means if k in _LEVELS}
    return means.pop("loss"), means | levels


def full_history_tokens(
    chunks: int,
    chunk_tokens: int,
    *,
    order: Callable[[np.ndarray], np.ndarray] = lambda column: column,
) -> Tokens:
    """Tokens of `chunks` context and as many target chunks, in NumPy, for attention only.

    Positions are zeros. `order` is that of `Shards`.
    """
    columns = {k: np.tile(x, 2) for k, x in full_history(chunks).items()}
    columns["noisy"] = np.arange(2 * chunks) >= chunks
    per_token: Any = {k: np.repeat(order(x), chunk_tokens) for k, x in columns.items()}
    return make(np.zeros((2 * chunks * chunk_tokens, 3), np.int32), **per_token)


def sequence_tokens(batch: TeacherForcingBatch, chunk_frames: int, global_sinks: int) -> Tokens:
    """Tokens of context and target chunks, patches of a frame in row-major order."""
    height, width = batch.target.shape[2:4]
    rows, columns = height // 2, width // 2
    frame, row, column = (
        x.reshape(-1) for x in jnp.mgrid[:chunk_frames, :rows, :columns].astype(jnp.int32)
    )

    def per_token(values: Array) -> Array:
        return jnp.repeat(values, len(frame), axis=-1)

    chunks = batch.chunk_index.shape[-1]
    time = per_token(batch.start) + jnp.tile(frame, chunks)
    space = (jnp.broadcast_to(jnp.tile(x, chunks), time.shape) for x in (row, column))
    pos = jnp.stack([time, *space], -1)
    noisy = batch.noisy
    if noisy is None:
        noisy = jnp.arange(chunks) >= batch.context.shape[1] // chunk_frames
    return make(
        pos,
        per_token(batch.chunk_index),
        per_token(noisy),
        window_start=per_token(batch.window_start),
        sink=per_token(batch.sink),
        global_sinks=global_sinks,
    )
