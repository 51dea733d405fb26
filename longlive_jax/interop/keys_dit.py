"""Key tables of the DiT: Wan's own naming, including LongLive's packed kernels, and diffusers'."""

from longlive_jax.interop import released
from longlive_jax.interop.keytable import KeyRule, KeyTable

__all__ = ["DIFFUSERS", "ORIGINAL"]


def _linear(key: str, path: str) -> list[KeyRule]:
    return [
        KeyRule(f"{key}.weight", f"{path}.kernel", "linear"),
        KeyRule(f"{key}.bias", f"{path}.bias"),
    ]


def _patch() -> list[KeyRule]:
    return [
        KeyRule("patch_embedding.weight", "patch_embedding.kernel", "patch_embedding"),
        KeyRule("patch_embedding.bias", "patch_embedding.bias"),
    ]


def _quantizable(key: str, path: str) -> list[KeyRule]:
    """Rules of a linear layer that LongLive's packed checkpoints store in NVFP4."""
    return [*_linear(key, path), *released.key_rules(key, path)]


_BLOCK = "blocks.{layer}"
_ATTENTION = "{attn:self_attn|cross_attn}"

ORIGINAL = KeyTable(
    "Wan DiT (original naming)",
    [
        *_patch(),
        *_linear("text_embedding.0", "text_embedding.fc1"),
        *_linear("text_embedding.2", "text_embedding.fc2"),
        *_linear("time_embedding.0", "time_embedding.fc1"),
        *_linear("time_embedding.2", "time_embedding.fc2"),
        *_linear("time_projection.1", "time_projection"),
        KeyRule("head.modulation", "head.modulation", "drop_first"),
        *_linear("head.head", "head.linear"),
        KeyRule(f"{_BLOCK}.modulation", "blocks.modulation", "drop_first"),
        *_quantizable(f"{_BLOCK}.{_ATTENTION}.{{m:q|k|v|o}}", "blocks.{attn}.{m}"),
        KeyRule(f"{_BLOCK}.{_ATTENTION}.norm_{{m:q|k}}.weight", "blocks.{attn}.norm_{m}.scale"),
        KeyRule(f"{_BLOCK}.norm3.weight", "blocks.norm3.scale"),
        KeyRule(f"{_BLOCK}.norm3.bias", "blocks.norm3.bias"),
        *_quantizable(f"{_BLOCK}.ffn.0", "blocks.ffn.up"),
        *_quantizable(f"{_BLOCK}.ffn.2", "blocks.ffn.down"),
    ],
)


def _diffusers_attention(theirs: str, ours: str) -> list[KeyRule]:
    return [
        *_linear(f"{_BLOCK}.{theirs}.to_{{m:q|k|v}}", f"blocks.{ours}.{{m}}"),
        *_linear(f"{_BLOCK}.{theirs}.to_out.0", f"blocks.{ours}.o"),
        KeyRule(f"{_BLOCK}.{theirs}.norm_{{m:q|k}}.weight", f"blocks.{ours}.norm_{{m}}.scale"),
    ]


DIFFUSERS = KeyTable(
    "Wan DiT (diffusers naming)",
    [
        *_patch(),
        *_linear("condition_embedder.text_embedder.linear_{m:1|2}", "text_embedding.fc{m}"),
        *_linear("condition_embedder.time_embedder.linear_{m:1|2}", "time_embedding.fc{m}"),
        *_linear("condition_embedder.time_proj", "time_projection"),
        KeyRule("scale_shift_table", "head.modulation", "drop_first"),
        *_linear("proj_out", "head.linear"),
        KeyRule(f"{_BLOCK}.scale_shift_table", "blocks.modulation", "drop_first"),
        *_diffusers_attention("attn1", "self_attn"),
        *_diffusers_attention("attn2", "cross_attn"),
        KeyRule(f"{_BLOCK}.norm2.weight", "blocks.norm3.scale"),
        KeyRule(f"{_BLOCK}.norm2.bias", "blocks.norm3.bias"),
        *_linear(f"{_BLOCK}.ffn.net.0.proj", "blocks.ffn.up"),
        *_linear(f"{_BLOCK}.ffn.net.2", "blocks.ffn.down"),
    ],
)
