"""Fine-tunes an AR model of Wan2.2-TI2V-5B on own clips with a LoRA, on one GPU of 24 to 48 GB.

    longlive train --config=lora_5b:nvfp4 --config.videos=CLIPS --workdir=runs/lora_5b \\
        --out=checkpoints/lora_5b

The model in `checkpoint` is frozen, in bfloat16 (`bf16`), in FP8 (`fp8`) or in NVFP4 (`nvfp4`), and
stays as it is; `--out` gets the adapter. Clips have 32 latent frames of 704x1280 pixels.
Cost: not measured, no GPU has run it; `longlive plan` estimated 31 GiB of 45 on an L40S for `bf16`.
Result: not measured.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("bf16", "fp8", "nvfp4")
POLICIES = {"bf16": "none", "fp8": "fp8", "nvfp4": "nvfp4_frozen"}


def get_config(arg: str = "bf16") -> ConfigDict:
    """Fine-tuning with a frozen model in this precision; `videos` is set on the command line."""
    return ConfigDict(
        dict(
            stage="clips",
            # Data.
            checkpoint="checkpoints/wan22_5b",
            clips=None,
            videos=None,
            cut=dict(size=(704, 1280), chunks=4, windows=0, pad=True),
            batch=1,
            # The adapter, precision and memory.
            lora=dict(rank=64),
            quant=dict(policy=POLICIES[arg or "bf16"]),
            dtype="bfloat16",
            stream_dtype="bfloat16",
            remat="everything",
            ffn_chunks=8,
            save_dtype="bfloat16",
            # Loss and optimization.
            loss=dict(shift=5.0, weighting="bell", text_dropout=0.1),
            optim=dict(name="adamw", lr=1e-4, b1=0.9, b2=0.999, warmup=20, decay=0.0, clip=1.0),
            ema=None,
            loop=dict(steps=1000, log_every=10, save_every=250),
        )
    )
