"""Peak memory of `longlive convert` and `export` on synthetic weights in the shapes of the 5B DiT.

    python -m longlive_jax.bench.convert_memory [--layers 10] [--dtype bfloat16] [--folder DIR]

Writes the weights as sharded safetensors and as a PyTorch file, converts both, exports the first
checkpoint and converts the export, checks that all checkpoints have the same bits, and prints one
JSON object. Each step runs in its own process, whose peak resident memory is read from the
operating system. Needs about four times the size of the weights on disk (3.2 GiB for 10 layers in
bfloat16); the files are removed at the end.
"""

import argparse
import functools
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longlive_jax.interop.keytable import Leaf

COMMAND_WITH_PEAK = """
import resource, sys
from longlive_jax.cli.app import run
code = run(sys.argv[1:])
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
kib = int(peak[0]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"PEAK {kib / 2**20:.3f}")
raise SystemExit(code)
"""
"""Python program that runs a `longlive` command line and prints its peak memory in GiB."""


def tensor_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """State-dict keys and shapes of a DiT with the widths of Wan2.2-TI2V-5B."""
    from longlive_jax.interop import keys_dit
    from longlive_jax.interop.components import COMPONENTS, expected_shapes
    from longlive_jax.interop.export import slice_shape
    from longlive_jax.io.arrays import flatten
    from longlive_jax.models.wan import DiTConfig

    shapes = expected_shapes(COMPONENTS["dit"], DiTConfig(layers=layers)) or flatten({})
    return {
        key: tensor_shape(leaf, slice_shape(leaf))
        for leaf in keys_dit.ORIGINAL.backward(shapes)
        for key in leaf.keys
    }


def tensor_shape(leaf: "Leaf", shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf's tensors in the file, given the shape of one layer."""
    import numpy as np

    return leaf.to_tensor(np.broadcast_to(np.zeros((), np.uint8), shape)).shape


def torch_zip(path: Path, tensors: dict[str, tuple[tuple[int, ...], str, Callable]]) -> None:
    """Writes a state dict {name: (shape, storage type, make bytes)} in PyTorch's zip format.

    It is independent of `interop.torch_writer`, so that tests of the reader can use it.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(torch_pickle(tensors)))
        archive.writestr("archive/byteorder", "little")
        for i, (_, _, make) in enumerate(tensors.values()):
            with archive.open(f"archive/data/{i}", "w", force_zip64=True) as member:
                member.write(make())
        archive.writestr("archive/version", "3\n")


def torch_pickle(tensors: dict[str, tuple[tuple[int, ...], str, Callable]]) -> Iterator[bytes]:
    """The pickle stream (protocol 2) of a flat state dict of contiguous tensors."""

    # Opcodes that push a string, an integer, and a tuple of integers.
    def string(text: str) -> bytes:
        return b"X" + struct.pack("<I", len(text.encode())) + text.encode()

    def integer(number: int) -> bytes:
        raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def integers(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, numbers)) + b"t"

    # A dictionary from names to calls of `_rebuild_tensor_v2`.
    yield b"\x80\x02}("
    for i, (name, (shape, storage, _)) in enumerate(tensors.items()):
        strides: list[int] = []
        count = 1
        for size in reversed(shape):
            strides.insert(0, count)
            count *= size
        yield string(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        yield b"(" + string("storage") + f"ctorch\n{storage}\n".encode()
        yield string(str(i)) + string("cpu")
        yield integer(count) + b"tQ" + integer(0) + integers(shape) + integers(tuple(strides))
        yield b"\x89ccollections\nOrderedDict\n)RtR"
    yield b"u."


def make_files(folder: Path, layers: int, dtype: str) -> None:
    """Writes the same weights as sharded safetensors and as a PyTorch file."""
    import ml_dtypes
    import numpy as np

    from longlive_jax.interop.safetensors_file import OutputTensor, write_safetensors

    element = np.dtype(getattr(ml_dtypes, dtype, dtype))
    noise = np.random.default_rng(0).standard_normal(2**25, np.float32).astype(element)

    def make(shape: tuple[int, ...], seed: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.resize(np.roll(noise[: 2**25 - 7919 * seed], seed), size).reshape(shape)

    # 1. safetensors.
    shapes = list(tensor_shapes(layers).items())
    tensors = {
        name: OutputTensor(shape, element, functools.partial(make, shape, i))
        for i, (name, shape) in enumerate(shapes)
    }
    (folder / "wan").mkdir()
    write_safetensors(folder / "wan", "diffusion_pytorch_model", tensors, shard_bytes=10**9)
    # 2. PyTorch.
    storage = {"bfloat16": "BFloat16Storage", "float32": "FloatStorage"}[dtype]
    torch_tensors = {
        f"model.{name}": (shape, storage, lambda s=shape, i=i: make(s, i).tobytes())
        for i, (name, shape) in enumerate(shapes)
    }
    torch_zip(folder / "model.pt", torch_tensors)


def measure_command(*arguments: str) -> dict[str, float]:
    """Peak memory and time of one `longlive` command line, run in its own process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", COMMAND_WITH_PEAK, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"longlive {' '.join(arguments)} failed: {process.stderr[-2000:]}")
    peak = float(process.stdout.rpartition("PEAK ")[2].split()[0])
    return {"peak_rss_gib": peak, "seconds": round(time.perf_counter() - start, 1)}


def same_bits(folder: Path, a: str, b: str) -> bool:
    """Whether two checkpoints in a folder have the same array fingerprints."""
    arrays = [json.loads((folder / n / "longlive.json").read_text())["arrays"] for n in (a, b)]
    return arrays[0] == arrays[1]


def largest_array(folder: Path) -> float:
    """Size in GiB of the largest (stacked) array of a checkpoint."""
    from longlive_jax.io.checkpoint import open_component

    specs = open_component(folder, "dit")[0].specs.values()
    sizes = [s.dtype.itemsize for s in specs]
    for i, spec in enumerate(specs):
        for size in spec.shape:
            sizes[i] *= size
    return round(max(sizes) / 2**30, 3)


def main() -> int:
    """Prints the report; the exit code is 1 if any bit changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10, help="layers of the DiT (default: 10)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights"
    )
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert_memory.", dir=args.folder))
    try:
        # 1. Synthetic weights.
        make_files(folder, args.layers, args.dtype)
        size = sum(p.stat().st_size for p in (folder / "wan").iterdir()) / 2**30
        report = {"layers": args.layers, "dtype": args.dtype, "size_gib": round(size, 2)}
        # 2. Measure each step: name, verb, input and output.
        steps = (
            ("convert_safetensors", "convert", "wan", "a"),
            ("convert_torch", "convert", "model.pt", "b"),
            ("export_original", "export", "a", "c"),
            ("convert_export", "convert", "c", "d"),
        )
        for name, verb, source, out in steps:
            report[name] = measure_command(
                verb, f"--source={folder / source}", f"--out={folder / out}"
            )
        # 3. Compare the checkpoints.
        report["largest_array_gib"] = largest_array(folder / "a")
        report["same_bits"] = same_bits(folder, "a", "b") and same_bits(folder, "a", "d")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=1))
    return 0 if report["same_bits"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
