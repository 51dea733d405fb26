"""Benchmark of single NVFP4 and FP8 operations, with every implementation that runs here.

Speeds count useful work: bytes that must be read and written once, or operations of the product.
They are compared with the rates of memory copies and matrix products measured on this device in the
same run, and with plain `jnp` under `jit` ("reference"), so that the load of the machine cancels.
"bfloat16" is the product or attention of unpacked values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.bench import nvfp4_bytes
from longlive_jax.bench.timing import machine, peak_memory, repeated
from longlive_jax.planning.chips import get_chip
from longlive_jax.quant.packed import pack_kernel
from longlive_jax.quant.policy import Format
from longlive_jax.typing import Array
from pallas_kernels.attention import attention
from pallas_kernels.attention.packed_kv import attention_packed
from pallas_kernels.dispatch import Implementation, Unsupported
from pallas_kernels.nvfp4 import NVFP4, dequantize, matmul, quantize

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "mosaic")
PLAIN = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4Spec:
    """Sizes of the benchmark; the defaults are one chunk of the 5B model at 704x1280.

    Attributes:
      rows: tokens that are multiplied with a matrix.
      inputs: input channels of the matrix, a multiple of 16.
      outputs: output channels of the matrix.
      slots: packed chunks of the KV cache.
      tokens: tokens per chunk.
      heads: attention heads.
      width: head width, a multiple of 16.
      calls: calls per measurement, without waiting in between; times are per call.
      repeats: number of measurements, after one warm-up.
      product: size of the square matrix product whose rate is the compute limit.
      copy: MiB copied to measure the memory limit.
      bytes: count the bytes of a linear in compiled programs instead (`nvfp4_bytes.count`).
      chip: GPU to compile for, with `bytes`.
    """

    rows: int = 7040
    inputs: int = 3072
    outputs: int = 14336
    slots: int = 3
    tokens: int = 7040
    heads: int = 24
    width: int = 128
    calls: int = 20
    repeats: int = 10
    product: int = 8192
    copy: int = 1024
    bytes: bool = False
    chip: str = "gb200"

    def __post_init__(self) -> None:
        get_chip(self.chip)
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be >= 1, got {getattr(self, field.name)}")
        for name in ("inputs", "width"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {getattr(self, name)}")


SMALL = {
    "rows": 256, "inputs": 512, "outputs": 768, "slots": 2, "tokens": 96, "heads": 4, "width": 64,
    "calls": 1, "repeats": 3, "product": 1024, "copy": 64,
}  # fmt: skip
"""Settings that take seconds on a CPU."""


def default_settings() -> dict[str, Any]:
    """Settings of `NVFP4Spec` for this machine's backend."""
    return {} if jax.default_backend() == "gpu" else dict(SMALL)


@dataclasses.dataclass(frozen=True)
class Op:
    """One benchmarked operation.

    Attributes:
      work: useful bytes or floating-point operations per call.
      unit: "bytes" or "flop".
      ways: implementation name -> function of `arguments`.
      arguments: arguments of the implementations.
      plain: arguments of the implementation "bfloat16".
    """

    work: float
    unit: str
    ways: Mapping[str, Callable[..., Any]]
    arguments: tuple
    plain: tuple = ()


def bench_nvfp4(spec: NVFP4Spec) -> dict[str, Any]:
    """Times all operations; returns a JSON-serializable report.

    `not_run` holds the reasons why implementations were skipped. With `spec.bytes`, the report is
    that of `nvfp4_bytes.count`.
    """
    if spec.bytes:
        return nvfp4_bytes.count(spec.chip)
    about, limits = machine(), _limits(spec)
    operations: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, make in OPERATIONS.items():
        op = make(spec)
        rows: dict[str, Any] = {}
        for way, function in op.ways.items():
            arguments = op.plain if way == PLAIN else op.arguments
            try:
                seconds = _seconds(spec, function, arguments)
            except Unsupported as error:
                skipped[f"{name}/{way}"] = str(error)
                continue
            rows[way] = _with_rates(op, seconds, limits)
        operations[name] = {"unit": op.unit, "work": op.work, "ways": _with_speedups(rows)}
    return {
        "machine": about,
        "spec": dataclasses.asdict(spec),
        "limits": limits,
        "operations": operations,
        "not_run": skipped,
        "peak": peak_memory(),
    }


def _seconds(spec: NVFP4Spec, function: Callable[..., Any], arguments: tuple) -> dict[str, float]:
    """Seconds per call; several calls are in flight at once, which hides launch overhead."""
    compiled = jax.jit(function)

    def calls() -> Any:
        result = None
        for _ in range(spec.calls):
            result = compiled(*arguments)
        return result

    times = repeated(calls, spec.repeats)
    return {k: x if k == "repeats" else x / spec.calls for k, x in times.items()}


def _limits(spec: NVFP4Spec) -> dict[str, float]:
    """Measured limits: bytes/s of a copy or a negation (the faster one), FLOP/s of products."""
    x = jnp.ones(spec.copy * 2**18, jnp.float32)
    fastest = min(_seconds(spec, f, (x,))["least"] for f in (jnp.copy, jnp.negative))
    limits = {"bytes": 2 * x.nbytes / max(fastest, 1e-9)}
    for dtype in ("bfloat16", "float32"):
        a, b = (_normal(i, spec.product, spec.product, dtype=dtype) for i in range(2))
        seconds = _seconds(spec, jnp.matmul, (a, b))["least"]
        limits[f"flop_{dtype}"] = 2 * spec.product**3 / max(seconds, 1e-9)
    limits["flop"] = max(limits["flop_bfloat16"], limits["flop_float32"])
    return {k: float(f"{x:.4g}") for k, x in limits.items()}


def _with_rates(op: Op, seconds: dict[str, float], limits: Mapping[str, float]) -> dict[str, Any]:
    """Times with the rate of useful work and its share of the limit."""
    rate = op.work / max(seconds["median"], 1e-9)
    return {
        "seconds": {k: float(f"{x:.4g}") for k, x in seconds.items()},
        "per_second": float(f"{rate:.4g}"),
        "share_of_limit": round(rate / limits[op.unit], 4),
    }


def _with_speedups(rows: dict[str, Any]) -> dict[str, Any]:
    """Adds the speedups over "reference" and over "bfloat16" to each row."""
    for base in ("reference", PLAIN):
        if base in rows:
            slow = rows[base]["per_second"]
            for row in rows.values():
                row[f"times_{base}"] = round(row["per_second"] / slow, 3)
    return rows


def _normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _packed_bytes(size: int) -> float:
    """Bytes of the codes and scales of `size` values."""
    return size * (1 / 2 + 1 / 16)


def _by(function: Callable[..., Any], **settings: Any) -> dict[str, Callable[..., Any]]:
    """The function bound to each implementation, by name."""

    def bind(name: Implementation) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments, implementation=name, **settings)

    return {name: bind(name) for name in IMPLEMENTATIONS}


def _quantize(spec: NVFP4Spec) -> Op:
    """Quantization of activations with a given amax."""
    x = _normal(0, spec.rows, spec.inputs)
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32)

    def call(x: Array, amax: Array, implementation: Implementation) -> NVFP4:
        return quantize(x, amax=amax, implementation=implementation)

    return Op(2 * x.size + _packed_bytes(x.size), "bytes", _by(call), (x, amax))


def _dequantize(spec: NVFP4Spec) -> Op:
    """Dequantization of a matrix to bfloat16."""
    a = quantize(_normal(0, spec.outputs, spec.inputs))
    return Op(2 * a.size + _packed_bytes(a.size), "bytes", _by(dequantize), (a,))


def _matmul(spec: NVFP4Spec) -> Op:
    """The product of packed matrices; "bfloat16" is the product of the unpacked ones."""
    x, w = _normal(0, spec.rows, spec.inputs), _normal(1, spec.outputs, spec.inputs)
    ways = _by(matmul) | {PLAIN: lambda x, w: x @ w.T}
    flop = 2 * spec.rows * spec.inputs * spec.outputs
    return Op(flop, "flop", ways, (quantize(x), quantize(w)), (x, w))


def _linear(spec: NVFP4Spec) -> Op:
    """A linear layer with activations quantized on the fly, in FP8 and in NVFP4."""
    x, bias = _normal(0, spec.rows, spec.inputs), _normal(1, spec.outputs)
    kernel = _normal(2, spec.inputs, spec.outputs)
    four, eight = pack_kernel(kernel, Format()), pack_kernel(kernel, Format(kind="fp8"))
    ways: dict[str, Callable[..., Any]] = {
        PLAIN: lambda x, kernel, bias: x @ kernel + bias,
        "fp8": lambda x, _, eight, bias: eight.product(x, bias),
        "nvfp4": lambda x, four, _, bias: four.product(x, bias),
    }
    flop = 2 * spec.rows * spec.inputs * spec.outputs
    return Op(flop, "flop", ways, (x, four, eight, bias), (x, kernel, bias))


def _packed_window(spec: NVFP4Spec, seed: int) -> NVFP4:
    shape = (1, spec.slots, spec.tokens, spec.heads, spec.width)
    return quantize(_normal(seed, *shape), lead=2)


def _kv_dequantize(spec: NVFP4Spec) -> Op:
    """Dequantization of the keys of a window to bfloat16."""
    past = _packed_window(spec, 0)
    return Op(2 * past.size + _packed_bytes(past.size), "bytes", _by(dequantize), (past,))


def _kv_attention(spec: NVFP4Spec) -> Op:
    """Attention of a chunk to itself and to a packed window ("bfloat16": to an unpacked one)."""
    own = [_normal(i, 1, spec.tokens, spec.heads, spec.width) for i in range(3)]
    k, v = _packed_window(spec, 3), _packed_window(spec, 4)
    unpacked = [
        jnp.concatenate([part, dequantize(past).reshape(1, -1, *part.shape[2:])], axis=1)
        for part, past in ((own[1], k), (own[2], v))
    ]
    ways: dict[str, Callable[..., Any]] = {
        "unpacked": lambda *x: attention_packed(*x),
        "mosaic": lambda *x: attention_packed(*x, implementation="mosaic"),
        PLAIN: lambda q, k, v: attention(q, k, v),
    }
    flop = 4 * spec.tokens**2 * (spec.slots + 1) * spec.heads * spec.width
    return Op(flop, "flop", ways, (*own, k, v), (own[0], *unpacked))


OPERATIONS: Mapping[str, Callable[[NVFP4Spec], Op]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "matmul": _matmul,
    "linear": _linear,
    "kv_dequantize": _kv_dequantize,
    "kv_attention": _kv_attention,
}
"""Operation -> its builder, in the order of the report."""
