"""Adapters: low-rank branches for a DiT, as files of their own, with their sampling settings.

    adapter = load_adapter("lora.safetensors")          # or a directory of ours, or a .pt file
    save_adapter("checkpoints/adapter", adapter)        # our directory
    export_peft("out/adapter", adapter)                 # safetensors in PEFT's names
    export_original("out/model.pt", generator=adapter)  # the original's file

`sampling.pipeline.Pipeline.with_adapter` plugs them in.
"""

from longlive_jax.adapters.adapter import ROLES, SETTINGS, Adapter
from longlive_jax.adapters.files import (
    export_original,
    export_peft,
    is_adapter,
    load_adapter,
    load_adapters,
    parse_strength,
    save_adapter,
)

__all__ = [
    "ROLES",
    "SETTINGS",
    "Adapter",
    "export_original",
    "export_peft",
    "is_adapter",
    "load_adapter",
    "load_adapters",
    "parse_strength",
    "save_adapter",
]
