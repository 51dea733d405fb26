"""Compiles jitted programs, Pallas kernels included, for an NVIDIA GPU that is not present.

XLA and Mosaic compile against a description of the chip. ptxas and nvdisasm then report what became
of a kernel: registers, spills, tensor-core instructions. This needs ptxas, nvdisasm and the CUDA
plugin of JAX's own version, either in the environment or in a folder next to its packages
(`setup_compiler` in launch/setup.sh): inside the environment, the plugin makes JAX warn about the
missing GPU at every start. Mosaic compiles for only one chip per process, and its settings are read
when JAX is imported, so every check runs in a process of its own.
"""

import collections
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.planning.chips import get_chip
from longlive_jax.planning.kernel_facts import facts

SHARED_MEMORY = 232_448
"""Shared memory that one block may request at most, bytes, on Hopper and on Blackwell."""
TENSOR_COLUMNS = 512
"""Tensor-memory columns of a Blackwell multiprocessor."""
PLUGIN = pathlib.Path(sys.prefix) / "compile"
"""Where the plugin and nvdisasm are, if they are not among the environment's packages."""


def refusal() -> str | None:
    """Why nothing can be compiled on this machine, or None if it can."""
    if tool("ptxas") is None:
        return "no ptxas: install a CUDA toolkit, or its compiler by `pip install -e '.[plan]'`"
    if tool("nvdisasm") is None:
        return "no nvdisasm: install a CUDA toolkit, or `pip install nvidia-cuda-nvdisasm`"
    if not (PLUGIN / "jax_plugins" / "xla_cuda13").is_dir() and not _installed():
        return "no CUDA plugin of JAX: `pip install -e '.[plan]'` (no GPU needed)"
    return None


def tool(name: str) -> pathlib.Path | None:
    """Path of a CUDA toolkit program, from PATH or from the installed packages; None if missing."""
    if path := shutil.which(name):
        return pathlib.Path(path)
    folders = (PLUGIN, pathlib.Path(sysconfig.get_path("purelib")))
    return next((p for folder in folders for p in folder.glob(f"nvidia/*/bin/{name}")), None)


def _installed() -> bool:
    """Whether the CUDA plugin is among the environment's packages."""
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


def prepare() -> pathlib.Path:
    """Sets the environment that JAX reads at import, and returns the folder Mosaic dumps to.

    Raises RuntimeError if JAX has been imported already.
    """
    if "jax" in sys.modules:
        raise RuntimeError("call deviceless.prepare() before the first import of jax")
    # 1. Put the CUDA tools into one folder.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mosaic_"))
    tools = folder / "cuda" / "bin"
    tools.mkdir(parents=True)
    sys.path.append(str(PLUGIN))
    for name in ("ptxas", "nvlink", "nvdisasm"):
        if (path := tool(name)) is not None:
            (tools / name).symlink_to(path)
    # 2. Point JAX and Mosaic at it.
    dump = folder / "dump"
    dump.mkdir()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_ROOT"] = str(tools.parent)  # where Mosaic looks for the tools
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
    return dump


def compile_for(
    chip: str, fn: Any, *arguments: Any, options: Mapping[str, Any] | None = None
) -> Any:
    """Compiles `jax.jit(fn)` for one device of a chip.

    Args:
      chip: name in `CHIPS`, such as "gb200".
      fn: function to compile.
      *arguments: its arguments; ShapeDtypeStructs suffice.
      options: XLA compiler options.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=get_chip(chip).description(), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.default_device(mesh.devices.flat[0]):  # gives Mosaic the architecture
        lowered = jax.jit(fn, in_shardings=sharding, out_shardings=sharding).lower(*arguments)
        return lowered.compile(compiler_options=dict(options or {}))


def inspect(dump: pathlib.Path, *patterns: str) -> list[dict[str, Any]]:
    """Resources and instructions of every kernel in a dump folder, as ptxas and nvdisasm report.

    Args:
      dump: folder that `prepare` returned, after compiling.
      *patterns: regular expressions of instructions to look for.

    Returns:
      For every kernel, a dict of
      kernel: stem of its files in the dump.
      architecture: target of ptxas, such as "sm_100a".
      registers: registers of a thread.
      spilled_bytes: bytes of register spills.
      shared_bytes: bytes of shared memory.
      tensor_columns: columns of tensor memory.
      tensor_core: number of tensor-core instructions by name.
      instructions: number of instructions that match a pattern, by name.
      lacking: patterns that no instruction matches.
      facts: what a step of each warpgroup costs, see `kernel_facts.facts`.
      unread: why there are no facts, or None.
    """
    return [_inspect(p, patterns) for p in sorted(dump.glob("*.ptxas"))]


def _inspect(ptxas: pathlib.Path, patterns: Sequence[str]) -> dict[str, Any]:
    # 1. Read the compilers' reports.
    log = ptxas.read_text(errors="replace")
    resources = ptxas.with_suffix(".resources.txt").read_text()
    sass = ptxas.with_suffix(".sass_ctrl").read_text(errors="replace")
    mma = re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|QGMMA|HMMA)\b", sass)
    mnemonics = collections.Counter(re.findall(r"\b[A-Z][A-Z0-9]+(?:\.\w+)*", sass))
    matches = {p: {w: n for w, n in mnemonics.items() if re.match(p, w)} for p in patterns}

    def total(pattern: str, text: str) -> int:
        return sum(int(x) for x in re.findall(pattern, text))

    # 2. Count what a step of each warpgroup costs, and collect the resources.
    architecture = re.findall(r"for '(sm_\w+)'", log)[-1]
    registers = total(r"Used (\d+) registers", log)
    counted, unread = None, None
    try:
        counted = facts(ptxas.parent, ptxas.stem, architecture, registers)
    except (ValueError, KeyError) as error:
        unread = f"{type(error).__name__}: {error}"
    return {
        "kernel": ptxas.stem,
        "architecture": architecture,
        "registers": registers,
        "spilled_bytes": total(r"(\d+) bytes spill", log),
        "shared_bytes": total(r"smem_scratch_bytes=(\d+)", resources),
        "tensor_columns": total(r"tmem_(?:collective_)?scratch_cols=(\d+)", resources),
        "tensor_core": dict(collections.Counter(mma)),
        "instructions": dict(collections.ChainMap(*matches.values())),
        "lacking": [pattern for pattern, counts in matches.items() if not counts],
        "facts": counted,
        "unread": unread,
    }
