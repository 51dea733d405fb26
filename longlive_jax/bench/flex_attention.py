"""PyTorch's compiled flex_attention with the same mask, in a separate process.

PyTorch is optional: without it or without a CUDA device, `run_in_process` raises `CannotRun`. The
code that uses PyTorch runs as `python -m longlive_jax.bench.flex_attention SETTINGS`, without JAX,
so that the two do not share a process. They share the GPU, whose memory JAX may have reserved.
"""

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

TIMEOUT = 1800
"""Seconds after which the process is killed."""
FLEX = "flex_attention"
PREFIX = "FLEX "


class CannotRun(RuntimeError):
    """flex_attention could not be timed; the message gives the reason."""


def run_in_process(settings: dict[str, Any]) -> dict[str, Any]:
    """Times of the forward pass and of forward and backward passes; raises `CannotRun`.

    `settings` are those of `AttentionSpec`, plus `frames` and the tokens per `frame`.
    """
    if importlib.util.find_spec("torch") is None:
        raise CannotRun("PyTorch is not installed; `pip install torch` to compare")
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise CannotRun(f"timed out after {TIMEOUT} s") from error
    lines = [line.removeprefix(PREFIX) for line in done.stdout.splitlines() if PREFIX in line]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CannotRun(f"exit code {done.returncode}: {last}")
    report = json.loads(lines[-1])
    if "refusal" in report:
        raise CannotRun(report["refusal"])
    return report


def main(argv: Sequence[str]) -> int:
    """Prints the line that `run_in_process` reads."""
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        report = timed(torch, json.loads(argv[0]), device="cuda")
    else:
        report = {"refusal": f"PyTorch {torch.__version__} found no CUDA device"}
    print(PREFIX + json.dumps(report))
    return 0


def timed(torch: Any, settings: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Seconds of compiled flex_attention with its block mask, which is built once."""
    # 1. Mask, compiled function and random arguments.
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    length = 2 * settings["frames"] * settings["frame"]
    mask = torch.compile(flex.create_block_mask)(
        mask_mod(torch, settings), None, None, length, length, device=device
    )
    attend = torch.compile(flex.flex_attention, dynamic=False)
    shape = (1, settings["heads"], length, settings["width"])
    dtype = getattr(torch, settings["dtype"])
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v, block_mask=mask)

    def forward_backward() -> Any:
        return torch.autograd.grad(attend(q, k, v, block_mask=mask), (q, k, v), grad)

    # 2. Time both passes.
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return {
        "version": torch.__version__,
        "visited": round(1 - mask.sparsity() / 100, 4),
        "forward": repeated(forward, settings["repeats"], wait),
        "forward_backward": repeated(forward_backward, settings["repeats"], wait),
    }


def mask_mod(torch: Any, settings: dict[str, Any]) -> Callable:
    """The teacher-forcing mask as a flex_attention mask_mod, by index of query and key."""
    chunk_tokens = settings["chunk"] * settings["frame"]
    half = settings["frames"] * settings["frame"]

    def is_visible(batch, head, query, key):
        mine, theirs = query % half // chunk_tokens, key % half // chunk_tokens
        noisy, noisy_key = query >= half, key >= half
        clean = (theirs < mine) | ((theirs == mine) & ~noisy)
        return torch.where(noisy_key, noisy & (theirs == mine), clean)

    return is_visible


def repeated(call: Callable[[], Any], repeats: int, wait: Callable[[], Any]) -> dict[str, Any]:
    """`timing.repeated` without importing JAX."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begin)
    rest = seconds[1:]
    return {
        "median": round(statistics.median(rest), 5),
        "least": round(min(rest), 5),
        "most": round(max(rest), 5),
        "repeats": repeats,
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
