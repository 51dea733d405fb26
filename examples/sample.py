"""A video of three shots from the built-in model, on any CPU.

python examples/sample.py [STEPS] [FILE]      # 32 steps, out/sample.mp4
"""

import sys

from longlive_jax import Pipeline, enable_compilation_cache, write_video

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 32
path = sys.argv[2] if len(sys.argv) > 2 else "out/sample.mp4"

enable_compilation_cache()  # the next run starts faster
pipe = Pipeline.from_checkpoint()
frames = pipe.sample(
    [
        "a red circle moves left on a mint background",
        "a blue square moves up on a gray background",
        "a green triangle stays still on a white background",
    ],
    seconds=2,
    steps=steps,
    seed=7,
)
write_video(path, frames[0], fps=pipe.spec.fps)
print(f"{path}: {frames.shape[1]} frames")
