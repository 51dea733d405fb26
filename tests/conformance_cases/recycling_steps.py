"""Error recycling over successive steps, replayed with the reference's random numbers."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.rows import EXACT, TIGHT, Case, compared, differing, later, relative
from longlive_jax.diffusion.flow import FlowSchedule, corrupt, x0_from_velocity
from longlive_jax.training.objectives import error_buffer as eb
from longlive_jax.training.objectives.batch import ARLossSpec, Draws, TeacherForcingBatch
from longlive_jax.training.objectives.error_recycling import (
    Errors,
    Recycled,
    RecyclingSpec,
    init_buffers,
    prediction_errors,
    record_errors,
    recycle,
)
from longlive_jax.training.objectives.recycling_draws import InjectionDraws, RecyclingDraws
from longlive_jax.training.objectives.teacher_forcing import (
    flow_loss,
)

REPLACE: dict[str, eb.Replacement] = {"random": "random", "fifo": "oldest", "l2": "nearest"}
NEVER = 1.0
"""The draw of a gate that is closed at any probability."""

INPUTS = {"clean_latent", "noise", "index_draw", "initial_latent"}
OPTIONS = {"i2v", "independent_first_frame"}

sample_bucket = jax.jit(eb.sample_bucket, static_argnames="replace")


def uniform_for(index: int, count: int) -> float:
    """A number in [0, 1) that selects entry `index` of `count`."""
    return (index + 0.5) / count


def uniform_of_scale(scale: float, modulation: float) -> float:
    """The number in [0, 1) that gives a factor from 1 - modulation to 1 + modulation."""
    return (scale - 1) / (2 * modulation) + 0.5


def contents(buffer: eb.Buffer, replace: eb.Replacement) -> np.ndarray:
    """All entries of a buffer of one group, ordered by row, column and arrival."""
    entries = [
        sample_bucket(buffer, row, column, uniform_for(index, count), replace=replace)
        for (row, column), count in np.ndenumerate(np.asarray(buffer.counts))
        for index in range(count)
    ]
    return np.array(entries).reshape(-1, *buffer.entries.shape[3:])


def relative_or_empty(got: Any, want: Any) -> float:
    """`relative`, but 0 for two empty arrays."""
    if np.size(want) or np.size(got):
        return relative(got, want)
    return 0.0


class Steps:
    """Cases of successive training steps around a model without parameters."""

    def __init__(self, golden: Golden, run: Mapping[str, Any]):
        # 1. Shapes.
        self.golden, self.name, self.calls = golden, run["name"], run["calls"]
        self.unknown = sorted(set(run["extra_args"]) - OPTIONS)
        self.chunk_frames, settings = run["num_frame_per_block"], run["error_recycling"]
        self.shape = tuple(run["shape"][i] for i in (0, 1, 3, 4, 2))
        self.blocks = self.shape[1] // self.chunk_frames
        # 2. Settings.
        self.loss = ARLossSpec()
        self.schedule = FlowSchedule(self.loss.shift)
        self.spec = RecyclingSpec(
            buffer=eb.BufferSpec(
                rows=self.blocks if settings["enable_position_bucketing"] else 1,
                buckets=settings["num_buckets"],
                slots=settings["buffer_size_per_bucket"],
                replace=REPLACE[settings["replacement_strategy"]],
                dtype="float32",
            ),
            clean=settings["clean_prob"],
            noise=settings["noise_inject_prob"],
            latent=settings["latent_inject_prob"],
            context=settings["context_inject_prob"],
            modulation=settings["modulate_factor"],
            update=settings["clean_buffer_update_prob"],
            start=settings["start_step"],
            warmup=settings["buffer_warmup_iter"],
            skip_first=settings.get("skip_block_0", False),
        )
        # 3. Jitted functions.
        self.replayed = functools.cache(self._replay)
        options = {"chunk_frames": self.chunk_frames, "spec": self.spec, "loss": self.loss}
        self._recycle = jax.jit(partial(recycle, **options))
        self._record = jax.jit(partial(record_errors, **options))

    def cases(self) -> list[Case]:
        """The cases of all steps."""
        if self.unknown:
            return [later(self.name, f"options {self.unknown}")]
        cases = []
        for i, call in enumerate(self.calls):
            for key, theirs in self.golden.under(f"{self.name}/{i}/").items():
                if key in INPUTS:
                    continue
                want = theirs if theirs.ndim < 5 else np.moveaxis(theirs, 2, -1)
                got = partial(lambda i, key: self.replayed()[i][key], i, key)
                cases.append(
                    compared(f"{self.name}/{i}/{key}", TIGHT, got, want, relative_or_empty)
                )
            for key, want in {
                "total_added": call["total_added"],
                "counts": self._counts(call["bucket_layout_after"]["latent_buffer"]),
            }.items():
                got = partial(lambda i, key: self.replayed()[i][key], i, key)
                cases.append(compared(f"{self.name}/{i}/{key}", EXACT, got, want, differing))
        return cases

    def _counts(self, layout: Sequence[tuple[str, int]]) -> np.ndarray:
        counts = np.zeros((self.spec.buffer.rows, self.spec.buffer.buckets), int)
        for key, count in layout:
            row, bucket = [0, int(key)] if "(" not in key else map(int, key[1:-1].split(","))
            counts[row, bucket] = count
        return counts

    def _contents(self, buffer: eb.Buffer) -> np.ndarray:
        return contents(jax.tree.map(lambda x: x[0], buffer), self.spec.buffer.replace)

    def _replay(self) -> list[dict[str, Any]]:
        m, (h, w, c) = self.chunk_frames, self.shape[2:]
        buffers, results = init_buffers(self.spec, (m, h, w, c)), []
        for i, call in enumerate(self.calls):
            buffers, result = self._call(f"{self.name}/{i}/", call, buffers)
            results.append(result)
        return results

    def _call(self, prefix: str, call: Mapping[str, Any], buffers):
        """The buffers after one step, and everything that the step computes."""
        golden, table, step = self.golden, self.schedule, call["global_step"]
        # 1. Inputs and random numbers, from the file.
        buffers = dataclasses.replace(buffers, num_updates=jnp.asarray(step))
        clean = golden.frames(f"{prefix}clean_latent", 2)
        chunk_index = golden[f"{prefix}index_draw"][:, :: self.chunk_frames]
        index = np.repeat(chunk_index, self.chunk_frames, axis=1)
        batch, draws = self._inputs(clean, golden.frames(f"{prefix}noise", 2), index)
        bucket = np.asarray(eb.bucket_of(index[:, :: self.chunk_frames], self.spec.buffer.buckets))
        replay = _Replay(self.spec, call["python_draws"], bucket, buffers, step)
        recycling_draws = replay.recycling_draws()
        # 2. Recycling, and a forward pass of the trivial model.
        recycled = self._recycle(recycling_draws, batch, draws, buffers)
        first = f"{prefix}initial_latent"
        used = clamped(recycled, golden.frames(first, 2)) if first in golden else recycled
        noisy = corrupt(used.model_batch.target, used.draws.noise, used.draws.sigma)
        timestep = used.draws.timestep[:, :, None, None, None] / 1000
        velocity = 0.3 * noisy + 0.1 * used.draws.context + 0.02 * timestep - 0.05
        # The reference takes the noise level from the table, which ends just above 0.
        sigma = jnp.asarray(table.sigmas)[table.index(used.draws.timestep)]
        x0 = x0_from_velocity(noisy, velocity, sigma)
        # 3. Errors, and the updated buffers.
        errors = prediction_errors(velocity, batch, used)
        if first in golden:
            errors = self._with_first_frame(errors, x0 - clean, velocity, draws.sigma)
        buffers = self._record(recycling_draws, errors, batch, used, buffers)
        loss_batch = dataclasses.replace(batch, mask=batch.mask * ~used.draws.conditioning_frame)
        return buffers, {
            "latent_used": recycled.model_batch.target,
            "noise_used": recycled.draws.noise,
            "timestep": used.draws.timestep,
            "noisy_latents": noisy,
            "clean_x": used.draws.context,
            "flow_pred": velocity,
            "x0_pred": x0,
            "loss": flow_loss(velocity, loss_batch, used.draws)[0],
            "latent_buffer": self._contents(buffers.latent),
            "noise_buffer": self._contents(buffers.noise),
            "total_added": buffers.latent.added.sum(),
            "counts": buffers.noise.counts[0],
        }

    def _inputs(self, clean, noise, index: np.ndarray) -> tuple[TeacherForcingBatch, Draws]:
        """Batch and draws for these latents, this noise and these noise-level indices."""
        table, size = self.schedule, clean.shape[:2]
        chunk = jnp.tile(jnp.arange(self.blocks), (size[0], 2))
        zeros = jnp.zeros_like(chunk)
        batch = TeacherForcingBatch(clean, clean, jnp.ones(size), chunk, zeros, zeros, zeros, zeros)
        return batch, Draws(
            noise=noise,
            sigma=jnp.asarray(table.sigmas)[index],
            timestep=jnp.asarray(table.timesteps)[index],
            weight=jnp.asarray(table.weights)[index],
            context=clean,
            context_timestep=jnp.zeros(size),
            dropped=jnp.zeros(size[:1], bool),
            conditioning_frame=jnp.zeros(size, bool),
        )

    @staticmethod
    def _with_first_frame(errors: Errors, latent, velocity, sigma) -> Errors:
        """`errors` with the reference's values for a given first frame, for which ours are zero.

        The latent error is the difference of the prediction from that frame; the noise error treats
        zero as the target velocity.
        """
        noise = velocity * (1 - sigma)[:, :, None, None, None]
        return Errors(
            errors.latent.at[:, :1].set(latent[:, :1]), errors.noise.at[:, :1].set(noise[:, :1])
        )


def clamped(used: Recycled, first: jnp.ndarray) -> Recycled:
    """`used` with the first frame of context and target set to `first`, at noise level 0."""
    draws = used.draws
    target = used.model_batch.target.at[:, :1].set(first)
    return Recycled(
        dataclasses.replace(used.model_batch, target=target),
        dataclasses.replace(
            draws,
            context=draws.context.at[:, :1].set(first),
            sigma=draws.sigma.at[:, 0].set(0.0),
            timestep=draws.timestep.at[:, 0].set(0.0),
            conditioning_frame=draws.conditioning_frame.at[:, 0].set(True),
        ),
        used.clean,
    )


class _Replay:
    """Converts the reference's random numbers of one step, in its order, to `RecyclingDraws`."""

    def __init__(
        self, spec: RecyclingSpec, numbers: Sequence[Sequence], bucket, buffers, step: int
    ):
        self.spec, self.numbers, self.bucket = spec, iter(numbers), bucket
        self.counts = {k: np.asarray(getattr(buffers, k).counts[0]) for k in ("latent", "noise")}
        self.step, self.shape = step, bucket.shape

    def recycling_draws(self) -> RecyclingDraws:
        """The draws; raises ValueError if they do not use up the reference's numbers."""
        spec, is_started = self.spec, self.step >= self.spec.start
        clean = self._gate(spec.clean > 0)
        enabled = is_started and clean >= spec.clean
        noise = self._injection(enabled, "noise", spec.noise, self._count_matching)
        latent = self._injection(enabled, "latent", spec.latent, self._count_matching)
        context = self._injection(enabled, "latent", spec.context, self._count_row, always=True)
        update = self._gate(clean < spec.clean)
        is_stored = clean >= spec.clean or update < spec.update
        draws = RecyclingDraws(
            clean=self._per_sample(clean), update=self._per_sample(update),
            noise=noise, latent=latent, context=context,
            evict_latent=self._evictions("latent", is_stored),
            evict_noise=self._evictions("noise", is_stored),
        )  # fmt: skip
        if unused := list(self.numbers):
            raise ValueError(f"{len(unused)} draws of the golden are unused, first {unused[0]}")
        return draws

    def _next(self, kind: str) -> Sequence:
        number = next(self.numbers)
        if number[0] != kind:
            raise ValueError(f"the golden draws {number} where ours needs a {kind}")
        return number

    def _gate(self, is_drawn: bool) -> float:
        return self._next("random")[1] if is_drawn else NEVER

    def _per_sample(self, value: float) -> jnp.ndarray:
        return jnp.full(self.shape[:1], value, jnp.float32)

    def _row(self, block: int) -> int:
        return block if self.spec.buffer.rows > 1 else 0

    def _each_chunk(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """(sample and chunk), row and bucket of each chunk."""
        for chunk in np.ndindex(*self.shape):
            yield chunk, self._row(chunk[1]), self.bucket[chunk]

    def _count_matching(self, counts: np.ndarray, chunk, row: int, bucket: int) -> int:
        return counts[row, bucket]

    def _count_row(self, counts: np.ndarray, chunk, row: int, bucket: int) -> int:
        return 0 if self.spec.skip_first and chunk[1] == 0 else counts[row].sum()

    def _injection(
        self, enabled: bool, name: str, prob: float, count: Callable[..., int], always: bool = False
    ) -> InjectionDraws:
        """The draws for one kind of injection; `count` gives the entries a chunk chooses from."""
        counts = self.counts[name]
        gate = self._gate(enabled and counts.any() and (prob > 0 or always))
        entries, scales = np.zeros(self.shape), np.full(self.shape, 0.5)
        for chunk, row, bucket in self._each_chunk() if gate < prob else ():
            if total := count(counts, chunk, row, bucket):
                _, reference_total, index = self._next("choice")
                if reference_total != total:
                    raise ValueError(
                        f"the golden chooses from {reference_total} entries, ours from {total}"
                    )
                entries[chunk] = uniform_for(index, total)
                if self.spec.modulation:
                    scale = self._next("uniform")[3]
                    scales[chunk] = uniform_of_scale(scale, self.spec.modulation)
        return InjectionDraws(self._per_sample(gate), jnp.asarray(entries), jnp.asarray(scales))

    def _evictions(self, name: str, is_stored: bool) -> jnp.ndarray:
        """The draws that choose the entries to replace, where buckets are full by then."""
        counts, uniform = self.counts[name].copy(), np.zeros(self.shape)
        slots = self.spec.buffer.slots
        for chunk, row, bucket in self._each_chunk() if is_stored else ():
            if counts[row, bucket] < slots:
                counts[row, bucket] += 1
            elif self.spec.buffer.replace == "random":
                _, low, high, index = self._next("randint_inclusive")
                uniform[chunk] = uniform_for(index - low, high + 1 - low)
        return jnp.asarray(uniform)
