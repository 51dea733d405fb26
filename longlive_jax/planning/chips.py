"""GPUs by the figures of their data sheets, and their descriptions for XLA's compiler.

XLA compiles for a GPU that is not there from a description of it. What decides how a program uses
memory is the architecture and the size of the memory.
"""

import dataclasses
import math

from longlive_jax.spec import UserError, nearest

__all__ = ["CHIPS", "Chip", "chip_of"]

_CUDA = "major: 13 minor: 0 patch: 0"
_CUDNN = "9.15.0"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU.

    Attributes:
      name: in full.
      capability: CUDA compute capability.
      cores: multiprocessors.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      cache: bytes of level 2.
      clock: GHz.
      flops: dense bfloat16 operations a second of the tensor cores.
      per_host: GPUs of one host, as they are sold.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    cache: int
    clock: float
    flops: float
    per_host: int

    def topology(self, devices: int) -> str:
        """`slices x hosts x GPUs of a host`, as XLA asks for it."""
        here = math.gcd(devices, self.per_host)
        return f"1x{devices // here}x{here}"

    def description(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  ecc_enabled: true
  name: "{self.name}"
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES
  }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "{_CUDNN}"
}}
platform_name: "CUDA"
runtime_version {{ {_CUDA} }}
dnn_version_info {{ major: 9 minor: 15 patch: 0 }}
device_description_str: "{self.name}"
"""


CHIPS = {
    "gb200": Chip(
        "NVIDIA GB200", (10, 0), 152, 197_897_748_480, 7_928_064_000_000, 135_528_448, 2.062,
        2.5e15, 4,
    ),
    "b200": Chip(
        "NVIDIA B200", (10, 0), 148, 191_500_000_000, 7_700_000_000_000, 132_644_864, 1.965,
        2.25e15, 8,
    ),
    "h200": Chip(
        "NVIDIA H200", (9, 0), 132, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98,
        0.989e15, 8,
    ),
    "h100": Chip(
        "NVIDIA H100", (9, 0), 132, 84_929_347_584, 3_352_320_000_000, 52_428_800, 1.98,
        0.989e15, 8,
    ),
}  # fmt: skip
"""By the name of the command line."""


def chip_of(name: str) -> Chip:
    """The chip of that name; UserError names the nearest."""
    if name not in CHIPS:
        raise UserError(f"--chip: unknown chip {name!r}{nearest(name, CHIPS)}")
    return CHIPS[name]
