"""Small models: the golden files' own, and random ones."""

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
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.settings import SampleSpec
from tests.tiny import TINY, activate_outputs, tiny_parts, write_tiny


def state_dict_params(tensors):
    """Parameters from the original names, through the converter's key table."""
    params = {}
    for leaf in keys_dit.ORIGINAL.forward({k: v.shape for k, v in tensors.items()}):
        parts = [leaf.to_param(tensors[key]) for key in leaf.keys]
        node = params
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        stacked = len(parts) > 1 or leaf.rule.stacked
        node[leaf.path[-1]] = jnp.asarray(np.stack(parts) if stacked else parts[0])
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
        given = case.get("uses_initial_latent", False)
        first = jnp.zeros((1, height, width, channels))
        if given:
            first = jnp.moveaxis(jnp.asarray(self.arrays["initial_latent"][:, 0]), 1, -1)
        setting = VideoConditioning(
            solver=solvers.unipc(options["sampling_steps"], shift=self.meta["timestep_shift"]),
            keys=jax.random.split(jax.random.key(0), 1),
            first=first,
            given=jnp.array([given]),
            guidance=jnp.float32(options["guidance_scale"]) if guided else None,
        )
        cache = empty_cache(self.config, 1 + guided, (self.frames, height // 2, width // 2), policy)
        orders = self._orders(prompts, options["multi_shot_rope_offset"], guided)
        return self.sampler.sample(self.params, cache, setting, orders, self.bank)

    def _orders(self, prompts, shot_rope_offset, guided):
        order, shot = self.meta["prompt_order"], 0
        orders = []
        for i, prompt in enumerate(prompts):
            cut = i > 0 and prompt.startswith(self.meta["scene_cut_prefix"])
            shot += cut
            text = [order.index(prompt)] + ([order.index("bad")] if guided else [])
            noise = self.noise[:, i * self.frames : (i + 1) * self.frames]
            shot_rope_offset = jnp.array([shot * shot_rope_offset], jnp.int32)
            orders.append(ChunkInputs(jnp.array(text), jnp.array([cut]), shot_rope_offset, noise))
        return stack_chunk_inputs(orders)


class Toy:
    """A random DiT with its sampler, a bank of four prompts, and orders to play with."""

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
        texts = jax.random.normal(jax.random.key(9), (4, 6, 12))
        self.bank = self.sampler.text(self.params, texts)

    def cache(self, batch=1, policy=None):
        return empty_cache(self.config, batch, self.size, policy or self.policy)

    def setting(self, seeds=(0,), *, steps=3, guidance=None, first=None, solver=solvers.unipc):
        batch, space = len(seeds), self.shape[1:]
        return VideoConditioning(
            solver=solver(steps),
            keys=jnp.stack([jax.random.key(seed) for seed in seeds]),
            first=jnp.zeros((batch, *space)) if first is None else first,
            given=jnp.full(batch, first is not None),
            guidance=None if guidance is None else jnp.float32(guidance),
        )

    def order(self, text, cut=(False,), shot=(0,)):
        shot_rope_offset = 8 * jnp.array(shot, jnp.int32)
        return ChunkInputs(jnp.array(text), jnp.array(cut), shot_rope_offset)

    def words(self, order):
        """The order with keys and values in place of indices, as a stream takes it."""
        text = jax.tree.map(lambda x: jnp.take(x, order.text, axis=1), self.bank)
        return order.replace(text=text)

    def sample(self, orders, setting, *, rows=1, policy=None):
        cache = self.cache(rows, policy)
        return self.sampler.sample(
            self.params, cache, setting, stack_chunk_inputs(orders), self.bank
        )

    def stream(self, orders, setting, *, rows=1):
        words = map(self.words, orders)
        return list(self.sampler.stream(self.params, self.cache(rows), setting, words))


@pytest.fixture(scope="session")
def tiny():
    """A whole pipeline with random weights."""
    return Pipeline(*tiny_parts(), SampleSpec(**TINY))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The same parts in a checkpoint directory."""
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
