"""Decoding behind the sampler: order, and leaving early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.sampling.streaming_vae import overlapped


def decode(latents):
    return latents.astype(jnp.uint8), jnp.isfinite(latents).all()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_chunk_comes_in_order(ahead):
    chunks = [jnp.full((1, 2), float(i)) for i in range(5)]
    frames = [frame for frame, _ in overlapped(iter(chunks), decode, ahead=ahead)]
    np.testing.assert_array_equal(np.concatenate(frames)[:, 0], range(5))


def test_leaving_early_waits_for_what_is_under_way(monkeypatch):
    """Or a process that ends then would be torn down below threads at work."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.extend)
    film = overlapped((jnp.full((1, 2), float(i)) for i in range(9)), decode, ahead=2)
    next(film)
    film.close()
    np.testing.assert_array_equal([chunk[0, 0] for _, _, chunk in waited], [1, 2])


def test_latents_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        next(overlapped(iter([jnp.full((1, 2), jnp.nan)]), decode, ahead=0))
