"""`Kernel`: all that the project knows about one GPU kernel, in one record.

The catalog collects the records of `pallas_kernels/*/mosaic/records.py`. `longlive kernels check`
and `prove`, the benchmark, dispatch, the table in the documentation and the tests' parameters are
derived from them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tokens import Tokens

Build = Callable[[], tuple[Callable, tuple]]
"""Builds a kernel call: (callable, abstract arguments)."""
HOPPER, BLACKWELL = ("sm_90a",), ("sm_100a",)
CHIPS = {"9.0": "sm_90a", "10.0": "sm_100a", "10.3": "sm_100a"}
"""CUDA compute capability -> architecture that kernels are written for."""
NAMES = {"sm_90a": "Hopper (sm_90)", "sm_100a": "Blackwell (sm_100)"}
"""Architecture -> its name in messages."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One input of a kernel's test body.

    Attributes:
      name: what is special about the input: "no keys", "one row".
      build: returns concrete arguments of `Kernel.run`, small enough for the interpreter.
      slow: whether another case or kernel runs the same code on the same kind of input, so that
        only the long tests need it.
      launches: kernels that it launches; None for those of the record.
    """

    name: str
    build: Callable[[], tuple]
    slow: bool = False
    launches: int | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least work of a call, whatever the implementation.

    Attributes:
      bytes: bytes read and written once.
      flops: operations of the products.
      exponentials: exponentials of the softmax.
      flops_format: format of the products' operands: "bfloat16" or "nvfp4".
    """

    bytes: int
    flops: int = 0
    exponentials: int = 0
    flops_format: str = "bfloat16"


def _always(*arguments: Any, **options: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or the few kernels that one call launches.

    Attributes:
      name: unique name.
      op: operation that it implements, as `dispatch` knows it.
      chips: target architectures ("sm_90a", "sm_100a").
      build: a call at the 5B model's sizes, to compile.
      refusal: the reason in words why it cannot run arguments of the operation, or None.
      run: the call: `run(*arguments, interpret=None, **tiles)`.
      oracle: what `run(*arguments)` must return, computed without the kernel.
      cases: inputs of the test body.
      tiles: tile size -> values that `kernels prove --tune` tries; each is an option of `run`.
      cost: least work of `run(*arguments)`; arguments may be abstract.
      instructions: patterns of SASS instructions that the machine code must contain.
      production: concrete arguments at the 5B model's sizes, to prove and time.
      modules: modules of the kernel and of its launch; a proof covers their source and imports.
      tolerance: largest error relative to the oracle in the interpreter, in the Frobenius norm; 0
        for equal bits.
      device_tolerance: the same on a GPU, whose divisions and sums round differently.
      launches: kernels that a call launches.
      not_interpreted: the reason why the interpreter cannot run it, or None.
      covers: whether a proof of this form holds for arguments of the operation.
      launch: what the operation's function calls, with arguments of its own, to run the kernel.
        All forms of an operation on a chip have the same; attention has `target` instead.
      target: the kernels and tile sizes of a chip, for attention; None for other operations.
    """

    name: str
    op: str
    chips: tuple[str, ...]
    build: Build
    refusal: Callable[..., str | None]
    run: Callable
    oracle: Callable
    cases: tuple[Case, ...]
    tiles: Mapping[str, tuple]
    cost: Callable[..., Cost]
    instructions: tuple[str, ...]
    production: Callable[[], tuple]
    modules: tuple[str, ...]
    tolerance: float = 0.0
    device_tolerance: float = 0.0
    launches: int = 1
    not_interpreted: str | None = None
    covers: Callable[..., bool] = _always
    launch: Callable | None = None
    target: Any = None


def bind(run: Callable, arguments: tuple, **options: Any) -> tuple[Callable, tuple]:
    """(function of the arrays, arrays): `run` with its `Tokens` and None arguments fixed.

    A mask must be known at trace time to cost no work, so tokens are not arguments of a jitted
    function.
    """
    traced = [i for i, x in enumerate(arguments) if not (x is None or isinstance(x, Tokens))]

    def call(*arrays: Any) -> Any:
        every = list(arguments)
        for i, array in zip(traced, arrays, strict=True):
            every[i] = array
        return run(*every, **options)

    return call, tuple(arguments[i] for i in traced)


def error(got: Any, want: Any) -> float:
    """The largest relative error of any result, in the Frobenius norm.

    0 for equal bits, infinity where only one of two values is finite or NaN.
    """
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(_array_error(a, b) for a, b in pairs)


def _array_error(got: Any, want: Any) -> float:
    if got.shape != want.shape:
        return float("inf")
    a, b = (jnp.asarray(x).astype(jnp.float32) for x in (got, want))
    same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
    if bool(same.all()):
        return 0.0
    different = jnp.where(same, 0.0, a - b)
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(b), b, 0.0))
    relative = float(jnp.linalg.norm(different) / jnp.maximum(size, 1e-30))
    return relative if relative == relative else float("inf")


def abstract(build: Callable[[], tuple]) -> tuple:
    """The arguments that `build` would return, with shapes instead of arrays.

    `Tokens` keep their values, from which the cost of a mask follows.
    """
    fixed: dict[int, Any] = {}

    def arrays() -> tuple:
        arguments = build()
        fixed.update({i: x for i, x in enumerate(arguments) if x is None or isinstance(x, Tokens)})
        return tuple(x for i, x in enumerate(arguments) if i not in fixed)

    shapes = list(jax.eval_shape(arrays))
    for i in sorted(fixed):
        shapes.insert(i, fixed[i])
    return tuple(shapes)
