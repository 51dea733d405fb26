"""Error buffers under lists of operations; whole steps are in `recycling_steps`."""

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.recycling_steps import (
    REPLACE,
    Steps,
    contents,
    matched,
    share_of,
    uniform_mask,
)
from conformance_cases.rows import EXACT, TIGHT, Case, compared, differing, later
from longlive_jax.training.objectives import error_buffer as eb

SETTINGS = {
    "num_buckets", "max_size_per_bucket", "modulate_factor", "replacement_strategy", "num_blocks",
    "shard_rank", "shard_size", "global_block_offset", "num_train_timesteps",
}  # fmt: skip

add = jax.jit(eb.add, static_argnames="replace")
pooled = jax.jit(eb.pooled, static_argnames="replace")


def error_buffer(golden: Golden) -> Sequence[Case]:
    """Buckets of timesteps, the scripts of operations, and the steps."""
    index = jnp.asarray(golden["bucket_query_index"])
    cases = [
        compared(
            f"bucket_of/{count}", EXACT, partial(eb.bucket_of, index, int(count)), want, differing
        )
        for count, want in golden.under("bucket_of/").items()
    ]
    for script in golden.meta["scripts"]:
        cases += _Script(golden, script).cases()
    for run in golden.meta["steps"]:
        cases += Steps(golden, run).cases()
    return cases


class _Script:
    """One buffer under a list of operations with the reference's own random numbers."""

    def __init__(self, golden: Golden, script: Mapping[str, Any]):
        self.name, self.script = script["name"], script
        self.entries = np.moveaxis(golden[f"{self.name}/entries"], 2, -1)
        self.results = np.moveaxis(golden[f"{self.name}/results"], 2, -1)
        made = script["ctor"]
        self.shards, self.rank = made.get("shard_size", 1), made.get("shard_rank", 0)
        self.positions, self.levels = made["num_blocks"], made.get("num_train_timesteps", 1000)
        self.spec = eb.BufferSpec(
            rows=max(self.positions, self.shards),
            by="column" if self.shards > 1 else "chunk",
            buckets=made["num_buckets"],
            slots=made["max_size_per_bucket"],
            dealt=self.shards > 1,
            replace=REPLACE[made["replacement_strategy"]],
            dtype="float32",
        )
        self.played = functools.cache(self._play)

    def cases(self) -> list[Case]:
        name, script = self.name, self.script
        if unknown := sorted(set(script["ctor"]) - SETTINGS):
            return [later(name, f"settings {unknown}")]
        if self.positions and self.shards > 1:
            return [later(name, "positions of which each has some of the buckets only")]
        final = [self.entries[entry] for key in self._keys() for entry in key]
        facts = {
            "total_added": script["total_added"],
            "is_empty": script["is_empty"],
            "has_pos": script["has_pos"],
            "nearest_owned": script["nearest_owned"],
            "counts": [len(key) for key in self._keys()],
        }
        return [
            compared(
                f"{name}/results", TIGHT, lambda: self.played()[0], self.results, uniform_mask
            ),
            compared(
                f"{name}/final_buckets",
                EXACT,
                lambda: contents(self.played()[1], self.spec.replace),
                np.array(final).reshape(-1, *self.entries.shape[1:]),
                uniform_mask,
            ),
            *(
                compared(f"{name}/{key}", EXACT, partial(self._fact, key), want, differing)
                for key, want in facts.items()
            ),
        ]

    def _keys(self) -> list[list[int]]:
        """Entries of every bucket that is kept, by row and column."""
        final = self.script["final_buckets"]
        buckets = range(self.rank, self.spec.buckets, self.shards)
        if not self.positions:
            return [final.get(str(bucket), []) for bucket in buckets]
        rows = range(self.positions)
        return [final.get(f"({row}, {bucket})", []) for row in rows for bucket in buckets]

    def _own(self, buffer: eb.Buffer) -> eb.Buffer:
        """The rows of this rank, with the columns that it has."""
        columns = len(range(self.rank, self.spec.buckets, self.shards))
        first = self.rank if self.shards > 1 else 0
        last = first + max(self.positions, 1)
        return jax.tree.map(lambda x: x[first:last, :columns], buffer)

    def _play(self) -> tuple[np.ndarray, eb.Buffer]:
        buffer = jax.tree.map(lambda x: x[0], eb.empty(self.spec, self.entries.shape[1:]))
        found: list[np.ndarray] = []
        for op in self.script["ops"]:
            if op["op"] == "add":
                buffer = self._add(buffer, op)
            elif op["result"] is None:
                if np.any(self._sample(buffer, op, 0.0)):
                    raise ValueError(f"the golden samples nothing where ours has something: {op}")
            else:
                (_, count, nth), *rest = op["python_draws"]
                scale = rest[0][3] if rest else 1.0
                found.append(scale * self._sample(buffer, op, share_of(nth, count)))
        return np.array(found).reshape(-1, *self.entries.shape[1:]), self._own(buffer)

    def _place(self, op: Mapping[str, Any]):
        """Row, column, and whether the bucket is kept at all."""
        at = self.rank if self.shards > 1 else op.get("pos") or 0
        row = jnp.clip(at, 0, self.spec.rows - 1)
        index = jnp.asarray(op.get("t", 0))
        bucket = eb.bucket_of(index, self.spec.buckets, levels=self.levels)
        return row, *eb.column_of(self.spec, row, bucket)

    def _add(self, buffer: eb.Buffer, op: Mapping[str, Any]) -> eb.Buffer:
        row, column, keep = self._place(op)
        share = 0.0
        for _, low, high, nth in op["python_draws"]:
            share = share_of(nth - low, high + 1 - low)
        error, replace = self.entries[op["entry"]], self.spec.replace
        return add(buffer, error, row, column, share=share, keep=keep, replace=replace)

    def _sample(self, buffer: eb.Buffer, op: Mapping[str, Any], share: float) -> np.ndarray:
        row, column, _ = self._place(op)
        replace = self.spec.replace
        if op["op"] == "sample":
            return np.asarray(matched(buffer, row, column, share, replace=replace))
        if op["op"] == "sample_global" and self.positions:
            buffer, row = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), buffer), 0
        return np.asarray(pooled(buffer, row, share, replace=replace))

    def _fact(self, key: str) -> Any:
        buffer = self.played()[1]
        held = np.asarray(buffer.held)
        rows = np.clip(np.arange(len(self.script["has_pos"])), 0, len(held) - 1)
        buckets = jnp.arange(self.spec.buckets)
        column, _ = eb.column_of(self.spec, jnp.asarray(self.rank), buckets)
        return {
            "total_added": buffer.added.sum(),
            "is_empty": not held.any(),
            "has_pos": held[rows].any(axis=1),
            "nearest_owned": column * self.shards + self.rank,
            "counts": held.reshape(-1),
        }[key]
