"""Names of low-rank adapters of the DiT, as PEFT writes them.

In our tree an adapter sits where the kernel it changes sits: `blocks.self_attn.q.{a, b}` with
a `[layers, in, r]` and b `[layers, r, out]`, so that kernel + a @ b * alpha / r is the merged one.
"""

from longlive_jax.interop.keytable import KeyRule, KeyTable

PREFIX = "base_model.model."

_MODULES = (
    ("{attn:self_attn|cross_attn}.{m:q|k|v|o}", "{attn}.{m}"),
    ("ffn.0", "ffn.up"),
    ("ffn.2", "ffn.down"),
)

PEFT = KeyTable(
    "LoRA, PEFT naming",
    tuple(
        KeyRule(
            f"{PREFIX}blocks.{{layer}}.{theirs}.lora_{side}.weight",
            f"blocks.{ours}.{side.lower()}",
            "linear",
        )
        for theirs, ours in _MODULES
        for side in ("A", "B")
    ),
)
