"""Key tables of the UMT5 encoder: Wan's own naming, and transformers' (used by diffusers)."""

from collections.abc import Mapping
from typing import Any

from longlive_jax.interop.keytable import KeyRule, KeyTable
from longlive_jax.io.arrays import Shape, TreePath
from longlive_jax.models.umt5.config import UMT5Config

__all__ = ["ORIGINAL", "TRANSFORMERS", "config_of"]

ORIGINAL = KeyTable(
    "UMT5 encoder, Wan naming",
    (
        KeyRule("token_embedding.weight", "token_embedding.embedding"),
        KeyRule("blocks.{layer}.norm{i:1|2}.weight", "blocks.norm{i}.scale"),
        KeyRule("blocks.{layer}.attn.{m:q|k|v|o}.weight", "blocks.attn.{m}.kernel", "linear"),
        KeyRule("blocks.{layer}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", "linear"),
        KeyRule("blocks.{layer}.ffn.{m:fc1|fc2}.weight", "blocks.ffn.{m}.kernel", "linear"),
        KeyRule("blocks.{layer}.pos_embedding.embedding.weight", "blocks.pos_embedding.embedding"),
        KeyRule("norm.weight", "norm.scale"),
    ),
)

_ATTENTION = "encoder.block.{layer}.layer.0"
_FEED_FORWARD = "encoder.block.{layer}.layer.1"

TRANSFORMERS = KeyTable(
    "UMT5 encoder, transformers naming",
    (
        KeyRule("shared.weight", "token_embedding.embedding"),
        KeyRule(f"{_ATTENTION}.layer_norm.weight", "blocks.norm1.scale"),
        KeyRule(
            f"{_ATTENTION}.SelfAttention.{{m:q|k|v|o}}.weight", "blocks.attn.{m}.kernel", "linear"
        ),
        KeyRule(
            f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
            "blocks.pos_embedding.embedding",
        ),
        KeyRule(f"{_FEED_FORWARD}.layer_norm.weight", "blocks.norm2.scale"),
        KeyRule(f"{_FEED_FORWARD}.DenseReluDense.wi_0.weight", "blocks.ffn.gate.kernel", "linear"),
        KeyRule(f"{_FEED_FORWARD}.DenseReluDense.wi_1.weight", "blocks.ffn.fc1.kernel", "linear"),
        KeyRule(f"{_FEED_FORWARD}.DenseReluDense.wo.weight", "blocks.ffn.fc2.kernel", "linear"),
        KeyRule("encoder.final_layer_norm.weight", "norm.scale"),
    ),
    # A copy of shared.weight, which some versions of transformers write too.
    ignore=("encoder.embed_tokens.weight",),
)


def config_of(shapes: Mapping[TreePath, Shape], **settings: Any) -> UMT5Config:
    """The config of an encoder whose parameters have the given shapes.

    Args:
      shapes: shapes by path in the parameter tree.
      **settings: values of the fields that do not follow from shapes: dtypes, `max_distance` and
        `eps` (the latter two are the same in all published UMT5 models).

    Raises ValueError if one of the arrays that determine the config is missing.
    """
    try:
        vocab_size, dim = shapes["token_embedding", "embedding"]
        layers, _, dim_attn = shapes["blocks", "attn", "q", "kernel"]
        ffn_dim = shapes["blocks", "ffn", "fc1", "kernel"][-1]
        _, buckets, heads = shapes["blocks", "pos_embedding", "embedding"]
    except KeyError as error:
        raise ValueError(
            f"not the weights of a UMT5 encoder: {'/'.join(error.args[0])} is missing"
        ) from error
    return UMT5Config(
        vocab_size,
        dim,
        dim_attn,
        ffn_dim,
        heads=heads,
        layers=layers,
        buckets=buckets,
        **settings,
    )
