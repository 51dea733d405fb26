"""Fine-tunes the built-in model on a folder of own clips, on a laptop's CPU.

    longlive train --config=own_clips --config.videos=CLIPS --workdir=runs/own \\
        --out=checkpoints/own
    longlive sample --checkpoint=checkpoints/own --script=shots.yaml --out=out/own

CLIPS has videos with captions next to them (`a.mp4`, `a.txt`), which are scaled and cropped to
64x64 pixels. Give 1.25 seconds or more; shorter ones are padded, and the padding is masked. For a
first try, add `--config.loop.steps=4`.

The built-in VAE knows flat coloured shapes only, and other pictures come out blurred. The argument
`vae` fine-tunes it on the same clips first:

    longlive train --config=own_clips:vae --config.videos=CLIPS --workdir=runs/own_vae \\
        --out=checkpoints/own_vae
    longlive train --config=own_clips --config.checkpoint=checkpoints/own_vae \\
        --config.videos=CLIPS --workdir=runs/own_both --out=checkpoints/own_both

With the argument `lora` only an adapter is trained, over the frozen model:

    longlive train --config=own_clips:lora --config.videos=CLIPS --workdir=runs/own_lora \\
        --out=checkpoints/own_lora
    longlive sample --adapter=checkpoints/own_lora --script=shots.yaml --out=out/own_lora

The text encoder stays as it is: captions that differ only in words it does not know look the same
to the model. For real footage, fine-tune Wan2.2 on a GPU (--config=ar_5b).

Cost: not measured; it is meant for minutes on a laptop. The videos are encoded once.
Result: a toy, to learn the steps with; quality on real footage is not measured.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("dit", "lora", "vae")


def get_config(arg: str = "dit") -> ConfigDict:
    """Fine-tuning of the DiT (`dit`, default), of a LoRA for it, or of the VAE.

    `videos` is set on the command line.
    """
    if arg == "vae":
        return ConfigDict(_vae())
    return ConfigDict(_dit() | (_lora() if arg == "lora" else {}))


def _dit() -> dict:
    return dict(
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
        sampling=dict(solver="sde", steps=32, guidance=2.0),
        # Loss and optimization.
        loss=dict(shift=5.0, weighting="uniform", context_noise=0.1, text_dropout=0.1),
        optim=dict(name="adamw", lr=3e-4, b1=0.9, b2=0.98, warmup=20, decay=0.5, clip=1.0),
        ema=dict(decay=0.98, start=50),
        loop=dict(steps=400, log_every=10, save_every=100),
    )


def _lora() -> dict:
    """What differs when only an adapter is trained."""
    return dict(
        lora=dict(rank=16),
        optim=dict(name="adamw", lr=1e-3, b1=0.9, b2=0.98, warmup=20, decay=0.5, clip=1.0),
        save_dtype="float32",
    )


def _vae() -> dict:
    phases = [dict(steps=200, batch=16, frames=1), dict(steps=200, batch=4, frames=13)]
    return dict(
        stage="vae",
        # Data.
        checkpoint="small_world",
        videos=None,
        size=(64, 64),
        save_dtype="float16",
        # Images first, then clips.
        phases=phases,
        loop=dict(
            steps=sum(p["steps"] for p in phases), log_every=10, eval_every=100, save_every=100
        ),
        optim=dict(name="adamw", lr=3e-4, b1=0.9, b2=0.98, warmup=20, decay=0.5, clip=1.0),
        ema=dict(decay=0.98, start=50),
    )
