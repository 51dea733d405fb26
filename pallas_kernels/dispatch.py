"""Choosing an implementation: a named one runs or raises, only "auto" chooses."""

from typing import Literal

import jax

Implementation = Literal["auto", "reference", "xla", "cudnn", "mosaic"]


class Unsupported(NotImplementedError):
    """The named implementation cannot run these arguments on this machine; the message says why."""


def platform() -> str:
    """The platform that a function traced now will run on: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
