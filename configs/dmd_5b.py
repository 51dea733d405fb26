"""Distillation of an autoregressive Wan2.2-TI2V-5B to 4 or 2 steps, by LoRA (DMD, section 4.1).

    longlive data encode --texts_only --source=DATASET --checkpoint=checkpoints/ar_5b \\
        --text_dtype=bfloat16 --out=prompts/t2v
    longlive train --config=dmd_5b:t2v,nvfp4 --workdir=runs/dmd_5b --out=checkpoints/dmd_5b

Arguments: `t2v` (default), or `i2v` with first images (encode them by --first_images into
prompts/i2v); `two_step` for 2 steps; `nvfp4` for all three models in NVFP4. `nvfp4_student` packs
the student alone, `nvfp4_teacher` student and teacher: the rows of the paper's Table 2. Without
`nvfp4` the three models are separate, as there; `shared` lets student and critic be one.

The teacher is checkpoints/wan22_5b, the original model. With `--config.checkpoint` set to it as
well, the adapter suits any model of the family. The mesh is for 32 GPUs, one video on each; on one
GPU, set mesh.data=1, mesh.fsdp=1 and loop.accumulate=32.
Cost and result: not measured, no GPU has run it.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("t2v", "i2v", "nvfp4", "nvfp4_student", "nvfp4_teacher", "two_step", "shared")
PACKED = {
    "nvfp4": ("student", "teacher", "critic"),
    "nvfp4_student": ("student",),
    "nvfp4_teacher": ("student", "teacher"),
}
PREVIEW = (
    "A red fox trots along a snowy forest path at dawn, its breath visible in the cold air.",
    "A close-up of the red fox, which stops, pricks its ears and looks into the camera.",
)


def get_config(arg: str = "t2v") -> ConfigDict:
    """The hyper-parameters of the paper's appendix H."""
    options = [option for option in arg.split(",") if option]
    for choices in (("t2v", "i2v"), tuple(PACKED)):
        if len(chosen := [option for option in options if option in choices]) > 1:
            raise ValueError(f"choose one of {', '.join(choices)}, got {' and '.join(chosen)}")
    kind = "i2v" if "i2v" in options else "t2v"
    packed = next((roles for name, roles in PACKED.items() if name in options), ())
    optim = dict(name="adamw", b1=0.0, b2=0.999, weight_decay=0.01, clip=10.0)
    return ConfigDict(
        dict(
            stage="dmd",
            # Models.
            checkpoint="checkpoints/ar_5b",
            teacher="checkpoints/wan22_5b",
            lora=dict(rank=128),
            # Data and mesh.
            prompts=f"prompts/{kind}",
            image_to_video=kind == "i2v",
            chunks_per_shot=2,
            batch=32,
            mesh=dict(data=4, fsdp=8),
            # Precision and memory.
            dtype="bfloat16",
            stream_dtype="bfloat16",
            precision=dict.fromkeys(packed, "nvfp4_frozen"),
            share_backbones="nvfp4" in options or "shared" in options,
            remat="everything",
            ffn_chunks=8,
            save_dtype="bfloat16",
            # Losses.
            rollout=dict(steps=2 if "two_step" in options else 4, shift=5.0, chunks=4),
            scores=dict(guidance=4.0, shift=5.0, per_chunk=kind == "i2v"),
            # Optimization.
            generator_every=5,
            optim=optim | dict(lr=1e-5),
            critic_optim=optim | dict(lr=2e-6),
            loop=dict(
                steps=5000, log_every=10, eval_every=250, save_every=50, keep=3, accumulate=1
            ),
            # Sampled on one device at every evaluation, at 4 and at 2 steps.
            preview=dict(prompts=PREVIEW, seconds=2.5),
            preview_steps=(4, 2),
        )
    )
