"""Sampling against keys and values in NVFP4: the same drivers, close to the same video."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models.wan.cache import CachePolicy
from longlive_jax.models.wan.packed_cache import KVFormat
from longlive_jax.sampling.script import ShotScript
from longlive_jax.spec import UserError
from tests.longlive_jax.sampling.conftest import Toy

PACKED = CachePolicy(format=KVFormat("nvfp4"))


@pytest.fixture(scope="module")
def wide():
    """A toy with heads that NVFP4 takes."""
    return Toy(PACKED, dim=64)


@pytest.fixture(scope="module")
def latents(wide):
    """Four chunks, by scan."""
    return wide.sample([wide.order([0])] * 4, wide.setting())[0]


@pytest.fixture(scope="module")
def plain(wide):
    """The same with nothing packed."""
    return wide.sample([wide.order([0])] * 4, wide.setting(), policy=CachePolicy())[0]


def distance(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_scan_equals_stream_in_place_and_all_chunks_share_a_compilation(wide, latents):
    cache, setting, order = wide.cache(), wide.setting(), wide.words(wide.order([0]))
    place = cache.v.codes.unsafe_buffer_pointer()
    for i in range(4):
        chunk, cache = wide.sampler.step(wide.params, cache, setting, order)
        np.testing.assert_array_equal(chunk, latents[:, 2 * i : 2 * i + 2])
    assert wide.sampler.step._cache_size() == 1
    assert cache.v.codes.dtype == jnp.uint8 and cache.v.codes.unsafe_buffer_pointer() == place


def test_packing_moves_the_video_a_little_once_there_is_a_past(latents, plain):
    np.testing.assert_allclose(latents[:, :2], plain[:, :2], atol=1e-5)
    assert 1e-6 < distance(latents[:, 2:], plain[:, 2:]) < 0.05


def test_unrotated_keys_are_packed_as_well(wide, plain):
    policy = dataclasses.replace(PACKED, relative_rope=True)
    relative, _ = wide.sample([wide.order([0])] * 4, wide.setting(), policy=policy)
    assert 1e-6 < distance(relative, plain) < 0.05


def test_a_setting_of_the_pipeline(tiny):
    """It is said what the cache takes, and what cannot be is refused before anything compiles."""
    script = ShotScript.of("a cat runs", seconds=1)
    assert not any("NVFP4" in note for note in tiny.stream(script).notes)
    pipe = tiny.with_settings(kv="nvfp4", kv_smoothing="none")
    with pytest.raises(UserError, match="use kv=model"):
        pipe.stream(script)
    pipe = copy.copy(pipe)
    pipe.cfg = dataclasses.replace(tiny.cfg, dim=32)
    (note,) = (note for note in pipe.stream(script).notes if "NVFP4" in note)
    assert "NVFP4 (none), unpacked a layer at a time: 0.00 MB, 3." in note
    with pytest.raises(UserError, match=r"kv_reader=mosaic: .*this is cpu"):
        pipe.with_settings(kv_reader="mosaic").stream(script)
