"""The training loss, replayed with the reference's noise levels, noise and context noise."""

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
    """Cases for the corrupted inputs, the prediction, the loss and the gradients."""
    files = _Files(golden)
    return [case for entry in golden.meta["cases"] for case in files.cases(entry)]


class _Files:
    """The model and the compiled loss that all cases of a golden file use."""

    def __init__(self, golden: Golden):
        self.golden, self.model = golden, golden.dit
        self.chunk_frames = golden.meta["num_frame_per_block"]
        self.schedule = FlowSchedule(golden.meta["timestep_shift"])
        self.clean = golden.frames("clean_latent", 2)
        text = prompts_of_blocks(golden)
        self.blocks = text.shape[1]
        self.text = text.reshape(-1, *text.shape[2:])
        self._loss_and_grads = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def cases(self, entry: Mapping[str, Any]) -> list[Case]:
        """The comparisons of one entry of the file's `cases`."""
        name, golden = entry["name"], self.golden
        unknown = sorted(set(entry["args"]) - OPTIONS)
        if unknown:
            return [later(name, f"options {unknown}")]

        # 1. What is compared, and how closely. The result is computed when first needed.
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

        # 2. Numbers and latents, as far as the file contains them, then gradients.
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
        """Everything that the golden file may contain for a case."""
        batch, draws, levels = self._inputs(name, options)
        (loss, velocity), grads = self._loss_and_grads(self.model.params, batch, draws)
        target = velocity_target(batch.target, draws.noise)
        noisy = corrupt(batch.target, draws.noise, draws.sigma)
        return {
            **levels,
            "timestep": draws.timestep,
            "frame_weight": draws.weight,
            "noisy_latents": noisy,
            "clean_x": draws.context,
            "target": target,
            "flow_pred": velocity,
            # The reference looks the level up in its table, which ends just above 0.
            "x0_pred": x0_from_velocity(noisy, velocity, levels["sigma"]),
            "frame_mse": jnp.mean((velocity - target) ** 2, axis=(2, 3, 4)),
            "loss": loss,
            "grads": grads,
        }

    def _inputs(self, name: str, options: Mapping[str, Any]):
        """Batch, draws and noise levels of a case, from the reference's random numbers."""
        golden, schedule = self.golden, self.schedule
        image_to_video = bool(options.get("i2v"))
        context_name = f"{name}/aug_index_draw"
        augmented = context_name in golden

        # 1. Latents. The reference sets noise = clean in conditioning frames: their target is 0.
        clean, noise = self.clean, golden.frames(f"{name}/noise", 2)
        if image_to_video:
            clean, noise = (
                x.at[:, :1].set(golden.frames("initial_latent", 2)) for x in (clean, noise)
            )
        batch = self._batch(clean, jnp.asarray(golden[f"{name}/loss_mask"]))

        # 2. Settings and draws.
        spec = ARLossSpec(
            shift=golden.meta["timestep_shift"],
            global_sinks=0,
            context_noise=float(augmented),
            context_noise_told=augmented,
            image_to_video=image_to_video,
        )
        context_level = jnp.zeros((len(clean), self.blocks))
        if augmented:
            index = golden[context_name][:, :: self.chunk_frames]
            context_level = jnp.asarray(schedule.sigmas)[index]
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
        return batch, *self._round_like_reference(draws, bool(options.get("mixed_precision")))

    def _round_like_reference(
        self, draws: Draws, mixed_precision: bool
    ) -> tuple[Draws, dict[str, Array]]:
        """Draws and noise levels with the reference's rounding.

        In mixed precision its timesteps are bfloat16. It looks every level up in the table by its
        timestep, also where the timestep is 0.
        """
        schedule, timestep = self.schedule, draws.timestep
        if mixed_precision:
            timestep = timestep.astype(jnp.bfloat16).astype(jnp.float32)
        index = schedule.index(timestep)
        sigma = jnp.asarray(schedule.sigmas)[index]
        weight = jnp.asarray(schedule.weights)[index]
        if mixed_precision:
            draws = dataclasses.replace(draws, timestep=timestep, sigma=sigma)
        own_weight = weight if mixed_precision else draws.weight
        weight = jnp.where(draws.conditioning_frame, weight, own_weight)
        return dataclasses.replace(draws, weight=weight), {"sigma": sigma}

    def _batch(self, clean, mask) -> TeacherForcingBatch:
        """Full clips: every frame as context and as target, with full history."""
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
        """The loss, and the velocity as its auxiliary output."""
        setup = ARSetup(self.model.graphdef, self.chunk_frames, 0, ARLossSpec(global_sinks=0))
        velocity = predict(setup, self.model.around(params), batch, draws, self.text)
        return flow_loss(velocity, batch, draws)[0], velocity
