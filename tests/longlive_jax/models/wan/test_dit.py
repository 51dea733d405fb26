"""Identities that hold for any weights."""

import dataclasses
from functools import partial

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

from longlive_jax.bench.timing import Compilations
from longlive_jax.layout import grid, teacher_forcing
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.variants import variant
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.models.wan.attention import Cache
from longlive_jax.models.wan.layer_kv import DenseLayerKV
from longlive_jax.models.wan.layers import affine, round_like_reference
from pallas_kernels.tokens import Tokens, make

SMALL = DiTConfig(
    dim=32,
    ffn_dim=48,
    freq_dim=16,
    text_dim=8,
    text_len=5,
    heads=2,
    layers=3,
    in_channels=4,
    out_channels=4,
)
FRAMES, ROWS, COLUMNS, CHUNK = 6, 2, 3, 2
CHUNKS = FRAMES // CHUNK


def randomised(cfg=SMALL, seed=0):
    """A model whose zero-initialised parameters are not zero."""
    dit = DiT(cfg, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def noisy(x):
        return jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype)

    return nnx.graphdef(dit), jax.tree.map(noisy, params_of(dit))


@pytest.fixture(scope="module")
def model():
    return randomised()


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(7), 4)
    shape = (2, FRAMES, 2 * ROWS, 2 * COLUMNS, 4)
    return {
        "clean": jax.random.normal(keys[0], shape),
        "noisy": jax.random.normal(keys[1], shape),
        "text": jax.random.normal(keys[2], (2, CHUNKS, 4, 8)),
        "time": 1000 * jax.random.uniform(keys[3], (2, FRAMES)),
    }


def run(model, latents, times, text, tokens, cache=None, **flags):
    """The model on text features, in one compiled call."""

    @jax.jit
    def call(params, latents, times, text, cache):
        dit = with_params(model[0], params)
        return dit(latents, times, dit.text_kv(text), tokens, cache, **flags)

    return call(model[1], latents, times, text, cache)


def forced(model, params, batch, *, embed="text_kv", **flags):
    """Velocity of the noisy half under teacher forcing, and every layer's keys and values."""
    dit = with_params(model[0], params)
    latents = jnp.concatenate([batch["clean"], batch["noisy"]], axis=1)
    times = jnp.concatenate([jnp.zeros_like(batch["time"]), batch["time"]], axis=1)
    tokens = teacher_forcing(FRAMES, ROWS, COLUMNS, chunk_frames=CHUNK)
    text = getattr(dit, embed)(batch["text"], streams=2)
    return dit(latents, times, text, tokens, noisy_from=FRAMES, **flags)


@struct.dataclass
class Slots:
    """A cache built by hand, with only what `DiT` needs."""

    k: jax.Array
    v: jax.Array
    cached: Tokens

    @property
    def layer_kv(self):
        return DenseLayerKV(self.k, self.v)

    def tokens(self, queries, /):
        return self.cached


def chunk_of(x, i):
    return x[:, i * CHUNK : (i + 1) * CHUNK]


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_cached_equals_masked(model, batch, relative):
    want, _ = jax.jit(lambda params: forced(model, params, batch))(model[1])
    stored_k, stored_v, cached = [], [], []
    for i in range(CHUNKS):
        text = batch["text"][:, i : i + 1]
        noisy, clean = (
            grid(CHUNK, ROWS, COLUMNS, chunk_frames=CHUNK, start=i * CHUNK, noisy=n)
            for n in (True, False)
        )
        cache = None
        if i:
            chunk = np.concatenate([t.chunk_index for t in cached])
            # An empty slot must not matter.
            pad = [jnp.full_like(x[0], 9.0) for x in (stored_k, stored_v)]
            k, v = jnp.stack([*stored_k, pad[0]], 2), jnp.stack([*stored_v, pad[1]], 2)
            pos = np.concatenate([*(t.pos for t in cached), noisy.pos])
            empty = np.full(len(noisy), -1)
            cache = Slots(k, v, make(pos, np.concatenate([chunk, empty]), False))
            assert isinstance(cache, Cache)
        flags = {"relative_rope": relative}
        noise = chunk_of(batch["noisy"], i), chunk_of(batch["time"], i), text, noisy, cache
        got, _ = run(model, *noise, **flags)
        chex.assert_trees_all_close(got, chunk_of(want, i), rtol=1e-4, atol=1e-5)
        context = chunk_of(batch["clean"], i), jnp.zeros((2, CHUNK)), text, clean, cache
        nothing, (k, v) = run(model, *context, output=False, **flags)
        velocity, kv = run(model, *context, return_kv=True, **flags)
        assert nothing is None and velocity is not None
        chex.assert_trees_all_close((k, v), kv, rtol=1e-5, atol=1e-5)
        stored_k.append(k)
        stored_v.append(v)
        cached.append(clean)


def test_rematerialised_and_unrolled_layers_and_text_kv_within_them_change_nothing(model, batch):
    def loss(params, **flags):
        velocity, _ = forced(model, params, batch, **flags)
        return jnp.mean(velocity**2)

    want = jax.jit(jax.value_and_grad(loss))(model[1])
    for flags in ({"remat": "everything", "embed": "embed_text"}, {"unroll": 3}):
        got = jax.jit(jax.value_and_grad(lambda p, flags=flags: loss(p, **flags)))(model[1])
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_timesteps_per_frame_equal_timesteps_per_token(model, batch):
    tokens = grid(FRAMES, ROWS, COLUMNS, chunk_frames=FRAMES)
    want, _ = run(model, batch["noisy"], batch["time"], batch["text"], tokens)
    each = jnp.repeat(batch["time"], ROWS * COLUMNS, axis=1)
    got, _ = run(model, batch["noisy"], each, batch["text"], tokens)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_each_segment_of_frames_attends_its_own_prompt(model, batch):
    """Noisy chunks do not attend each other, so a chunk alone with its prompt is the same."""
    tokens = grid(FRAMES, ROWS, COLUMNS, chunk_frames=CHUNK, noisy=True)
    got, _ = run(model, batch["noisy"], batch["time"], batch["text"], tokens)
    for i in range(CHUNKS):
        own = grid(CHUNK, ROWS, COLUMNS, chunk_frames=CHUNK, start=i * CHUNK, noisy=True)
        alone = chunk_of(batch["noisy"], i), chunk_of(batch["time"], i)
        want, _ = run(model, *alone, batch["text"][:, i : i + 1], own)
        chex.assert_trees_all_close(chunk_of(got, i), want, rtol=1e-4, atol=1e-5)


def test_text_is_padded_with_zero_rows(model, batch):
    dit = with_params(*model)
    padded = jnp.pad(batch["text"], ((0, 0), (0, 0), (0, 1), (0, 0)))
    text_kv = jax.jit(dit.text_kv)
    chex.assert_trees_all_equal(text_kv(batch["text"]), text_kv(padded))
    with pytest.raises(ValueError, match="must be <= 5, got 6"):
        dit.text_kv(jnp.zeros((1, 1, 6, 8)))


def test_bfloat16_is_close_and_reference_rounding_rounds_to_bfloat16(model, batch):
    def result(graphdef):
        call = jax.jit(lambda params: forced((graphdef,), params, batch, return_kv=True))
        return call(model[1])

    want, _ = result(model[0])
    for settings in ({}, {"reference_bf16": True}):
        cfg = dataclasses.replace(SMALL, dtype=jnp.bfloat16, **settings)
        graphdef, _ = abstract(lambda cfg=cfg: DiT(cfg, rngs=nnx.Rngs(0)))
        got, kv = result(graphdef)
        assert got.dtype == jnp.float32 and kv[0].dtype == jnp.bfloat16
        assert 1e-4 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.05
    x = jnp.linspace(0, 1, 97)
    rounded = jax.jit(lambda x: round_like_reference(x, cfg))(x)
    chex.assert_trees_all_equal(rounded, x.astype(jnp.bfloat16).astype(jnp.float32))
    assert jnp.any(rounded != round_like_reference(x, SMALL))


def test_a_bfloat16_stream_is_rounded_between_layers_only(model, batch):
    """It changes nothing under the reference's rounding, and less than that without it; gradients
    differ from those of the float32 stream by the rounding."""
    half = {"stream_dtype": jnp.bfloat16}

    def loss(graphdef, params):
        velocity, _ = forced((graphdef,), params, batch, remat="everything")
        return (velocity**2).mean(), velocity

    def result(call, **settings):
        cfg = dataclasses.replace(SMALL, **settings)
        graphdef, _ = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
        return jax.jit(lambda params: call(graphdef, params))(model[1])

    def error(a, b):
        a, b = (jax.flatten_util.ravel_pytree(x)[0] for x in (a, b))
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    rounded = {"dtype": jnp.bfloat16, "reference_bf16": True}
    (_, reference), (_, halved) = result(loss, **rounded), result(loss, **rounded, **half)
    chex.assert_trees_all_equal(halved, reference)
    gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)
    ((_, want), want_grad), ((_, got), got_grad) = result(gradient), result(gradient, **half)
    assert 1e-5 < error(got, want) < error(reference, want)
    assert 1e-5 < error(got_grad, want_grad) < 2e-2


def test_a_new_model_predicts_nothing():
    dit = DiT(SMALL, rngs=nnx.Rngs(0))
    inputs = jnp.ones((1, 2, 4, 6, 4)), jnp.full((1, 2), 500.0), jnp.ones((1, 1, 5, 8))
    new = nnx.graphdef(dit), params_of(dit)
    velocity, _ = run(new, *inputs, grid(2, 2, 3, chunk_frames=2))
    chex.assert_trees_all_equal(velocity, jnp.zeros_like(velocity))


def test_one_compilation_for_every_chunk_start(model, batch):
    @jax.jit
    def velocity(start):
        dit = with_params(*model)
        tokens = grid(CHUNK, ROWS, COLUMNS, chunk_frames=CHUNK, start=start, noisy=True)
        text = dit.text_kv(batch["text"][:, :1])
        return dit(chunk_of(batch["noisy"], 0), chunk_of(batch["time"], 0), text, tokens)[0]

    with Compilations() as compiled:
        near, far = velocity(jnp.int32(0)), velocity(jnp.int32(1_000_000))
    chex.assert_trees_all_close(near, far, rtol=1e-4, atol=1e-5)
    assert compiled.counts["velocity"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": (1, 2, 3, 6, 4)}, "must be even"),
        ({"latents": (1, 2, 4, 6, 5)}, "model of 4 channels"),
        ({"timestep": (1, 5)}, "5 timesteps for 2 frames of 12 tokens"),
        ({"frames": 3}, "tokens describe 18 patches, latents have 12"),
        ({"prompts": 3}, "do not split into 3 segments"),
    ],
)
def test_invalid_arguments_are_explained(model, change, message):
    latents = jnp.zeros(change.get("latents", (1, 2, 4, 6, 4)))
    timestep = jnp.zeros(change.get("timestep", (1, 2)))
    text = jnp.zeros((1, change.get("prompts", 1), 5, 8))
    frames = change.get("frames", 2)
    with pytest.raises(ValueError, match=message):
        run(model, latents, timestep, text, grid(frames, 2, 3, chunk_frames=frames))


def test_invalid_configurations_are_explained():
    for settings, message in (
        ({"heads": 5}, "does not split over 5 heads"),
        ({"heads": 32}, "is odd"),
        ({"freq_dim": 15}, "freq_dim 15 is odd"),
        ({"reference_bf16": True}, "needs dtype bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **settings)


def test_a_5b_step_lowers_without_weights():
    """1280x704 in chunks of 8 frames against a window of 4 chunks, nothing allocated."""
    cfg = dataclasses.replace(
        variant("wan2_2_ti2v_5b")["dit"], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    graphdef, params = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    frames, rows, columns, slots = 8, 22, 40, 3
    length = frames * rows * columns

    # 1. Shapes of the arguments.
    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    kv = like(cfg.layers, 1, slots, length, cfg.heads, cfg.head_dim)
    cached = jax.eval_shape(
        lambda: make(jnp.zeros((1, slots * length, 3), jnp.int32), jnp.int32(0), False)
    )

    # 2. The call.
    def step(params, latents, timestep, text, cache, start):
        dit = with_params(graphdef, params)
        tokens = grid(frames, rows, columns, chunk_frames=frames, start=start, noisy=True)
        velocity, _ = dit(latents, timestep, dit.text_kv(text), tokens, cache)
        return velocity

    arguments = (
        params,
        like(1, frames, 2 * rows, 2 * columns, 48),
        like(1, frames, dtype=jnp.float32),
        like(1, 1, cfg.text_len, cfg.text_dim),
        Slots(kv, kv, cached),
        like(dtype=jnp.int32),
    )
    lowered = jax.jit(step).lower(*arguments)
    assert lowered.out_info.shape == (1, frames, 2 * rows, 2 * columns, 48)


@partial(jax.tree_util.register_dataclass, data_fields=["half", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Halved:
    """A kernel stored as its half, which computes its own product."""

    half: jax.Array
    scale: jax.Array

    def product(self, x, bias):
        return affine(x, self.half * self.scale, bias)


def test_a_kernel_may_compute_its_own_product(model, batch):
    graphdef, params = model
    params = jax.tree.map(lambda leaf: leaf, params)
    tokens = grid(FRAMES, ROWS, COLUMNS, chunk_frames=CHUNK, noisy=True)
    inputs = batch["noisy"], batch["time"], batch["text"], tokens
    plain = run(model, *inputs)
    for module, name in (("self_attn", "q"), ("cross_attn", "v"), ("ffn", "down")):
        linear = params["blocks"][module][name]
        linear["kernel"] = Halved(linear["kernel"] / 2, jnp.full(SMALL.layers, 2.0))
    chex.assert_trees_all_equal(plain, run((graphdef, params), *inputs))
