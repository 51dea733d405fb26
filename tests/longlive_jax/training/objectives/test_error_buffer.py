"""Buckets of errors against lists of Python, and what a layout refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.training.objectives import error_buffer as eb

CHUNK = (2, 1, 1, 3)


def errors(count: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(0), (count, *CHUNK)))


class Lists:
    """What a buffer ought to hold: a list a bucket."""

    def __init__(self, spec: eb.BufferSpec):
        self.spec = spec
        self.held = {place: [] for place in np.ndindex(spec.rows, spec.columns)}

    def add(self, error, row, column, share):
        bucket, slots = self.held[row, column], self.spec.slots
        if len(bucket) < slots:
            bucket.append(error)
        elif self.spec.replace == "oldest":
            self.held[row, column] = [*bucket[1:], error]
        elif self.spec.replace == "random":
            bucket[int(share * slots)] = error
        else:
            bucket[int(np.argmin([np.sum((x - error) ** 2) for x in bucket]))] = error


@pytest.mark.parametrize("replace", ["random", "oldest", "nearest"])
def test_buckets_are_lists(replace):
    spec = eb.BufferSpec(rows=2, buckets=3, slots=3, replace=replace, dtype="float32")
    count = 60
    rng, given = np.random.default_rng(1), errors(count)
    row, column = rng.integers(2, size=count), rng.integers(3, size=count)
    share, keep = rng.random(count, np.float32), rng.random(count) < 0.8
    lists = Lists(spec)
    for i in np.flatnonzero(keep):
        lists.add(given[i], row[i], column[i], share[i])
    start = jax.tree.map(lambda x: x[0], eb.empty(spec, CHUNK))
    buffer = jax.jit(functools.partial(eb.add_all, replace=replace))(
        start, given, row, column, share=share, keep=keep
    )
    matched = jax.jit(functools.partial(eb.matched, replace=replace))
    pooled = jax.jit(functools.partial(eb.pooled, replace=replace))
    for (r, t), want in lists.held.items():
        got = [matched(buffer, r, t, (i + 0.5) / len(want)) for i in range(len(want))]
        np.testing.assert_array_equal(np.array(got), want)
    for r in range(2):
        want = [error for t in range(3) for error in lists.held[r, t]]
        got = [pooled(buffer, r, (i + 0.5) / len(want)) for i in range(len(want))]
        np.testing.assert_array_equal(np.array(got), want)
    assert int(buffer.added.sum()) == keep.sum()


def test_an_empty_bucket_gives_nothing():
    spec = eb.BufferSpec(rows=2, buckets=2, slots=2)
    buffer = jax.tree.map(lambda x: x[0], eb.empty(spec, CHUNK))
    buffer = eb.add(
        buffer, errors(1)[0], 0, 1, share=jnp.array(0.0), keep=jnp.array(True), replace="random"
    )
    assert np.any(eb.matched(buffer, 0, 1, 0.99, "random"))
    assert np.any(eb.pooled(buffer, 0, 0.99, "random"))
    for row, column in ((0, 0), (1, 1)):
        assert not np.any(eb.matched(buffer, row, column, 0.5, "random"))
    assert not np.any(eb.pooled(buffer, 1, 0.5, "random"))


@pytest.mark.parametrize(("buckets", "rows"), [(7, 3), (8, 4), (5, 2), (6, 6)])
def test_dealt_buckets_have_one_row_each_and_all_have_a_nearest(buckets, rows):
    spec = eb.BufferSpec(rows=rows, buckets=buckets, dealt=True)
    bucket = jnp.arange(buckets)
    owners = np.zeros(buckets, int)
    for row in range(rows):
        mine = np.arange(row, buckets, rows)
        column, owned = eb.column_of(spec, jnp.asarray(row), bucket)
        np.testing.assert_array_equal(np.flatnonzero(owned), mine)
        found = np.asarray(column) * rows + row
        away = np.abs(mine[:, None] - np.arange(buckets))
        np.testing.assert_array_equal(np.abs(found - np.arange(buckets)), away.min(0))
        assert column.max() < spec.columns
        owners += np.asarray(owned)
    assert (owners == 1).all()


def test_buckets_split_the_table_evenly():
    of = np.asarray(eb.bucket_of(jnp.arange(-3, 1003), 40))
    assert (np.bincount(of[3:-3]) == 25).all() and of[0] == 0 and of[-1] == 39


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots is 0; give at least 1"),
        ({"buckets": 1001}, "buckets is 1001; give at most 1000"),
        ({"buckets": 3, "rows": 4, "dealt": True}, "3 buckets cannot be dealt to 4 rows"),
        ({"dealt": True, "by": "chunk"}, "gives rows no position"),
    ],
)
def test_what_makes_no_buffer_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        eb.BufferSpec(**settings)
