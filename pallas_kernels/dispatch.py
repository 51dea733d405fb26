"""Choice of implementation: a named one runs or raises, only "auto" selects."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax

from pallas_kernels import tuned
from pallas_kernels.catalog import kernels_of
from pallas_kernels.digest import source_digest
from pallas_kernels.kernel import NAMES, Kernel

Implementation = Literal["auto", "reference", "xla", "cudnn", "mosaic"]


class Unsupported(NotImplementedError):
    """The named implementation cannot run these arguments on this machine; the message says why."""


class _AssumedDevice(NamedTuple):
    platform: str
    capability: str
    kind: str


_assumed: contextvars.ContextVar[_AssumedDevice | None] = contextvars.ContextVar(
    "assumed", default=None
)


@contextlib.contextmanager
def assumed_device(platform: str, capability: str = "", kind: str = "") -> Iterator[None]:
    """Inside it, implementations are chosen as on such a device, which need not be present."""
    token = _assumed.set(_AssumedDevice(platform, capability, kind))
    try:
        yield
    finally:
        _assumed.reset(token)


def platform() -> str:
    """The platform of the current default device: "cpu", "gpu" or "tpu".

    A function traced now will run there.
    """
    if (assumed := _assumed.get()) is not None:
        return assumed.platform
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def capability() -> str:
    """CUDA compute capability of the current default device ("9.0"), or "" without a GPU."""
    if (assumed := _assumed.get()) is not None:
        return assumed.capability
    return str(getattr(_device(), "compute_capability", ""))


def device_kind() -> str:
    """The model name of the current default device: "NVIDIA H200"."""
    if (assumed := _assumed.get()) is not None:
        return assumed.kind
    return str(_device().device_kind)


def _device() -> Any:
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device


def kernel_refusal(op: str, capability: str, *arguments: Any, **options: Any) -> str | None:
    """The reason why no kernel of `op` runs these arguments on a GPU of a capability, or None."""
    kernels = kernels_of(op, capability)
    if not kernels:
        here = f"compute capability {capability}" if capability else "no NVIDIA GPU"
        return f"there are kernels for {chips_of(op)}; this is {here}"
    reasons = [kernel.refusal(*arguments, **options) for kernel in kernels]
    return None if None in reasons else reasons[0]


def kernel_of(op: str) -> Kernel:
    """The record of the general form of `op` on the current device; `Unsupported` without one."""
    kernels = kernels_of(op, capability())
    if not kernels:
        raise Unsupported(f"{op}: {kernel_refusal(op, capability())}")
    return kernels[0]


def launch_of(op: str) -> Callable[..., Any]:
    """The function that runs the kernel of `op` on the current device."""
    launch = kernel_of(op).launch
    assert launch is not None, f"the records of {op} have no launch"
    return launch


def chips_of(op: str) -> str:
    """The names of the chips that have kernels of `op`: "Blackwell (sm_100)"."""
    chips = dict.fromkeys(chip for kernel in kernels_of(op) for chip in kernel.chips)
    return " and ".join(NAMES.get(chip, chip) for chip in chips) or "no chip"


def proven(op: str, *arguments: Any, **options: Any) -> bool:
    """Whether "auto" may take the kernels of `op` for these arguments on the current device.

    Each kernel that serves them must have been proven on this kind of device, with its present
    source, tile sizes and version of JAX, and must have been faster there than what "auto" takes
    otherwise. Only the records of `longlive kernels prove` say so; no setting overrules them.
    """
    if platform() not in ("gpu", "cuda") or not (kind := device_kind()):
        return False
    if not (tuned.PROVEN / tuned.file_name(kind)).is_file():
        return False
    chosen = [k for k in kernels_of(op, capability()) if k.covers(*arguments, **options)]
    return bool(chosen) and all(
        kernel.refusal(*arguments, **options) is None and is_proven(kernel, kind)
        for kernel in chosen
    )


def is_proven(kernel: Kernel, device: str) -> bool:
    """Whether a kernel, as it is now, is proven and faster than its peer on a kind of device."""
    proof = tuned.proof(kernel.name, device)
    return (
        proof.get("proven") is True
        and proof.get("faster") is True
        and proof.get("digest") == source_digest(kernel.modules)
        and proof.get("tiles") == tuned.tiles(kernel.name, device)
    )
