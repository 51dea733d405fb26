"""The loss of an adapter: equal to that of merged matrices, and the same under remat."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.layout import full_history
from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.quant.frozen import freeze
from longlive_jax.quant.lora import LoRASpec, init_adapter, merge_adapter
from longlive_jax.quant.policy import named
from longlive_jax.training.objectives.adapted import AdaptedLoss, adapted_for_loss
from longlive_jax.training.objectives.batch import ARLossSpec, TeacherForcingBatch
from longlive_jax.training.objectives.teacher_forcing import ARSetup, TeacherForcingLoss
from tests.tiny import activate_outputs

CFG = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
CHUNKS, FRAMES = 2, 2
SPEC = LoRASpec(rank=4, alpha=2)
KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def params():
    return activate_outputs(params_of(DiT(CFG, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def adapter(params):
    """An adapter whose second factors are not zero."""
    new = init_adapter(jax.random.key(1), params, SPEC)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), new)


@pytest.fixture(scope="module")
def batch():
    context, target = jax.random.normal(jax.random.key(3), (2, 1, CHUNKS * FRAMES, 4, 4, 4))
    columns = {k: jnp.tile(x, 2)[None] for k, x in full_history(CHUNKS).items()}
    columns["start"] = FRAMES * columns["chunk_index"]
    columns["prompt"] = columns["chunk_index"] % 2
    return TeacherForcingBatch(context, target, jnp.ones(target.shape[:2]), **columns)


def loss_of(dtype="float32", **settings):
    """The loss of complete parameters."""
    model = DiTConfig(**{**vars(CFG), "dtype": jnp.dtype(dtype)})
    graphdef, _ = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
    setup = ARSetup(graphdef, FRAMES, 2, ARLossSpec(text_dropout=0.0), **settings)
    text = jax.random.normal(jax.random.key(2), (3, CFG.text_len, CFG.text_dim))
    return TeacherForcingLoss(setup, lambda batch: (batch, text))


def value_and_grad(loss, spec, base, adapter, batch):
    """Loss of the adapter, and its gradient."""
    adapted = AdaptedLoss(loss, spec, "base")
    frozen = {"base": base}
    function = jax.value_and_grad(lambda a: adapted(a, batch, KEY, (), frozen)[0])
    return jax.jit(function)(adapter)


@pytest.fixture(scope="module")
def exact(params, adapter, batch):
    """Loss and gradient over the float32 model."""
    return value_and_grad(loss_of(), SPEC, params, adapter, batch)


def test_unmerged_equals_merged_in_loss_and_gradient(params, adapter, batch, exact):
    loss = loss_of()

    @jax.jit
    @jax.value_and_grad
    def merged(adapter):
        return loss(merge_adapter(params, adapter, SPEC.scale), batch, KEY)[0]

    value, grads = merged(adapter)
    np.testing.assert_allclose(exact[0], value, rtol=1e-5)
    chex.assert_trees_all_close(exact[1], grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "nvfp4_frozen"])
def test_dropout_is_the_same_in_the_recomputation_of_a_layer(params, adapter, batch, exact, policy):
    spec = LoRASpec(rank=4, alpha=2, dropout=0.3)
    base = freeze(params, named(policy), gradient=True)
    first, again = (
        value_and_grad(loss_of(remat=remat), spec, base, adapter, batch)
        for remat in ("none", "everything")
    )
    chex.assert_trees_all_close(first, again, rtol=1e-4, atol=1e-6)
    assert abs(first[0] - exact[0]) > 1e-4


@pytest.mark.parametrize("policy", ["none", "fp8", "nvfp4_frozen"])
def test_gradients_over_rounded_models_are_float32_and_close(params, adapter, batch, exact, policy):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    base = freeze(half, named(policy), gradient=True)
    _, grads = value_and_grad(loss_of("bfloat16"), SPEC, base, adapter, batch)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    got, want = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (grads, exact[1])
    )
    cosine = jnp.vdot(got, want) / jnp.linalg.norm(got) / jnp.linalg.norm(want)
    assert cosine > {"none": 0.999, "fp8": 0.99, "nvfp4_frozen": 0.9}[policy]


def test_dropout_and_rounding_depend_on_the_key_alone(params, adapter):
    base = freeze(params, named("nvfp4_frozen"), gradient=True)
    keys = functools.partial(adapted_for_loss, base, adapter, LoRASpec(rank=4, dropout=0.3))
    first, same, other = (
        jax.tree.leaves(
            jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None, p)
        )
        for p in (keys(KEY), keys(KEY), keys(jax.random.key(5)))
    )
    assert len(first) == 20  # of 10 linears, for rounding and for dropout
    for a, b, c in zip(first, same, other, strict=True):
        assert jnp.all(a == b) and not jnp.any(a == c)
