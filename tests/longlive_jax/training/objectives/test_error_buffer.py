"""Error buffers against Python lists, and layouts that are errors."""

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
    """The expected contents of a buffer: one Python list per bucket."""

    def __init__(self, spec: eb.BufferSpec):
        self.spec = spec
        self.contents = {bucket: [] for bucket in np.ndindex(spec.rows, spec.columns)}

    def add(self, error, row, column, uniform):
        bucket, slots = self.contents[row, column], self.spec.slots
        if len(bucket) < slots:
            bucket.append(error)
        elif self.spec.replace == "oldest":
            self.contents[row, column] = [*bucket[1:], error]
        elif self.spec.replace == "random":
            bucket[int(uniform * slots)] = error
        else:
            bucket[int(np.argmin([np.sum((x - error) ** 2) for x in bucket]))] = error


@pytest.mark.parametrize("replace", ["random", "oldest", "nearest"])
def test_buckets_equal_lists(replace):
    spec = eb.BufferSpec(rows=2, buckets=3, slots=3, replace=replace, dtype="float32")
    count = 60
    rng, new_errors = np.random.default_rng(1), errors(count)
    row, column = rng.integers(2, size=count), rng.integers(3, size=count)
    uniform, keep = rng.random(count, np.float32), rng.random(count) < 0.8
    lists = Lists(spec)
    for i in np.flatnonzero(keep):
        lists.add(new_errors[i], row[i], column[i], uniform[i])
    start = jax.tree.map(lambda x: x[0], eb.empty(spec, CHUNK))
    buffer = jax.jit(functools.partial(eb.add_all, replace=replace))(
        start, new_errors, row, column, uniform=uniform, keep=keep
    )
    sample_bucket = jax.jit(functools.partial(eb.sample_bucket, replace=replace))
    sample_row = jax.jit(functools.partial(eb.sample_row, replace=replace))
    for (r, t), want in lists.contents.items():
        got = [sample_bucket(buffer, r, t, (i + 0.5) / len(want)) for i in range(len(want))]
        np.testing.assert_array_equal(np.array(got), want)
    for r in range(2):
        want = [error for t in range(3) for error in lists.contents[r, t]]
        got = [sample_row(buffer, r, (i + 0.5) / len(want)) for i in range(len(want))]
        np.testing.assert_array_equal(np.array(got), want)
    assert int(buffer.added.sum()) == keep.sum()


def test_an_empty_bucket_returns_zeros():
    spec = eb.BufferSpec(rows=2, buckets=2, slots=2)
    buffer = jax.tree.map(lambda x: x[0], eb.empty(spec, CHUNK))
    buffer = eb.add(
        buffer, errors(1)[0], 0, 1, uniform=jnp.array(0.0), keep=jnp.array(True), replace="random"
    )
    assert np.any(eb.sample_bucket(buffer, 0, 1, 0.99, "random"))
    assert np.any(eb.sample_row(buffer, 0, 0.99, "random"))
    for row, column in ((0, 0), (1, 1)):
        assert not np.any(eb.sample_bucket(buffer, row, column, 0.5, "random"))
    assert not np.any(eb.sample_row(buffer, 1, 0.5, "random"))


@pytest.mark.parametrize(("buckets", "rows"), [(7, 3), (8, 4), (5, 2), (6, 6)])
def test_dealt_buckets_belong_to_one_row_and_lookups_find_the_nearest(buckets, rows):
    spec = eb.BufferSpec(rows=rows, buckets=buckets, dealt=True)
    bucket = jnp.arange(buckets)
    owners = np.zeros(buckets, int)
    for row in range(rows):
        own = np.arange(row, buckets, rows)
        column, has_bucket = eb.column_of(spec, jnp.asarray(row), bucket)
        np.testing.assert_array_equal(np.flatnonzero(has_bucket), own)
        nearest = np.asarray(column) * rows + row
        distances = np.abs(own[:, None] - np.arange(buckets))
        np.testing.assert_array_equal(np.abs(nearest - np.arange(buckets)), distances.min(0))
        assert column.max() < spec.columns
        owners += np.asarray(has_bucket)
    assert (owners == 1).all()


def test_buckets_split_the_table_evenly():
    bucket = np.asarray(eb.bucket_of(jnp.arange(-3, 1003), 40))
    assert (np.bincount(bucket[3:-3]) == 25).all() and bucket[0] == 0 and bucket[-1] == 39


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots must be >= 1, got 0"),
        ({"buckets": 1001}, "buckets must be <= 1000, the number of noise levels, got 1001"),
        ({"buckets": 3, "rows": 4, "dealt": True}, "3 buckets cannot be dealt to 4 rows"),
        ({"dealt": True, "by": "chunk"}, "dealt = True needs by = 'column'"),
    ],
)
def test_inconsistent_layouts_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        eb.BufferSpec(**settings)
