"""Cost of a teacher-forcing step in closed form: tokens and floating-point operations."""

import dataclasses
import re

import jax

from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan.remat import Remat
from longlive_jax.parallel.rules import path_of
from longlive_jax.training.task import StepCost
from longlive_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs (multiplications and additions) of the matrix products of one forward pass, by part.

    Attributes:
      linears: FLOPs of the linear layers on video tokens.
      attention: FLOPs of self-attention and cross-attention.
      text: FLOPs of the linear layers on text rows.
    """

    linears: float
    attention: float
    text: float

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.linears + self.attention + self.text


def visible_chunk_pairs(chunks: int, window: int | None = None) -> int:
    """Number of (query chunk, key chunk) pairs that the attention mask makes visible.

    It includes clean and noisy query chunks. Query chunk k attends to k clean chunks and itself, or
    to as many chunks as fit in the window.
    """
    limit = chunks if window is None else window
    return 2 * sum(min(k + 1, limit) for k in range(chunks))


def forward_flops(
    cfg: DiTConfig, *, chunks: int, chunk_tokens: int, window: int | None = None
) -> Flops:
    """FLOPs of one forward pass on a clip of `chunks` chunks, clean and noisy.

    Each chunk has a prompt of `cfg.text_len` rows.
    """
    return _forward(
        cfg,
        clean=chunks * chunk_tokens,
        noisy=chunks * chunk_tokens,
        visible_pairs=visible_chunk_pairs(chunks, window) * chunk_tokens**2,
        num_text_rows=2 * chunks * cfg.text_len,
    )


def _forward(
    cfg: DiTConfig, *, clean: int, noisy: int, visible_pairs: int, num_text_rows: int
) -> Flops:
    """FLOPs of one forward pass over these token, attention-pair and text-row counts."""
    tokens = clean + noisy
    per_layer = 6 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim
    ends = 4 * (cfg.in_channels * tokens + cfg.out_channels * noisy) * cfg.dim
    per_text_row = cfg.text_dim * cfg.dim + cfg.dim**2 + 2 * cfg.layers * cfg.dim**2
    return Flops(
        linears=2.0 * (cfg.layers * tokens * per_layer + ends),
        attention=4.0 * cfg.layers * cfg.dim * (visible_pairs + tokens * cfg.text_len),
        text=2.0 * num_text_rows * per_text_row,
    )


def recomputed_flops(cfg: DiTConfig, forward: Flops, remat: Remat, *, tokens: int) -> float:
    """FLOPs of a forward pass over `tokens` tokens that the backward pass repeats."""
    if remat == "none":
        return 0.0
    if remat == "everything":
        return forward.total
    attention_to_text = 4.0 * cfg.layers * cfg.dim * tokens * cfg.text_len
    return forward.total - (forward.attention - attention_to_text)


def clip_update_cost(
    cfg: DiTConfig,
    *,
    batch: int,
    chunks: int,
    chunk_tokens: int,
    window: int | None = None,
    adapter: Params | None = None,
) -> StepCost:
    """Cost of one update on a batch of full clips, of all parameters or of an adapter alone."""
    flops = forward_flops(cfg, chunks=chunks, chunk_tokens=chunk_tokens, window=window)
    tokens = 2 * chunks * chunk_tokens
    if adapter is None:
        return _update(flops, batch, tokens)
    return _adapter_update(flops, batch, tokens, adapter, 2 * chunks * cfg.text_len)


def window_update_cost(
    cfg: DiTConfig,
    *,
    batch: int,
    context: int,
    target: int,
    chunk_tokens: int,
    window: int,
    adapter: Params | None = None,
) -> StepCost:
    """Cost of one update on a batch of windows with `context` clean and `target` noisy chunks.

    Each chunk attends to `window` chunks. The update is of all parameters or of an adapter alone.
    """
    chunks = context + target
    flops = _forward(
        cfg,
        clean=context * chunk_tokens,
        noisy=target * chunk_tokens,
        visible_pairs=chunks * window * chunk_tokens**2,
        num_text_rows=chunks * cfg.text_len,
    )
    if adapter is None:
        return _update(flops, batch, chunks * chunk_tokens)
    rows = chunks * cfg.text_len
    return _adapter_update(flops, batch, chunks * chunk_tokens, adapter, rows)


def _update(flops: Flops, batch: int, tokens: int) -> StepCost:
    """Cost of an update: a backward pass costs two forward passes; recomputation is not counted."""
    kinds = {kind: 3.0 * batch * value for kind, value in dataclasses.asdict(flops).items()}
    return StepCost(batch * tokens, 3.0 * batch * flops.total, kinds)


def _adapter_update(
    flops: Flops, batch: int, tokens: int, adapter: Params, text_rows: int
) -> StepCost:
    """Cost of an update of an adapter: frozen matrices have no gradient, nor has what they compute
    from the text alone.
    """
    branches = 0.0
    for keys, x in jax.tree_util.tree_flatten_with_path(adapter)[0]:
        of_text = re.search("cross_attn/[kv]/", path_of(keys)) is not None
        branches += 2.0 * (text_rows if of_text else tokens) * x.size
    parts = {
        "linears": 2.0 * flops.linears,
        "attention": 3.0 * flops.attention,
        "text": flops.text,
        "adapter": 3.0 * branches,
    }
    kinds = {kind: batch * value for kind, value in parts.items()}
    return StepCost(batch * tokens, sum(kinds.values()), kinds)
