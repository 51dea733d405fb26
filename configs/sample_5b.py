"""Sampling with Wan2.2-TI2V-5B and the released LongLive 2.0 weights.

    longlive convert --source=PATH/TO/WEIGHTS --out=checkpoints/5b
    longlive sample --config=configs/sample_5b.py --script=shots.yaml --out=out/5b

The argument says which model the checkpoint holds: `distilled` (the default, 4 steps), `two_step`,
or `ar` (before distillation: 50 steps, guidance 3). By arithmetic, bfloat16 without guidance takes
36 GiB and what the VAE works in: weights 23, cache 8, keys and values of 24 prompts 5.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("distilled", "two_step", "ar")

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(arg: str = "distilled") -> ConfigDict:
    """Sampling settings; what is not said here is the default of `SampleSpec`."""
    changes = {
        "distilled": {"steps": 4},
        "two_step": {"steps": 2},
        "ar": {"steps": 50, "guidance": 3.0, "negative_prompt": NEGATIVE_PROMPT},
    }
    return ConfigDict({"checkpoint": "checkpoints/5b", "sample": changes[arg or "distilled"]})
