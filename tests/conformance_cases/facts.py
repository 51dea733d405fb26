"""Constants and tables from the reference's code."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from conformance_cases.rows import EXACT, TIGHT, Case, compared, differing, later
from longlive_jax.captions import CUT_PREFIX
from longlive_jax.diffusion import solvers
from longlive_jax.diffusion.flow import FlowSchedule
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.variants import variant

PROSE = ("_note", "_quirks")


def facts(path: Path) -> Sequence[Case]:
    """Cases for all facts that are numbers or constants; prose is skipped."""
    known = json.loads(path.read_text(encoding="utf-8"))
    table = FlowSchedule(_shift(known))
    cases: list[Case] = []
    for key, value in known.items():
        if key.startswith("unipc_shift"):
            for steps, want in value.items():
                cases += _unipc(f"{key}/{steps}", int(steps), table, want)
        elif key == "training_grid":
            cases += _grid(value, table)
        elif key == "training_weight":
            cases += _weight(value, table)
        elif key == "scene_cut_prefix":
            cases.append(compared(key, EXACT, lambda: CUT_PREFIX, value, differing))
        elif key == "model_5b":
            cases.append(Case(key, EXACT, partial(_model_error, value)))
        elif key == "negative_prompt" or not (key.endswith(PROSE) or isinstance(value, str)):
            cases.append(later(key))
    return cases


def _shift(known: Mapping[str, Any]) -> float:
    for key in known:
        if match := re.fullmatch(r"unipc_shift(\d+(?:\.\d+)?)", key):
            return float(match[1])
    raise ValueError("the file does not give the shift of the noise levels")


def _unipc(name: str, steps: int, table: FlowSchedule, want: Mapping[str, Any]) -> list[Case]:
    solver = solvers.unipc(steps, shift=table.shift)

    def nearest() -> np.ndarray:
        return np.asarray(table.index(jnp.asarray(solver.timestep)))

    def levels() -> np.ndarray:
        return np.append(np.asarray(solver.sigma), 0.0)

    def x0_sigma() -> np.ndarray:
        return table.sigmas[nearest()]

    return [
        compared(f"{name}/timesteps", EXACT, lambda: solver.timestep, want["timesteps"], differing),
        compared(f"{name}/sigmas", TIGHT, levels, want["sigmas"]),
        compared(f"{name}/nearest", EXACT, nearest, want["nearest_grid_index"], differing),
        compared(f"{name}/x0_conversion_sigma", TIGHT, x0_sigma, want["x0_conversion_sigma"]),
    ]


def _grid(want: Mapping[str, Any], table: FlowSchedule) -> list[Case]:
    first, last = want["first"], want["last"]
    at_zero = table.sigmas[int(table.index(jnp.zeros(())))]
    return [
        compared("training_grid/num", EXACT, lambda: table.size, want["num"], differing),
        compared("training_grid/first", TIGHT, lambda: table.timesteps[: len(first)], first),
        compared("training_grid/last", TIGHT, lambda: table.timesteps[-len(last) :], last),
        compared("training_grid/sigma_at_t0", TIGHT, lambda: at_zero, want["sigma_at_t0"]),
    ]


def _weight(want: Mapping[str, Any], table: FlowSchedule) -> list[Case]:
    top = int(np.argmax(table.weights))

    name, at = "training_weight", want["w_at_index"]
    return [
        compared(f"{name}/w", TIGHT, lambda: table.weights[at], want["w"]),
        compared(f"{name}/max", TIGHT, table.weights.max, want["max"]),
        compared(f"{name}/argmax_index", EXACT, lambda: top, want["argmax_index"], differing),
        compared(f"{name}/T_at_argmax", TIGHT, lambda: table.timesteps[top], want["T_at_argmax"]),
    ]


def _model_error(want: Mapping[str, Any]) -> float:
    """Fraction of the 5B model's sizes in which our variant differs."""
    dit, vae = variant("wan2_2_ti2v_5b")["dit"], VAEConfig()
    names = {"num_heads": "heads", "num_layers": "layers", "in_dim": "in_channels"}
    names |= {"out_dim": "out_channels"}
    names |= {
        n: n for n in ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "head_dim", "eps")
    }
    wrong = [ours for theirs, ours in names.items() if getattr(dit, ours) != want[theirs]]
    if [vae.temporal_stride, vae.spatial_stride, vae.spatial_stride] != want["vae_stride"]:
        wrong.append("vae_stride")
    return len(wrong) / (len(names) + 1)
