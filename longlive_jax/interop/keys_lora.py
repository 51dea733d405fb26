"""Key table of LoRA adapters for the DiT, as written by PEFT.

In our tree, an adapter is a sibling of the kernel that it adapts: `blocks.self_attn.q.{a, b}` with
a `[layers, in, r]` and b `[layers, r, out]`. The merged kernel is `kernel + a @ b * alpha / r`.
"""

from longlive_jax.interop.keytable import KeyRule, KeyTable

__all__ = ["PEFT", "PEFT_PREFIX"]

PEFT_PREFIX = "base_model.model."

_MODULES = (
    ("{attn:self_attn|cross_attn}.{m:q|k|v|o}", "{attn}.{m}"),
    ("ffn.0", "ffn.up"),
    ("ffn.2", "ffn.down"),
)

PEFT = KeyTable(
    "LoRA, PEFT naming",
    tuple(
        KeyRule(
            f"{PEFT_PREFIX}blocks.{{layer}}.{theirs}.lora_{side}.weight",
            f"blocks.{ours}.{side.lower()}",
            "linear",
        )
        for theirs, ours in _MODULES
        for side in ("A", "B")
    ),
)
