"""Teacher-forced training of an autoregressive Wan2.2-TI2V-5B on clips of 16, 32 or 64 seconds.

    longlive data encode --source=DATASET --checkpoint=checkpoints/wan22_5b --out=clips/64s \\
        --size=704x1280 --chunks=48 --text_dtype=bfloat16
    longlive train --config=ar_5b:64s --workdir=runs/ar_5b --out=checkpoints/ar_5b

The argument is the clip length, and `nvfp4` (`:64s,nvfp4`) to train in NVFP4 (section 2.2). The
mesh is for 32 GPUs (64s, 32s) or 8 (16s); several hosts add `--hosts` (launch/slurm.sh).
Cost: not measured, no GPU has run it; `longlive plan` estimated 119 GiB per GB200 for 64s,
whose remat is everything: attention_saved runs attention forward once, but needs more memory.
Result: not measured.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("16s", "32s", "64s", "nvfp4")
MESHES = {"16s": dict(data=2, sp=4), "32s": dict(data=8, sp=4), "64s": dict(data=8, sp=4)}
CHUNKS = {"16s": 12, "32s": 24, "64s": 48}


def get_config(arg: str = "64s") -> ConfigDict:
    """Teacher forcing with the complete history as context and one prompt per chunk."""
    options = arg.split(",")
    lengths = [option for option in options if option in MESHES]
    if len(lengths) > 1:
        raise ValueError(f"choose one clip length of {', '.join(MESHES)}, got {arg!r}")
    length = lengths[0] if lengths else "64s"
    mesh = MESHES[length]
    return ConfigDict(
        dict(
            stage="clips",
            # Data and mesh.
            checkpoint="checkpoints/wan22_5b",
            clips=f"clips/{length}",
            batch=mesh["data"],
            mesh=mesh,
            # Precision and memory.
            dtype="bfloat16",
            quant=dict(policy="nvfp4_train" if "nvfp4" in options else "none"),
            remat="everything" if length == "64s" else "attention_saved",
            ffn_chunks=8,
            save_dtype="bfloat16",
            # Loss and optimization.
            recycling=dict(buffer=dict(rows=CHUNKS[length], groups=mesh["data"])),
            loss=dict(shift=5.0, weighting="bell", text_dropout=0.1),
            optim=dict(
                name="adamw",
                lr=1e-5,
                b1=0.0,
                b2=0.999,
                weight_decay=0.01,
                warmup=0,
                decay=0.0,
                clip=10.0,
            ),
            ema=dict(decay=0.99, start=100),
            loop=dict(steps=3000, log_every=10, save_every=250, keep=3, accumulate=1),
        )
    )
