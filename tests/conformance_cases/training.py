"""The training loss with everything random given: levels, noise, roughened context."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.dit import prompts_of_blocks
from conformance_cases.golden import Golden
from conformance_cases.rows import CLOSE, TIGHT, Case, compared, later
from longlive_jax.diffusion.flow import FlowSchedule, corrupt, velocity_target, x0_from_velocity
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    Draws,
    TeacherForcingBatch,
    draws_of,
)
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    flow_loss,
    predict,
)
from longlive_jax.typing import Array

OPTIONS = {
    "i2v",
    "independent_first_frame",
    "mixed_precision",
    "noise_augmentation_max_timestep",
}


def ar_training_loss(golden: Golden) -> Sequence[Case]:
    """Inputs made from the draws, then prediction, loss and gradients of every case."""
    files = _Files(golden)
    return [case for entry in golden.meta["cases"] for case in files.cases(entry)]


class _Files:
    """What the cases of a file share: the model, and one compiled function for all of them."""

    def __init__(self, golden: Golden):
        self.golden, self.model = golden, golden.dit
        self.chunk_frames = golden.meta["num_frame_per_block"]
        self.schedule = FlowSchedule(golden.meta["timestep_shift"])
        self.clean = golden.frames("clean_latent", 2)
        text = prompts_of_blocks(golden)
        self.blocks = text.shape[1]
        self.text = text.reshape(-1, *text.shape[2:])
        self._measured = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def cases(self, entry: Mapping[str, Any]) -> list[Case]:
        name, golden = entry["name"], self.golden
        unknown = sorted(set(entry["args"]) - OPTIONS)
        if unknown:
            return [later(name, f"options {unknown}")]
        result = functools.cache(lambda: self._result(name, entry["args"]))
        latents = {
            "noisy_latents": TIGHT, "clean_x": TIGHT, "target": TIGHT,
            "flow_pred": CLOSE, "x0_pred": CLOSE,
        }  # fmt: skip
        numbers = {
            "timestep": TIGHT, "sigma": TIGHT, "frame_weight": TIGHT,
            "frame_mse": CLOSE, "loss": CLOSE,
        }  # fmt: skip

        def gradient(key: str) -> np.ndarray:
            return self.model.state_dict(result()["grads"], [key])[key]

        cases = []
        for key, tolerance in {**numbers, **latents}.items():
            path = f"{name}/{key}"
            if path in golden:
                want = golden.frames(path, 2) if key in latents else golden[path]
                cases.append(
                    compared(path, tolerance, partial(lambda key: result()[key], key), want)
                )
        return cases + [
            compared(f"{name}/grad/{key}", CLOSE, partial(gradient, key), want)
            for key, want in golden.under(f"{name}/grad/").items()
        ]

    def _result(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        batch, draws, levels = self._given(name, options)
        (loss, velocity), grads = self._measured(self.model.params, batch, draws)
        wanted = velocity_target(batch.target, draws.noise)
        noisy = corrupt(batch.target, draws.noise, draws.sigma)
        return {
            **levels,
            "timestep": draws.timestep,
            "frame_weight": draws.weight,
            "noisy_latents": noisy,
            "clean_x": draws.context,
            "target": wanted,
            "flow_pred": velocity,
            # the reference reads the level off the table, which ends just above 0
            "x0_pred": x0_from_velocity(noisy, velocity, levels["sigma"]),
            "frame_mse": jnp.mean((velocity - wanted) ** 2, axis=(2, 3, 4)),
            "loss": loss,
            "grads": grads,
        }

    def _given(self, name: str, options: Mapping[str, Any]):
        """Batch, draws and levels of a case, from the reference's own random numbers."""
        golden, table = self.golden, self.schedule
        clamp, context_name = bool(options.get("i2v")), f"{name}/aug_index_draw"
        clean, noise = self.clean, golden.frames(f"{name}/noise", 2)
        if clamp:  # the target of a given frame is then zero, as the reference has it
            clean, noise = (
                x.at[:, :1].set(golden.frames("initial_latent", 2)) for x in (clean, noise)
            )
        augmented = context_name in golden
        spec = ARLossSpec(
            shift=golden.meta["timestep_shift"],
            global_sinks=0,
            context_noise=float(augmented),
            context_noise_told=augmented,
            image_to_video=clamp,
        )
        context_level = jnp.zeros((len(clean), self.blocks))
        if augmented:
            context_level = jnp.asarray(table.sigmas)[golden[context_name][:, :: self.chunk_frames]]
        batch = self._episode(clean, jnp.asarray(golden[f"{name}/loss_mask"]))
        draws = draws_of(
            batch,
            noise=noise,
            index=jnp.asarray(golden[f"{name}/index_draw"][:, :: self.chunk_frames]),
            context_level=context_level,
            context_noise=noise if augmented else None,
            dropped=jnp.zeros(len(clean), bool),
            chunk_frames=self.chunk_frames,
            spec=spec,
        )
        return batch, *self._rounded(draws, bool(options.get("mixed_precision")))

    def _rounded(self, draws: Draws, half: bool) -> tuple[Draws, dict[str, Array]]:
        """Draws and their levels with the reference's rounding: bfloat16 timesteps, and every level
        read off the table by its timestep, also where that is 0."""
        table = self.schedule
        timestep = draws.timestep
        if half:
            timestep = timestep.astype(jnp.bfloat16).astype(jnp.float32)
        index = table.index(timestep)
        sigma = jnp.asarray(table.sigmas)[index]
        weight = jnp.asarray(table.weights)[index]
        if half:
            draws = dataclasses.replace(draws, timestep=timestep, sigma=sigma)
        weight = jnp.where(draws.conditioning_frame, weight, weight if half else draws.weight)
        return dataclasses.replace(draws, weight=weight), {"sigma": sigma}

    def _episode(self, clean, mask) -> TeacherForcingBatch:
        chunk = jnp.tile(jnp.arange(self.blocks), (len(clean), 2))
        prompt = chunk + jnp.arange(len(clean))[:, None] * self.blocks
        return TeacherForcingBatch(
            context=clean,
            target=clean,
            mask=mask,
            chunk_index=chunk,
            start=chunk * self.chunk_frames,
            window_start=jnp.zeros_like(chunk),
            sink=jnp.full_like(chunk, -1),
            prompt=prompt,
        )

    def _loss(self, params, batch: TeacherForcingBatch, draws: Draws):
        setup = ARSetup(self.model.graphdef, self.chunk_frames, 0, ARLossSpec(global_sinks=0))
        velocity = predict(setup, self.model.around(params), batch, draws, self.text)
        return flow_loss(velocity, batch, draws)[0], velocity
