"""Balanced SP: one loss and one gradient, whatever the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.bench.contiguous_sp import CONTIGUOUS, contiguous_layout
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    TeacherForcingBatch,
    draw,
)
from longlive_jax.training.objectives.sharded import (
    ShardedLoss,
    balanced,
    sharded_teacher_forcing_loss,
)
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    teacher_forcing_loss,
)
from pallas_kernels.tokens import EMPTY
from tests.tiny import activate_outputs

CFG = DiTConfig(
    dim=64, ffn_dim=96, freq_dim=16, text_dim=8, text_len=4, heads=8, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
CHUNK, CHUNKS, BATCH, PROMPTS = 2, 8, 8, 6
MESHES = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 8, 1)]


def init(key):
    return activate_outputs(params_of(DiT(CFG, rngs=nnx.Rngs(key))))


def episode(per_chunk: bool) -> TeacherForcingBatch:
    """Whole videos: every frame as context and as target; some padded at the end."""
    keys = jax.random.split(jax.random.key(3), 2)
    clean = jax.random.normal(keys[0], (BATCH, CHUNKS * CHUNK, 4, 4, 4))
    chunk = np.tile(np.arange(CHUNKS, dtype=np.int32), (BATCH, 2))
    mask = np.ones((BATCH, CHUNKS * CHUNK), np.float32)
    mask[1, -3:] = mask[4, -7:] = 0
    prompt = np.asarray(jax.random.randint(keys[1], (BATCH, CHUNKS), 0, PROMPTS - 1))
    prompt = prompt if per_chunk else np.broadcast_to(prompt[:, :1], prompt.shape)
    return TeacherForcingBatch(
        context=clean,
        target=clean,
        mask=jnp.asarray(mask),
        chunk_index=jnp.asarray(chunk),
        start=jnp.asarray(chunk * CHUNK + 5 * (chunk > 2)),
        window_start=jnp.zeros_like(jnp.asarray(chunk)),
        sink=jnp.full(chunk.shape, EMPTY, jnp.int32),
        prompt=jnp.asarray(np.tile(prompt, (1, 2)), jnp.int32),
    )


def table():
    return jax.random.normal(jax.random.key(2), (PROMPTS, CFG.text_len, CFG.text_dim))


def setup_of(image, **more):
    graphdef = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[0]
    return ARSetup(graphdef, CHUNK, PROMPTS - 1, loss_spec(image), remat=True, **more)


@functools.cache
def alone(per_chunk: bool, image: bool):
    """Loss, metrics and gradients on one device."""
    setup = setup_of(image)

    @jax.jit
    def measured(params, batch):
        def loss(params):
            return teacher_forcing_loss(setup, params, batch, jax.random.key(7), table())

        return jax.value_and_grad(loss, has_aux=True)(params)

    return measured(init(jax.random.key(1)), episode(per_chunk))


def loss_spec(image: bool) -> ARLossSpec:
    return ARLossSpec(context_noise=0.2, text_dropout=0.3, image_to_video=image)


def off(got, want) -> float:
    """Relative error in the Euclidean norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


CASES = [(shape, *kinds) for shape in MESHES for kinds in ((True, False), (False, True))]
OTHERS = [((1, 1, 4), True, True), ((2, 2, 2), False, False)]


@pytest.mark.parametrize(("shape", "per_chunk", "image"), [*CASES, *OTHERS], ids=str)
def test_balanced_loss_and_gradients_equal_one_device(shape, per_chunk, image):
    """And the gradients are split as the parameters are, without being told to."""
    spec = MeshSpec(*shape)
    mesh = make_mesh(spec, jax.devices()[: spec.size])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    # In two parts, with each sample's own table of prompts, where the other has neither.
    setup = setup_of(image, ffn_chunks=2)
    text = jnp.broadcast_to(table(), (BATCH, *table().shape)) if image else table()

    @jax.jit
    def measured(params, batch):
        def loss(params):
            key = jax.random.key(7)
            return sharded_teacher_forcing_loss(
                setup, ShardedLoss(mesh, specs), params, batch, key, text
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, metrics), grads = measured(params, episode(per_chunk))
    (want_loss, want_metrics), want = alone(per_chunk, image)
    assert off(loss, want_loss) < 1e-5
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    errors = jax.tree.map(off, grads, want)
    assert all(error < 1e-4 for error in jax.tree.leaves(errors)), errors
    for grad, held in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(held.sharding, grad.ndim)


def test_the_naive_order_gives_the_same_and_is_unbalanced():
    mesh = make_mesh(MeshSpec(sp=4), jax.devices()[:4])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    shared, batch = ShardedLoss(mesh, specs, layout=CONTIGUOUS), episode(per_chunk=True)

    @jax.jit
    def measured(params):
        return sharded_teacher_forcing_loss(
            setup_of(False), shared, params, batch, jax.random.key(7), table()
        )

    loss, metrics = measured(params)
    (want, want_metrics), _ = alone(True, False)
    assert off(loss, want) < 1e-5
    assert off(metrics["velocity_error"], want_metrics["velocity_error"]) < 1e-5
    line, _ = contiguous_layout(
        batch, draw(jax.random.key(7), batch, chunk_frames=CHUNK, spec=loss_spec(False))
    )
    learnt = line.mask.sum(0).reshape(4, -1).sum(1)
    assert learnt[0] == learnt[1] == 0 and min(learnt[2:]) > 0


def test_chunks_that_do_not_split_are_refused():
    batch = episode(per_chunk=True)
    with pytest.raises(ValueError, match=r"8 context chunks do not divide over mesh\.sp = 3"):
        balanced(batch, 3)
