"""Settings of distillation, and what is random in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.training.objectives.dmd.draws import (
    RolloutSpec,
    ScoreSpec,
    draw_rollout,
    draw_scores,
    score_draws_of,
)

SHAPE = (2, 8, 2, 2, 3)


def test_the_exit_step_is_uniform_or_the_last():
    keys = jax.random.split(jax.random.key(0), 400)

    def steps(spec):
        return jax.vmap(lambda key: draw_rollout(key, spec, SHAPE).exit_step)(keys)

    counts = np.bincount(steps(RolloutSpec(steps=4)), minlength=4)
    assert counts.min() > 60 and len(counts) == 4
    assert set(np.asarray(steps(RolloutSpec(steps=4, exit="last")))) == {3}


def test_noise_of_the_context_is_drawn_where_it_is_used():
    assert draw_rollout(jax.random.key(0), RolloutSpec(), SHAPE).context_noise is None
    noised = draw_rollout(jax.random.key(0), RolloutSpec(context="noised"), SHAPE)
    assert noised.context_noise.shape == SHAPE
    assert not np.array_equal(noised.noise, noised.context_noise)


@pytest.mark.parametrize("per_chunk", [False, True])
def test_timesteps_are_one_a_video_or_one_a_chunk(per_chunk):
    spec = ScoreSpec(per_chunk=per_chunk)
    drawn = draw_scores(jax.random.key(1), spec, SHAPE, chunk_frames=2, image_to_video=False)
    kinds = [len(set(row)) for row in np.asarray(drawn.timestep)]
    assert kinds == ([4, 4] if per_chunk else [1, 1])


def test_timesteps_are_clipped_and_a_given_frame_has_none():
    raw = jnp.array([[0, 999, 500, 500]])
    drawn = score_draws_of(raw, jnp.zeros((1, 4, 2, 2, 3)), ScoreSpec(), image_to_video=False)
    assert drawn.timestep[0, 0] == 20 and drawn.timestep[0, 1] == 980
    np.testing.assert_allclose(drawn.timestep[0, 2], 1000 * 5 * 0.5 / (1 + 4 * 0.5), rtol=1e-6)
    given = score_draws_of(raw, jnp.zeros((1, 4, 2, 2, 3)), ScoreSpec(), image_to_video=True)
    assert given.timestep[0, 0] == 0 and given.sigma[0, 0] < 0.01
    np.testing.assert_array_equal(given.timestep[0, 1:], drawn.timestep[0, 1:])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RolloutSpec, {"steps": 0}, "rollout.steps must be >= 1, got 0"),
        (RolloutSpec, {"chunks": 0}, "rollout.chunks must be >= 1, got 0"),
        (RolloutSpec, {"window": 2}, "rollout.window must be >= 3 for 1 global sinks and 1 shot"),
        (RolloutSpec, {"tail": 5}, "rollout.tail must be in [1, rollout.chunks = 4], got 5"),
        (RolloutSpec, {"gradients": "reference", "kv": "nvfp4"}, "set rollout.kv=model"),
        (ScoreSpec, {"timesteps": (980.0, 20.0)}, "scores.timesteps must be two rising numbers"),
        (ScoreSpec, {"guidance": -1.0}, "scores.guidance must be >= 0, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError) as caught:
        kind(**settings)
    assert message in str(caught.value)


def test_gradients_leak_only_where_the_reference_does_not_move_its_cache():
    leaks = {
        tail: RolloutSpec(chunks=8, window=4, gradients="reference", tail=tail).leaks
        for tail in (1, 4, None)
    }
    assert leaks == {1: False, 4: True, None: True}
    assert not RolloutSpec().leaks
