"""Error-recycling steps around a trivial model, on one device or over a mesh, for the tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import BATCH, SP
from longlive_jax.parallel.rules import shardings
from longlive_jax.training.objectives.batch import ARLossSpec, TeacherForcingBatch, draw
from longlive_jax.training.objectives.error_buffer import BufferSpec
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    buffer_specs,
    init_buffers,
    prediction_errors,
    record_errors,
    recycle,
)
from longlive_jax.training.objectives.recycling_draws import draw_recycling
from pallas_kernels.tokens import EMPTY

CHUNK, CHUNKS, BATCH_SIZE, SIZE = 2, 8, 4, (2, 2, 3)
LOSS = ARLossSpec()


def spec_of(**buffer) -> RecyclingSpec:
    """Settings under which every kind of injection happens often."""
    layout = {"rows": CHUNKS, "buckets": 2, "slots": 2, "dtype": "float32"} | buffer
    return RecyclingSpec(
        BufferSpec(**layout), clean=0.3, noise=0.6, latent=0.8, context=0.9, update=0.5, warmup=2
    )


def example_batch(key) -> TeacherForcingBatch:
    clean = jax.random.normal(key, (BATCH_SIZE, CHUNKS * CHUNK, *SIZE))
    chunk = jnp.tile(jnp.arange(CHUNKS), (BATCH_SIZE, 2))
    zeros = jnp.zeros_like(chunk)
    return TeacherForcingBatch(
        context=clean, target=clean, mask=jnp.ones(clean.shape[:2]), chunk_index=chunk,
        start=chunk * CHUNK, window_start=zeros, sink=zeros + EMPTY, prompt=zeros,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def make_inputs(step, loss=LOSS):
    """Batch, draws and recycling draws of a step."""
    key = jax.random.fold_in(jax.random.key(5), step)
    batch = example_batch(key)
    recycling_draws = draw_recycling(jax.random.fold_in(key, 1), BATCH_SIZE, CHUNKS, CHUNKS)
    return batch, draw(key, batch, chunk_frames=CHUNK, spec=loss), recycling_draws


def compiled_with(function, spec, loss=LOSS):
    """`recycle` or `record_errors` with its settings bound, jitted."""
    return jax.jit(functools.partial(function, chunk_frames=CHUNK, spec=spec, loss=loss))


def one_step(spec, loss, buffers, batch, draws, recycling_draws):
    """A recycling step around a model that returns a linear combination of its inputs."""
    options = {"chunk_frames": CHUNK, "spec": spec, "loss": loss}
    used = recycle(recycling_draws, batch, draws, buffers, **options)
    velocity = 0.3 * used.model_batch.target + 0.2 * used.draws.noise - 0.1 * used.draws.context
    errors = prediction_errors(velocity, batch, used)
    return used, record_errors(recycling_draws, errors, batch, used, buffers, **options)


def rollout(spec, mesh=None, steps=6, loss=LOSS):
    """The last step's inputs with errors, and the buffers after it."""
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    out = None if mesh is None else (None, shardings(mesh, buffer_specs(spec)))
    run = jax.jit(functools.partial(one_step, spec, loss), donate_argnums=0, out_shardings=out)
    for step in range(steps):
        inputs = make_inputs(step, loss)
        if mesh is not None:
            inputs = jax.device_put(
                inputs, jax.tree.map(functools.partial(sharding_of, mesh), inputs)
            )
        used, buffers = run(buffers, *inputs)
    return used, buffers


def sharding_of(mesh, x):
    """The sharding of an input in training: samples over data and fsdp, frames over sp."""
    has_frames = x.ndim > 1 and x.shape[1] == CHUNKS * CHUNK
    return NamedSharding(mesh, P(BATCH, SP) if has_frames else P(BATCH))


def assert_all_close(got, want, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
