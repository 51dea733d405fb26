"""Counts the machine code of a public attention kernel whose speed is published.

tokamax (https://github.com/openxla/tokamax, version 0.0.17) has Mosaic kernels for Hopper and, in
`data/autotuning/nvidia_h100_80gb_hbm3`, the times of its tuned tiles on an H100. This module
compiles the same kernels with the same tiles and stores the counts next to those times. The tests
of `planning.kernel_model` apply the model to them.

    python -m longlive_jax.bench.calibration [OUT]

needs tokamax, and what compiling needs (`planning.deviceless`).
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from longlive_jax.planning import deviceless

TABLE = Path(__file__).with_name("results") / "calibration_attention_h100.json"
"""Counts and published times, one row per case."""
TOKENS = 16_384
PREFIX = "CASE "


@dataclasses.dataclass(frozen=True)
class Case:
    """A tuned attention call, without a mask, whose times are published.

    Attributes:
      heads, width: number of heads and head width.
      tiles: tokamax's tuned configuration.
      milliseconds: all published times.
      backward: whether the call computes gradients from stored residuals.
    """

    heads: int
    width: int
    tiles: dict[str, Any]
    milliseconds: tuple[float, ...]
    backward: bool = False

    @property
    def useful(self) -> int:
        """Products of queries x keys x width: two, or five for the gradients."""
        return 5 if self.backward else 2

    def teraflops(self) -> float:
        """The published speed: useful operations over the best time."""
        operations = 2 * self.useful * TOKENS**2 * self.width * self.heads
        return operations / min(self.milliseconds) / 1e9


def _forward(block_q: int, block_kv: int, num_stages: int) -> dict[str, Any]:
    return {
        "block_q": block_q, "block_kv": block_kv, "num_stages": num_stages, "persistent": False,
    }  # fmt: skip


def _backward(block_q: int, compute_wgs: int) -> dict[str, Any]:
    return {
        "block_q_dkv": block_q, "block_kv_dkv": 64, "block_q_dq": block_q, "block_kv_dq": 64,
        "num_stages": 2, "compute_wgs": compute_wgs,
    }  # fmt: skip


CASES = {
    "forward, width 128": Case(
        16, 128, _forward(64, 128, 2), (3.224182, 3.234358, 3.313046, 3.302166, 3.304182)
    ),
    "forward, width 64": Case(
        32, 64, _forward(128, 128, 3), (4.215473, 4.222832, 4.223473, 4.407984, 4.415567)
    ),
    "forward, width 256": Case(
        8, 256, _forward(64, 64, 2), (3.014775, 3.020791, 3.023448, 3.02812, 3.026871)
    ),
    "backward, width 128": Case(
        16, 128, _backward(64, 2), (11.178114, 11.910941, 12.215738, 12.098075, 12.092059), True
    ),
    "backward, width 64": Case(
        32, 64, _backward(128, 2), (15.051004, 15.227867, 15.157498, 15.28169, 15.297275), True
    ),
    "backward, width 256": Case(
        8, 256, _backward(64, 1), (35.20099, 35.180831, 35.16515, 35.210719, 35.27939), True
    ),
}
"""Name -> case. All calls have 16,384 queries and keys in bfloat16."""


def main(argv: list[str]) -> int:
    """Arguments: an output file, or `--case NAME` to count one case in this process."""
    if argv[:1] == ["--case"]:
        print(PREFIX + json.dumps(count(CASES[argv[1]])), flush=True)
        return 0
    out = Path(argv[0]) if argv else TABLE
    rows = [row(name) for name in CASES]
    out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def row(name: str) -> dict[str, Any]:
    """A row of the table: the case's published speed and its kernels' counts."""
    case = CASES[name]
    command = [sys.executable, "-m", "longlive_jax.bench.calibration", "--case", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = json.loads(next(x for x in lines if x.startswith(PREFIX)).removeprefix(PREFIX))
    return {
        "case": name,
        "source": "tokamax 0.0.17, data/autotuning/nvidia_h100_80gb_hbm3, best of five",
        "tokens": TOKENS,
        "heads": case.heads,
        "width": case.width,
        "tiles": case.tiles,
        "useful": case.useful,
        "measured_tflops": round(case.teraflops(), 1),
        "spilled_bytes": sum(kernel["spilled_bytes"] for kernel in kernels),
        "kernels": [kernel["facts"] for kernel in kernels],
    }


def count(case: Case) -> list[dict[str, Any]]:
    """Compiles a case for Hopper and returns the report on its kernels, as `deviceless.inspect`."""
    dump = deviceless.prepare()
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.attention import pallas_mosaic_gpu as forward
    from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp as backward
    from tokamax._src.ops.attention.pallas_mosaic_gpu_vjp_common import Config

    x = jax.ShapeDtypeStruct((1, TOKENS, case.heads, case.width), jnp.bfloat16)
    if not case.backward:
        config = forward.ConfigSM90(**case.tiles)
        attend = forward.PallasMosaicGpuFlashAttention(config=config)
        deviceless.compile_for("h200", lambda q, k, v: attend(q, k, v), x, x, x)
        return deviceless.inspect(dump)
    gradients = backward.PallasMosaicGpuFlashAttentionVjp(config=Config(**case.tiles))
    tiles = forward.ConfigSM90(block_q=64, block_kv=64, num_stages=2)
    attend = forward.PallasMosaicGpuFlashAttention(config=tiles, vjp=gradients)

    def pull(q, k, v, grad):
        return jax.vjp(lambda *a: attend(*a), q, k, v)[1](grad)

    deviceless.compile_for("h200", pull, x, x, x, x)
    # The forward kernel, which only makes the residuals, has a name of its own.
    return [x for x in deviceless.inspect(dump) if "flash_attention" not in x["kernel"]]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
