"""Which sample comes when: the same for any workers, ranks and resumes."""

import numpy as np
import pytest

from longlive_jax.data.clips.loader import ClipFeed, FeedSpec, clip_batches
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.videos import Toy


def batches(source, steps, start=0, **spec):
    with ClipFeed(source, FeedSpec(**spec), start=start) as feed:
        return [next(feed) for _ in range(steps)]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def indices(found):
    return np.concatenate([batch["index"] for batch in found]).tolist()


def test_every_epoch_is_all_samples_in_another_order():
    found = indices(batches(Toy(12), 12, batch=3))
    epochs = [found[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != list(range(12))
    assert indices(batches(Toy(12), 4, batch=3, seed=1)) not in (epochs[0], epochs[1])


def test_batches_of_one():
    """Also with a group of one row, and far into a run."""
    found = indices(batches(Toy(5, bad=(3,)), 10, batch=1))
    assert set(found[:5]) == set(found[5:]) == {0, 1, 2, 4}
    whole = batches(Toy(5), 2, 10**9, batch=2)
    shares = [batches(Toy(5), 2, 10**9, batch=2, rank=rank, count=2) for rank in range(2)]
    assert indices(whole) == [i for pair in zip(*map(indices, shares), strict=True) for i in pair]


def test_what_is_random_is_drawn_anew_for_every_visit():
    found = batches(Toy(4), 3, batch=4)
    draws = {tuple(row) for batch in found for row in batch["draw"]}
    assert len(draws) == 12
    same(found, batches(Toy(4), 3, batch=4))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_groups_read_disjoint_rows_of_the_batch_of_one(count):
    """Also where epochs do not end with a batch."""
    whole = batches(Toy(20, bad=(3, 11)), 9, batch=6)
    shares = [
        batches(Toy(20, bad=(3, 11)), 9, batch=6, rank=rank, count=count) for rank in range(count)
    ]
    for step, batch in enumerate(whole):
        for name, column in batch.items():
            parts = [share[step][name] for share in shares]
            np.testing.assert_array_equal(np.concatenate(parts), column)
    assert sorted(indices(batches(Toy(18), 3, batch=6))) == list(range(18))


@pytest.mark.parametrize("start", [1, 5, 13])
def test_resuming_at_a_step(start):
    source = Toy(7, bad=(2,))
    same(batches(source, 15, batch=2)[start:], batches(source, 15 - start, start, batch=2))
    lazily = clip_batches(source, FeedSpec(batch=2))[start]
    np.testing.assert_array_equal(lazily["index"], batches(source, 1, start, batch=2)[0]["index"])


def test_any_number_of_workers_and_threads():
    source = Toy(9, bad=(4,))
    alone = batches(source, 8, batch=2)
    same(alone, batches(source, 8, batch=2, threads=5, ahead=4))
    same(alone[3:], batches(source, 5, 3, batch=2, workers=2))


def test_unusable_samples_are_replaced_counted_and_logged(caplog):
    bad = (1, 5)
    with ClipFeed(Toy(8, bad), FeedSpec(batch=2)) as feed:
        found = [next(feed) for _ in range(8)]
        skipped = dict(feed.skipped)
    assert set(skipped) == {"toy 1: is bad", "toy 5: is bad"}
    assert sum(skipped.values()) == sum(batch["skipped"].sum() for batch in found) >= 4
    assert not set(indices(found)) & set(bad)
    assert all(batch["index"].shape == (2,) for batch in found)
    assert all(len(set(batch["index"].tolist())) == 2 for batch in found)
    untouched = batches(Toy(8), 8, batch=2)
    for batch, other in zip(found, untouched, strict=True):
        usual = batch["skipped"] == 0
        np.testing.assert_array_equal(batch["index"][usual], other["index"][usual])
        np.testing.assert_array_equal(batch["draw"][usual], other["draw"][usual])
    logged = [r.getMessage() for r in caplog.records]
    assert sorted(m for m in logged if "skipped" in m) == [f"skipped {r}" for r in sorted(skipped)]


def test_one_usable_sample_is_enough_and_none_is_an_error():
    found = batches(Toy(5, bad=(0, 1, 2, 4)), 6, batch=3)
    assert set(indices(found)) == {3}
    with pytest.raises(UserError, match=r"4 samples tried .* toy \d: is bad"):
        batches(Toy(4, bad=(0, 1, 2, 3)), 1, batch=2)
    with pytest.raises(UserError, match="no sample"):
        clip_batches(Toy(0), FeedSpec())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"rank": 2, "count": 2, "batch": 2}, "from 0 to 1"),
        ({"batch": 6, "count": 4}, "6 rows does not split over 4"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        FeedSpec(**spec)
