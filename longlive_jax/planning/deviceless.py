"""Compile jitted programs, Pallas kernels included, for an NVIDIA GPU that is not here.

XLA and Mosaic compile against a description of the chip; ptxas and nvdisasm then say what a kernel
really is: registers, spills, tensor-core instructions. This needs ptxas, nvdisasm and the CUDA
plugin of JAX's own version, in the environment or in a folder beside its packages
(`setup_compiler` in launch/setup.sh): among them it would complain of the missing GPU whenever JAX
starts. Mosaic takes one chip a process, and its settings are read when JAX is imported, so every
check runs in a process of its own.
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

from longlive_jax.planning.chips import chip_of

SHARED_MEMORY = 232_448
"""Most bytes of shared memory one block may ask for, on Hopper and on Blackwell."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory of a multiprocessor, on Blackwell."""
PLUGIN = pathlib.Path(sys.prefix) / "compile"
"""Where the plugin and nvdisasm are, if not among the environment's packages."""


def refusal() -> str | None:
    """Why nothing can be compiled here, or None."""
    if tool("ptxas") is None:
        return "no ptxas: install a CUDA toolkit, or its compiler by `pip install -e '.[plan]'`"
    if tool("nvdisasm") is None:
        return "no nvdisasm: install a CUDA toolkit, or `pip install nvidia-cuda-nvdisasm`"
    if not (PLUGIN / "jax_plugins" / "xla_cuda13").is_dir() and not _installed():
        return "no CUDA plugin of JAX: `pip install -e '.[plan]'` (no GPU needed)"
    return None


def tool(name: str) -> pathlib.Path | None:
    """A program of the CUDA toolkit: on PATH, or among the packages."""
    found = shutil.which(name)
    if found:
        return pathlib.Path(found)
    places = (PLUGIN, pathlib.Path(sysconfig.get_path("purelib")))
    return next((p for place in places for p in place.glob(f"nvidia/*/bin/{name}")), None)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


def prepare() -> pathlib.Path:
    """Sets what JAX reads at import; returns the folder that Mosaic dumps to. Call it first."""
    if "jax" in sys.modules:
        raise RuntimeError("deviceless.prepare() comes before the first import of jax")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mosaic_"))
    tools = folder / "cuda" / "bin"
    tools.mkdir(parents=True)
    sys.path.append(str(PLUGIN))
    for name in ("ptxas", "nvlink", "nvdisasm"):
        if (found := tool(name)) is not None:
            (tools / name).symlink_to(found)
    dump = folder / "dump"
    dump.mkdir()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_ROOT"] = str(tools.parent)  # where Mosaic looks for the tools
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
    return dump


def compile_for(
    chip: str, fn: Any, *arguments: Any, options: Mapping[str, Any] | None = None
) -> Any:
    """`jax.jit(fn)` compiled for one device of a chip ("gb200"); ShapeDtypeStructs will do.
    `options` are the compiler's."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=chip_of(chip).description(), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.default_device(mesh.devices.flat[0]):  # tells Mosaic the architecture
        lowered = jax.jit(fn, in_shardings=place, out_shardings=place).lower(*arguments)
        return lowered.compile(compiler_options=dict(options or {}))


def inspect(dump: pathlib.Path, *patterns: str) -> list[dict[str, Any]]:
    """What the compilers said of each kernel in a dump folder: its architecture, registers,
    spills, bytes of shared memory, columns of tensor memory, tensor-core instructions, how often
    each instruction occurs that fits one of `patterns`, and the patterns that none fits."""
    return [_inspect(p, patterns) for p in sorted(dump.glob("*.ptxas"))]


def _inspect(ptxas: pathlib.Path, patterns: Sequence[str]) -> dict[str, Any]:
    said = ptxas.read_text(errors="replace")
    taken = ptxas.with_suffix(".resources.txt").read_text()
    sass = ptxas.with_suffix(".sass_ctrl").read_text(errors="replace")
    mma = re.findall(r"\b(UTC[A-Z]*MMA|HGMMA|QGMMA|HMMA)\b", sass)
    words = collections.Counter(re.findall(r"\b[A-Z][A-Z0-9]+(?:\.\w+)*", sass))
    fitting = {p: {w: n for w, n in words.items() if re.match(p, w)} for p in patterns}

    def number(pattern: str, text: str) -> int:
        return sum(int(x) for x in re.findall(pattern, text))

    return {
        "architecture": re.findall(r"for '(sm_\w+)'", said)[-1],
        "registers": number(r"Used (\d+) registers", said),
        "spilled_bytes": number(r"(\d+) bytes spill", said),
        "shared_bytes": number(r"smem_scratch_bytes=(\d+)", taken),
        "tensor_columns": number(r"tmem_(?:collective_)?scratch_cols=(\d+)", taken),
        "tensor_core": dict(collections.Counter(mma)),
        "instructions": dict(collections.ChainMap(*fitting.values())),
        "lacking": [pattern for pattern, found in fitting.items() if not found],
    }
