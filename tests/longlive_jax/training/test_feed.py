"""Batches on their way to the devices: each process's rows, sharded by the specs."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec, make_mesh
from longlive_jax.training.feed import device_put_batch, feed_in_order, process_rows, total_skipped


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1)])
def test_a_single_process_has_all_rows(shape):
    mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
    assert process_rows(mesh, 8) == range(8)


def test_a_batch_is_sharded_by_its_specs_and_complete():
    mesh = make_mesh(MeshSpec(2, 1, 4))
    batch = {"frames": np.arange(4 * 8 * 3.0).reshape(4, 8, 3), "row": np.arange(4)}
    on_mesh = device_put_batch(batch, {"frames": P(BATCH, SP), "row": P(BATCH)}, mesh, rows=4)
    for name, value in batch.items():
        np.testing.assert_array_equal(on_mesh[name], value)
    assert on_mesh["frames"].addressable_shards[0].data.shape == (2, 2, 3)
    assert on_mesh["row"].addressable_shards[0].data.shape == (2,)


def test_one_spec_applies_to_a_subtree():
    mesh = make_mesh(MeshSpec(2, 2, 2))
    on_mesh = device_put_batch({"a": np.ones((4, 5)), "b": np.ones(4)}, P(BATCH), mesh, rows=4)
    assert all(x.addressable_shards[0].data.shape[0] == 1 for x in on_mesh.values())


def test_batches_are_in_order_from_any_step():
    with feed_in_order(range(10, 20))(4) as feed:
        assert list(feed) == [14, 15, 16, 17, 18, 19]
        assert feed.waited > 0 and feed.skipped == 0


def test_samples_of_processes_with_equal_rows_count_once(monkeypatch):
    first_and_skipped = np.array([[0, 3], [0, 2], [4, 0], [4, 5]])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: first_and_skipped)
    assert total_skipped(3, 0) == 3 + 5
