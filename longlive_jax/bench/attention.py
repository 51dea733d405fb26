"""Attention alone, on teacher forcing: every implementation that runs here, in one run.

Speeds are of useful work: the products of the pairs that are visible, four operations a pair, head
and channel forward and ten backward (no recomputation counted). They are held against the rate of
one large matrix product, measured in the same run, so that a slow or shared machine cancels.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.bench import flex_attention
from longlive_jax.bench.timing import machine, peak_memory, repeated, report_settings
from longlive_jax.layout import teacher_forcing
from pallas_kernels.attention import lay_out, which
from pallas_kernels.attention.tilemap import density, pad_tokens, tile_map
from pallas_kernels.dispatch import Implementation, Unsupported
from pallas_kernels.tokens import Tokens, visible

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "cudnn", "mosaic")
FLEX = "flex_attention"
LATENTS = 6  # latent frames of a second: 24 frames, four in a latent
TILE = 128  # of queries and of keys, for the density that is reported
WORK = {"forward": 4, "backward": 10, "forward_backward": 14}
"""Useful operations a visible pair, head and channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One video, all clean frames and then all noisy ones, each seen as in training.

    Attributes:
      seconds: of video, at 24 frames a second and four frames a latent.
      chunk_frames: latent frames of a chunk.
      rows, columns: tokens of a frame.
      heads, width: of the attention.
      dtype: of queries, keys and values.
      repeats: calls that are timed, after one that is not.
      product: size of the square matrix product whose rate is the measure.
    """

    seconds: float = 16.0
    chunk_frames: int = 8
    rows: int = 22
    columns: int = 40
    heads: int = 24
    width: int = 128
    dtype: str = "bfloat16"
    repeats: int = 10
    product: int = 8192

    def __post_init__(self) -> None:
        for name in ("chunk_frames", "rows", "columns", "heads", "width", "repeats", "product"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype {self.dtype!r}; choose bfloat16 or float32")
        if self.frames < 1 or self.frames % self.chunk_frames:
            near = max(1, round(self.frames / self.chunk_frames)) * self.chunk_frames / LATENTS
            raise ValueError(
                f"{self.seconds} seconds are {self.frames} latent frames, no whole number of "
                f"chunks of {self.chunk_frames}; choose {near:.4g}"
            )

    @property
    def frames(self) -> int:
        """Latent frames of the video."""
        return round(LATENTS * self.seconds)

    def tokens(self) -> Tokens:
        """Clean, then noisy."""
        return teacher_forcing(self.frames, self.rows, self.columns, chunk_frames=self.chunk_frames)

    def pairs(self) -> int:
        """Visible pairs of a query and a key."""
        frames = teacher_forcing(self.frames, 1, 1, chunk_frames=self.chunk_frames)
        return int(np.sum(visible(frames, frames))) * (self.rows * self.columns) ** 2


SMALL = {
    "seconds": 8.0, "rows": 4, "columns": 6, "heads": 2, "width": 64, "dtype": "float32",
    "repeats": 3, "product": 1024,
}  # fmt: skip
"""What a CPU does in seconds."""


def default_settings() -> dict[str, Any]:
    """Settings of `AttentionSpec` that suit this machine."""
    return {} if jax.default_backend() == "gpu" else dict(SMALL)


def bench_attention(spec: AttentionSpec) -> dict[str, Any]:
    """Times all implementations; the report is ready for JSON and says why others were left out.

    Each entry has seconds, operations a second on useful work, and the share of the measured rate
    of matrix products in the same dtype. Backward is what the gradient adds to the forward pass.
    """
    about, tokens = machine(), spec.tokens()
    rates = {name: _product_rate(spec, name) for name in dict.fromkeys(("bfloat16", spec.dtype))}
    useful = {k: n * spec.pairs() * spec.heads * spec.width for k, n in WORK.items()}
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in IMPLEMENTATIONS:
        why = _refusal(spec, tokens, name)
        if why is None:
            found[name] = _judged(_times(spec, tokens, name), useful, rates[spec.dtype])
        else:
            left_out[name] = why
    try:
        other = flex_attention.in_a_process(_flex_settings(spec))
        found[FLEX] = _judged(other, useful, rates[spec.dtype])
    except flex_attention.CannotRun as error:
        left_out[FLEX] = str(error)
    return {
        "machine": about,
        "spec": report_settings(spec),
        "tokens": len(tokens),
        "useful_flop": useful,
        "pairs": _pairs(spec, tokens),
        "matmul_flop_per_second": rates,
        "implementations": found,
        "not_run": left_out,
        "times_as_fast": _ratios(found),
        "peak": peak_memory(),
    }


def _refusal(spec: AttentionSpec, tokens: Tokens, name: Implementation) -> str | None:
    """Why an implementation is left out, or None."""
    x = jax.ShapeDtypeStruct((1, len(tokens), spec.heads, spec.width), spec.dtype)
    try:
        which(x, x, x, tokens, tokens, implementation=name)
    except Unsupported as error:
        return str(error)
    if name != "reference":
        return None
    needed, there = 5 * 4 * spec.heads * len(tokens) ** 2, _memory()
    if needed > there / 2:
        return (
            f"dense logits need about {needed / 2**30:.0f} GiB, half of {there / 2**30:.0f} serve"
        )
    return None


def _memory() -> int:
    """Bytes that the device, or this host, has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _times(spec: AttentionSpec, tokens: Tokens, name: Implementation) -> dict[str, Any]:
    """Seconds of the forward pass, and of it with the gradients of queries, keys and values."""
    shape = (1, len(tokens), spec.heads, spec.width)
    *qkv, grad = (
        jax.random.normal(key, shape, spec.dtype) for key in jax.random.split(jax.random.key(0), 4)
    )
    attend = lay_out(tokens, tokens, implementation=name)

    def both(*arguments):
        *qkv, grad = arguments
        out, pull = jax.vjp(attend, *qkv)
        return out, pull(grad)

    forward, forward_backward = jax.jit(lambda *qkv: attend(*qkv)), jax.jit(both)
    return {
        "forward": repeated(lambda: forward(*qkv), spec.repeats),
        "forward_backward": repeated(lambda: forward_backward(*qkv, grad), spec.repeats),
    }


def _judged(times: dict[str, Any], useful: dict[str, int], rate: float) -> dict[str, Any]:
    """Times with speeds; `backward` is the difference of medians."""
    seconds = {k: times[k]["median"] for k in ("forward", "forward_backward")}
    seconds["backward"] = max(seconds["forward_backward"] - seconds["forward"], 1e-9)
    speeds = {k: useful[k] / max(seconds[k], 1e-9) for k in WORK}
    return {
        "seconds": {**times, "backward": {"median": round(seconds["backward"], 5)}},
        "flop_per_second": {k: float(f"{x:.4g}") for k, x in speeds.items()},
        "share_of_matmul": {k: round(x / rate, 6) for k, x in speeds.items()},
    }


def _product_rate(spec: AttentionSpec, dtype: str) -> float:
    """Operations a second of one square matrix product."""
    n = spec.product
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    product = jax.jit(
        lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)
    )
    return float(f"{2 * n**3 / repeated(lambda: product(a, b), spec.repeats)['least']:.4g}")


def _pairs(spec: AttentionSpec, tokens: Tokens) -> dict[str, Any]:
    """Shares of all pairs: visible ones, and those of tiles that a kernel visits."""
    padded = pad_tokens(tokens, TILE)
    tiles = tile_map(padded, padded, q_tile=TILE, k_tile=TILE, rows="query")
    visited = density(tiles, tiles.count.shape[1])
    return {
        "visible": round(spec.pairs() / len(tokens) ** 2, 4),
        "visited": round(visited, 4),
        "tile": TILE,
    }


def _flex_settings(spec: AttentionSpec) -> dict[str, Any]:
    settings = report_settings(spec)
    return {**settings, "frames": spec.frames, "frame": spec.rows * spec.columns}


def _ratios(found: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast each implementation is as each other one."""

    def ratio(a: str, b: str) -> dict[str, float]:
        speeds = (found[name]["flop_per_second"] for name in (a, b))
        ours, theirs = speeds
        return {k: round(ours[k] / theirs[k], 3) for k in WORK}

    return {a: {b: ratio(a, b) for b in found if b != a} for a in found}
