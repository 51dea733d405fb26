"""Noise levels, solvers and attention masks."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.rows import CLOSE, EXACT, TIGHT, Case, compared, differing
from longlive_jax import layout
from longlive_jax.diffusion import solvers
from longlive_jax.diffusion.flow import FlowSchedule
from pallas_kernels.tokens import COLUMNS, Tokens, visible


def flow_schedulers(golden: Golden) -> Sequence[Case]:
    """UniPC of every number of steps in the file, and the training table."""
    shift = _shift(golden)
    found = {int(n) for key in golden.arrays for n in re.findall(r"^unipc(\d+)_", key)}
    cases = [case for steps in sorted(found) for case in _unipc(golden, steps, shift)]
    for name, want in golden.under("fm_").items():
        table = FlowSchedule(shift, size=len(want))
        cases.append(compared(f"fm_{name}", TIGHT, partial(getattr, table, name), want))
    return cases


def _shift(golden: Golden) -> float:
    """The file says it in its note, others of its kind may in their settings."""
    for key in ("timestep_shift", "shift"):
        if key in golden.meta:
            return float(golden.meta[key])
    found = re.search(r"\bshift[ =]+(\d+(?:\.\d+)?)", golden.meta.get("note", ""))
    if found is None:
        raise ValueError("neither settings nor note say the shift of the noise levels")
    return float(found[1])


def _unipc(golden: Golden, steps: int, shift: float) -> list[Case]:
    given = golden.under(f"unipc{steps}_")
    solver = solvers.unipc(steps, shift=shift)

    def trajectory() -> Any:
        weights = jnp.asarray(given["A"])

        def body(state, row):
            velocity = jnp.tanh(state.x @ weights) + state.x * row.timestep / 1000
            state = solvers.step(state, velocity, row)
            return state, state.x

        return jax.jit(lambda x: jax.lax.scan(body, solvers.start(x), solver)[1])(given["x0"])

    def levels() -> np.ndarray:
        return np.append(np.asarray(solver.sigma), 0.0)

    name = f"unipc{steps}"
    return [
        compared(
            f"{name}/timesteps", EXACT, lambda: solver.timestep, given["timesteps"], differing
        ),
        compared(f"{name}/sigmas", TIGHT, levels, given["sigmas"]),
        compared(f"{name}/trajectory", CLOSE, trajectory, given["traj"]),
    ]


def masks(golden: Golden) -> Sequence[Case]:
    """Who sees whom in teacher forcing, in both orders of the sequence."""
    return [
        compared(
            f"{order}_{i}",
            EXACT,
            partial(_mask, sizes, natural=order == "natural"),
            golden[f"{order}_{i}"],
            differing,
        )
        for i, sizes in enumerate(golden.meta["cases"])
        for order in ("logical", "natural")
        if f"{order}_{i}" in golden
    ]


def _mask(sizes: dict[str, int], *, natural: bool) -> np.ndarray:
    frames, tokens = sizes["num_frames"], sizes["frame_seqlen"]
    sequence = layout.teacher_forcing(frames, 1, tokens, chunk_frames=sizes["num_frame_per_block"])
    if natural:
        sequence = jax.tree.map(np.asarray, sequence)
        sequence = _taken(sequence, natural_order(frames * tokens, sizes["sp_size"]))
    return np.asarray(visible(sequence, sequence))


def natural_order(tokens: int, devices: int) -> np.ndarray:
    """Places in [clean; noisy] of a sequence split over devices, each with its share of both."""
    share = np.arange(tokens).reshape(devices, -1)
    return np.stack([share, share + tokens], axis=1).reshape(-1)


def _taken(tokens: Tokens, order: np.ndarray) -> Tokens:
    columns = {name: getattr(tokens, name)[..., order] for name in COLUMNS}
    return Tokens(pos=tokens.pos[..., order, :], **columns)
