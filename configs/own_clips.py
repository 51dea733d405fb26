"""Fine-tunes the built-in model on a folder of own clips, on a laptop's CPU.

    longlive train --config=configs/own_clips.py --config.videos=CLIPS --workdir=runs/own \\
        --out=checkpoints/own
    longlive sample --checkpoint=checkpoints/own --script=shots.yaml --out=out/own

CLIPS has videos with captions next to them (`a.mp4`, `a.txt`), of 1.25 seconds or more; they are
cropped to 64x64 pixels. Small changes for a first try: `--config.loop.steps=4`.

Cost: minutes on two cores, most of it training steps; the videos are encoded once.
Result: the DiT learns how your clips move. The built-in VAE and text encoder stay as they are, and
know only flat coloured shapes and the words of their captions: other pictures come out blurred, and
captions that differ only in unknown words look the same. For real footage, fine-tune Wan2.2 on a
GPU (configs/ar_5b.py).
"""

from ml_collections import ConfigDict

ARGUMENTS = ()


def get_config(arg: str = "") -> ConfigDict:
    """Stage `clips` from the built-in checkpoint; `videos` must be set on the command line."""
    del arg
    return ConfigDict(
        dict(
            stage="clips",
            # Data.
            checkpoint="small_world",
            clips=None,
            videos=None,
            cut=dict(size=(64, 64), chunks=4, windows=0, pad=True),
            batch=8,
            save_dtype="float16",
            # The sampler's attention window and positions, as in the base checkpoint.
            window=4,
            shot_rope_offset=8,
            sampling=dict(solver="sde", num_steps=32, guidance=2.0),
            # Loss and optimization.
            loss=dict(shift=5.0, weighting="uniform", context_noise=0.1, text_dropout=0.1),
            optim=dict(name="adamw", lr=3e-4, b1=0.9, b2=0.98, warmup=20, decay=0.5, clip=1.0),
            ema=dict(decay=0.98, start=50),
            loop=dict(steps=400, log_every=10, save_every=100),
        )
    )
