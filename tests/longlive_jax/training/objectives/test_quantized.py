"""NVFP4 training: a mesh equals one device, and a run through the command resumes."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import load_component
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import AXES, MeshSpec, make_mesh
from longlive_jax.quant.policy import POLICIES, Format, QuantPolicy, QuantSpec, Recipe, named
from longlive_jax.quant.training import QuantizedTraining
from longlive_jax.small_world.corpus import CORPUS, CorpusSpec, origin_of, save_corpus
from longlive_jax.small_world.windows import EncodedVideos
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    TeacherForcingBatch,
)
from longlive_jax.training.objectives.quantized import quantized
from longlive_jax.training.objectives.sharded import ShardedLoss, sharded_teacher_forcing_loss
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    teacher_forcing_loss,
)
from pallas_kernels.tokens import EMPTY
from tests.tiny import activate_outputs

CFG = DiTConfig(
    dim=128, ffn_dim=128, freq_dim=16, text_dim=8, text_len=16, heads=4, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
CHUNK, CHUNKS, BATCH, PROMPTS = 1, 4, 2, 3
NEAREST = QuantPolicy(
    "nearest",
    (
        (
            r"blocks/(ffn/(up|down)|cross_attn/k)/kernel",
            Format(weights="static_6", tile=16, recipe=Recipe(stochastic=None)),
        ),
    ),
)
"""Three matrices, to compile less: sharded by outputs, sharded by inputs, and for text rows."""


def init(key):
    return activate_outputs(params_of(DiT(CFG, rngs=nnx.Rngs(key))))


def make_batch() -> TeacherForcingBatch:
    """Frames of 16 tokens, so that groups of 16 contain the same tokens on every mesh."""
    clean = jax.random.normal(jax.random.key(3), (BATCH, CHUNKS * CHUNK, 8, 8, 4))
    chunk = jnp.asarray(np.tile(np.arange(CHUNKS, dtype=np.int32), (BATCH, 2)))
    return TeacherForcingBatch(
        context=clean,
        target=clean,
        mask=jnp.ones((BATCH, CHUNKS * CHUNK)),
        chunk_index=chunk,
        start=chunk * CHUNK,
        window_start=jnp.zeros_like(chunk),
        sink=jnp.full(chunk.shape, EMPTY, jnp.int32),
        prompt=chunk % (PROMPTS - 1),
    )


def prompt_table():
    """Text features of all prompts."""
    return jax.random.normal(jax.random.key(2), (PROMPTS, CFG.text_len, CFG.text_dim))


def make_setup():
    graphdef = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[0]
    return ARSetup(graphdef, CHUNK, PROMPTS - 1, ARLossSpec())


def loss_and_grads(quant, loss_fn, params, batch):
    """(loss, gradients of the float32 masters), and the packed form of a matrix."""

    @jax.jit
    def compute(params, batch):
        quantize_for_loss = quant.prepare(params)

        def loss(params):
            quantized_params = quantize_for_loss(params, jax.random.key(4))
            return loss_fn(quantized_params, batch, jax.random.key(7))[0]

        quantized_params = quantize_for_loss(params, jax.random.key(4))
        packed = quantized_params["blocks"]["ffn"]["up"]["kernel"].packed
        return jax.value_and_grad(loss)(params), packed

    return compute(params, batch)


@functools.cache
def single_device():
    """`loss_and_grads` on one device."""

    def loss(params, batch, key):
        return teacher_forcing_loss(make_setup(), params, batch, key, prompt_table())

    quant = QuantizedTraining(NEAREST)
    return loss_and_grads(quant, loss, init(jax.random.key(1)), make_batch())


def relative_error(got, want) -> float:
    """Relative error in the Euclidean norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_loss_and_gradients_on_a_mesh_equal_one_device():
    """Packed matrices, all-gathered instead of their masters, are equal bit for bit.

    Gradients match up to values on a rounding boundary: the inputs of a quantization differ in
    their last bit between meshes, which can change a code.
    """
    # 1. Loss and gradients on the mesh.
    mesh = make_mesh(MeshSpec(fsdp=2, sp=4), jax.devices()[:8])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    quant = QuantizedTraining(NEAREST, AXES)
    quant.check_shards(specs, params, mesh.shape)
    quantized_specs = quant.specs(specs, params)
    gather = Gather(quantized_specs, dtype=jnp.float32)
    sharded = ShardedLoss(mesh, quantized_specs, gather)

    def loss(params, batch, key):
        setup, text = make_setup(), prompt_table()
        return sharded_teacher_forcing_loss(setup, sharded, params, batch, key, text)

    (value, grads), packed = loss_and_grads(quant, loss, params, make_batch())

    # 2. Compared with one device.
    (want, want_grads), want_packed = single_device()
    assert relative_error(value, want) < 1e-5
    errors = jax.tree.map(relative_error, grads, want_grads)
    assert all(error < 2e-2 for error in jax.tree.leaves(errors)), errors
    assert np.median(jax.tree.leaves(errors)) < 1e-5, errors
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(want_packed), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)


SETTINGS = (
    "model.dim=32", "model.ffn_dim=32", "model.freq_dim=8", "model.heads=2", "model.layers=1",
    "unroll=1", "corpus.videos=8", "corpus.chunks=8",
    "windows.batch=2", "windows.targets=3", "windows.window=3",
    "held_out_batches=1", "loop.steps=8", "loop.log_every=1", "loop.save_every=4",
    "optim.name=adamw", "optim.lr=0.02", "optim.warmup=0", "ema.start=100",
)  # fmt: skip


def train_small_world(folder, capsys, *changes):
    """Runs the stage `ar` by the command; losses by step, and the output."""
    out, workdir = folder / "checkpoint", folder / "work"
    if not out.exists():
        shutil.copytree(builtin_checkpoint(), out)
        workdir.mkdir()
        videos, chunks = 8, 8
        channels = np.random.default_rng(0).normal(size=16)  # one image only, quick to learn
        latents = np.broadcast_to(channels, (videos, 4 * chunks, 4, 4, 16))
        rows = np.zeros((videos, chunks), np.int32)
        origin = origin_of(CorpusSpec(videos, chunks, (2, 8)), 0, out)
        save_corpus(workdir / CORPUS, EncodedVideos(latents.astype("f4"), rows, rows), origin)
    overrides = [f"--config.{change}" for change in (*SETTINGS, *changes)]
    paths = [f"--workdir={workdir}", f"--out={out}"]
    assert run(["train", "--config=configs/small_world.py:ar", *overrides, *paths]) == 0
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in lines if "loss" in r}, capsys.readouterr().out


def test_the_small_world_trains_in_nvfp4_and_resumes_bit_for_bit(tmp_path, capsys, monkeypatch):
    # 1. A policy with few matrices, to compile less.
    nvfp4 = named("nvfp4_train").rules[0][1]
    few = QuantPolicy("few", ((r"blocks/(ffn/(up|down)|self_attn/o)/kernel", nvfp4),))
    monkeypatch.setitem(POLICIES, "few", few)
    folder, policy = tmp_path / "nvfp4", "quant.policy=few"
    losses, output = train_small_world(folder, capsys, policy)
    assert "few: 3 of 17 matrices" in output and "computed by xla" in output
    uninterrupted, _ = load_component(folder / "checkpoint", "dit")

    # 2. Without its last checkpoint the run resumes from step 4, and ends with the same numbers.
    shutil.rmtree(next((folder / "work").rglob("8")))
    resumed_losses, output = train_small_world(folder, capsys, policy)
    assert "Resumed from step 4" in output and resumed_losses == losses
    resumed, _ = load_component(folder / "checkpoint", "dit")
    for a, b in zip(jax.tree.leaves(uninterrupted), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)

    # 3. The losses are close to, but not equal to, those without quantization.
    plain, _ = train_small_world(tmp_path / "plain", capsys)
    assert plain[8] < 0.8 * plain[1]
    assert max(abs(losses[i] - plain[i]) for i in plain) < 0.05 * plain[1]
    assert any(losses[i] != plain[i] for i in plain)


@pytest.mark.parametrize(
    ("policy", "rows", "sizes", "message"),
    [
        ("nvfp4", {}, (1, 1, 1), "config.quant.policy nvfp4 is for inference; 'nvfp4_train'"),
        ("nvfp4_frozen", {}, (1, 1, 1), "nvfp4_frozen freezes its matrices; 'nvfp4_train'"),
        ("nvfp4_train", {"tokens": 96}, (1, 1, 4), "96 tokens of a sample over mesh.sp = 4"),
        ("nvfp4_train", {}, (1, 4, 4), "128 over 16 devices must be a multiple of 16 each"),
    ],
)
def test_settings_that_do_not_fit_are_refused(policy, rows, sizes, message):
    mesh = AbstractMesh(sizes, AXES)
    shapes = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[1]
    specs = rules.specs_for(rules.DIT, shapes)
    with pytest.raises(UserError) as caught:
        quantized(QuantSpec(policy), shapes, specs, mesh, rows)
    assert message in str(caught.value)
