"""Conformance of distribution matching distillation: rollout, scores, losses and gradients."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden, Model, load
from conformance_cases.rows import CLOSE, TIGHT, Case, compared, distance
from longlive_jax.diffusion.flow import x0_from_velocity
from longlive_jax.training.objectives.dmd.draws import (
    PromptBatch,
    RolloutDraws,
    RolloutSpec,
    ScoreDraws,
    ScoreSpec,
    score_draws_of,
)
from longlive_jax.training.objectives.dmd.losses import (
    DMDSetup,
    generated,
    generator_loss,
    matching_loss,
    scene_of,
    score_loss,
)
from longlive_jax.training.objectives.dmd.rollout import Scene, rollout
from longlive_jax.training.objectives.dmd.scores import (
    add_noise,
    critic_x0,
    matching_gradient,
    teacher_x0,
)
from longlive_jax.training.objectives.teacher_forcing import self_attention

OFFSET = 8
"""Latent frames that the reference adds to temporal positions at every cut."""
FULL_CUT = 1
"""Chunk that begins a shot in the case `full`, whose metadata does not state it."""
SCORES = ("fake_x0", "real_x0_cond", "real_x0_uncond", "real_x0_cfg")
GRADIENTS = {"grad_cache_detached": "detached", "grad_reference": "reference"}


def distillation(golden: Golden) -> Sequence[Case]:
    """All cases of a file."""
    bench = Bench(golden)
    cases: list[Case] = []
    for entry in golden.meta["cases"]:
        make = bench.critic if entry["name"].startswith("critic") else bench.matching
        cases += make(entry)
    for entry in golden.meta["rollouts"]:
        make = bench.full if entry["name"] == "full" else bench.rollout
        cases += make(entry)
    return cases


class Bench:
    """The three models of a file, and its cases."""

    def __init__(self, golden: Golden):
        self.golden, self.chunk_frames = golden, golden.meta["num_frame_per_block"]
        self.student, self.teacher, self.critic_model = (
            load("dit", golden.under(f"w/{name}/"), golden.meta["config"])
            for name in ("generator", "real", "fake")
        )

    def setup(self, entry: Mapping[str, Any], chunks: int, **rolled: Any) -> DMDSetup:
        """Setup of a case; `rolled` are further fields of `RolloutSpec`."""
        options = entry["args"]
        window = options.get("model_kwargs", {}).get("local_attn_size", -1)
        inference, tail = options.get("inference", {}), options.get("slice_last_frames")
        _, _, height, width, channels = self.latents(entry["name"]).shape
        return DMDSetup(
            self.student.graphdef,
            (height, width, channels),
            self.chunk_frames,
            RolloutSpec(
                chunks=chunks,
                shift=self.golden.meta["timestep_shift"],
                window=None if window < 0 else window // self.chunk_frames,
                global_sinks=inference.get("sink_size", 0) // self.chunk_frames,
                shot_sinks=bool(inference.get("multi_shot_sink")),
                shot_rope_offset=OFFSET,
                context="noised",
                tail=None if tail is None else tail // self.chunk_frames,
                **rolled,
            ),
            ScoreSpec(
                context="clean" if options.get("teacher_forcing") else "noisy",
                shift=self.golden.meta["timestep_shift"],
                per_chunk=bool(options.get("i2v")),
            ),
            attention_for=self_attention,
            options={"remat": "everything"},
        )

    def latents(self, name: str) -> jax.Array:
        """Latents of a case; the given first frame of image to video is put in."""
        key = next(k for k in ("generated", "latents") if f"{name}/{k}" in self.golden)
        x = self.golden.frames(f"{name}/{key}", 2)
        first = self.first_frame(name)
        return x if first is None else x.at[:, 0].set(first)

    def first_frame(self, name: str) -> jax.Array | None:
        key = f"{name}/initial_latent"
        return self.golden.frames(key, 2)[:, 0] if key in self.golden else None

    def scene(self, name: str, cuts: Sequence[bool] | None = None) -> tuple[Scene, jax.Array]:
        """What the videos of a case show, and the features of the negative prompt."""
        embeds = jnp.asarray(self.golden[f"{name}/cond_embeds"])
        b, frames = self.latents(name).shape[:2]
        chunks = frames // self.chunk_frames
        text = embeds.reshape(b, chunks, *embeds.shape[1:])
        key = f"{name}/uncond_embeds"
        negative = jnp.asarray(self.golden[key]) if key in self.golden else text[:, 0]
        features = jnp.concatenate([text, negative[:, None]], axis=1)
        cut = jnp.broadcast_to(jnp.asarray(cuts or [False] * chunks), (b, chunks))
        prompt = jnp.broadcast_to(jnp.arange(chunks), (b, chunks))
        return scene_of(PromptBatch(prompt, cut, self.first_frame(name)), features)

    def score_draws(self, name: str, spec: ScoreSpec) -> ScoreDraws:
        noise = self.golden.frames(f"{name}/noise_draw", 2)
        return self._score_draws(name, spec, self.golden[f"{name}/raw_timestep_draw"], noise)

    def _score_draws(self, name: str, spec: ScoreSpec, raw: np.ndarray, noise: jax.Array):
        """The reference draws a timestep per frame and uses that of a chunk's first frame."""
        if raw.shape[1] > 1:
            raw = np.repeat(raw[:, :: self.chunk_frames], self.chunk_frames, axis=1)
        raw = np.broadcast_to(raw, noise.shape[:2])
        given = self.first_frame(name) is not None
        noise = noise.at[:, 0].set(0.0) if given else noise
        return score_draws_of(jnp.asarray(raw), noise, spec, image_to_video=given)

    def rows(self, name: str, computed: Any, keys: Sequence[str]) -> list[Case]:
        """Rows of arrays `computed()[key]`; latents are stored with their channels second."""
        out = []
        for key in keys:
            full = f"{name}/{key}"
            if full not in self.golden:
                continue
            latents = self.golden[full].ndim == 5
            want = self.golden.frames(full, 2) if latents else self.golden[full]
            tolerance = TIGHT if key in ("timestep", "sigma", "noisy") else CLOSE
            out.append(compared(full, tolerance, partial(lambda k: computed()[k], key), want))
        return out

    # --- Scores and losses at given latents ---

    def matching(self, entry: Mapping[str, Any]) -> list[Case]:
        """Scores, matching gradient and loss at given latents."""
        name, (scene, negative) = entry["name"], self.scene(entry["name"])
        setup, x = self.setup(entry, scene.cut.shape[1]), self.latents(entry["name"])
        draws = self.score_draws(name, setup.scores)
        mask = None
        if f"{name}/gradient_mask" in self.golden:
            mask = self.golden.frames(f"{name}/gradient_mask", 2).astype(jnp.float32)

        @functools.cache
        def computed() -> dict[str, Any]:
            noisy = add_noise(x, scene, draws)
            scores = self._scores(entry, x, noisy, scene, negative, draws)
            fake, real = scores["fake_x0"], scores["real_x0_cfg"]
            gradient, norm = matching_gradient(x, fake, real, chunk_frames=self.chunk_frames)
            loss, by_x = jax.value_and_grad(
                lambda x: matching_loss(setup, x, fake, real, scene, mask=mask)[0]
            )(x)
            return scores | {
                "timestep": draws.timestep, "sigma": draws.sigma, "noisy": noisy,
                "block_normalizer": norm, "kl_grad": gradient, "loss": loss, "grad_latents": by_x,
            }  # fmt: skip

        losses = ("block_normalizer", "kl_grad", "loss", "grad_latents")
        return self.rows(name, computed, ("timestep", "sigma", "noisy", *SCORES, *losses))

    def _scores(
        self,
        entry: Mapping[str, Any],
        x: jax.Array,
        noisy: jax.Array,
        scene: Scene,
        negative: jax.Array,
        draws: ScoreDraws,
    ) -> dict[str, jax.Array]:
        """The critic's estimate, and the teacher's with, without and guided by its prompt."""
        score = self.setup(entry, scene.cut.shape[1]).score(trains=False)
        plain = dataclasses.replace(score, spec=dataclasses.replace(score.spec, guidance=1.0))
        critic, teacher = (m.around(m.params) for m in (self.critic_model, self.teacher))
        unprompted = dataclasses.replace(scene, text=negative)
        return {
            "fake_x0": critic_x0(score, critic, noisy, x, scene, draws),
            "real_x0_cond": teacher_x0(plain, teacher, noisy, x, scene, negative, draws),
            "real_x0_uncond": teacher_x0(plain, teacher, noisy, x, unprompted, negative, draws),
            "real_x0_cfg": teacher_x0(score, teacher, noisy, x, scene, negative, draws),
        }

    def critic(self, entry: Mapping[str, Any]) -> list[Case]:
        """The critic's velocity, loss and gradients at a given video."""
        name, (scene, _) = entry["name"], self.scene(entry["name"])
        setup, x = self.setup(entry, scene.cut.shape[1]), self.latents(entry["name"])
        draws, model = self.score_draws(name, setup.scores), self.critic_model

        @functools.cache
        def computed() -> dict[str, Any]:
            def loss_of(params):
                return score_loss(setup, params, x, scene, draws)[0]

            loss, grads = jax.jit(jax.value_and_grad(loss_of))(model.params)
            noisy, dit = add_noise(x, scene, draws), model.around(model.params)
            flow = setup.score(trains=False)(dit, noisy, x, draws.timestep, scene.text, scene.cut)
            return {
                "timestep": draws.timestep, "sigma": draws.sigma, "noisy": noisy,
                "fake_flow": flow, "fake_x0": x0_from_velocity(noisy, flow, draws.sigma),
                "loss": loss, "grads": grads,
            }  # fmt: skip

        keys = ("timestep", "sigma", "noisy", "fake_flow", "fake_x0", "loss")
        rows = self.rows(name, computed, keys)
        return rows + self.gradients(f"{name}/grad_fake", model, lambda: computed()["grads"])

    def gradients(self, prefix: str, model: Model, grads: Any) -> list[Case]:
        """Rows of parameter gradients by original name."""
        return [
            compared(
                f"{prefix}/{key}",
                CLOSE,
                partial(lambda k: model.state_dict(grads(), [k])[k], key),
                want,
            )
            for key, want in self.golden.under(f"{prefix}/").items()
        ]

    # --- Rollouts ---

    def rollout(self, entry: Mapping[str, Any]) -> list[Case]:
        """Latents, cache and both kinds of gradients of a rollout."""
        name, (scene, _) = entry["name"], self.scene(entry["name"], entry["scene_cut_mask"])
        draws = self.rollout_draws(name, entry["exit_step"])
        weights = self.golden.frames(f"{name}/grad_weights", 2)
        chunks = scene.cut.shape[1]

        @functools.cache
        def rolled():
            setup, model = self.setup(entry, chunks), self.student
            run = partial(
                rollout, scene=scene, draws=draws, spec=setup.rollout,
                chunk_frames=self.chunk_frames, attend=setup.attend,
            )  # fmt: skip
            return jax.jit(lambda params: run(model.around(params)))(model.params)

        @functools.cache
        def gradient(kind: str):
            setup = self.setup(entry, chunks, gradients=kind)
            weighted = lambda p: jnp.sum(generated(setup, p, scene, draws) * weights)  # noqa: E731
            return jax.jit(jax.grad(weighted))(self.student.params)

        want = self.golden.frames(f"{name}/latents", 2)
        cases = [compared(f"{name}/latents", CLOSE, lambda: rolled().x0, want, distance)]
        cases.append(self._cached_keys(name, entry, lambda: rolled().layer_kv.k))
        for key, kind in GRADIENTS.items():
            cases += self.gradients(f"{name}/{key}", self.student, partial(gradient, kind))
        return cases

    def _cached_keys(self, name: str, entry: Mapping[str, Any], keys: Any) -> Case:
        """Keys of the first layer, as far as the reference's cache still holds them."""
        want = self.golden[f"{name}/k_cache_layer0"]

        def remaining() -> np.ndarray:
            k = np.asarray(keys()[0])
            chunks = want.shape[1] // k.shape[2]
            evicted = k.shape[1] - chunks
            sinks = entry["args"].get("inference", {}).get("sink_size", 0) // self.chunk_frames
            order = [*range(sinks), *range(sinks + evicted, k.shape[1])]
            return k[:, order].reshape(want.shape)

        return compared(f"{name}/k_cache_layer0", CLOSE, remaining, want)

    def rollout_draws(self, name: str, exit_step: int) -> RolloutDraws:
        noise = self.golden.frames(f"{name}/noise", 2)
        drawn = np.moveaxis(self.golden[f"{name}/context_noise_draws"], 3, -1)
        context = np.moveaxis(drawn, 0, 1).reshape(noise.shape)
        return RolloutDraws(noise, jnp.asarray(context), jnp.asarray(exit_step))

    def full(self, entry: Mapping[str, Any]) -> list[Case]:
        """The generator's loss from noise to gradients, with the reference's draws in its order."""
        name, golden, chunks = "full", self.golden, entry["draws"][2]["shape"][0]
        scene, negative = self.scene(name, [chunk == FULL_CUT for chunk in range(chunks)])
        context = [golden[f"full/draw{3 + i}_randn_like"] for i in range(chunks)]
        frames = np.moveaxis(np.concatenate(context)[None], 2, -1)
        rolled = RolloutDraws(
            golden.frames("full/draw0_randn", 2),
            jnp.asarray(frames),
            jnp.asarray(entry["exit_step"]),
        )
        raw = golden[f"full/draw{3 + chunks}_randint"]
        noise = golden.frames(f"full/draw{4 + chunks}_randn_like", 2)
        draws = self._score_draws(name, self.setup(entry, chunks).scores, raw, noise)

        @functools.cache
        def computed(kind: str) -> dict[str, Any]:
            setup = self.setup(entry, chunks, gradients=kind)

            def loss_of(params):
                arguments = (self.teacher.params, self.critic_model.params, scene, negative)
                return generator_loss(setup, params, *arguments, rolled, draws)[0]

            loss, grads = jax.jit(jax.value_and_grad(loss_of))(self.student.params)
            return {"loss": loss, "grads": grads}

        @functools.cache
        def scored() -> dict[str, Any]:
            x = generated(self.setup(entry, chunks), self.student.params, scene, rolled)
            noisy = add_noise(x, scene, draws)
            return self._scores(entry, x, noisy, scene, negative, draws) | {
                "latents": x, "score_timestep": draws.timestep, "score_noisy": noisy,
            }  # fmt: skip

        keys = ("latents", "score_timestep", "score_noisy", *SCORES)
        cases = self.rows(name, scored, keys)
        cases += self.rows(name, partial(computed, "detached"), ("loss",))
        for key, kind in GRADIENTS.items():
            cases += self.gradients(
                f"{name}/{key}", self.student, lambda kind=kind: computed(kind)["grads"]
            )
        return cases
