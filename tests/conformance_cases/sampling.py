"""Entire videos: denoising chunk by chunk against the cache, with sinks, cuts and guidance."""

import functools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.rows import (
    CLOSE,
    EXACT,
    Case,
    NotImplementedHere,
    compared,
    differing,
    distance,
    relative,
)
from longlive_jax import layout
from longlive_jax.diffusion import solvers
from longlive_jax.models.wan.cache import CachePolicy, KVCache, empty_cache
from longlive_jax.models.wan.packed_cache import KVFormat
from longlive_jax.sampling.drivers import (
    ChunkInputs,
    Sampler,
    VideoConditioning,
    stack_chunk_inputs,
)

CACHE_KEY = re.compile(r"([kv])_cache_layer(\d+)")
OPTIONS = {
    "guidance_scale",
    "independent_first_frame",
    "local_attn_size",
    "multi_shot_rope_offset",
    "multi_shot_sink",
    "sampling_steps",
    "shot_clean_recache",
    "sink_size",
    "use_relative_rope",
}


def videos(golden: Golden) -> Sequence[Case]:
    """Latents and caches of every case, and single model calls if the file has them."""
    studio = Studio(golden)
    return [case for entry in golden.meta["cases"] for case in studio.cases(entry)]


class Studio:
    """Model, prompts and noise of all cases of a file."""

    def __init__(self, golden: Golden, form: KVFormat | None = None):
        self.golden, self.model = golden, golden.dit
        self.form = KVFormat() if form is None else form
        self.chunk_frames = golden.meta["num_frame_per_block"]
        self.noise = golden.frames("noise", 2)
        self.order: list[str] = golden.meta["prompt_order"]
        self.sampler = Sampler(self.model.graphdef)

    @functools.cached_property
    def bank(self):
        """Keys and values of every prompt of the file."""
        embeds = jnp.asarray(self.golden["prompt_embeds"])
        return self.sampler.text(self.model.params, embeds)

    def cases(self, entry: Mapping[str, Any]) -> list[Case]:
        name, golden = entry["name"], self.golden
        video = functools.cache(lambda: self.video(entry))

        def cached(key: str) -> float:
            return _matched(video()[1], key, golden[f"{name}/{key}"])[0]

        latents, flow = f"{name}/latents", f"{name}/block0_flow"
        cases = [compared(latents, CLOSE, lambda: video()[0], golden.frames(latents, 2), distance)]
        if entry.get("uses_initial_latent"):
            first = golden.frames("initial_latent", 2)
            frame = lambda: video()[0][:, : first.shape[1]]  # noqa: E731
            cases.append(compared(f"{name}/first_frame", EXACT, frame, first, differing))
        caches = [key for key in golden.under(f"{name}/") if CACHE_KEY.fullmatch(key)]
        cases += [Case(f"{name}/{key}", CLOSE, partial(cached, key)) for key in caches]
        if "cache_state" in entry and caches:
            theirs = golden[f"{name}/{caches[0]}"]
            state = partial(_state_error, entry["cache_state"], caches[0], theirs)
            cases.append(Case(f"{name}/cache_state", EXACT, lambda: state(video()[1])))
        if flow in golden:
            want = golden.frames(flow, 2)
            cases.append(compared(flow, CLOSE, lambda: self._first_chunk(entry), want))
        return cases

    def video(self, entry: Mapping[str, Any]) -> tuple[jax.Array, KVCache]:
        """Latents of the video, and the cache after it."""
        options, prompts = entry["inference"], self._prompts(entry)
        scale = options.get("guidance_scale", 1.0)
        batch, _, height, width, channels = self.noise.shape
        has_conditioning_frame = bool(entry.get("uses_initial_latent"))
        first = jnp.zeros((batch, height, width, channels))
        if has_conditioning_frame:
            frames = self.golden.frames("initial_latent", 2)
            if frames.shape[1] != 1:
                raise NotImplementedHere("more than one initial latent frame")
            first = frames[:, 0]
        conditioning = VideoConditioning(
            solver=solvers.unipc(
                options["sampling_steps"], shift=self.golden.meta["timestep_shift"]
            ),
            keys=jax.random.split(jax.random.key(0), batch),
            conditioning_frame=first,
            has_conditioning_frame=jnp.full(batch, has_conditioning_frame),
            guidance=None if scale == 1 else jnp.float32(scale),
        )
        size = (self.chunk_frames, height // 2, width // 2)
        samples = batch if scale == 1 else 2 * batch
        cache = empty_cache(self.model.config, samples, size, self.policy(options, len(prompts)))
        inputs = self.inputs(prompts, options, guided=scale != 1)
        return self.sampler.sample(self.model.params, cache, conditioning, inputs, self.bank)

    def policy(self, options: Mapping[str, Any], chunks: int) -> CachePolicy:
        """The cache policy that these options describe."""
        unknown = sorted(key for key in set(options) - OPTIONS if options[key])
        if unknown:
            raise NotImplementedHere(f"options {unknown}")
        window = options.get("local_attn_size", self.golden.meta.get("local_attn_size", -1))
        window = chunks * self.chunk_frames if window < 0 else window
        sinks = options.get("sink_size", 0)
        if window % self.chunk_frames or sinks % self.chunk_frames:
            raise NotImplementedHere(
                f"window of {window} and sinks of {sinks} frames for chunks of {self.chunk_frames}"
            )
        return CachePolicy(
            window=window // self.chunk_frames,
            global_sinks=sinks // self.chunk_frames,
            shot_sinks=bool(options.get("multi_shot_sink")) and sinks > 0,
            clean_recache=bool(options.get("shot_clean_recache")),
            relative_rope=bool(options.get("use_relative_rope")),
            format=self.form,
        )

    def _prompts(self, entry: Mapping[str, Any]) -> list[str]:
        prompts = entry.get("prompts", self.golden.meta.get("prompts"))
        if len(prompts) * self.chunk_frames != self.noise.shape[1]:
            raise ValueError(f"{len(prompts)} prompts for {self.noise.shape[1]} frames of noise")
        return prompts

    def _negative(self) -> str:
        """The prompt named by the file, or the only prompt without a chunk."""
        meta = self.golden.meta
        if "negative_prompt" in meta:
            return meta["negative_prompt"]
        used = {p for entry in meta["cases"] for p in self._prompts(entry)}
        (unused,) = set(self.order) - used
        return unused

    def inputs(
        self, prompts: Sequence[str], options: Mapping[str, Any], *, guided: bool = False
    ) -> ChunkInputs:
        """The inputs of all chunks, stacked."""
        shot_rope_offset = options.get("multi_shot_rope_offset", 0)
        prefix = self.golden.meta["scene_cut_prefix"]
        batch, shot, inputs = len(self.noise), 0, []
        for i, prompt in enumerate(prompts):
            cut = i > 0 and prompt.startswith(prefix)
            shot += cut
            rows = [self.order.index(prompt)] * batch
            if guided:
                rows += [self.order.index(self._negative())] * batch
            chunk = ChunkInputs(
                text=jnp.array(rows),
                cut=jnp.full(batch, cut),
                shot_rope_offset=jnp.full(batch, shot * shot_rope_offset, jnp.int32),
                noise=self.noise[:, i * self.chunk_frames : (i + 1) * self.chunk_frames],
            )
            inputs.append(chunk)
        return stack_chunk_inputs(inputs)

    def _first_chunk(self, entry: Mapping[str, Any]) -> jax.Array:
        """The model calls of chunk 0 on the reference's own inputs."""
        name, prompts = entry["name"], self._prompts(entry)
        x = self.golden.frames(f"{name}/block0_model_input", 2)
        index = [self.order.index(prompts[0])]
        if entry["inference"].get("guidance_scale", 1.0) != 1:
            index.append(self.order.index(self._negative()))
        rows = np.resize(index, len(x))
        text = jax.tree.map(lambda leaf: leaf[:, rows], self.bank)
        tokens = layout.grid(
            self.chunk_frames, x.shape[2] // 2, x.shape[3] // 2, chunk_frames=self.chunk_frames
        )
        timestep = jnp.asarray(self.golden[f"{name}/block0_timestep"])

        @jax.jit
        def velocity(params, x, timestep, text):
            return self.model.around(params)(x, timestep, text, tokens)[0]

        return velocity(self.model.params, x, timestep, text)


def _matched(cache: KVCache, key: str, theirs: np.ndarray) -> tuple[float, dict[int, int]]:
    """The largest error of our chunks against the reference's, and the slots of the latter.

    The reference keeps chunks in order of age. It evicts a chunk when the next one arrives, we
    when the last one is written, so its cache contains at least the chunks in ours.
    """
    if cache.policy.relative_rope:
        raise NotImplementedHere("keys are stored without rotation")
    match = CACHE_KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key} is not a cache")
    slot_chunk = np.asarray(cache.slot_chunk[0])
    ours = np.asarray(getattr(cache, match[1]))[int(match[2]), 0]
    want = theirs[0].reshape(-1, *ours.shape[1:])
    worst, slots = 0.0, {}
    for slot in np.argsort(slot_chunk):
        if slot_chunk[slot] >= 0:
            errors = [relative(ours[slot], block) for block in want]
            slots[int(slot_chunk[slot])] = int(np.argmin(errors))
            worst = max(worst, min(errors))
    order = list(slots.values())
    if order != sorted(set(order)):
        raise ValueError(f"chunks {list(slots)} match the golden's slots {order}")
    return worst, slots


def _state_error(state: Mapping[str, int], key: str, theirs: np.ndarray, cache: KVCache) -> float:
    """Fraction of the reference's bookkeeping that differs from ours."""
    frames, rows, columns = cache.size
    tokens = frames * rows * columns
    ours, want = [int(cache.num_chunks[0]) * tokens], [state["global_end_index"]]
    if state["pinned_start"] >= 0:
        _, slots = _matched(cache, key, theirs)
        slot = slots.get(int(cache.sink_start[0]), -1)
        ours += [slot * tokens, int(cache.sink_length[0]) * tokens]
        want += [state["pinned_start"], state["pinned_len"]]
    return differing(ours, want)
