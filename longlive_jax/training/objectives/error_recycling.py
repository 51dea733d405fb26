"""Error recycling: what the model got wrong before is mixed into what it sees (appendix C).

Teacher forcing shows a model clean history, sampling its own. So errors of past predictions are
kept in two buffers, of latents and of noise, and some are added to history, targets and noise:

    rolls = roll(key, samples, context_chunks, target_chunks)
    used = recycle(rolls, batch, draws, buffers, ...)        # before the forward pass
    velocity = predict(dit, used.batch, used.draws, ...)
    loss, metrics = flow_loss(velocity, batch, used.draws)   # of the batch as it was
    errors = prediction_errors(velocity, batch, used)
    buffers = observe(rolls, errors, batch, used, buffers, ...)

`TeacherForcingLoss` does these in turn. All of it takes global arrays and may run under one `jit`
over a mesh. What is random is in `Rolls`, drawn for the whole batch, so results depend neither on
the mesh nor on a restart. With positions by column nothing moves between sp ranks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.diffusion.flow import FlowSchedule, corrupt, velocity_target, x0_from_velocity
from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec
from longlive_jax.parallel.rules import check_divides, parts_of, shardings
from longlive_jax.training.objectives import error_buffer as eb
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    Draws,
    TeacherForcingBatch,
)
from longlive_jax.training.update import LossState
from longlive_jax.typing import Array, Bool, Float, Int, Key

_ROLLS = 1
"""Folded into a key, so that rolls are not the numbers of draws."""


@dataclasses.dataclass(frozen=True)
class RecyclingSpec:
    """How often errors are mixed in, and what is kept of new ones; memory: see `BufferSpec`.

    Probabilities are per sample (the reference's default settings). `start` and `warmup` count
    calls of `observe`: a step makes one for every part that its batch is worked off in.

    Attributes:
      buffer: layout and size of each of the two buffers.
      clean: samples that nothing is mixed into.
      noise: of the others, those whose noise gets errors of noise. The model learns the sum.
      latent: those whose targets get errors of latents before they are noised. The model learns to
        undo them.
      context: those whose history gets errors of latents, at any noise level.
      modulation: errors are multiplied by a number uniform in 1 - this to 1 + this.
      update: clean samples whose errors are kept. Those of the others always are.
      start: the first call before which anything is mixed in.
      warmup: the last call at which groups also get the errors of each other's samples.
      skip_first: the context's first chunk stays as it is.
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
                raise ValueError(f"{name} is {getattr(self, name)}; give a share, 0 to 1")


@flax.struct.dataclass
class Buffers:
    """Past errors of predicted latents and of predicted noise, and the calls of `observe` so far.

    They are part of a run's state: to be saved with it, and to be donated to its next step.
    """

    latent: eb.Buffer
    noise: eb.Buffer
    seen: Int[Array, ""]


def init_buffers(
    spec: RecyclingSpec, chunk_frames: tuple[int, ...], mesh: Mesh | None = None
) -> Buffers:
    """Buffers without entries for chunks of shape (m, h, w, c), made where they stay.

    Raises ValueError if rows do not split over the mesh.
    """

    def make() -> Buffers:
        latent, noise = (eb.empty(spec.buffer, chunk_frames) for _ in range(2))
        return Buffers(latent, noise, jnp.zeros((), jnp.int32))

    if mesh is None:
        return make()
    specs = partition(spec, parts_of(mesh.shape, BATCH))
    check_divides(mesh, specs, jax.eval_shape(make))
    return jax.jit(make, out_shardings=shardings(mesh, specs))()


def buffer_state(
    spec: RecyclingSpec | None, chunk_shape: tuple[int, ...], mesh: MeshSpec
) -> LossState:
    """Error buffers as a loss's state, for chunks of shape (m, h, w, c); nothing without a spec."""
    if spec is None:
        return LossState()
    return LossState(lambda: init_buffers(spec, chunk_shape), partition(spec, mesh.samples))


def partition(spec: RecyclingSpec, samples: int = 1) -> Buffers:
    """PartitionSpecs of `Buffers`: groups over data and fsdp, `samples` devices, positions over sp.

    Groups that do not split over these, as on another mesh than they began on, lie whole on all; so
    do positions that are chunk numbers, as any device may need any.
    """
    layout = spec.buffer
    split = layout.groups > 1 and layout.groups % samples == 0
    apart = layout.rows > 1 and layout.aligned
    place = P(BATCH if split else None, SP if apart else None)
    both: Any = eb.Buffer(place, place)  # type: ignore[arg-type]
    return Buffers(both, both, P())  # type: ignore[arg-type]


def check_recycling(spec: RecyclingSpec, mesh: MeshSpec, *, chunks: Sequence[int], batch: int):
    """ValueError if the buffers do not fit the mesh, sequences of so many context and target
    chunks, or a batch (or part of one) of so many samples."""
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


def bytes_held(
    spec: RecyclingSpec, chunk_frames: tuple[int, ...], mesh: Mapping[str, int] | None = None
) -> int:
    """Bytes of both buffers in all, or on each device of a mesh of these axis sizes."""
    one = jax.eval_shape(lambda: eb.empty(spec.buffer, chunk_frames))
    whole = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    if mesh is None:
        return whole
    parts = 1
    samples = math.prod(mesh.get(axis, 1) for axis in BATCH)
    for names in partition(spec, samples).latent.entries:
        parts *= parts_of(mesh, names)
    return whole // parts


@flax.struct.dataclass
class Pick:
    """Numbers in [0, 1) for one kind of injection: `gate` decides whether a sample gets any, and
    for every chunk `share` which error it is and `scale` how strong."""

    gate: Float[Array, "b"]
    share: Float[Array, "b n"]
    scale: Float[Array, "b n"]


@flax.struct.dataclass
class Rolls:
    """All that is random in one step of recycling, as numbers in [0, 1).

    `clean` and `update` are compared with the shares of that name in `RecyclingSpec`; the last two
    say which entry of a full bucket gives way to a new error.
    """

    clean: Float[Array, "b"]
    update: Float[Array, "b"]
    noise: Pick
    latent: Pick
    context: Pick
    old_latent: Float[Array, "b k"]
    old_noise: Float[Array, "b k"]


def roll(key: Key[Array, ""], samples: int, context: int, target: int) -> Rolls:
    """Uniform numbers for a batch of episodes of so many context and target chunks."""
    chunks = [target] * 6 + [context] * 2
    found = jax.random.uniform(key, (samples, 5 + sum(chunks)))
    clean, update, *gates = (found[:, i] for i in range(5))
    ends = 5 + np.cumsum(chunks)
    old_latent, old_noise, *rest = (
        found[:, end - count : end] for count, end in zip(chunks, ends, strict=True)
    )
    noise, latent, past = (Pick(gates[i], rest[2 * i], rest[2 * i + 1]) for i in range(3))
    return Rolls(clean, update, noise, latent, past, old_latent, old_noise)


def roll_for(key: Key[Array, ""], batch: TeacherForcingBatch, *, chunk_frames: int) -> Rolls:
    """Numbers for a batch, independent of its `Draws` from the same key."""
    context, target = (x.shape[1] for x in _columns(batch, chunk_frames))
    return roll(jax.random.fold_in(key, _ROLLS), batch.chunk_index.shape[0], context, target)


@flax.struct.dataclass
class Recycled:
    """A batch and draws with errors mixed in, for the model; `clean` samples have none.

    `batch.target` is what is noised. What is to be learnt is the velocity from the original target
    to `draws.noise`.
    """

    batch: TeacherForcingBatch
    draws: Draws
    clean: Bool[Array, "b"]


def recycle(
    rolls: Rolls,
    batch: TeacherForcingBatch,
    draws: Draws,
    buffers: Buffers,
    *,
    chunk_frames: int,
    spec: RecyclingSpec,
    loss: ARLossSpec,
) -> Recycled:
    """Mixes past errors into noise, targets and context, of matching position and noise level.

    Context errors are of any level, as a history's errors come from a whole trajectory. Frames that
    are given (image to video) stay. An empty bucket adds nothing. Raises ValueError if context or
    target chunks do not fill the rows of the buffer evenly.
    """
    layout = spec.buffer
    clean = rolls.clean < spec.clean
    open_ = ~clean & (buffers.seen >= spec.start)
    before, after = (eb.rows_of(layout, x) for x in _columns(batch, chunk_frames))
    column, _ = eb.column_of(layout, after, _bucket(draws, chunk_frames, spec, loss))
    mixed = functools.partial(_mixed, open_, spec.modulation)

    def near(buffer: eb.Buffer, pick: Pick) -> Array:
        def one(lane: eb.Buffer, row: Array, column: Array, share: Array) -> Array:
            return eb.matched(lane, row, column, share, layout.replace)

        return eb.drawn(one, buffer, layout, after, column, pick.share)

    def anywhere(lane: eb.Buffer, row: Array, share: Array) -> Array:
        return eb.pooled(lane, row, share, layout.replace)

    noise = mixed(rolls.noise, spec.noise, near(buffers.noise, rolls.noise), draws.noise)
    target = mixed(rolls.latent, spec.latent, near(buffers.latent, rolls.latent), batch.target)
    history = eb.drawn(anywhere, buffers.latent, layout, before, rolls.context.share)
    context = mixed(rolls.context, spec.context, history, draws.context)
    kept = _kept(batch, chunk_frames, spec, loss)
    return Recycled(
        batch=dataclasses.replace(
            batch, target=_where(draws.conditioning_frame, batch.target, target)
        ),
        draws=dataclasses.replace(draws, noise=noise, context=_where(kept, draws.context, context)),
        clean=clean,
    )


def _mixed(
    open_: Array, modulation: float, pick: Pick, share: float, errors: Array, like: Array
) -> Array:
    """`like` [b, n m, h, w, c] and `errors` of the samples that are open and picked."""
    if not share:
        return like
    scale = 1 + modulation * (2 * pick.scale - 1)
    scale = jnp.where((open_ & (pick.gate < share))[:, None], scale, 0.0)
    scale = scale[..., None, None, None, None]
    return like + (scale * errors).reshape(like.shape).astype(like.dtype)


@flax.struct.dataclass
class Errors:
    """Of a prediction: how far off its latents are, and its noise."""

    latent: Float[Array, "b km h w c"]
    noise: Float[Array, "b km h w c"]


def prediction_errors(
    velocity: Float[Array, "b km h w c"], batch: TeacherForcingBatch, used: Recycled
):
    """`Errors` of a velocity v against `batch` as it was before recycling; no gradient.

    Of latents, x - sigma v less the target, so what was mixed in counts until it is undone; of
    noise, (1 - sigma) times what v is off. Frames that are given have no error.
    """
    velocity, draws = jax.lax.stop_gradient(velocity), used.draws
    noisy = corrupt(used.batch.target, draws.noise, draws.sigma)
    latent = x0_from_velocity(noisy, velocity, draws.sigma) - batch.target
    missed = velocity - velocity_target(batch.target, draws.noise)
    noise = missed * (1 - draws.sigma)[..., None, None, None]
    return Errors(
        *(_where(draws.conditioning_frame, jnp.zeros_like(x), x) for x in (latent, noise))
    )


def observe(
    rolls: Rolls,
    errors: Errors,
    batch: TeacherForcingBatch,
    used: Recycled,
    buffers: Buffers,
    *,
    chunk_frames: int,
    spec: RecyclingSpec,
    loss: ARLossSpec,
    good: Bool[Array, ""] | bool = True,
) -> Buffers:
    """The buffers with the errors of a step's predictions, sample by sample.

    Left out are most of the clean samples (`spec.update`), chunks with padded frames, those with an
    error that is not finite, and all of them unless `good`, which says that the loss was finite.
    """
    layout = spec.buffer
    row = eb.rows_of(layout, _columns(batch, chunk_frames)[1])
    column, owned = eb.column_of(layout, row, _bucket(used.draws, chunk_frames, spec, loss))
    whole = _by_chunk((batch.mask > 0) | used.draws.conditioning_frame, chunk_frames).all(axis=2)
    wanted = ~used.clean | (rolls.update < spec.update)
    keep = owned & whole & wanted[:, None] & good

    def stored(buffer: eb.Buffer, errors: Array, share: Array) -> eb.Buffer:
        errors = _by_chunk(errors, chunk_frames)
        fine = keep & jnp.isfinite(errors).all(axis=(2, 3, 4, 5))
        among = buffers.seen <= spec.warmup
        return eb.stored(buffer, layout, row, column, errors, share=share, keep=fine, among=among)

    return Buffers(
        latent=stored(buffers.latent, errors.latent, rolls.old_latent),
        noise=stored(buffers.noise, errors.noise, rolls.old_noise),
        seen=buffers.seen + 1,
    )


def _bucket(
    draws: Draws, chunk_frames: int, spec: RecyclingSpec, loss: ARLossSpec
) -> Int[Array, "b k"]:
    """Of every target chunk's noise level; a chunk's first frame may be given, its last is not."""
    schedule = FlowSchedule(loss.shift)
    index = schedule.index(draws.timestep[:, chunk_frames - 1 :: chunk_frames])
    return eb.bucket_of(index, spec.buffer.buckets, levels=schedule.size)


def _columns(
    batch: TeacherForcingBatch, chunk_frames: int
) -> tuple[Int[Array, "b j"], Int[Array, "b k"]]:
    """Chunk numbers of context and target."""
    first = batch.context.shape[1] // chunk_frames
    return batch.chunk_index[:, :first], batch.chunk_index[:, first:]


def _kept(
    batch: TeacherForcingBatch, chunk_frames: int, spec: RecyclingSpec, loss: ARLossSpec
) -> Bool[Array, "b jm"]:
    """Frames of the context that nothing is mixed into."""
    frames = jnp.arange(batch.context.shape[1])
    first = jnp.repeat(_columns(batch, chunk_frames)[0] == 0, chunk_frames, axis=1)
    given = first & (frames % chunk_frames == 0) & loss.image_to_video
    return given | ((frames < chunk_frames) & spec.skip_first)


def _by_chunk(x: Array, chunk_frames: int) -> Array:
    """[b, n m, ...] to [b, n, m, ...]."""
    return x.reshape(x.shape[0], -1, chunk_frames, *x.shape[2:])


def _where(frames: Bool[Array, "b f"], x: Array, y: Array) -> Array:
    return jnp.where(frames[:, :, None, None, None], x, y)
