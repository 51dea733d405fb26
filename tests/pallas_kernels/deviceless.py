"""Compile jitted programs, Pallas kernels included, for an NVIDIA GPU that is not here.

XLA and Mosaic compile against a description of the chip; ptxas and nvdisasm then say what a kernel
really is: registers, spills, tensor-core instructions. This needs ptxas, and the CUDA plugin of
JAX's own version in a folder beside the environment's packages (`setup_compiler` in
launch/setup.sh): among them it would complain of the missing GPU whenever JAX starts. Mosaic takes
one chip a process, and its settings are read when JAX is imported, so every check runs in a process
of its own.
"""

import collections
import dataclasses
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the compiler has to know; figures of the public data sheets."""

    name: str
    capability: tuple[int, int]
    sms: int
    memory: int  # bytes
    bandwidth: int  # bytes a second
    l2: int  # bytes
    clock: float  # GHz

    def description(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        version = "{ major: 13 minor: 0 patch: 0 }"
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {self.sms}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {SHARED_MEMORY}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  ecc_enabled: true
  name: "{self.name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.15.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 15 patch: 0 }}
runtime_version {version}
device_description_str: "{self.name}"
"""


SHARED_MEMORY = 232_448
"""Most bytes of shared memory one block may ask for, on Hopper and on Blackwell."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory of a multiprocessor, on Blackwell."""

CHIPS = {
    "h100": Chip(
        "NVIDIA H100", (9, 0), 132, 84_929_347_584, 3_352_320_000_000, 52_428_800, 1.98
    ),
    "h200": Chip(
        "NVIDIA H200", (9, 0), 132, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98
    ),
    "b200": Chip(
        "NVIDIA B200", (10, 0), 148, 191_500_000_000, 7_700_000_000_000, 132_644_864, 1.965
    ),
    "gb200": Chip(
        "NVIDIA GB200", (10, 0), 152, 197_897_748_480, 7_928_064_000_000, 135_528_448, 2.062
    ),
}  # fmt: skip


PLUGIN = pathlib.Path(sys.prefix) / "compile"
"""Where the plugin and nvdisasm are."""


def refusal() -> str | None:
    """Why nothing can be compiled here, or None."""
    if shutil.which("ptxas") is None:
        return "no ptxas on PATH"
    if not (PLUGIN / "jax_plugins" / "xla_cuda13").is_dir():
        return f"no CUDA plugin of JAX in {PLUGIN.name}/ of this environment (launch/setup.sh)"
    return None


def prepare() -> pathlib.Path:
    """Sets what JAX reads at import; returns the folder that Mosaic dumps to. Call it first."""
    if "jax" in sys.modules:
        raise RuntimeError("deviceless.prepare() comes before the first import of jax")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mosaic_"))
    tools = folder / "cuda" / "bin"
    tools.mkdir(parents=True)
    sys.path.append(str(PLUGIN))
    for name in ("ptxas", "nvlink", "nvdisasm"):
        found = shutil.which(name) or next(PLUGIN.glob(f"nvidia/*/bin/{name}"), None)
        if found:
            (tools / name).symlink_to(found)
    dump = folder / "dump"
    dump.mkdir()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_ROOT"] = str(tools.parent)  # where Mosaic looks for the tools
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
    return dump


def compile_for(chip: str, fn: Any, *arguments: Any) -> Any:
    """`jax.jit(fn)` compiled for one device of `chip`; arguments may be ShapeDtypeStructs."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=CHIPS[chip].description(), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.default_device(mesh.devices.flat[0]):  # tells Mosaic the architecture
        lowered = jax.jit(fn, in_shardings=place, out_shardings=place).lower(*arguments)
        return lowered.compile()


def inspect(dump: pathlib.Path) -> list[dict[str, Any]]:
    """What the compilers said of each kernel in a dump folder: its architecture, registers,
    spills, bytes of shared memory, columns of tensor memory, and tensor-core instructions."""
    return [_inspect(p) for p in sorted(dump.glob("*.ptxas"))]


def _inspect(ptxas: pathlib.Path) -> dict[str, Any]:
    said = ptxas.read_text(errors="replace")
    taken = ptxas.with_suffix(".resources.txt").read_text()
    sass = ptxas.with_suffix(".sass_ctrl").read_text(errors="replace")
    mma = re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|QGMMA|HMMA)\b", sass)

    def number(pattern: str, text: str) -> int:
        return sum(int(x) for x in re.findall(pattern, text))

    return {
        "architecture": re.findall(r"for '(sm_\w+)'", said)[-1],
        "registers": number(r"Used (\d+) registers", said),
        "spilled_bytes": number(r"(\d+) bytes spill", said),
        "shared_bytes": number(r"smem_scratch_bytes=(\d+)", taken),
        "tensor_columns": number(r"tmem_scratch_cols=(\d+)", taken),
        "tensor_core": dict(collections.Counter(mma)),
    }
