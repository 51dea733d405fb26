"""Peak memory of `longlive convert` and `export` on synthetic weights laid out like the 5B DiT.

    python -m longlive_jax.bench.convert_memory [--layers 10] [--dtype bfloat16] [--folder DIR]

Writes the weights as sharded safetensors and as a PyTorch zip, converts both, exports the first
again, checks that the bits are the same everywhere, and prints one JSON object. Each step is a
process of its own, whose peak resident memory is what the kernel says at its end. Needs about
four times the size of the weights on disk (3.2 GiB for 10 layers in bfloat16), removed at the end.
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

MEASURED = """
import resource, sys
from longlive_jax.cli.app import run
code = run(sys.argv[1:])
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
kib = int(peak[0]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"PEAK {kib / 2**20:.3f}")
raise SystemExit(code)
"""


def layout(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DiT with the widths of Wan2.2-TI2V-5B."""
    from longlive_jax.interop import keys_dit
    from longlive_jax.interop.components import COMPONENTS, expected_shapes
    from longlive_jax.interop.export import piece_shape
    from longlive_jax.io.arrays import flatten
    from longlive_jax.models.wan import DiTConfig

    shapes = expected_shapes(COMPONENTS["dit"], DiTConfig(layers=layers)) or flatten({})
    return {
        key: outgoing_shape(leaf, piece_shape(leaf))
        for leaf in keys_dit.ORIGINAL.backward(shapes)
        for key in leaf.keys
    }


def outgoing_shape(leaf, piece: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one tensor of a leaf in the file."""
    import numpy as np

    return leaf.extract(np.broadcast_to(np.zeros((), np.uint8), piece)).shape


def torch_zip(path: Path, tensors: dict[str, tuple[tuple[int, ...], str, Callable]]) -> None:
    """Writes {name: (shape, storage type, make bytes)} as torch.save would, without PyTorch."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(torch_pickle(tensors)))
        archive.writestr("archive/byteorder", "little")
        for i, (_, _, make) in enumerate(tensors.values()):
            with archive.open(f"archive/data/{i}", "w", force_zip64=True) as member:
                member.write(make())
        archive.writestr("archive/version", "3\n")


def torch_pickle(tensors: dict[str, tuple[tuple[int, ...], str, Callable]]) -> Iterator[bytes]:
    """The pickle stream (protocol 2) of a flat state dict of contiguous tensors."""

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word.encode())) + word.encode()

    def integer(number: int) -> bytes:
        raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def integers(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, numbers)) + b"t"

    yield b"\x80\x02}("
    for i, (name, (shape, storage, _)) in enumerate(tensors.items()):
        strides: list[int] = []
        count = 1
        for size in reversed(shape):
            strides.insert(0, count)
            count *= size
        yield text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        yield b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(str(i)) + text("cpu")
        yield integer(count) + b"tQ" + integer(0) + integers(shape) + integers(tuple(strides))
        yield b"\x89ccollections\nOrderedDict\n)RtR"
    yield b"u."


def make_files(folder: Path, layers: int, dtype: str) -> None:
    """Writes the same weights as sharded safetensors and as a PyTorch file."""
    import ml_dtypes
    import numpy as np

    from longlive_jax.interop.safetensors_file import Outgoing, write_safetensors

    element = np.dtype(getattr(ml_dtypes, dtype, dtype))
    noise = np.random.default_rng(0).standard_normal(2**25, np.float32).astype(element)

    def make(shape: tuple[int, ...], seed: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.resize(np.roll(noise[: 2**25 - 7919 * seed], seed), size).reshape(shape)

    shapes = list(layout(layers).items())
    outgoing = {
        name: Outgoing(shape, element, functools.partial(make, shape, i))
        for i, (name, shape) in enumerate(shapes)
    }
    (folder / "wan").mkdir()
    write_safetensors(folder / "wan", "diffusion_pytorch_model", outgoing, shard_bytes=10**9)
    storage = {"bfloat16": "BFloat16Storage", "float32": "FloatStorage"}[dtype]
    saved = {
        f"model.{name}": (shape, storage, lambda s=shape, i=i: make(s, i).tobytes())
        for i, (name, shape) in enumerate(shapes)
    }
    torch_zip(folder / "model.pt", saved)


def measured(*words: str) -> dict[str, float]:
    """Runs one command line of `longlive` in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"longlive {' '.join(words)} failed: {done.stderr[-2000:]}")
    peak = float(done.stdout.rpartition("PEAK ")[2].split()[0])
    return {"peak_rss_gib": peak, "seconds": round(time.perf_counter() - start, 1)}


def same_bits(folder: Path, a: str, b: str) -> bool:
    """Whether two checkpoints have the same fingerprints."""
    arrays = [json.loads((folder / n / "longlive.json").read_text())["arrays"] for n in (a, b)]
    return arrays[0] == arrays[1]


def largest_array(folder: Path) -> float:
    """GiB of the largest stacked array of a checkpoint."""
    from longlive_jax.io.checkpoint import open_component

    specs = open_component(folder, "dit")[0].specs.values()
    sizes = [s.dtype.itemsize for s in specs]
    for i, spec in enumerate(specs):
        for size in spec.shape:
            sizes[i] *= size
    return round(max(sizes) / 2**30, 3)


def main() -> int:
    """Prints the report; exit code 1 if any bit changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where to put the temporary files")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert_memory.", dir=args.folder))
    try:
        make_files(folder, args.layers, args.dtype)
        size = sum(p.stat().st_size for p in (folder / "wan").iterdir()) / 2**30
        report = {"layers": args.layers, "dtype": args.dtype, "size_gib": round(size, 2)}
        steps = {
            "convert_safetensors": (
                "convert",
                f"--source={folder / 'wan'}",
                f"--out={folder / 'a'}",
            ),
            "convert_torch": (
                "convert",
                f"--source={folder / 'model.pt'}",
                f"--out={folder / 'b'}",
            ),
            "export_original": ("export", f"--source={folder / 'a'}", f"--out={folder / 'c'}"),
            "convert_export": ("convert", f"--source={folder / 'c'}", f"--out={folder / 'd'}"),
        }
        for name, words in steps.items():
            report[name] = measured(*words)
        report["largest_array_gib"] = largest_array(folder / "a")
        report["same_bits"] = same_bits(folder, "a", "b") and same_bits(folder, "a", "d")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=1))
    return 0 if report["same_bits"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
