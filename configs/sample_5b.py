"""Sampling with Wan2.2-TI2V-5B and the released LongLive 2.0 weights.

    longlive convert --source=PATH/TO/WEIGHTS --out=checkpoints/5b
    longlive sample --config=sample_5b --script=shots.yaml --out=out/5b

Argument: the kind of checkpoint. `distilled` (default, 4 steps), `two_step` (2 steps), or `ar`
(before distillation: 50 steps, guidance 3).

Memory (computed, bfloat16, without guidance): 36 GiB plus the VAE's activations. These are weights
23, KV cache 8, and text keys and values of 24 prompts 5 GiB.
Cost and result: not measured; no GPU has run this config.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("distilled", "two_step", "ar")

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(arg: str = "distilled") -> ConfigDict:
    """Sampling settings; other fields have the defaults of `SampleSpec`."""
    changes = {
        "distilled": {"steps": 4},
        "two_step": {"steps": 2},
        "ar": {"steps": 50, "guidance": 3.0, "negative_prompt": NEGATIVE_PROMPT},
    }
    if "," in arg:
        raise ValueError(f"choose one of {', '.join(ARGUMENTS)}, got {arg!r}")
    return ConfigDict({"checkpoint": "checkpoints/5b", "sample": changes[arg or "distilled"]})
