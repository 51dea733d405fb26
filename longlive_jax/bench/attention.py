"""Benchmark of attention with the teacher-forcing mask, with every implementation that runs here.

Speeds count useful work: the products of visible pairs, i.e. 4 operations per pair, head and
channel in the forward pass and 10 in the backward pass (recomputation does not count). They are
compared with the rate of a large matrix product measured in the same run, so that the load of the
machine cancels.
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
from pallas_kernels.attention import make_attention, select_implementation
from pallas_kernels.attention.tilemap import density, pad_tokens, tile_map
from pallas_kernels.dispatch import Implementation, Unsupported
from pallas_kernels.tokens import Tokens, visible

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "cudnn", "mosaic")
FLEX = "flex_attention"
LATENTS = 6  # latent frames per second: 24 frames, four per latent
TILE = 128  # queries and keys of a tile, for the reported density
WORK = {"forward": 4, "backward": 10, "forward_backward": 14}
"""Useful operations per visible pair, head and channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """A video of clean frames followed by noisy frames, masked as in training.

    Attributes:
      seconds: seconds of video, at 24 frames per second and four frames per latent.
      chunk_frames: latent frames per chunk.
      rows: token rows per frame.
      columns: token columns per frame.
      heads: attention heads.
      width: head width.
      dtype: dtype of queries, keys and values.
      repeats: number of timed calls, after one warm-up.
      product: size of the square matrix product that sets the reference rate.
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
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype {self.dtype!r}; choose bfloat16 or float32")
        if self.frames < 1 or self.frames % self.chunk_frames:
            near = max(1, round(self.frames / self.chunk_frames)) * self.chunk_frames / LATENTS
            raise ValueError(
                f"{self.seconds} seconds are {self.frames} latent frames, which is not a multiple "
                f"of {self.chunk_frames}; choose {near:.4g} seconds"
            )

    @property
    def frames(self) -> int:
        """Latent frames of the video."""
        return round(LATENTS * self.seconds)

    def tokens(self) -> Tokens:
        """The tokens of all clean frames, then of all noisy frames."""
        return teacher_forcing(self.frames, self.rows, self.columns, chunk_frames=self.chunk_frames)

    def pairs(self) -> int:
        """The number of visible pairs of a query and a key."""
        frames = teacher_forcing(self.frames, 1, 1, chunk_frames=self.chunk_frames)
        return int(np.sum(visible(frames, frames))) * (self.rows * self.columns) ** 2


SMALL = {
    "seconds": 8.0, "rows": 4, "columns": 6, "heads": 2, "width": 64, "dtype": "float32",
    "repeats": 3, "product": 1024,
}  # fmt: skip
"""Settings that take seconds on a CPU."""


def default_settings() -> dict[str, Any]:
    """Settings of `AttentionSpec` for this machine's backend."""
    return {} if jax.default_backend() == "gpu" else dict(SMALL)


def bench_attention(spec: AttentionSpec) -> dict[str, Any]:
    """Times all implementations; returns a JSON-serializable report.

    Each entry has seconds, useful operations per second, and their share of the measured rate of
    matrix products in the same dtype. `backward` is the time that the gradient adds to the forward
    pass. `not_run` holds the reasons why implementations were skipped.
    """
    # 1. Measure the rate of matrix products.
    about, tokens = machine(), spec.tokens()
    rates = {name: _product_rate(spec, name) for name in dict.fromkeys(("bfloat16", spec.dtype))}
    useful = {k: n * spec.pairs() * spec.heads * spec.width for k, n in WORK.items()}
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    # 2. Time the implementations that can run.
    for name in IMPLEMENTATIONS:
        why = refusal(spec, tokens, name)
        if why is None:
            results[name] = _with_rates(_times(spec, tokens, name), useful, rates[spec.dtype])
        else:
            skipped[name] = why
    # 3. Time PyTorch's flex_attention in its own process.
    try:
        other = flex_attention.run_in_process(_flex_settings(spec))
        results[FLEX] = _with_rates(other, useful, rates[spec.dtype])
    except flex_attention.CannotRun as error:
        skipped[FLEX] = str(error)
    return {
        "machine": about,
        "spec": report_settings(spec),
        "tokens": len(tokens),
        "useful_flop": useful,
        "pairs": pair_shares(spec, tokens),
        "matmul_flop_per_second": rates,
        "implementations": results,
        "not_run": skipped,
        "times_as_fast": _ratios(results),
        "peak": peak_memory(),
    }


def refusal(spec: AttentionSpec, tokens: Tokens, name: Implementation) -> str | None:
    """The reason why an implementation is skipped, or None."""
    x = jax.ShapeDtypeStruct((1, len(tokens), spec.heads, spec.width), spec.dtype)
    try:
        select_implementation(x, x, x, tokens, tokens, implementation=name)
    except Unsupported as error:
        return str(error)
    if name != "reference":
        return None
    needed, memory = 5 * 4 * spec.heads * len(tokens) ** 2, memory_bytes()
    if needed > memory / 2:
        return (
            f"dense logits need about {needed / 2**30:.0f} GiB, more than half of the "
            f"{memory / 2**30:.0f} GiB available"
        )
    return None


def memory_bytes() -> int:
    """Memory of the device, or of this host, in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _times(spec: AttentionSpec, tokens: Tokens, name: Implementation) -> dict[str, Any]:
    """Seconds of the forward pass, and of forward and backward passes together."""
    shape = (1, len(tokens), spec.heads, spec.width)
    *qkv, grad = (
        jax.random.normal(key, shape, spec.dtype) for key in jax.random.split(jax.random.key(0), 4)
    )
    attend = make_attention(tokens, tokens, implementation=name)

    def both(*arguments):
        *qkv, grad = arguments
        out, pull = jax.vjp(attend, *qkv)
        return out, pull(grad)

    forward, forward_backward = jax.jit(lambda *qkv: attend(*qkv)), jax.jit(both)
    return {
        "forward": repeated(lambda: forward(*qkv), spec.repeats),
        "forward_backward": repeated(lambda: forward_backward(*qkv, grad), spec.repeats),
    }


def _with_rates(times: dict[str, Any], useful: dict[str, int], rate: float) -> dict[str, Any]:
    """Times with rates of useful work; `backward` is the difference of medians."""
    seconds = {k: times[k]["median"] for k in ("forward", "forward_backward")}
    seconds["backward"] = max(seconds["forward_backward"] - seconds["forward"], 1e-9)
    speeds = {k: useful[k] / max(seconds[k], 1e-9) for k in WORK}
    return {
        "seconds": {**times, "backward": {"median": round(seconds["backward"], 5)}},
        "flop_per_second": {k: float(f"{x:.4g}") for k, x in speeds.items()},
        "share_of_matmul": {k: round(x / rate, 6) for k, x in speeds.items()},
    }


def _product_rate(spec: AttentionSpec, dtype: str) -> float:
    """Operations per second of a square matrix product."""
    n = spec.product
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    product = jax.jit(
        lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)
    )
    return float(f"{2 * n**3 / repeated(lambda: product(a, b), spec.repeats)['least']:.4g}")


def pair_shares(spec: AttentionSpec, tokens: Tokens) -> dict[str, Any]:
    """Fractions of all pairs: visible ones, and those in tiles that a kernel visits."""
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


def _ratios(results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The speedup of each implementation over each other one."""

    def ratio(a: str, b: str) -> dict[str, float]:
        speeds = (results[name]["flop_per_second"] for name in (a, b))
        ours, theirs = speeds
        return {k: round(ours[k] / theirs[k], 3) for k in WORK}

    return {a: {b: ratio(a, b) for b in results if b != a} for a in results}
