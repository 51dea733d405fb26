"""Balanced SP: loss and gradients on any mesh equal those of one device."""

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
    self_attention,
    teacher_forcing_loss,
)
from pallas_kernels.attention import api, attention
from pallas_kernels.tokens import EMPTY
from tests.pallas_kernels.fused_kernel import DENSE
from tests.tiny import activate_outputs

CFG = DiTConfig(
    dim=64, ffn_dim=96, freq_dim=16, text_dim=8, text_len=4, heads=8, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
CHUNK, CHUNKS, BATCH, PROMPTS = 2, 8, 8, 6
MESHES = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 8, 1)]


def init(key):
    return activate_outputs(params_of(DiT(CFG, rngs=nnx.Rngs(key))))


def make_batch(prompt_per_chunk: bool) -> TeacherForcingBatch:
    """Full clips, every frame as context and as target; two samples are padded at the end.

    Every chunk has its own prompt, or every sample one for all its chunks.
    """
    keys = jax.random.split(jax.random.key(3), 2)
    clean = jax.random.normal(keys[0], (BATCH, CHUNKS * CHUNK, 4, 4, 4))
    chunk = np.tile(np.arange(CHUNKS, dtype=np.int32), (BATCH, 2))
    mask = np.ones((BATCH, CHUNKS * CHUNK), np.float32)
    mask[1, -3:] = mask[4, -7:] = 0
    prompt = np.asarray(jax.random.randint(keys[1], (BATCH, CHUNKS), 0, PROMPTS - 1))
    prompt = prompt if prompt_per_chunk else np.broadcast_to(prompt[:, :1], prompt.shape)
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


def prompt_table():
    """Text features of all prompts."""
    return jax.random.normal(jax.random.key(2), (PROMPTS, CFG.text_len, CFG.text_dim))


def loss_spec(image_to_video: bool) -> ARLossSpec:
    return ARLossSpec(context_noise=0.2, text_dropout=0.3, image_to_video=image_to_video)


def make_setup(image_to_video, **more):
    graphdef = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[0]
    return ARSetup(
        graphdef, CHUNK, PROMPTS - 1, loss_spec(image_to_video), remat="everything", **more
    )


@functools.cache
def single_device(prompt_per_chunk: bool, image_to_video: bool):
    """Loss, metrics and gradients on one device."""
    setup = make_setup(image_to_video)

    @jax.jit
    def loss_and_grads(params, batch):
        def loss(params):
            return teacher_forcing_loss(setup, params, batch, jax.random.key(7), prompt_table())

        return jax.value_and_grad(loss, has_aux=True)(params)

    return loss_and_grads(init(jax.random.key(1)), make_batch(prompt_per_chunk))


def relative_error(got, want) -> float:
    """Relative error in the Euclidean norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


CASES = [(shape, *options) for shape in MESHES for options in ((True, False), (False, True))]
OTHERS = [((1, 1, 4), True, True), ((2, 2, 2), False, False)]


@pytest.mark.parametrize(
    ("shape", "prompt_per_chunk", "image_to_video"), [*CASES, *OTHERS], ids=str
)
def test_balanced_loss_and_gradients_equal_one_device(shape, prompt_per_chunk, image_to_video):
    """The gradients also get the sharding of the parameters, without a constraint."""
    # 1. Unlike the single device: two FFN chunks and, for images, a prompt table per sample.
    spec = MeshSpec(*shape)
    mesh = make_mesh(spec, jax.devices()[: spec.size])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    setup, text = make_setup(image_to_video, ffn_chunks=2), prompt_table()
    if image_to_video:
        text = jnp.broadcast_to(text, (BATCH, *text.shape))

    @jax.jit
    def loss_and_grads(params, batch):
        def loss(params):
            key = jax.random.key(7)
            return sharded_teacher_forcing_loss(
                setup, ShardedLoss(mesh, specs), params, batch, key, text
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    # 2. Loss, metrics and gradients.
    (loss, metrics), grads = loss_and_grads(params, make_batch(prompt_per_chunk))
    (want_loss, want_metrics), want_grads = single_device(prompt_per_chunk, image_to_video)
    assert relative_error(loss, want_loss) < 1e-5
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    errors = jax.tree.map(relative_error, grads, want_grads)
    assert all(error < 1e-4 for error in jax.tree.leaves(errors)), errors
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)


@pytest.fixture
def fused(monkeypatch):
    """Attention chosen automatically is cuDNN's, in plain operations; segments are counted."""
    monkeypatch.setattr(api.cudnn, "refusal", lambda *_: None)
    monkeypatch.setattr(api, "CUDNN", DENSE)
    seen = []
    original = api.attend_batched

    def attend(kernel, pieces, q, k, v):
        seen.append(len(pieces))
        return original(kernel, pieces, q, k, v)

    monkeypatch.setattr(api, "attend_batched", attend)
    return seen


def without_text_mask(q, k, v, *_):
    return attention(q, k, v, implementation="reference")


@pytest.mark.parametrize("sp", [1, 2, 4, 8])
def test_static_columns_in_balanced_order_equal_the_traced_mask(sp, fused):
    """Fused attention over segments, against masks from the columns of the batch."""
    # 1. Loss and gradients of a full-history setup over the mesh.
    mesh = make_mesh(MeshSpec(sp=sp), jax.devices()[:sp])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    setup = make_setup(False, full_history=True, attend_text=without_text_mask)

    @jax.jit
    def loss_and_grads(params, batch):
        def loss(params):
            return sharded_teacher_forcing_loss(
                setup, ShardedLoss(mesh, specs), params, batch, jax.random.key(7), prompt_table()
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, _), grads = loss_and_grads(params, make_batch(True))
    assert set(fused) == {2 * CHUNKS}

    # 2. The same with the mask of every token, on one device.
    (want, _), want_grads = masked_reference()
    assert relative_error(loss, want) < 1e-5
    errors = jax.tree.map(relative_error, grads, want_grads)
    assert all(error < 1e-4 for error in jax.tree.leaves(errors)), errors


@functools.cache
def masked_reference():
    """Loss and gradients with reference attention on one device."""
    attend = functools.partial(self_attention, implementation="reference")
    setup = make_setup(False, attention_for=attend, attend_text=without_text_mask)

    def loss(params, batch):
        return teacher_forcing_loss(setup, params, batch, jax.random.key(7), prompt_table())

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return gradient(init(jax.random.key(1)), make_batch(True))


def test_contiguous_sp_gives_the_same_loss_and_is_unbalanced():
    mesh = make_mesh(MeshSpec(sp=4), jax.devices()[:4])
    params, specs = rules.init_sharded(init, jax.random.key(1), mesh, rules.DIT)
    sharded, batch = ShardedLoss(mesh, specs, layout=CONTIGUOUS), make_batch(prompt_per_chunk=True)

    # 1. The loss is that of one device.
    @jax.jit
    def loss_fn(params):
        return sharded_teacher_forcing_loss(
            make_setup(False), sharded, params, batch, jax.random.key(7), prompt_table()
        )

    loss, metrics = loss_fn(params)
    (want, want_metrics), _ = single_device(True, False)
    assert relative_error(loss, want) < 1e-5
    assert relative_error(metrics["velocity_error"], want_metrics["velocity_error"]) < 1e-5

    # 2. Only the second half of the devices has frames in the loss.
    sequence, _ = contiguous_layout(
        batch, draw(jax.random.key(7), batch, chunk_frames=CHUNK, spec=loss_spec(False))
    )
    loss_frames = sequence.mask.sum(0).reshape(4, -1).sum(1)
    assert loss_frames[0] == loss_frames[1] == 0 and min(loss_frames[2:]) > 0


def test_chunks_that_do_not_divide_over_sp_are_refused():
    batch = make_batch(prompt_per_chunk=True)
    with pytest.raises(ValueError, match=r"8 context chunks do not divide over mesh\.sp = 3"):
        balanced(batch, 3)
