"""A batch of scripts of different lengths, sampled together.

    python examples/batch.py [STEPS] [FOLDER]     # 32 steps, out/batch

Videos of a batch share every model call, which a GPU does faster than one after the other. Shorter
videos are padded to the longest; `lengths` says where each of them ends.
"""

import sys
from pathlib import Path

from longlive_jax import Pipeline, ShotScript, write_video

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 32
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "out/batch")

scripts = [
    ShotScript.of("a red circle moves left on a mint background", seconds=2, seed=1, name="left"),
    ShotScript.of("a blue square moves up on a gray background", seconds=2, seed=2, name="up"),
    ShotScript.of(
        "a green triangle moves down on a white background",
        "an orange cross stays still on a black background",
        seconds=2,
        seed=3,
        name="two_shots",
    ),
]
pipe = Pipeline.from_checkpoint()
frames = pipe.sample(scripts, steps=steps)
timeline = pipe.engine.timeline(scripts)
for script, video, chunks in zip(scripts, frames, timeline.lengths, strict=True):
    length = timeline.num_frames(chunks)
    write_video(folder / f"{script.name}.mp4", video[:length], fps=pipe.spec.fps)
    print(f"{folder / script.name}.mp4: {length} frames")
