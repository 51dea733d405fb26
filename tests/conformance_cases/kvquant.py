"""Sampling with keys and values in NVFP4: the reference's run step by step, and end to end.

Rounding to four bits sometimes turns a difference of one part in a million into a full step of a
code. So the run is replayed with the reference's own inputs at every step, where errors cannot
accumulate, and the latents of the free run have a wider tolerance.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.rows import CLOSE, EXACT, Case, compared, differing, distance, relative
from conformance_cases.sampling import Studio
from longlive_jax.models.wan.cache import KVCache, empty_cache
from longlive_jax.models.wan.packed_cache import KVFormat
from longlive_jax.sampling.drivers import ChunkInputs
from pallas_kernels.attention import attention
from pallas_kernels.nvfp4 import pack, quantize

FREE = 1e-3
"""Relative L2 error of the latents of a free run."""
STEP = 2e-3
"""Relative L2 error of one model call: a code or two of the cache on the other side of a tie."""
PROBED = 2e-3
"""Relative L2 error of the attention inputs of one call."""
FLIPPED = 1e-3
"""Fraction of codes on the other side of a tie."""


def quantised_cache(golden: Golden) -> Sequence[Case]:
    """The unquantised run; the quantised run, free and replayed; the cache after the replay."""
    inference = golden.meta["inference"]
    plain = Studio(golden).cases({"name": "unquantized", "inference": inference})
    replay = Replay(golden)
    free = {"name": "kvquant", "inference": inference}
    latents = compared(
        "kvquant/latents", FREE, lambda: replay.studio.video(free)[0],
        golden.frames("kvquant/latents", 2), distance,
    )  # fmt: skip
    return [*plain, latents, *replay.flows(), *replay.caches(), *replay.probe()]


class Replay:
    """The reference's model calls on its own inputs, against our cache."""

    def __init__(self, golden: Golden):
        self.golden = golden
        self.studio = Studio(golden, KVFormat("nvfp4", smoothing="reference"))
        self.options = golden.meta["inference"]
        self.calls = self.options["sampling_steps"] + 1  # per chunk, the last at noise level 0
        self.inputs = golden.frames("trace_input", 2)
        self.chunks = self.studio.inputs(golden.meta["prompts"], self.options)
        self.forward = jax.jit(self._forward)

    def flows(self) -> list[Case]:
        """The velocity of every call, chunk by chunk."""
        want = self.golden.frames("trace_flow", 2)

        def of(chunk: int) -> slice:
            return slice(chunk * self.calls, (chunk + 1) * self.calls)

        chunks = range(len(want) // self.calls)
        return [
            compared(f"trace/chunk{c}", STEP, lambda c=c: self.run[0][of(c)], want[of(c)], distance)
            for c in chunks
        ]

    def caches(self) -> list[Case]:
        """Codes, scales and amax of the chunks that are in both caches at the end."""
        cases = []
        for layer in range(self.studio.model.config.layers):
            for kind in "kv":
                key = f"cache/layer{layer}/{kind}"
                cases += [
                    Case(
                        f"{key}/{part}",
                        most,
                        functools.partial(self._cache_error, layer, kind, part),
                    )
                    for part, most in {
                        "codes": FLIPPED,
                        "scales_e4m3": FLIPPED,
                        "amax": CLOSE,
                    }.items()
                ]
        return cases

    def probe(self) -> list[Case]:
        """Inputs of layer 0's attention in one call, and the quantiser alone."""
        names = ("query", "attended_k", "attended_v")
        attended = [
            compared(
                f"probe/{name}",
                PROBED,
                lambda i=i: self.attended[i],
                self.golden[f"probe_{name}"],
                distance,
            )
            for i, name in enumerate(names)
        ]
        return [*attended, *(case for kind in "kv" for case in self._quantiser(kind))]

    @functools.cached_property
    def run(self) -> tuple[np.ndarray, list[KVCache], list[int]]:
        """Velocity of every call, caches before every chunk and at the end, and the reference's
        chunks at the end: those it attended last."""
        params, flows, caches, slot_chunks = self.studio.model.params, [], [self._empty()], []
        for i, x in enumerate(self.inputs):
            chunk, step = divmod(i, self.calls)
            inputs = jax.tree.map(lambda leaf: leaf[chunk], self.chunks)  # noqa: B023
            timestep = jnp.asarray(self.golden["trace_timestep"][i])
            flow, after = self.forward(params, caches[-1], inputs, x[None], timestep[None])
            flows.append(np.asarray(flow[0]))
            if step == self.calls - 1:
                slot_chunks = sorted([*np.asarray(caches[-1].slot_chunk[0]).tolist(), chunk])
                caches.append(after)
        return np.stack(flows), caches, slot_chunks

    @functools.cached_property
    def attended(self) -> tuple[np.ndarray, ...]:
        """Queries, keys and values of layer 0 in the context pass of chunk 1, cached ones first."""
        at = 2 * self.calls - 1
        calls: list[tuple[np.ndarray, ...]] = []

        def recorded(q, k, v, *tokens):
            calls.append(tuple(np.asarray(x) for x in (q, k, v)))
            return attention(q, k, v, *tokens)

        inputs = jax.tree.map(lambda leaf: leaf[1], self.chunks)
        timestep = jnp.asarray(self.golden["trace_timestep"][at])[None]
        with jax.disable_jit():
            arguments = self.run[1][1], inputs, self.inputs[at][None], timestep
            self._forward(self.studio.model.params, *arguments, attend=recorded)
        q, *rest = calls[0]
        own = q.shape[1]
        return q, *(np.concatenate([x[:, own : 2 * own], x[:, :own]], axis=1) for x in rest)

    def _empty(self) -> KVCache:
        policy = self.studio.policy(self.options, len(self.golden.meta["prompts"]))
        size = (self.studio.chunk_frames, self.inputs.shape[2] // 2, self.inputs.shape[3] // 2)
        return empty_cache(self.studio.model.config, 1, size, policy)

    def _forward(
        self, params, cache: KVCache, inputs: ChunkInputs, x, timestep, *, attend=attention
    ):
        """Velocity, and the cache with `x` written to it, which is clean at timestep 0."""
        dit = self.studio.model.around(params)
        text = jax.tree.map(lambda leaf: leaf[:, inputs.text], self.studio.bank)
        tokens = cache.upcoming(inputs.shot_rope_offset, noisy=False)
        flow, packed = dit(
            x, timestep, text, tokens, cache, attend=attend, return_kv=True, store=cache.pack
        )
        return flow, cache.insert(packed, cut=inputs.cut, shot_rope_offset=inputs.shot_rope_offset)

    def _cache_error(self, layer: int, kind: str, part: str) -> float:
        _, caches, theirs = self.run
        cache = caches[-1]
        slots = [theirs.index(chunk) for chunk in np.asarray(cache.slot_chunk[0]).tolist()]
        want = self.golden[f"cache/layer{layer}/{kind}/{part}"][slots]
        field = {"codes": "codes", "scales_e4m3": "scales", "amax": "amax"}[part]
        got = np.asarray(getattr(getattr(cache, kind), field))[layer, 0].reshape(want.shape)
        return (
            relative(got, want)
            if part == "amax"
            else differing(_nibbles(got, part), _nibbles(want, part))
        )

    def _quantiser(self, kind: str) -> list[Case]:
        written = self.golden[f"probe_written_{kind}"]
        array = quantize(jnp.asarray(written), rule="mse")
        got = {
            "codes": pack(array.codes),
            "scales_e4m3": jax.lax.bitcast_convert_type(array.scales, jnp.uint8),
            "amax": array.amax,
        }
        cases = []
        for part, x in got.items():
            want = self.golden[f"probe_{part}_{kind}"]
            ours = functools.partial(np.reshape, x, want.shape)
            cases.append(compared(f"probe/{part}_{kind}", EXACT, ours, want, differing))
        return cases


def _nibbles(x: np.ndarray, part: str) -> np.ndarray:
    """Bytes as separate codes, with a single zero code."""
    if part != "codes":
        return x
    codes = np.stack([x & 15, x >> 4], axis=-1)
    return np.where(codes == 8, 0, codes)
