"""Small models: those of the golden files, and random ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.diffusion import solvers
from longlive_jax.interop import keys_dit
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.sampling.drivers import (
    ChunkInputs,
    Sampler,
    VideoConditioning,
    stack_chunk_inputs,
)
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.settings import SampleSpec
from tests.tiny import TINY, activate_outputs, tiny_parts, write_tiny


def state_dict_params(tensors):
    """Parameters from tensors with their original names, by the converter's key table."""
    params = {}
    for leaf in keys_dit.ORIGINAL.forward({k: v.shape for k, v in tensors.items()}):
        arrays = [leaf.to_param(tensors[key]) for key in leaf.keys]
        node = params
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        is_stacked = len(arrays) > 1 or leaf.rule.stacked
        node[leaf.path[-1]] = jnp.asarray(np.stack(arrays) if is_stacked else arrays[0])
    return params


class Golden:
    """One sampling golden file: its model, prompts and cases."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(bytes(self.arrays["__meta__"]))
        c = self.meta["config"]
        self.config = DiTConfig(
            **{k: c[k] for k in ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len")},
            heads=c["num_heads"],
            layers=c["num_layers"],
            in_channels=c["in_dim"],
            out_channels=c["out_dim"],
        )
        weights = {k[2:]: v for k, v in self.arrays.items() if k.startswith("w/")}
        self.params = state_dict_params(weights)
        self.sampler = Sampler(abstract(lambda: DiT(self.config, rngs=nnx.Rngs(0)))[0])
        self.noise = jnp.moveaxis(jnp.asarray(self.arrays["noise"]), 2, -1)
        self.frames = self.meta["num_frame_per_block"]
        self.bank = self.sampler.text(self.params, jnp.asarray(self.arrays["prompt_embeds"]))

    def run(self, case):
        """Latents [1, f, h, w, c] and the final cache of one case."""
        options, prompts = case["inference"], case.get("prompts", self.meta.get("prompts"))
        sinks = options["sink_size"] // self.frames
        policy = CachePolicy(
            window=self.meta["local_attn_size"] // self.frames,
            global_sinks=sinks,
            shot_sinks=options["multi_shot_sink"] and sinks > 0,
            clean_recache=options.get("shot_clean_recache", False),
        )
        guided = options["guidance_scale"] != 1
        _, _, height, width, channels = self.noise.shape
        has_conditioning_frame = case.get("uses_initial_latent", False)
        first = jnp.zeros((1, height, width, channels))
        if has_conditioning_frame:
            first = jnp.moveaxis(jnp.asarray(self.arrays["initial_latent"][:, 0]), 1, -1)
        conditioning = VideoConditioning(
            solver=solvers.unipc(options["sampling_steps"], shift=self.meta["timestep_shift"]),
            keys=jax.random.split(jax.random.key(0), 1),
            conditioning_frame=first,
            has_conditioning_frame=jnp.array([has_conditioning_frame]),
            guidance=jnp.float32(options["guidance_scale"]) if guided else None,
        )
        cache = empty_cache(self.config, 1 + guided, (self.frames, height // 2, width // 2), policy)
        inputs = self._inputs(prompts, options["multi_shot_rope_offset"], guided)
        return self.sampler.sample(self.params, cache, conditioning, inputs, self.bank)

    def _inputs(self, prompts, shot_rope_offset, guided):
        """The inputs of all chunks, stacked."""
        order, shot = self.meta["prompt_order"], 0
        inputs = []
        for i, prompt in enumerate(prompts):
            cut = i > 0 and prompt.startswith(self.meta["scene_cut_prefix"])
            shot += cut
            text = [order.index(prompt)] + ([order.index("bad")] if guided else [])
            noise = self.noise[:, i * self.frames : (i + 1) * self.frames]
            offset = jnp.array([shot * shot_rope_offset], jnp.int32)
            inputs.append(ChunkInputs(jnp.array(text), jnp.array([cut]), offset, noise))
        return stack_chunk_inputs(inputs)


class Toy:
    """A random DiT with its sampler and a bank of four prompts."""

    size = (2, 3, 4)
    shape = (2, 6, 8, 4)

    def __init__(self, policy=CachePolicy(), *, dim=48):  # noqa: B008
        self.config = DiTConfig(
            dim=dim, ffn_dim=96, freq_dim=16, text_dim=12, text_len=6, heads=2, layers=3,
            in_channels=4, out_channels=4,
        )  # fmt: skip
        model = DiT(self.config, rngs=nnx.Rngs(0))
        self.graphdef, self.params = nnx.graphdef(model), activate_outputs(params_of(model))
        self.sampler = Sampler(self.graphdef)
        self.policy = policy
        features = jax.random.normal(jax.random.key(9), (4, 6, 12))
        self.bank = self.sampler.text(self.params, features)

    def cache(self, batch=1, policy=None):
        return empty_cache(self.config, batch, self.size, policy or self.policy)

    def conditioning(self, seeds=(0,), *, steps=3, guidance=None, frame=None, solver=solvers.unipc):
        batch, space = len(seeds), self.shape[1:]
        return VideoConditioning(
            solver=solver(steps),
            keys=jnp.stack([jax.random.key(seed) for seed in seeds]),
            conditioning_frame=jnp.zeros((batch, *space)) if frame is None else frame,
            has_conditioning_frame=jnp.full(batch, frame is not None),
            guidance=None if guidance is None else jnp.float32(guidance),
        )

    def inputs(self, text, cut=(False,), shot=(0,)):
        """One chunk with indices for text, as the scan takes it."""
        return ChunkInputs(jnp.array(text), jnp.array(cut), 8 * jnp.array(shot, jnp.int32))

    def with_text_kv(self, inputs):
        """The chunk with keys and values in place of indices, as a step takes it."""
        text = jax.tree.map(lambda x: jnp.take(x, inputs.text, axis=1), self.bank)
        return inputs.replace(text=text)

    def scan(self, chunks, conditioning, *, rows=1, policy=None):
        """Latents of all chunks by one scan, and the cache after them."""
        return self.sampler.sample(
            self.params, self.cache(rows, policy), conditioning, stack_chunk_inputs(chunks),
            self.bank,
        )  # fmt: skip

    def stream(self, chunks, conditioning, *, rows=1, cache=None):
        """Latents of all chunks, step by step."""
        cache, latents = self.cache(rows) if cache is None else cache, []
        for chunk in map(self.with_text_kv, chunks):
            x, cache = self.sampler.step(self.params, cache, conditioning, chunk)
            latents.append(x)
        return np.concatenate(latents, axis=1)


@pytest.fixture(scope="session")
def tiny():
    """A pipeline with random weights."""
    return Pipeline(Engine(*tiny_parts(), SampleSpec(**TINY)))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The same model in a checkpoint directory."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def toy():
    return Toy()


@pytest.fixture(scope="session")
def multishot(goldens):
    return Golden(goldens / "sampling_multishot.npz")


@pytest.fixture(scope="session")
def i2v(goldens):
    return Golden(goldens / "sampling_i2v.npz")
