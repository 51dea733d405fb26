"""What a step of teacher forcing amounts to, by arithmetic: tokens, floating point operations."""

import dataclasses

from longlive_jax.models.wan import DiTConfig
from longlive_jax.training.task import StepCost


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiplications and additions of the matrix products of one forward pass, by part."""

    linears: float
    attention: float
    text: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.linears + self.attention + self.text


def pairs_seen(chunks: int, window: int | None = None) -> int:
    """Pairs of chunks of which one sees the other, clean and noisy together.

    Chunk k sees k clean chunks and itself, or as many as fit into a window.
    """
    most = chunks if window is None else window
    return 2 * sum(min(k + 1, most) for k in range(chunks))


def forward_flops(
    cfg: DiTConfig, *, chunks: int, chunk_tokens: int, window: int | None = None
) -> Flops:
    """Of one clip of `chunks`, clean and noisy; each chunk has a prompt of `cfg.text_len` rows."""
    return _forward(
        cfg,
        clean=chunks * chunk_tokens,
        noisy=chunks * chunk_tokens,
        seen=pairs_seen(chunks, window) * chunk_tokens**2,
        words=2 * chunks * cfg.text_len,
    )


def _forward(cfg: DiTConfig, *, clean: int, noisy: int, seen: int, words: int) -> Flops:
    """Of so many tokens, pairs of which one sees the other, and rows of text."""
    tokens = clean + noisy
    per_layer = 6 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim
    ends = 4 * (cfg.in_channels * tokens + cfg.out_channels * noisy) * cfg.dim
    return Flops(
        linears=2.0 * (cfg.layers * tokens * per_layer + ends),
        attention=4.0 * cfg.layers * cfg.dim * (seen + tokens * cfg.text_len),
        text=2.0 * words * (cfg.text_dim * cfg.dim + cfg.dim**2 + 2 * cfg.layers * cfg.dim**2),
    )


def clip_update_cost(
    cfg: DiTConfig, *, batch: int, chunks: int, chunk_tokens: int, window: int | None = None
) -> StepCost:
    """Of one update on clips."""
    flops = forward_flops(cfg, chunks=chunks, chunk_tokens=chunk_tokens, window=window)
    return _update(flops, batch, 2 * chunks * chunk_tokens)


def window_update_cost(
    cfg: DiTConfig, *, batch: int, context: int, target: int, chunk_tokens: int, window: int
) -> StepCost:
    """Of one update on episodes of so many context and target chunks, each of which attends as
    many as a window holds."""
    chunks = context + target
    flops = _forward(
        cfg,
        clean=context * chunk_tokens,
        noisy=target * chunk_tokens,
        seen=chunks * window * chunk_tokens**2,
        words=chunks * cfg.text_len,
    )
    return _update(flops, batch, chunks * chunk_tokens)


def _update(flops: Flops, batch: int, tokens: int) -> StepCost:
    """A backward pass is twice a forward pass; recomputation is not counted."""
    kinds = {kind: 3.0 * batch * part for kind, part in dataclasses.asdict(flops).items()}
    return StepCost(batch * tokens, 3.0 * batch * flops.total, kinds)
