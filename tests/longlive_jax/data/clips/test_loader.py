"""The order of samples: independent of workers, ranks and resuming."""

import numpy as np
import pytest

from longlive_jax.data.clips.loader import ClipFeed, FeedSpec, clip_dataset
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.videos import ToySource


def batches(source, steps, start=0, **spec):
    with ClipFeed(source, FeedSpec(**spec), start=start) as feed:
        return [next(feed) for _ in range(steps)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for batch, other in zip(a, b, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_every_epoch_has_all_samples_in_another_order():
    order = indices(batches(ToySource(12), 12, batch=3))
    epochs = [order[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != list(range(12))
    assert indices(batches(ToySource(12), 4, batch=3, seed=1)) not in (epochs[0], epochs[1])


def test_batches_of_one():
    """Also in groups of one row, and far into a run."""
    order = indices(batches(ToySource(5, bad=(3,)), 10, batch=1))
    assert set(order[:5]) == set(order[5:]) == {0, 1, 2, 4}
    both = batches(ToySource(5), 2, 10**9, batch=2)
    groups = [batches(ToySource(5), 2, 10**9, batch=2, rank=rank, count=2) for rank in range(2)]
    assert indices(both) == [i for pair in zip(*map(indices, groups), strict=True) for i in pair]


def test_randomness_is_drawn_again_on_every_read():
    epochs = batches(ToySource(4), 3, batch=4)
    draws = {tuple(row) for batch in epochs for row in batch["draw"]}
    assert len(draws) == 12
    assert_equal(epochs, batches(ToySource(4), 3, batch=4))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_groups_read_disjoint_rows_of_the_same_batch(count):
    """Also if an epoch ends within a batch."""
    single = batches(ToySource(20, bad=(3, 11)), 9, batch=6)
    groups = [
        batches(ToySource(20, bad=(3, 11)), 9, batch=6, rank=rank, count=count)
        for rank in range(count)
    ]
    for step, batch in enumerate(single):
        for name, column in batch.items():
            rows = [group[step][name] for group in groups]
            np.testing.assert_array_equal(np.concatenate(rows), column)
    assert sorted(indices(batches(ToySource(18), 3, batch=6))) == list(range(18))


@pytest.mark.parametrize("start", [1, 5, 13])
def test_resuming_at_a_step(start):
    source = ToySource(7, bad=(2,))
    assert_equal(batches(source, 15, batch=2)[start:], batches(source, 15 - start, start, batch=2))
    batch = clip_dataset(source, FeedSpec(batch=2))[start]
    np.testing.assert_array_equal(batch["index"], batches(source, 1, start, batch=2)[0]["index"])


def test_any_number_of_workers_and_threads():
    source = ToySource(9, bad=(4,))
    default = batches(source, 8, batch=2)
    assert_equal(default, batches(source, 8, batch=2, threads=5, ahead=4))
    assert_equal(default[3:], batches(source, 5, 3, batch=2, workers=2))


def test_unusable_samples_are_replaced_counted_and_logged(caplog):
    bad = (1, 5)
    with ClipFeed(ToySource(8, bad), FeedSpec(batch=2)) as feed:
        read = [next(feed) for _ in range(8)]
        skipped = dict(feed.skipped)
    assert set(skipped) == {"toy 1: is bad", "toy 5: is bad"}
    assert sum(skipped.values()) == sum(batch["skipped"].sum() for batch in read) >= 4
    assert not set(indices(read)) & set(bad)
    assert all(batch["index"].shape == (2,) for batch in read)
    assert all(len(set(batch["index"].tolist())) == 2 for batch in read)
    without_bad = batches(ToySource(8), 8, batch=2)
    for batch, other in zip(read, without_bad, strict=True):
        unaffected = batch["skipped"] == 0
        np.testing.assert_array_equal(batch["index"][unaffected], other["index"][unaffected])
        np.testing.assert_array_equal(batch["draw"][unaffected], other["draw"][unaffected])
    logged = [r.getMessage() for r in caplog.records]
    assert sorted(m for m in logged if "skipped" in m) == [f"skipped {r}" for r in sorted(skipped)]


def test_one_usable_sample_is_enough_and_none_is_an_error():
    read = batches(ToySource(5, bad=(0, 1, 2, 4)), 6, batch=3)
    assert set(indices(read)) == {3}
    with pytest.raises(UserError, match=r"4 consecutive samples cannot be used .* toy \d: is bad"):
        batches(ToySource(4, bad=(0, 1, 2, 3)), 1, batch=2)
    with pytest.raises(UserError, match="no sample"):
        clip_dataset(ToySource(0), FeedSpec())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"rank": 2, "count": 2, "batch": 2}, "rank must be from 0 to 1, got 2"),
        ({"batch": 6, "count": 4}, "batch must be a multiple of the 4 data-parallel groups, got 6"),
        ({"workers": -1}, "workers must be >= 0, got -1"),
    ],
)
def test_invalid_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        FeedSpec(**spec)
