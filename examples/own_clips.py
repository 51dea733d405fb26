"""Training on a folder of own clips, on a laptop, and a video from the result.

    python examples/own_clips.py [STEPS] [CLIPS] [FOLDER]     # 400 steps, out/own_clips

CLIPS is a folder of videos with a caption next to each: `a.mp4` and `a.txt`. Without it, this
program draws eight clips of a bouncing disc. The same from a shell:

    longlive train --config=own_clips --config.videos=CLIPS --workdir=RUN --out=OUT
    longlive sample --checkpoint=OUT --script=shots.yaml
"""

import sys
from pathlib import Path

import numpy as np

from longlive_jax import Pipeline, write_video
from longlive_jax.cli.app import run

SIZE, FRAMES, RADIUS = 64, 45, 10
CAPTION = "a red circle moves {} on a white background"

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
folder = Path(sys.argv[3] if len(sys.argv) > 3 else "out/own_clips")
clips = Path(sys.argv[2]) if len(sys.argv) > 2 else folder / "clips"


def draw_clip(direction: str, seed: int) -> np.ndarray:
    """Frames [f, h, w, 3] of a disc that crosses the picture and bounces off its edges."""
    rng = np.random.default_rng(seed)
    span = SIZE - 2 * RADIUS
    along = rng.integers(span) + np.arange(FRAMES)
    along = RADIUS + span - np.abs(span - along % (2 * span))
    across = np.full(FRAMES, rng.integers(RADIUS, SIZE - RADIUS))
    x, y = (along, across) if direction in ("left", "right") else (across, along)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = (columns - x[:, None, None]) ** 2 + (rows - y[:, None, None]) ** 2 < RADIUS**2
    return np.where(inside[..., None], (214, 40, 40), (245, 245, 245)).astype(np.uint8)


if len(sys.argv) < 3:
    clips.mkdir(parents=True, exist_ok=True)
    for i, direction in enumerate(("left", "right", "up", "down") * 2):
        write_video(clips / f"{i}.mp4", draw_clip(direction, i))
        (clips / f"{i}.txt").write_text(CAPTION.format(direction))

out = folder / "checkpoint"
options = [f"--config.videos={clips}", f"--config.loop.steps={steps}"]
code = run(["train", "--config=own_clips", *options, f"--workdir={folder / 'run'}", f"--out={out}"])
if code:
    sys.exit(code)

pipe = Pipeline.from_checkpoint(out)
frames = pipe.sample(CAPTION.format("left"), seconds=2, steps=min(steps, 32), seed=1)
write_video(folder / "video.mp4", frames[0], fps=pipe.spec.fps)
print(folder / "video.mp4")
