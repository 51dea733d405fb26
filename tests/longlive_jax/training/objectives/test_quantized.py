"""Training in NVFP4 over a mesh and through the trainer: one result, whatever the mesh."""

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
            Format(weights="static_6", tile=16, recipe=Recipe(stochastic=False)),
        ),
    ),
)
"""One of each kind, to compile less: split by outputs, by inputs, and of the text."""


def init(key):
    return activate_outputs(params_of(DiT(CFG, rngs=nnx.Rngs(key))))


def episode() -> TeacherForcingBatch:
    """Frames of 16 tokens, so that the runs of 16 are the same wherever a frame is."""
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


def table():
    return jax.random.normal(jax.random.key(2), (PROMPTS, CFG.text_len, CFG.text_dim))


def setup_of():
    graphdef = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[0]
    return ARSetup(graphdef, CHUNK, PROMPTS - 1, ARLossSpec())


def measured(quant, loss_of, params, batch):
    """Loss, gradients of the masters, and the packed matrices."""

    @jax.jit
    def found(params, batch):
        dress = quant.prepare(params)

        def loss(params):
            return loss_of(dress(params, jax.random.key(4)), batch, jax.random.key(7))[0]

        packed = dress(params, jax.random.key(4))["blocks"]["ffn"]["up"]["kernel"].packed
        return jax.value_and_grad(loss)(params), packed

    return found(params, batch)


@functools.cache
def alone():
    def loss(params, batch, key):
        return teacher_forcing_loss(setup_of(), params, batch, key, table())

    return measured(QuantizedTraining(NEAREST), loss, init(jax.random.key(1)), episode())


def off(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_loss_and_gradients_are_those_of_one_device():
    """Up to a code that rounds to the other side: what is quantized differs in its last bit. Packed
    matrices, which are the same bit by bit, travel in the place of masters."""
    mesh = make_mesh(MeshSpec(fsdp=2, sp=4), jax.devices()[:8])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    quant = QuantizedTraining(NEAREST, AXES)
    quant.check_parts(specs, params, mesh.shape)
    dressed = quant.specs(specs, params)
    shared = ShardedLoss(mesh, dressed, Gather(dressed, dtype=jnp.float32))

    def loss(params, batch, key):
        return sharded_teacher_forcing_loss(setup_of(), shared, params, batch, key, table())

    (value, grads), packed = measured(quant, loss, params, episode())
    (want, want_grads), want_packed = alone()
    assert off(value, want) < 1e-5
    errors = jax.tree.map(off, grads, want_grads)
    assert all(error < 2e-2 for error in jax.tree.leaves(errors)), errors
    assert np.median(jax.tree.leaves(errors)) < 1e-5, errors
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(want_packed), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for grad, held in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(held.sharding, grad.ndim)


SETTINGS = (
    "model.dim=32", "model.ffn_dim=32", "model.freq_dim=8", "model.heads=2", "model.layers=1",
    "unroll=1", "corpus.videos=8", "corpus.chunks=8",
    "windows.batch=2", "windows.targets=3", "windows.window=3",
    "held_out_batches=1", "loop.steps=8", "loop.log_every=1", "loop.save_every=4",
    "optim.name=adamw", "optim.lr=0.02", "optim.warmup=0", "ema.start=100",
)  # fmt: skip


def trained(folder, capsys, *changes):
    """Losses of the stage `ar` through the command, and what it printed."""
    out, workdir = folder / "checkpoint", folder / "work"
    if not out.exists():
        shutil.copytree(builtin_checkpoint(), out)
        workdir.mkdir()
        videos, chunks = 8, 8
        channels = np.random.default_rng(0).normal(size=16)  # one picture, to be learnt at once
        latents = np.broadcast_to(channels, (videos, 4 * chunks, 4, 4, 16))
        rows = np.zeros((videos, chunks), np.int32)
        origin = origin_of(CorpusSpec(videos, chunks, (2, 8)), 0, out)
        save_corpus(workdir / CORPUS, EncodedVideos(latents.astype("f4"), rows, rows), origin)
    overrides = [f"--config.{change}" for change in (*SETTINGS, *changes)]
    where = [f"--workdir={workdir}", f"--out={out}"]
    assert run(["train", "--config=configs/small_world.py:ar", *overrides, *where]) == 0
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in lines if "loss" in r}, capsys.readouterr().out


def test_the_small_world_trains_in_nvfp4_and_resumes_bit_for_bit(tmp_path, capsys, monkeypatch):
    form = named("nvfp4_train").rules[0][1]
    few = QuantPolicy("few", ((r"blocks/(ffn/(up|down)|self_attn/o)/kernel", form),))
    monkeypatch.setitem(POLICIES, "few", few)  # to compile less
    folder, policy = tmp_path / "nvfp4", "quant.policy=few"
    losses, said = trained(folder, capsys, policy)
    assert "few: 3 of 17 matrices" in said and "computed by xla" in said
    first, _ = load_component(folder / "checkpoint", "dit")
    shutil.rmtree(next((folder / "work").rglob("8")))
    again, said = trained(folder, capsys, policy)
    assert "Resumed from step 4" in said and again == losses
    second, _ = load_component(folder / "checkpoint", "dit")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    plain, _ = trained(tmp_path / "plain", capsys)
    assert plain[8] < 0.8 * plain[1]
    assert max(abs(losses[i] - plain[i]) for i in plain) < 0.05 * plain[1]
    assert any(losses[i] != plain[i] for i in plain)


@pytest.mark.parametrize(
    ("policy", "rows", "sizes", "message"),
    [
        ("nvfp4", {}, (1, 1, 1), "config.quant.policy nvfp4 is for inference; 'nvfp4_train'"),
        ("nvfp4_train", {"tokens": 96}, (1, 1, 4), "96 tokens of a sample over mesh.sp = 4"),
        ("nvfp4_train", {}, (1, 4, 4), "128 over 16 devices are no whole blocks of 16 each"),
    ],
)
def test_what_does_not_fit_is_refused(policy, rows, sizes, message):
    mesh = AbstractMesh(sizes, AXES)
    shapes = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[1]
    specs = rules.specs_for(rules.DIT, shapes)
    with pytest.raises(UserError) as caught:
        quantized(QuantSpec(policy), shapes, specs, mesh, rows)
    assert message in str(caught.value)
