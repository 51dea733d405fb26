"""Rows on their way to devices: each process its own, placed as the specs say."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec, make_mesh
from longlive_jax.training.feed import feed_in_order, own_rows, placed, skipped_by_all


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1)])
def test_one_process_owns_all_rows(shape):
    mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
    assert own_rows(mesh, 8) == range(8)


def test_a_batch_lies_as_its_specs_say_and_is_whole():
    mesh = make_mesh(MeshSpec(2, 1, 4))
    batch = {"frames": np.arange(4 * 8 * 3.0).reshape(4, 8, 3), "row": np.arange(4)}
    there = placed(batch, {"frames": P(BATCH, SP), "row": P(BATCH)}, mesh, rows=4)
    for name, value in batch.items():
        np.testing.assert_array_equal(there[name], value)
    assert there["frames"].addressable_shards[0].data.shape == (2, 2, 3)
    assert there["row"].addressable_shards[0].data.shape == (2,)


def test_one_spec_serves_a_whole_tree():
    mesh = make_mesh(MeshSpec(2, 2, 2))
    there = placed({"a": np.ones((4, 5)), "b": np.ones(4)}, P(BATCH), mesh, rows=4)
    assert all(x.addressable_shards[0].data.shape[0] == 1 for x in there.values())


def test_batches_come_in_order_from_any_step():
    with feed_in_order(range(10, 20))(4) as feed:
        assert list(feed) == [14, 15, 16, 17, 18, 19]
        assert feed.waited > 0 and feed.skipped == 0


def test_samples_skipped_by_processes_that_share_rows_are_counted_once(monkeypatch):
    num_loss_frames = np.array([[0, 3], [0, 2], [4, 0], [4, 5]])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: num_loss_frames)
    assert skipped_by_all(3, 0) == 3 + 5
