"""Tile sizes and proofs that were found on a device, one JSON file a device.

`longlive kernels prove` writes them: `tuned/<device>.json` holds the fastest tile sizes of each
kernel, `proven/<device>.json` what was proven. They are beside the kernels because "auto" reads
them, and the kernels import nothing of `longlive_jax`, where the full reports are.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TUNED = Path(__file__).with_name("tuned")
PROVEN = Path(__file__).with_name("proven")


def file_name(device: str) -> str:
    """The file of a device kind: "NVIDIA H200" is "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def tiles(kernel: str, device: str) -> dict[str, int]:
    """The tile sizes found for a kernel on a device kind; empty for the kernel's defaults."""
    return dict(_read(TUNED / file_name(device)).get(kernel, {}))


def proof(kernel: str, device: str) -> Mapping[str, Any]:
    """What was proven of a kernel on a device kind; empty if nothing was."""
    entry = _read(PROVEN / file_name(device)).get(kernel, {})
    return entry if entry.get("device") == device else {}


def forget() -> None:
    """Forgets the files that were read, after one was written."""
    _read.cache_clear()


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
