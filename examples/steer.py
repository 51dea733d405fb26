"""A stream without end, steered while it runs: a change of the caption, then a cut.

    python examples/steer.py [STEPS] [FILE]       # 32 steps, out/steer.mp4

The next chunk is computed while one is shown, so a change is seen `pipe.spec.ahead` chunks later.
"""

import sys

import numpy as np

from longlive_jax import Pipeline, enable_compilation_cache, write_video

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 32
path = sys.argv[2] if len(sys.argv) > 2 else "out/steer.mp4"

enable_compilation_cache()  # the next run starts faster
pipe = Pipeline.from_checkpoint()
stream = pipe.stream("a red circle moves left on a mint background", endless=True, steps=steps)
frames = []
for chunk in stream:
    print(f"chunk {chunk.index}: {chunk.prompt[0]}")
    frames.append(chunk.frames[0])
    if chunk.index == 2:  # the shot continues under another caption
        stream.steer("a red circle moves right on a mint background")
    if chunk.index == 4:  # a new shot begins
        stream.steer("a yellow cross moves down on a navy background", cut=True)
    if chunk.index == 8:
        break
stream.close()
write_video(path, np.concatenate(frames), fps=pipe.spec.fps)
print(path)
