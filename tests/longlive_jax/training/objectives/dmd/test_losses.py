"""The losses of distillation at given scores, and the video that is scored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.quant.frozen import freeze
from longlive_jax.quant.policy import QuantPolicy, named
from longlive_jax.training.objectives.dmd.draws import ScoreSpec, draw_rollout, draw_scores
from longlive_jax.training.objectives.dmd.losses import (
    generator_loss,
    matching_loss,
    rolled_out,
    scene_of,
)
from longlive_jax.training.objectives.dmd.rollout import student_pass
from longlive_jax.training.objectives.dmd.scores import (
    add_noise,
    critic_x0,
    matching_gradient,
    teacher_x0,
)
from tests.longlive_jax.training.objectives.dmd.tiny_dmd import (
    CHUNK,
    inputs,
    relative_error,
    setup,
    videos,
    weights,
)

SETUP = setup(scores=ScoreSpec(guidance=1.0))
PACKED = QuantPolicy("few", ((r"blocks/ffn/down/kernel", named("nvfp4_frozen").rules[0][1]),))


def latents(seed: int, batch: int = 2):
    return jax.random.normal(jax.random.key(seed), SETUP.video_shape(batch))


def test_the_matching_gradient_is_normalised_by_chunk():
    x, fake, real = (latents(i) for i in range(3))
    gradient, norm = matching_gradient(x, fake, real, chunk_frames=CHUNK)
    first = np.asarray(x - real)[:, :CHUNK]
    np.testing.assert_allclose(norm[:, 0], np.abs(first).mean((1, 2, 3, 4)), rtol=1e-6)
    want = np.asarray(fake - real)[1, CHUNK] / norm[1, 1]
    np.testing.assert_allclose(gradient[1, CHUNK], want, rtol=1e-5)


def test_a_chunk_that_equals_its_scores_has_no_gradient():
    x, fake = latents(0), latents(1)
    same = x.at[:, :CHUNK].set(fake[:, :CHUNK])
    gradient, norm = matching_gradient(same, fake, fake, chunk_frames=CHUNK)
    assert np.all(norm[:, 0] == 0)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_a_score_that_is_not_finite_is_not_hidden():
    x, fake, real = (latents(i) for i in range(3))
    broken = fake.at[0, 0, 0, 0, 0].set(jnp.nan)
    gradient, _ = matching_gradient(x, broken, real, chunk_frames=CHUNK)
    assert np.isnan(gradient[0, 0, 0, 0, 0]) and np.isfinite(gradient[1]).all()


def test_the_gradient_of_the_loss_is_the_matching_gradient():
    """Averaged over what is generated; a given first frame has none."""
    x, fake, real = (latents(i) for i in range(3))
    scene, _ = scene_of(*inputs(videos(2, image=True)))
    (_, metrics), by_x = jax.value_and_grad(
        lambda x: matching_loss(SETUP, x, fake, real, scene), has_aux=True
    )(x)
    gradient = np.asarray(matching_gradient(x, fake, real, chunk_frames=CHUNK)[0])
    np.testing.assert_allclose(by_x[:, 1:], gradient[:, 1:] / gradient[:, 1:].size, rtol=1e-4)
    np.testing.assert_array_equal(by_x[:, 0], np.zeros_like(by_x[:, 0]))
    np.testing.assert_allclose(
        metrics["matching_gradient"], np.sqrt((gradient[:, 1:] ** 2).mean()), rtol=1e-5
    )


def test_what_is_scored_of_a_packed_student_is_the_pass_itself():
    """In W4A4 it differs from the rollout by the largest magnitudes of a call's activations."""
    # 1. A student with a matrix in NVFP4, and the draws of one update.
    student, teacher, critic = (weights(i) for i in (1, 2, 3))
    student = freeze(student, PACKED, gradient=True)
    scene, negative = scene_of(*inputs(videos(2)))
    shape = SETUP.video_shape(2)
    drawn = draw_rollout(jax.random.key(3), SETUP.rollout, shape)
    options = {"chunk_frames": CHUNK, "image_to_video": False}
    scored = draw_scores(jax.random.key(4), SETUP.scores, shape, **options)

    # 2. The loss, and the same from the pass and from the rollout.
    def of_video(x):
        score, noisy = SETUP.score(trains=False), add_noise(x, scene, scored)
        fake = critic_x0(score, SETUP.model(critic), noisy, x, scene, scored)
        real = teacher_x0(score, SETUP.model(teacher), noisy, x, scene, negative, scored)
        return matching_loss(SETUP, x, fake, real, scene)[0]

    @jax.jit
    def losses():
        models = (student, teacher, critic)
        loss, _ = generator_loss(SETUP, *models, scene, negative, drawn, scored)
        rolled = rolled_out(SETUP, student, scene, drawn)
        options = {"chunk_frames": CHUNK, "attend": SETUP.attend}
        passed = student_pass(SETUP.model(student), scene, rolled, SETUP.rollout, **options)
        return loss, (passed, rolled.x0), jax.lax.map(of_video, jnp.stack((passed, rolled.x0)))

    loss, (passed, rolled), (of_pass, of_rollout) = losses()
    assert 1e-4 < relative_error(passed, rolled) < 0.3
    np.testing.assert_allclose(loss, of_pass, rtol=1e-6)
    assert abs(loss / of_rollout - 1) > 5e-6


def test_scores_cost_a_third_less_without_guidance():
    guided = dataclasses.replace(SETUP, scores=ScoreSpec(guidance=2.0))
    scene, negative = scene_of(*inputs(videos(2)))
    drawn = draw_scores(
        jax.random.key(4), SETUP.scores, SETUP.video_shape(2), chunk_frames=CHUNK,
        image_to_video=False,
    )  # fmt: skip
    calls = []

    def counted(setup):
        calls.clear()
        score = setup.score(trains=False)

        def teacher(latents, *_, **__):
            calls.append(latents)
            return latents, None

        teacher.embed_text = lambda text, **_: text
        teacher_x0(score, teacher, latents(0), latents(0), scene, negative, drawn)
        return len(calls)

    assert (counted(SETUP), counted(guided)) == (1, 2)
