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
from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens, visible


def flow_schedulers(golden: Golden) -> Sequence[Case]:
    """UniPC for every number of steps in the file, and the training table."""
    shift = _shift(golden)
    counts = {int(n) for key in golden.arrays for n in re.findall(r"^unipc(\d+)_", key)}
    cases = [case for steps in sorted(counts) for case in _unipc(golden, steps, shift)]
    for name, want in golden.under("fm_").items():
        table = FlowSchedule(shift, size=len(want))
        cases.append(compared(f"fm_{name}", TIGHT, partial(getattr, table, name), want))
    return cases


def _shift(golden: Golden) -> float:
    """The shift of the noise levels, from the file's settings or else from its note."""
    for key in ("timestep_shift", "shift"):
        if key in golden.meta:
            return float(golden.meta[key])
    match = re.search(r"\bshift[ =]+(\d+(?:\.\d+)?)", golden.meta.get("note", ""))
    if match is None:
        raise ValueError("neither settings nor note give the shift of the noise levels")
    return float(match[1])


def _unipc(golden: Golden, steps: int, shift: float) -> list[Case]:
    arrays = golden.under(f"unipc{steps}_")
    solver = solvers.unipc(steps, shift=shift)

    def trajectory() -> Any:
        weights = jnp.asarray(arrays["A"])

        def body(state, row):
            velocity = jnp.tanh(state.x @ weights) + state.x * row.timestep / 1000
            state = solvers.step(state, velocity, row)
            return state, state.x

        return jax.jit(lambda x: jax.lax.scan(body, solvers.start(x), solver)[1])(arrays["x0"])

    def levels() -> np.ndarray:
        return np.append(np.asarray(solver.sigma), 0.0)

    name = f"unipc{steps}"
    return [
        compared(
            f"{name}/timesteps", EXACT, lambda: solver.timestep, arrays["timesteps"], differing
        ),
        compared(f"{name}/sigmas", TIGHT, levels, arrays["sigmas"]),
        compared(f"{name}/trajectory", CLOSE, trajectory, arrays["traj"]),
    ]


def masks(golden: Golden) -> Sequence[Case]:
    """Teacher-forcing attention masks, in both orders of the sequence."""
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
        sequence = _reorder(sequence, natural_order(frames * tokens, sizes["sp_size"]))
    return np.asarray(visible(sequence, sequence))


def natural_order(tokens: int, devices: int) -> np.ndarray:
    """Indices into [clean; noisy] in the order of devices that each have a shard of both."""
    shards = np.arange(tokens).reshape(devices, -1)
    return np.stack([shards, shards + tokens], axis=1).reshape(-1)


def _reorder(tokens: Tokens, order: np.ndarray) -> Tokens:
    columns = {name: getattr(tokens, name)[..., order] for name in VISIBILITY_COLUMNS}
    return Tokens(pos=tokens.pos[..., order, :], **columns)
