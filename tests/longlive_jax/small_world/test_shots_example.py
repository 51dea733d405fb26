"""The example script gives the shots that it describes, by the judge's reading of the pixels."""

import itertools

import numpy as np

from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import ShotScript
from longlive_jax.small_world.demo_script import judge


def test_every_shot_of_the_example_is_right(repository):
    """With the built-in model and its own settings; cuts are on the frames that the script says."""
    script = ShotScript.read(repository / "examples" / "shots.yaml")
    stream = Pipeline.from_checkpoint(builtin_checkpoint()).stream(script)
    frames = np.concatenate([chunk.frames[0] for chunk in stream])
    assert len(frames) == 3 * 96 - 3  # 4 s each at 24 frames/s; the first chunk lacks 3 frames
    bounds = list(itertools.pairwise([0, 93, 189, 285]))
    verdict = judge(frames, [shot.prompt for shot in script.shots], bounds)
    assert [shot.shows_caption for shot in verdict.shots] == [True] * 3
    assert [cut.exact for cut in verdict.cuts] == [True] * 2 and not verdict.extra_cuts
