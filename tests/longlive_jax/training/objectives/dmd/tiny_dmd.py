"""A tiny student, teacher and critic, and both losses of their distillation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.quant.lora import LoRASpec, init_adapter
from longlive_jax.training.objectives.dmd.draws import PromptBatch, RolloutSpec, ScoreSpec
from longlive_jax.training.objectives.dmd.losses import DMDSetup, critic_loss, generator_loss
from longlive_jax.training.objectives.dmd.roles import (
    CRITIC,
    CRITIC_BACKBONE,
    GENERATOR,
    STUDENT_BACKBONE,
    TEACHER,
    CriticLoss,
    GeneratorLoss,
)
from longlive_jax.training.objectives.teacher_forcing import self_attention
from tests.tiny import activate_outputs

CFG = DiTConfig(
    dim=64, ffn_dim=64, freq_dim=16, text_dim=8, text_len=3, heads=4, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
CHUNKS, CHUNK, SIZE, PROMPTS = 4, 4, (4, 4, 4), 5
ROLLOUT = RolloutSpec(steps=2, chunks=CHUNKS, window=3, exit="last")
LORA = LoRASpec(rank=4)
GRAPHDEF = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[0]


def weights(seed: int):
    """A model's parameters."""
    return activate_outputs(params_of(DiT(CFG, rngs=nnx.Rngs(seed))))


def adapter(seed: int):
    """An adapter that changes the model."""
    new = init_adapter(jax.random.key(seed), abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[1], LORA)
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(seed), x.shape), new)


def setup(rollout=ROLLOUT, scores=ScoreSpec(), **options) -> DMDSetup:  # noqa: B008
    return DMDSetup(GRAPHDEF, SIZE, CHUNK, rollout, scores, self_attention, options=options)


def videos(batch: int, *, image: bool = False) -> dict[str, jax.Array]:
    """Arrays of a batch: every chunk has a prompt of its own, and samples cut at different ones."""
    prompt = jnp.arange(batch * CHUNKS).reshape(batch, CHUNKS) % (PROMPTS - 1)
    cut = np.zeros((batch, CHUNKS), bool)
    for i in range(batch):
        cut[i, 1 + i % (CHUNKS - 1)] = True
    arrays = {"prompt": prompt, "cut": jnp.asarray(cut)}
    if image:
        arrays["first_frame"] = jax.random.normal(jax.random.key(5), (batch, *SIZE))
    return arrays


def text_table() -> jax.Array:
    """Text features of all prompts; the last is the negative one."""
    return jax.random.normal(jax.random.key(2), (PROMPTS, CFG.text_len, CFG.text_dim))


def inputs(arrays):
    return PromptBatch(**arrays), text_table()


def generator(setup: DMDSetup, forward=generator_loss, **more) -> GeneratorLoss:
    return GeneratorLoss(setup, inputs, LORA, forward, **more)


def critic(setup: DMDSetup, forward=critic_loss, **more) -> CriticLoss:
    return CriticLoss(setup, inputs, LORA, forward, **more)


def frozen_roles(pack=lambda params: params):
    """All frozen parameters of both updates; `pack` is applied to the backbones."""
    return {
        STUDENT_BACKBONE: pack(weights(1)),
        CRITIC_BACKBONE: pack(weights(2)),
        TEACHER: pack(weights(3)),
        GENERATOR: adapter(6),
        CRITIC: adapter(7),
    }


def loss_and_gradient(loss, frozen, batch):
    """((loss, metrics), gradient of the trained adapter) of a `GeneratorLoss` or `CriticLoss`."""
    own = GENERATOR if isinstance(loss, GeneratorLoss) else CRITIC
    others = {k: x for k, x in frozen.items() if k != own}

    @jax.jit
    def compute(params, others, batch):
        def of(params):
            value, (metrics, _) = loss(params, batch, jax.random.key(9), (), others)
            return value, metrics

        return jax.value_and_grad(of, has_aux=True)(params)

    return compute(frozen[own], others, batch)


def relative_error(got, want) -> float:
    """Relative error in the Euclidean norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
