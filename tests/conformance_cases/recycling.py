"""Error buffers under scripts of operations; full recycling steps are in `recycling_steps`."""

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
    relative_or_empty,
    sample_bucket,
    uniform_for,
)
from conformance_cases.rows import EXACT, TIGHT, Case, compared, differing, later
from longlive_jax.training.objectives import error_buffer as eb

SETTINGS = {
    "num_buckets", "max_size_per_bucket", "modulate_factor", "replacement_strategy", "num_blocks",
    "shard_rank", "shard_size", "global_block_offset", "num_train_timesteps",
}  # fmt: skip

add = jax.jit(eb.add, static_argnames="replace")
sample_row = jax.jit(eb.sample_row, static_argnames="replace")


def error_buffer(golden: Golden) -> Sequence[Case]:
    """Cases for the buckets of timesteps, the scripts of operations, and the steps."""
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
    """A script of operations on one buffer, replayed with the reference's random numbers."""

    def __init__(self, golden: Golden, script: Mapping[str, Any]):
        self.name, self.script = script["name"], script
        self.entries = np.moveaxis(golden[f"{self.name}/entries"], 2, -1)
        self.results = np.moveaxis(golden[f"{self.name}/results"], 2, -1)
        settings = script["ctor"]
        self.shards, self.rank = settings.get("shard_size", 1), settings.get("shard_rank", 0)
        self.positions = settings["num_blocks"]
        self.levels = settings.get("num_train_timesteps", 1000)
        self.spec = eb.BufferSpec(
            rows=max(self.positions, self.shards),
            by="column" if self.shards > 1 else "chunk",
            buckets=settings["num_buckets"],
            slots=settings["max_size_per_bucket"],
            dealt=self.shards > 1,
            replace=REPLACE[settings["replacement_strategy"]],
            dtype="float32",
        )
        self.replayed = functools.cache(self._replay)

    def cases(self) -> list[Case]:
        """The cases of the script."""
        name, script = self.name, self.script
        # 1. Settings that are not implemented.
        if unknown := sorted(set(script["ctor"]) - SETTINGS):
            return [later(name, f"settings {unknown}")]
        if self.positions and self.shards > 1:
            return [later(name, "positions that each have only some of the buckets")]
        # 2. The expected results.
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
                f"{name}/results",
                TIGHT,
                lambda: self.replayed()[0],
                self.results,
                relative_or_empty,
            ),
            compared(
                f"{name}/final_buckets",
                EXACT,
                lambda: contents(self.replayed()[1], self.spec.replace),
                np.array(final).reshape(-1, *self.entries.shape[1:]),
                relative_or_empty,
            ),
            *(
                compared(f"{name}/{key}", EXACT, partial(self._fact, key), want, differing)
                for key, want in facts.items()
            ),
        ]

    def _keys(self) -> list[list[int]]:
        """The final entries of every stored bucket, by row and column."""
        final = self.script["final_buckets"]
        buckets = range(self.rank, self.spec.buckets, self.shards)
        if not self.positions:
            return [final.get(str(bucket), []) for bucket in buckets]
        rows = range(self.positions)
        return [final.get(f"({row}, {bucket})", []) for row in rows for bucket in buckets]

    def _own(self, buffer: eb.Buffer) -> eb.Buffer:
        """The rows and columns of this rank."""
        columns = len(range(self.rank, self.spec.buckets, self.shards))
        first = self.rank if self.shards > 1 else 0
        last = first + max(self.positions, 1)
        return jax.tree.map(lambda x: x[first:last, :columns], buffer)

    def _replay(self) -> tuple[np.ndarray, eb.Buffer]:
        """The sampled errors, and the buffer after all operations."""
        buffer = jax.tree.map(lambda x: x[0], eb.empty(self.spec, self.entries.shape[1:]))
        samples: list[np.ndarray] = []
        for op in self.script["ops"]:
            if op["op"] == "add":
                buffer = self._add(buffer, op)
            elif op["result"] is None:
                if np.any(self._sample(buffer, op, 0.0)):
                    raise ValueError(
                        f"the golden samples nothing, but our buffer has an entry: {op}"
                    )
            else:
                (_, count, index), *rest = op["python_draws"]
                scale = rest[0][3] if rest else 1.0
                samples.append(scale * self._sample(buffer, op, uniform_for(index, count)))
        return np.array(samples).reshape(-1, *self.entries.shape[1:]), self._own(buffer)

    def _bucket(self, op: Mapping[str, Any]):
        """Row, column, and whether this rank stores the bucket."""
        position = self.rank if self.shards > 1 else op.get("pos") or 0
        row = jnp.clip(position, 0, self.spec.rows - 1)
        index = jnp.asarray(op.get("t", 0))
        bucket = eb.bucket_of(index, self.spec.buckets, levels=self.levels)
        return row, *eb.column_of(self.spec, row, bucket)

    def _add(self, buffer: eb.Buffer, op: Mapping[str, Any]) -> eb.Buffer:
        row, column, keep = self._bucket(op)
        uniform = 0.0
        for _, low, high, index in op["python_draws"]:
            uniform = uniform_for(index - low, high + 1 - low)
        error, replace = self.entries[op["entry"]], self.spec.replace
        return add(buffer, error, row, column, uniform=uniform, keep=keep, replace=replace)

    def _sample(self, buffer: eb.Buffer, op: Mapping[str, Any], uniform: float) -> np.ndarray:
        row, column, _ = self._bucket(op)
        replace = self.spec.replace
        if op["op"] == "sample":
            return np.asarray(sample_bucket(buffer, row, column, uniform, replace=replace))
        if op["op"] == "sample_global" and self.positions:
            buffer, row = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), buffer), 0
        return np.asarray(sample_row(buffer, row, uniform, replace=replace))

    def _fact(self, key: str) -> Any:
        buffer = self.replayed()[1]
        counts = np.asarray(buffer.counts)
        rows = np.clip(np.arange(len(self.script["has_pos"])), 0, len(counts) - 1)
        buckets = jnp.arange(self.spec.buckets)
        column, _ = eb.column_of(self.spec, jnp.asarray(self.rank), buckets)
        return {
            "total_added": buffer.added.sum(),
            "is_empty": not counts.any(),
            "has_pos": counts[rows].any(axis=1),
            "nearest_owned": column * self.shards + self.rank,
            "counts": counts.reshape(-1),
        }[key]
