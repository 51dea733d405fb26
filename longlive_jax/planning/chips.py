"""Data-sheet figures of GPUs, and the descriptions that XLA's compiler needs of them.

XLA compiles for a GPU from a description of it, so the GPU need not be present. Only the
architecture and the memory size decide how a program uses memory.
"""

import dataclasses
import math

from longlive_jax.spec import UserError, nearest

__all__ = ["CHIPS", "Chip", "get_chip"]

_CUDA = "major: 13 minor: 0 patch: 0"
_CUDNN = "9.15.0"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU model.

    Attributes:
      name: full product name.
      capability: CUDA compute capability (major, minor).
      multiprocessors: number of streaming multiprocessors.
      memory_bytes: size of the device memory.
      memory_bandwidth: bandwidth of the device memory, bytes per second.
      l2_bytes: size of the level-2 cache.
      clock_ghz: clock rate, GHz.
      bf16_flops: dense bfloat16 FLOP/s of the tensor cores.
      gpus_per_host: GPUs per host in the usual systems.
      shared_bytes: shared memory of a multiprocessor; a block may have 1 KiB less.
      threads: most threads of a multiprocessor.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    memory_bandwidth: int
    l2_bytes: int
    clock_ghz: float
    bf16_flops: float
    gpus_per_host: int
    shared_bytes: int = 233_472
    threads: int = 2048

    @property
    def compute_capability(self) -> str:
        """The compute capability as JAX's devices have it, such as "9.0"."""
        return ".".join(map(str, self.capability))

    def topology(self, devices: int) -> str:
        """XLA's topology string, `slices x hosts x GPUs per host`, for `devices` GPUs."""
        per_host = math.gcd(devices, self.gpus_per_host)
        return f"1x{devices // per_host}x{per_host}"

    def description(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        features = "feature_extension: ACCELERATED_FEATURES" if self.capability >= (9, 0) else ""
        # The other limits below are the same for Ada, Hopper and Blackwell.
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.shared_bytes - 1024}
  threads_per_core_limit: {self.threads}
  core_count: {self.multiprocessors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  ecc_enabled: true
  name: "{self.name}"
  cuda_compute_capability {{
    major: {major} minor: {minor} {features}
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
    "l40s": Chip(
        "NVIDIA L40S", (8, 9), 142, 48_305_799_168, 864_000_000_000, 100_663_296, 2.52,
        0.362e15, 8, 102_400, 1536,
    ),
    "rtx4090": Chip(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 25_757_220_864, 1_008_000_000_000, 75_497_472, 2.52,
        0.165e15, 1, 102_400, 1536,
    ),
}  # fmt: skip
"""GPU models by their `--chip` name."""


def get_chip(name: str) -> Chip:
    """The GPU model called `name` in `CHIPS`.

    Raises UserError with the nearest known name if there is none.
    """
    if name not in CHIPS:
        raise UserError(f"--chip: unknown chip {name!r}{nearest(name, CHIPS)}")
    return CHIPS[name]
