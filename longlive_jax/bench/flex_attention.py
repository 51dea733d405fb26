"""PyTorch's compiled flex_attention on the same layout, in a process of its own.

Nothing here needs PyTorch: where it or a CUDA device is missing, `in_a_process` says so. The part
that uses it runs as `python -m longlive_jax.bench.flex_attention SETTINGS`, without JAX, so that
the two do not share a process (they do share the GPU, whose memory JAX may hold most of).
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
"""Seconds after which the process is ended."""
PREFIX = "FLEX "


class CannotRun(RuntimeError):
    """flex_attention was not timed; the message says why."""


def in_a_process(settings: dict[str, Any]) -> dict[str, Any]:
    """Times of forward and forward with backward, or CannotRun.

    `settings` are those of `AttentionSpec`, and `frames` and tokens of a `frame`.
    """
    if importlib.util.find_spec("torch") is None:
        raise CannotRun("PyTorch is not installed; `pip install torch` beside JAX to compare")
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise CannotRun(f"not done after {TIMEOUT} s") from error
    said = [line.removeprefix(PREFIX) for line in done.stdout.splitlines() if PREFIX in line]
    if done.returncode or not said:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CannotRun(f"exit code {done.returncode}: {last}")
    report = json.loads(said[-1])
    if "refusal" in report:
        raise CannotRun(report["refusal"])
    return report


def main(argv: Sequence[str]) -> int:
    """Prints a line that `in_a_process` reads."""
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        report = timed(torch, json.loads(argv[0]), device="cuda")
    else:
        report = {"refusal": f"PyTorch {torch.__version__} sees no CUDA device"}
    print(PREFIX + json.dumps(report))
    return 0


def timed(torch: Any, settings: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Seconds of compiled flex_attention with its own block mask, which is made once."""
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

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return {
        "version": torch.__version__,
        "visited": round(1 - mask.sparsity() / 100, 4),
        "forward": repeated(forward, settings["repeats"], wait),
        "forward_backward": repeated(forward_backward, settings["repeats"], wait),
    }


def mask_mod(torch: Any, settings: dict[str, Any]) -> Callable:
    """Teacher forcing as flex_attention asks for it: by index of query and key."""
    chunk_tokens = settings["chunk"] * settings["frame"]
    half = settings["frames"] * settings["frame"]

    def seen(batch, head, query, key):
        mine, theirs = query % half // chunk_tokens, key % half // chunk_tokens
        noisy, noisy_key = query >= half, key >= half
        clean = (theirs < mine) | ((theirs == mine) & ~noisy)
        return torch.where(noisy_key, noisy & (theirs == mine), clean)

    return seen


def repeated(call: Callable[[], Any], repeats: int, wait: Callable[[], Any]) -> dict[str, Any]:
    """As `timing.repeated`, which would bring JAX in."""
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
