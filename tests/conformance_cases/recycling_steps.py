"""Error recycling over successive steps, every draw being the reference's own."""

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
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    Draws,
    TeacherForcingBatch,
)
from longlive_jax.training.objectives.error_recycling import (
    Errors,
    Pick,
    Recycled,
    RecyclingSpec,
    Rolls,
    init_buffers,
    observe,
    prediction_errors,
    recycle,
)
from longlive_jax.training.objectives.teacher_forcing import (
    flow_loss,
)

REPLACE: dict[str, eb.Replacement] = {"random": "random", "fifo": "oldest", "l2": "nearest"}
NEVER = 1.0
"""A gate that no share opens."""

GIVEN = {"clean_latent", "noise", "index_draw", "initial_latent"}
OPTIONS = {"i2v", "independent_first_frame"}

matched = jax.jit(eb.matched, static_argnames="replace")


def share_of(nth: int, count: int) -> float:
    """A number in [0, 1) that means entry `nth` of `count`."""
    return (nth + 0.5) / count


def centred(scale: float, modulation: float) -> float:
    """The number in [0, 1) that a factor in 1 - modulation to 1 + modulation was made from."""
    return (scale - 1) / (2 * modulation) + 0.5


def contents(buffer: eb.Buffer, replace: eb.Replacement) -> np.ndarray:
    """All entries of a buffer of one group, in the order of rows, columns and arrival."""
    found = [
        matched(buffer, row, column, share_of(nth, count), replace=replace)
        for (row, column), count in np.ndenumerate(np.asarray(buffer.held))
        for nth in range(count)
    ]
    return np.array(found).reshape(-1, *buffer.entries.shape[3:])


def uniform_mask(got: Any, want: Any) -> float:
    """`relative`, and nothing is like nothing."""
    if np.size(want) or np.size(got):
        return relative(got, want)
    return 0.0


class Steps:
    """Successive training steps around a model without parameters."""

    def __init__(self, golden: Golden, run: Mapping[str, Any]):
        self.golden, self.name, self.calls = golden, run["name"], run["calls"]
        self.unknown = sorted(set(run["extra_args"]) - OPTIONS)
        self.chunk_frames, settings = run["num_frame_per_block"], run["error_recycling"]
        self.shape = tuple(run["shape"][i] for i in (0, 1, 3, 4, 2))
        self.blocks = self.shape[1] // self.chunk_frames
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
        self.played = functools.cache(self._play)
        options = {"chunk_frames": self.chunk_frames, "spec": self.spec, "loss": self.loss}
        self._recycle = jax.jit(partial(recycle, **options))
        self._observe = jax.jit(partial(observe, **options))

    def cases(self) -> list[Case]:
        if self.unknown:
            return [later(self.name, f"options {self.unknown}")]
        cases = []
        for i, call in enumerate(self.calls):
            for key, theirs in self.golden.under(f"{self.name}/{i}/").items():
                if key in GIVEN:
                    continue
                want = theirs if theirs.ndim < 5 else np.moveaxis(theirs, 2, -1)
                got = partial(lambda i, key: self.played()[i][key], i, key)
                cases.append(compared(f"{self.name}/{i}/{key}", TIGHT, got, want, uniform_mask))
            for key, want in {
                "total_added": call["total_added"],
                "counts": self._counts(call["bucket_layout_after"]["latent_buffer"]),
            }.items():
                got = partial(lambda i, key: self.played()[i][key], i, key)
                cases.append(compared(f"{self.name}/{i}/{key}", EXACT, got, want, differing))
        return cases

    def _counts(self, layout: Sequence[tuple[str, int]]) -> np.ndarray:
        held = np.zeros((self.spec.buffer.rows, self.spec.buffer.buckets), int)
        for key, count in layout:
            row, bucket = [0, int(key)] if "(" not in key else map(int, key[1:-1].split(","))
            held[row, bucket] = count
        return held

    def _contents(self, buffer: eb.Buffer) -> np.ndarray:
        return contents(jax.tree.map(lambda x: x[0], buffer), self.spec.buffer.replace)

    def _play(self) -> list[dict[str, Any]]:
        m, (h, w, c) = self.chunk_frames, self.shape[2:]
        buffers, found = init_buffers(self.spec, (m, h, w, c)), []
        for i, call in enumerate(self.calls):
            buffers, result = self._call(f"{self.name}/{i}/", call, buffers)
            found.append(result)
        return found

    def _call(self, where: str, call: Mapping[str, Any], buffers):
        golden, table, step = self.golden, self.schedule, call["global_step"]
        buffers = dataclasses.replace(buffers, seen=jnp.asarray(step))
        clean = golden.frames(f"{where}clean_latent", 2)
        index = np.repeat(
            golden[f"{where}index_draw"][:, :: self.chunk_frames], self.chunk_frames, axis=1
        )
        batch, draws = self._given(clean, golden.frames(f"{where}noise", 2), index)
        bucket = np.asarray(eb.bucket_of(index[:, :: self.chunk_frames], self.spec.buffer.buckets))
        rolls = _Replay(self.spec, call["python_draws"], bucket, buffers, step).rolls()
        mixed = self._recycle(rolls, batch, draws, buffers)
        first = f"{where}initial_latent"
        used = clamped(mixed, golden.frames(first, 2)) if first in golden else mixed
        noisy = corrupt(used.batch.target, used.draws.noise, used.draws.sigma)
        told = used.draws.timestep[:, :, None, None, None] / 1000
        velocity = 0.3 * noisy + 0.1 * used.draws.context + 0.02 * told - 0.05
        # the reference reads the level off the table, which ends just above 0
        sigma = jnp.asarray(table.sigmas)[table.index(used.draws.timestep)]
        x0 = x0_from_velocity(noisy, velocity, sigma)
        errors = prediction_errors(velocity, batch, used)
        if first in golden:
            errors = self._with_given(errors, x0 - clean, velocity, draws.sigma)
        buffers = self._observe(rolls, errors, batch, used, buffers)
        mask = batch.mask * ~used.draws.conditioning_frame
        result = {
            "latent_used": mixed.batch.target,
            "noise_used": mixed.draws.noise,
            "timestep": used.draws.timestep,
            "noisy_latents": noisy,
            "clean_x": used.draws.context,
            "flow_pred": velocity,
            "x0_pred": x0,
            "loss": flow_loss(velocity, dataclasses.replace(batch, mask=mask), used.draws)[0],
            "latent_buffer": self._contents(buffers.latent),
            "noise_buffer": self._contents(buffers.noise),
            "total_added": buffers.latent.added.sum(),
            "counts": buffers.noise.held[0],
        }
        return buffers, result

    def _given(self, clean, noise, index: np.ndarray) -> tuple[TeacherForcingBatch, Draws]:
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
    def _with_given(errors: Errors, latent, velocity, sigma) -> Errors:
        """With what the reference keeps of a given frame, which is nothing here: how far the
        prediction lies from it, and the velocity as if it ought to be zero."""
        noise = velocity * (1 - sigma)[:, :, None, None, None]
        return Errors(
            errors.latent.at[:, :1].set(latent[:, :1]), errors.noise.at[:, :1].set(noise[:, :1])
        )


def clamped(used: Recycled, first: jnp.ndarray) -> Recycled:
    """With the first frame of context and target set to a given one, at no noise."""
    draws = used.draws
    return Recycled(
        dataclasses.replace(used.batch, target=used.batch.target.at[:, :1].set(first)),
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
    """The reference's random numbers of one step, in its order, as `Rolls`."""

    def __init__(self, spec: RecyclingSpec, told: Sequence[Sequence], bucket, buffers, step: int):
        self.spec, self.told, self.bucket = spec, iter(told), bucket
        self.held = {k: np.asarray(getattr(buffers, k).held[0]) for k in ("latent", "noise")}
        self.step, self.shape = step, bucket.shape

    def rolls(self) -> Rolls:
        spec, open_ = self.spec, self.step >= self.spec.start
        clean = self._gate(spec.clean > 0)
        on = open_ and clean >= spec.clean
        noise = self._pick(on, "noise", spec.noise, self._matching)
        latent = self._pick(on, "latent", spec.latent, self._matching)
        context = self._pick(on, "latent", spec.context, self._pooling, always=True)
        update = self._gate(clean < spec.clean)
        kept = clean >= spec.clean or update < spec.update
        rolls = Rolls(
            clean=self._all(clean), update=self._all(update),
            noise=noise, latent=latent, context=context,
            old_latent=self._old("latent", kept), old_noise=self._old("noise", kept),
        )  # fmt: skip
        if left := list(self.told):
            raise ValueError(f"{len(left)} draws of the golden were not asked for: {left[0]}")
        return rolls

    def _next(self, kind: str) -> Sequence:
        draw = next(self.told)
        if draw[0] != kind:
            raise ValueError(f"the golden draws {draw} where ours wants a {kind}")
        return draw

    def _gate(self, asked: bool) -> float:
        return self._next("random")[1] if asked else NEVER

    def _all(self, value: float) -> jnp.ndarray:
        return jnp.full(self.shape[:1], value, jnp.float32)

    def _row(self, block: int) -> int:
        return block if self.spec.buffer.rows > 1 else 0

    def _each(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        for place in np.ndindex(*self.shape):
            yield place, self._row(place[1]), self.bucket[place]

    def _matching(self, held: np.ndarray, place, row: int, bucket: int) -> int:
        return held[row, bucket]

    def _pooling(self, held: np.ndarray, place, row: int, bucket: int) -> int:
        return 0 if self.spec.skip_first and place[1] == 0 else held[row].sum()

    def _pick(
        self, on: bool, name: str, share: float, count: Callable[..., int], always: bool = False
    ) -> Pick:
        held = self.held[name]
        gate = self._gate(on and held.any() and (share > 0 or always))
        shares, scales = np.zeros(self.shape), np.full(self.shape, 0.5)
        for place, row, bucket in self._each() if gate < share else ():
            if total := count(held, place, row, bucket):
                _, among, nth = self._next("choice")
                if among != total:
                    raise ValueError(f"the golden chooses among {among}, ours among {total}")
                shares[place] = share_of(nth, among)
                if self.spec.modulation:
                    scales[place] = centred(self._next("uniform")[3], self.spec.modulation)
        return Pick(self._all(gate), jnp.asarray(shares), jnp.asarray(scales))

    def _old(self, name: str, kept: bool) -> jnp.ndarray:
        """Which entries give way, where buckets are full when their turn comes."""
        held, shares = self.held[name].copy(), np.zeros(self.shape)
        slots = self.spec.buffer.slots
        for place, row, bucket in self._each() if kept else ():
            if held[row, bucket] < slots:
                held[row, bucket] += 1
            elif self.spec.buffer.replace == "random":
                _, low, high, nth = self._next("randint_inclusive")
                shares[place] = share_of(nth - low, high + 1 - low)
        return jnp.asarray(shares)
