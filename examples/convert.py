"""Weights with the names of another library to a checkpoint, and a video from it.

    python examples/convert.py [SOURCE] [OUT]     # out/converted

SOURCE is a file or folder of weights: Wan2.2-TI2V-5B, its diffusers version, LongLive 2.0, a LoRA.
Parts that it lacks must be in OUT. Without SOURCE, OUT begins as a copy of the built-in model. Its
DiT is exported with the names of Wan and put back. PyTorch is not needed, and nothing is unpickled.
The same from a shell:

    longlive convert --source=SOURCE --out=OUT --overwrite
"""

import shutil
import sys
import tempfile
from pathlib import Path

from longlive_jax import Pipeline, write_video
from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint

out = Path(sys.argv[2] if len(sys.argv) > 2 else "out/converted")
with tempfile.TemporaryDirectory() as temporary:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "exported"
    if len(sys.argv) < 2:
        shutil.copytree(builtin_checkpoint(), out, dirs_exist_ok=True)
        if run(["export", f"--source={out}", f"--out={source}"]):
            sys.exit("the export failed")
        for name in ("Wan2.2_VAE", "models_t5_umt5-xxl-enc"):  # only the DiT is converted
            (source / f"{name}.safetensors").unlink()
    if run(["convert", f"--source={source}", f"--out={out}", "--overwrite"]):
        sys.exit("the conversion failed")

pipe = Pipeline.from_checkpoint(out)
print(pipe)
if len(sys.argv) < 2:
    frames = pipe.sample("a red circle moves left on a mint background", seconds=1, steps=4)
    write_video(out.with_suffix(".mp4"), frames[0], fps=pipe.spec.fps)
    print(out.with_suffix(".mp4"))
