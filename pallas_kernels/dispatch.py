"""Choice of implementation: a named one runs or raises, only "auto" selects."""

from typing import Any, Literal

import jax

Implementation = Literal["auto", "reference", "xla", "cudnn", "mosaic"]


class Unsupported(NotImplementedError):
    """The named implementation cannot run these arguments on this machine; the message says why."""


def platform() -> str:
    """The platform of the current default device: "cpu", "gpu" or "tpu".

    A function traced now will run there.
    """
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def capability() -> str:
    """CUDA compute capability of the current default device ("9.0"), or "" without a GPU."""
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return str(getattr(device, "compute_capability", ""))
