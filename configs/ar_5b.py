"""Wan2.2-TI2V-5B made autoregressive by teacher forcing, on clips of 16, 32 or 64 seconds.

    longlive convert --source=PATH/TO/Wan2.2-TI2V-5B --out=checkpoints/wan22_5b
    longlive data check DATASET
    longlive data encode --source=DATASET --checkpoint=checkpoints/wan22_5b --out=clips/64s \
        --size=704x1280 --chunks=48 --text_dtype=bfloat16
    longlive train --config=configs/ar_5b.py:64s --workdir=runs/ar_5b --out=checkpoints/ar_5b

or without latents on disk: encode with `--texts_only`, and train with `--config.videos=DATASET`,
which decodes, cuts anew at every visit, and encodes on the mesh before every update.

The argument is the clips' length; with `nvfp4` beside it (`:64s,nvfp4`) the linears of the blocks
are trained in NVFP4, forward and backward, with float32 masters (paper, section 2.2): by the chip's
own products on Blackwell, elsewhere the same numbers through bfloat16 ones, which costs time. The
mesh in each is for 32 GPUs (64s, 32s) or 8 (16s), and
`longlive plan --config=configs/ar_5b.py:64s --chip=gb200 --mesh=data=8,sp=4` says what a device
would need, before one is rented: 119 GiB for 64s (115 on H200s), 145 at once
(`--config.ffn_chunks=1`). Over 8 devices a sequence, `--config.mesh.data=4 --config.mesh.sp=8
--config.batch=4 --config.recycling.buffer.groups=4`, that is 98 GiB. The stream between layers is
float32; `--config.stream_dtype=bfloat16` halves what every layer keeps of it. Settings are those of
the paper's section 4.1: AdamW with betas (0, 0.999), a constant rate of 1e-5, gradients clipped to
10, an average of 0.99 from update 100, float32 masters. On several hosts every process runs the
same command with `--hosts` (launch/slurm.sh, launch/gke.yaml).

Attention is "auto", which is XLA's in blocks; pairs of blocks that see nothing of each other are
passed over. `--config.attention=mosaic` takes the block-sparse kernels; they are interpreted and
compiled for Hopper and Blackwell, not run yet. `longlive plan` compiles a stand-in for them, or
the one that is named.

Error recycling (appendix C) holds 2.4 GiB a device at 64 s and sp = 4 (`BufferSpec`); without it:
`--config.recycling=none`.

Cost and result: not measured, no GPU has run it. The same trainer made the small world's model.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("16s", "32s", "64s", "nvfp4")
MESHES = {"16s": dict(data=2, sp=4), "32s": dict(data=8, sp=4), "64s": dict(data=8, sp=4)}
CHUNKS = {"16s": 12, "32s": 24, "64s": 48}


def get_config(arg: str = "64s") -> ConfigDict:
    """Teacher forcing of the whole history, one prompt a chunk."""
    words = arg.split(",")
    length = next((word for word in words if word in MESHES), "64s")
    mesh = MESHES[length]
    return ConfigDict(
        dict(
            stage="clips",
            checkpoint="checkpoints/wan22_5b",
            clips=f"clips/{length}",
            batch=mesh["data"],
            mesh=mesh,
            dtype="bfloat16",
            quant=dict(policy="nvfp4_train" if "nvfp4" in words else "none"),
            remat=True,
            ffn_chunks=8,
            save_dtype="bfloat16",
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
