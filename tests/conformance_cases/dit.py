"""The DiT in its training modes: bidirectional, teacher-forced, block-causal."""

import functools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.rows import CLOSE, Case, compared
from longlive_jax import layout


def bidirectional(golden: Golden) -> Sequence[Case]:
    """One timestep per token, and one per video."""
    model, x = golden.dit, golden.frames("x", 1)
    b, frames, height, width, _ = x.shape
    tokens = layout.grid(frames, height // 2, width // 2, chunk_frames=frames)
    context = _cleared(golden)

    @jax.jit
    def velocity(params, timestep):
        dit = model.around(params)
        return dit(x, timestep, dit.text_kv(context[:, None]), tokens)[0]

    timesteps = {
        "y": jnp.asarray(golden["t_tokens"]),
        "y_scalar_t": jnp.broadcast_to(golden["t_scalar"][:, None], (b, frames)),
    }
    return [
        compared(key, CLOSE, partial(velocity, model.params, t), golden.frames(key, 1))
        for key, t in timesteps.items()
    ]


def _cleared(golden: Golden) -> jnp.ndarray:
    """The context with zeros after the prompt's end, as the text encoder returns it."""
    context = golden["context"]
    if "context_lens" not in golden:
        return jnp.asarray(context)
    inside = np.arange(context.shape[1]) < golden["context_lens"][:, None]
    return jnp.asarray(context * inside[..., None])


def teacher_forcing(golden: Golden) -> Sequence[Case]:
    """Outputs, loss and gradients with and without shot offsets; outputs without clean stream."""
    forcing = _Forcing(golden)
    cases = [
        case
        for suffix in ("", "_rope_offset")
        if f"y{suffix}" in golden
        for case in forcing.cases(suffix)
    ]
    more = {"y_aug0": forcing.without_augmentation, "y_blockwise_causal": forcing.causal}
    return cases + [
        compared(key, CLOSE, compute, golden.frames(key, 1))
        for key, compute in more.items()
        if key in golden
    ]


class _Forcing:
    """The computations on a teacher-forcing golden."""

    def __init__(self, golden: Golden):
        self.golden, self.model = golden, golden.dit
        self.x, self.clean = golden.frames("x", 1), golden.frames("clean", 1)
        self.frames, height, width = self.x.shape[1:4]
        self.chunk_frames = golden.meta["num_frame_per_block"]
        self.size = (height // 2, width // 2)
        self.text = prompts_of_blocks(golden)
        self.timestep = jnp.asarray(golden["t"])
        self.aug = jnp.asarray(golden["aug_t"])
        self._measured = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def result(self, suffix: str):
        """(loss, velocity, gradients); shot offsets are 0 without a suffix."""
        shot_rope_offset = np.zeros(self.timestep.shape, np.int32)
        if suffix:
            offsets = self.golden[suffix.removeprefix("_")]
            integers = offsets.astype(np.int32)
            shot_rope_offset = integers if np.array_equal(integers, offsets) else offsets
        target = self.golden.frames("target", 1)
        (loss, velocity), grads = self._measured(
            self.model.params, target, jnp.asarray(shot_rope_offset)
        )
        return loss, velocity, grads

    def cases(self, suffix: str) -> list[Case]:
        """Output, loss and gradients of one computation."""
        golden, result = self.golden, functools.cache(lambda: self.result(suffix))

        def gradient(key: str) -> np.ndarray:
            return self.model.state_dict(result()[2], [key])[key]

        output = golden.frames(f"y{suffix}", 1)
        return [
            compared(f"y{suffix}", CLOSE, lambda: result()[1], output),
            compared(f"loss{suffix}", CLOSE, lambda: result()[0], golden[f"loss{suffix}"]),
            *(
                compared(f"grad{suffix}/{key}", CLOSE, partial(gradient, key), want)
                for key, want in golden.under(f"grad{suffix}/").items()
            ),
        ]

    def without_augmentation(self):
        return jax.jit(self._velocity)(self.model.params, jnp.zeros_like(self.aug), None)

    def causal(self):
        """Only one stream: each block attends itself and the blocks before it."""
        tokens = layout.grid(self.frames, *self.size, chunk_frames=self.chunk_frames)

        @jax.jit
        def velocity(params):
            dit = self.model.around(params)
            return dit(self.x, self.timestep, dit.text_kv(self.text), tokens)[0]

        return velocity(self.model.params)

    def _velocity(self, params, aug, shot_rope_offset):
        dit = self.model.around(params)
        tokens = layout.teacher_forcing(
            self.frames,
            *self.size,
            chunk_frames=self.chunk_frames,
            shot_rope_offset=shot_rope_offset,
        )
        return dit(
            jnp.concatenate([self.clean, self.x], axis=1),
            jnp.concatenate([aug, self.timestep], axis=1),
            dit.text_kv(self.text, streams=2),
            tokens,
            noisy_from=self.frames,
        )[0]

    def _loss(self, params, target, shot_rope_offset):
        velocity = self._velocity(params, self.aug, shot_rope_offset)
        return jnp.mean((velocity - target) ** 2), velocity


def prompts_of_blocks(golden: Golden) -> jnp.ndarray:
    """Text features `[b, blocks, t, e]`, one prompt per block."""
    context, blocks = golden["context"], golden.meta["num_blocks"]
    return jnp.asarray(context.reshape(-1, blocks, *context.shape[1:]))
