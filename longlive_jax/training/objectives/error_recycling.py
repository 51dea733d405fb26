"""Error recycling: past prediction errors are injected into the model's inputs (paper, appendix C).

In teacher forcing the model gets clean history, in sampling its own predictions. To close this gap,
errors of past predictions are stored in two buffers, of latents and of noise, and some of them are
added to the history, the targets and the noise:

    recycling_draws = draw_recycling_for(key, batch, ...)
    used = recycle(recycling_draws, batch, draws, buffers, ...)     # before the forward pass
    velocity = predict(dit, used.model_batch, used.draws, ...)
    loss, metrics = flow_loss(velocity, batch, used.draws)          # against the original batch
    errors = prediction_errors(velocity, batch, used)
    buffers = record_errors(recycling_draws, errors, batch, used, buffers, ...)

`TeacherForcingLoss` combines these steps. They all take global arrays and may run under one `jit`
over a mesh. All randomness is in `RecyclingDraws`, drawn for the full batch, so results depend
neither on the mesh nor on restarts. With `by="column"`, no data moves between sp ranks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.diffusion.flow import FlowSchedule, corrupt, velocity_target, x0_from_velocity
from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec
from longlive_jax.parallel.rules import check_divides, num_shards, shardings
from longlive_jax.training.objectives import error_buffer as eb
from longlive_jax.training.objectives.batch import ARLossSpec, Draws, TeacherForcingBatch
from longlive_jax.training.objectives.recycling_draws import (
    InjectionDraws,
    RecyclingDraws,
    draw_recycling,
)
from longlive_jax.training.update import LossState
from longlive_jax.typing import Array, Bool, Float, Int, Key

_RECYCLING_STREAM = 1
"""Folded into the loss's key for the recycling draws. `jax.random.split` derives the key of the
target noise in the same way, so that the two are correlated; other draws would change results."""


@dataclasses.dataclass(frozen=True)
class RecyclingSpec:
    """How often errors are injected, and which new errors are stored.

    Probabilities are per sample; the defaults are the reference's. `start` and `warmup` count calls
    of `record_errors`: one per microbatch. For the size of the buffers see `BufferSpec`.

    Attributes:
      buffer: layout and size of each of the two buffers.
      clean: probability that a sample gets no errors at all.
      noise: probability that a sample that is not clean gets noise errors in its noise. The model
        learns to predict the sum.
      latent: probability that a sample that is not clean gets latent errors in its targets, before
        these are noised. The model learns to remove them.
      context: probability that a sample that is not clean gets latent errors of any noise level in
        its history.
      modulation: half width of the range around 1 of the uniform factor that scales an error.
      update: probability that a clean sample's errors are stored; those of other samples always
        are.
      start: number of the first call that injects errors.
      warmup: number of the last call in which each group also stores the other groups' errors.
      skip_first: whether to leave the first chunk of the context unchanged.
    """

    buffer: eb.BufferSpec = dataclasses.field(default_factory=eb.BufferSpec)
    clean: float = 0.2
    noise: float = 0.01
    latent: float = 0.9
    context: float = 0.9
    modulation: float = 0.3
    update: float = 0.1
    start: int = 0
    warmup: int = 50
    skip_first: bool = False

    def __post_init__(self) -> None:
        for name in ("clean", "noise", "latent", "context", "modulation", "update"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


@flax.struct.dataclass
class Buffers:
    """The error buffers of a run, part of its train state: saved with it, donated to each step.

    Attributes:
      latent: past errors of predicted latents.
      noise: past errors of predicted noise.
      num_updates: number of calls of `record_errors` so far.
    """

    latent: eb.Buffer
    noise: eb.Buffer
    num_updates: Int[Array, ""]


def init_buffers(
    spec: RecyclingSpec, chunk_shape: tuple[int, ...], mesh: Mesh | None = None
) -> Buffers:
    """Empty buffers for chunks of shape `chunk_shape` (m, h, w, c), allocated sharded on `mesh`.

    Raises ValueError if the rows do not divide over the mesh.
    """

    def make() -> Buffers:
        latent, noise = (eb.empty(spec.buffer, chunk_shape) for _ in range(2))
        return Buffers(latent, noise, jnp.zeros((), jnp.int32))

    if mesh is None:
        return make()
    specs = buffer_specs(spec, num_shards(mesh.shape, BATCH))
    check_divides(mesh, specs, jax.eval_shape(make))
    return jax.jit(make, out_shardings=shardings(mesh, specs))()


def buffer_state(
    spec: RecyclingSpec | None, chunk_shape: tuple[int, ...], mesh: MeshSpec
) -> LossState:
    """Error buffers as a loss state, for chunks of shape (m, h, w, c); empty if `spec` is None."""
    if spec is None:
        return LossState()
    return LossState(lambda: init_buffers(spec, chunk_shape), buffer_specs(spec, mesh.samples))


def buffer_specs(spec: RecyclingSpec, batch_shards: int = 1) -> Buffers:
    """PartitionSpecs of `Buffers`: groups over data and fsdp (`batch_shards`), rows over sp.

    Groups that do not divide over the batch shards, as after a resume on another mesh, are
    replicated. So are rows that are chunk indices, because any device may need any of them.
    """
    layout = spec.buffer
    shard_groups = layout.groups > 1 and layout.groups % batch_shards == 0
    shard_rows = layout.rows > 1 and layout.aligned
    axes = P(BATCH if shard_groups else None, SP if shard_rows else None)
    buffer: Any = eb.Buffer(axes, axes)  # type: ignore[arg-type]
    return Buffers(buffer, buffer, P())  # type: ignore[arg-type]


def check_recycling(spec: RecyclingSpec, mesh: MeshSpec, *, chunks: Sequence[int], batch: int):
    """Raises ValueError if the buffers do not fit the mesh, the sequences or the batch.

    `chunks` are the numbers of context and target chunks; `batch` is the number of samples in a
    batch, or in a microbatch if there are several.
    """
    layout = spec.buffer
    if layout.aligned:
        for count in chunks:
            eb.check_rows(layout, count)
    eb.check_groups(layout, batch)
    if layout.aligned and layout.rows > 1 and layout.rows % mesh.sp:
        raise ValueError(
            f"recycling.buffer.rows = {layout.rows} does not split over mesh.sp = {mesh.sp}; "
            f"choose a multiple of {mesh.sp}, or 1"
        )


def buffer_bytes(
    spec: RecyclingSpec, chunk_shape: tuple[int, ...], mesh: Mapping[str, int] | None = None
) -> int:
    """Bytes of both buffers in total or, given the axis sizes of a mesh, per device."""
    buffer = jax.eval_shape(lambda: eb.empty(spec.buffer, chunk_shape))
    total = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(buffer))
    if mesh is None:
        return total
    shards = 1
    batch_shards = math.prod(mesh.get(axis, 1) for axis in BATCH)
    for names in buffer_specs(spec, batch_shards).latent.entries:
        shards *= num_shards(mesh, names)
    return total // shards


def buffer_notes(
    spec: RecyclingSpec | None, chunk_shape: tuple[int, ...], mesh: Mapping[str, int]
) -> tuple[str, ...]:
    """Memory of the buffers in a line; groups that do not divide over the mesh are replicated."""
    if spec is None:
        return ()
    gib = buffer_bytes(spec, chunk_shape, mesh) / 2**30
    groups, ranks = spec.buffer.groups, math.prod(mesh.get(axis, 1) for axis in BATCH)
    replicated = groups > 1 and groups % ranks != 0
    reason = f", replicated: {groups} groups do not divide over data * fsdp = {ranks}"
    return (f"error buffers: {gib:.3g} GiB per device{reason * replicated}",)


def draw_recycling_for(
    key: Key[Array, ""], batch: TeacherForcingBatch, *, chunk_frames: int
) -> RecyclingDraws:
    """Recycling draws for a batch, from the key of its `Draws` (see `_RECYCLING_STREAM`)."""
    context, target = (x.shape[1] for x in _chunk_indices(batch, chunk_frames))
    recycling_key = jax.random.fold_in(key, _RECYCLING_STREAM)
    return draw_recycling(recycling_key, batch.chunk_index.shape[0], context, target)


@flax.struct.dataclass
class Recycled:
    """The model's inputs with errors injected.

    The training target is the velocity from the original batch's target to `draws.noise`.

    Attributes:
      model_batch: batch whose context and target contain errors; its target is what is noised.
      draws: draws whose noise and context contain errors.
      clean: whether each sample has no errors.
    """

    model_batch: TeacherForcingBatch
    draws: Draws
    clean: Bool[Array, "b"]


def recycle(
    recycling_draws: RecyclingDraws,
    batch: TeacherForcingBatch,
    draws: Draws,
    buffers: Buffers,
    *,
    chunk_frames: int,
    spec: RecyclingSpec,
    loss: ARLossSpec,
) -> Recycled:
    """Injects past errors of matching position and noise level into noise, targets and context.

    Context errors may have any noise level, because the errors of a sampled history come from a
    full trajectory. Conditioning frames (image to video) do not change, and an empty bucket adds
    nothing.
    Raises ValueError as `error_buffer.check_rows` does.
    """
    layout = spec.buffer
    # 1. Which samples get errors, and the bucket of each chunk.
    clean = recycling_draws.clean < spec.clean
    enabled = ~clean & (buffers.num_updates >= spec.start)
    context_row, row = (eb.rows_of(layout, x) for x in _chunk_indices(batch, chunk_frames))
    column, _ = eb.column_of(layout, row, _noise_bucket(draws, chunk_frames, spec, loss))
    inject = functools.partial(_inject, enabled, spec.modulation)
    noise_draws, latent_draws = recycling_draws.noise, recycling_draws.latent
    context_draws = recycling_draws.context
    # 2. Noise and targets: errors of matching position and noise level.
    matching = functools.partial(eb.sample_bucket, replace=layout.replace)
    errors = eb.sample_batch(matching, buffers.noise, layout, row, column, noise_draws.entry)
    noise = inject(noise_draws, spec.noise, errors, draws.noise)
    errors = eb.sample_batch(matching, buffers.latent, layout, row, column, latent_draws.entry)
    target = inject(latent_draws, spec.latent, errors, batch.target)
    # 3. Context: errors of matching position and any noise level.
    any_level = functools.partial(eb.sample_row, replace=layout.replace)
    errors = eb.sample_batch(any_level, buffers.latent, layout, context_row, context_draws.entry)
    context = inject(context_draws, spec.context, errors, draws.context)
    # 4. Restore the frames that must not change.
    unchanged = _unchanged_context(batch, chunk_frames, spec, loss)
    target = _where_frames(draws.conditioning_frame, batch.target, target)
    context = _where_frames(unchanged, draws.context, context)
    draws = dataclasses.replace(draws, noise=noise, context=context)
    return Recycled(dataclasses.replace(batch, target=target), draws, clean)


def _inject(
    enabled: Array, modulation: float, draws: InjectionDraws, prob: float, errors: Array, x: Array
) -> Array:
    """`x` [b, n m, h, w, c] plus scaled `errors` for the enabled samples whose gate is open."""
    if not prob:
        return x
    scale = 1 + modulation * (2 * draws.scale - 1)
    scale = jnp.where((enabled & (draws.gate < prob))[:, None], scale, 0.0)
    scale = scale[..., None, None, None, None]
    return x + (scale * errors).reshape(x.shape).astype(x.dtype)


@flax.struct.dataclass
class Errors:
    """Errors of a prediction, by frame.

    Attributes:
      latent: error of the predicted clean latents.
      noise: error of the predicted noise.
    """

    latent: Float[Array, "b km h w c"]
    noise: Float[Array, "b km h w c"]


def prediction_errors(
    velocity: Float[Array, "b km h w c"], batch: TeacherForcingBatch, used: Recycled
):
    """`Errors` of a predicted velocity v against the original `batch`, without gradient.

    The latent error is x - sigma v minus the original target, so it includes injected errors that
    the model did not remove. The noise error is (1 - sigma) times the error of v. Conditioning
    frames have no error.
    """
    velocity, draws = jax.lax.stop_gradient(velocity), used.draws
    noisy = corrupt(used.model_batch.target, draws.noise, draws.sigma)
    latent = x0_from_velocity(noisy, velocity, draws.sigma) - batch.target
    velocity_error = velocity - velocity_target(batch.target, draws.noise)
    noise = velocity_error * (1 - draws.sigma)[..., None, None, None]
    return Errors(
        *(_where_frames(draws.conditioning_frame, jnp.zeros_like(x), x) for x in (latent, noise))
    )


def record_errors(
    recycling_draws: RecyclingDraws,
    errors: Errors,
    batch: TeacherForcingBatch,
    used: Recycled,
    buffers: Buffers,
    *,
    chunk_frames: int,
    spec: RecyclingSpec,
    loss: ARLossSpec,
    is_finite: Bool[Array, ""] | bool = True,
) -> Buffers:
    """Stores the errors of a step's predictions in the buffers, sample by sample.

    Most errors of clean samples (see `RecyclingSpec.update`), errors of chunks with padded frames
    and non-finite errors are skipped; so are all errors unless `is_finite` (the loss was finite).
    """
    layout = spec.buffer
    row = eb.rows_of(layout, _chunk_indices(batch, chunk_frames)[1])
    bucket = _noise_bucket(used.draws, chunk_frames, spec, loss)
    column, has_bucket = eb.column_of(layout, row, bucket)
    unpadded = _by_chunk((batch.mask > 0) | used.draws.conditioning_frame, chunk_frames).all(axis=2)
    selected = ~used.clean | (recycling_draws.update < spec.update)
    keep = has_bucket & unpadded & selected[:, None] & is_finite
    across_groups = buffers.num_updates <= spec.warmup

    def store(buffer: eb.Buffer, errors: Array, uniform: Array) -> eb.Buffer:
        errors = _by_chunk(errors, chunk_frames)
        finite = keep & jnp.isfinite(errors).all(axis=(2, 3, 4, 5))
        options = {"uniform": uniform, "keep": finite, "across_groups": across_groups}
        return eb.add_batch(buffer, layout, row, column, errors, **options)

    return Buffers(
        latent=store(buffers.latent, errors.latent, recycling_draws.evict_latent),
        noise=store(buffers.noise, errors.noise, recycling_draws.evict_noise),
        num_updates=buffers.num_updates + 1,
    )


def _noise_bucket(
    draws: Draws, chunk_frames: int, spec: RecyclingSpec, loss: ARLossSpec
) -> Int[Array, "b k"]:
    """The noise-level bucket of each target chunk.

    It is that of the chunk's last frame, because the first may be a conditioning frame.
    """
    schedule = FlowSchedule(loss.shift)
    index = schedule.index(draws.timestep[:, chunk_frames - 1 :: chunk_frames])
    return eb.bucket_of(index, spec.buffer.buckets, levels=schedule.size)


def _chunk_indices(
    batch: TeacherForcingBatch, chunk_frames: int
) -> tuple[Int[Array, "b j"], Int[Array, "b k"]]:
    """Indices in their video of the context chunks and of the target chunks."""
    first = batch.context.shape[1] // chunk_frames
    return batch.chunk_index[:, :first], batch.chunk_index[:, first:]


def _unchanged_context(
    batch: TeacherForcingBatch, chunk_frames: int, spec: RecyclingSpec, loss: ARLossSpec
) -> Bool[Array, "b jm"]:
    """Whether each frame of the context must stay free of errors."""
    frames = jnp.arange(batch.context.shape[1])
    first = jnp.repeat(_chunk_indices(batch, chunk_frames)[0] == 0, chunk_frames, axis=1)
    conditioning = first & (frames % chunk_frames == 0) & loss.image_to_video
    return conditioning | ((frames < chunk_frames) & spec.skip_first)


def _by_chunk(x: Array, chunk_frames: int) -> Array:
    """Reshapes [b, n m, ...] to [b, n, m, ...]."""
    return x.reshape(x.shape[0], -1, chunk_frames, *x.shape[2:])


def _where_frames(frames: Bool[Array, "b f"], x: Array, y: Array) -> Array:
    """`x` for the frames that are true, else `y`."""
    return jnp.where(frames[:, :, None, None, None], x, y)
