"""What `longlive kernels prove` compares a kernel with, by operation, in the same run."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.bench import flex_attention
from pallas_kernels import nvfp4
from pallas_kernels.attention import attention
from pallas_kernels.attention.packed_kv import attention_packed
from pallas_kernels.dispatch import Implementation
from pallas_kernels.kernel import Kernel, bind
from pallas_kernels.nvfp4 import products
from pallas_kernels.nvfp4.format import dequantize_reference

FRAME_TOKENS, FRAMES, CHUNK = 880, 16, 8
"""Tokens of a frame, latent frames and frames of a chunk in the records' training mask."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another way to compute what a kernel computes.

    Attributes:
      name: "cudnn", "xla", "cuBLAS bfloat16".
      call: returns (function, arrays) to be jitted and timed.
      automatic: whether "auto" could take it instead of the kernel.
    """

    name: str
    call: Callable[[], tuple[Callable, tuple]]
    automatic: bool = False


def peers(kernel: Kernel, arguments: tuple) -> list[Peer]:
    """The peers of a kernel for its production arguments."""
    return PEERS.get(kernel.op, _reference)(kernel, arguments)


def outside(kernel: Kernel) -> dict[str, Any]:
    """Seconds of libraries that run in a process of their own, or the reason why not."""
    if kernel.op != "attention":
        return {}
    if "gradients" not in kernel.name:
        return {flex_attention.FLEX: "it is timed with the training mask only"}
    settings = {
        "frames": FRAMES, "frame": FRAME_TOKENS, "chunk": CHUNK, "heads": 24, "width": 128,
        "dtype": "bfloat16", "repeats": 10,
    }  # fmt: skip
    try:
        return {
            flex_attention.FLEX: flex_attention.run_in_process(settings)["forward_backward"][
                "median"
            ]
        }
    except flex_attention.CannotRun as reason:
        return {flex_attention.FLEX: str(reason)}


def _attention(kernel: Kernel, arguments: tuple) -> list[Peer]:
    """cuDNN, XLA and tokamax; with gradients if the arguments have them."""
    q, k, v, *grads, q_tokens, k_tokens = arguments

    def by(implementation: Implementation) -> Callable[[], tuple]:
        def run(*arrays: Any) -> Any:
            def forward(q: Any, k: Any, v: Any) -> Any:
                return attention(q, k, v, q_tokens, k_tokens, implementation=implementation)

            return _with_gradients(forward, arrays)

        return lambda: (run, (q, k, v, *grads[:1]))

    def tokamax() -> tuple[Callable, tuple]:
        if grads:
            raise NotImplementedError("it has no teacher-forcing mask")
        if importlib.util.find_spec("tokamax") is None:
            raise NotImplementedError("not installed")
        attend = importlib.import_module("tokamax").dot_product_attention
        return lambda *operands: attend(*operands, implementation="mosaic"), (q, k, v)

    return [
        Peer("cudnn", by("cudnn"), True),
        Peer("xla", by("xla"), True),
        Peer("tokamax", tokamax),
    ]


def _with_gradients(forward: Callable, arrays: tuple) -> Any:
    """The output, and the gradients of the operands if there is that of the output."""
    if len(arrays) == 3:
        return forward(*arrays)
    *operands, grad = arrays
    out, pull = jax.vjp(forward, *operands)
    return out, pull(grad)


def _attention_packed(kernel: Kernel, arguments: tuple) -> list[Peer]:
    def by(implementation: Implementation) -> Callable[[], tuple]:
        def run(*operands: Any) -> Any:
            *rest, offset = operands
            return attention_packed(*rest, offset=offset, implementation=implementation)

        return lambda: bind(run, arguments)

    return [Peer("cudnn", by("cudnn"), True), Peer("xla", by("xla"), True)]


def _reference(kernel: Kernel, arguments: tuple) -> list[Peer]:
    """What "xla" runs for operations that move data: the reference, compiled as one function."""
    return [Peer("xla", lambda: bind(kernel.oracle, arguments), True)]


def _matmul(kernel: Kernel, arguments: tuple) -> list[Peer]:
    """XLA's block-scaled product, and cuBLAS on operands dequantized beforehand."""
    a, b, *_ = arguments

    def automatic(a: Any, b: Any, bias: Any, *low_rank: Any) -> Any:
        pair: Any = low_rank or None
        return nvfp4.matmul(a, b, bias=bias, low_rank=pair, implementation="xla")

    def cublas(dtype: Any) -> Callable[[], tuple]:
        def call() -> tuple[Callable, tuple]:
            operands = (dequantize_reference(x, jnp.float32).astype(dtype) for x in (a, b))
            return _product, tuple(operands)

        return call

    return [
        Peer("xla", lambda: (automatic, arguments), True),
        Peer("jax.nn.scaled_matmul", lambda: (products.block_scaled, (a, b))),
        Peer("cuBLAS bfloat16", cublas(jnp.bfloat16)),
        Peer("cuBLAS FP8", cublas(jnp.float8_e4m3fn)),
    ]


def _product(x: Any, y: Any) -> Any:
    sums = jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return sums.astype(jnp.bfloat16)


PEERS: Mapping[str, Callable[[Kernel, tuple], list[Peer]]] = MappingProxyType(
    {"attention": _attention, "attention_packed": _attention_packed, "matmul": _matmul}
)
"""Operation -> its peers, for production arguments; others have only their reference."""
