"""Sampling with an NVFP4 cache: the same compiled functions, nearly the same video."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.bench.timing import Compilations
from longlive_jax.models.wan.cache import CachePolicy
from longlive_jax.models.wan.packed_cache import KVFormat
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import ShotScript
from longlive_jax.spec import UserError
from tests.longlive_jax.sampling.conftest import Toy

PACKED = CachePolicy(format=KVFormat("nvfp4"))


@pytest.fixture(scope="module")
def wide():
    """A toy whose heads split into NVFP4 blocks."""
    return Toy(PACKED, dim=64)


@pytest.fixture(scope="module")
def latents(wide):
    """Four chunks, by scan."""
    return wide.scan([wide.inputs([0])] * 4, wide.conditioning())[0]


@pytest.fixture(scope="module")
def plain(wide):
    """The same video without packing."""
    return wide.scan([wide.inputs([0])] * 4, wide.conditioning(), policy=CachePolicy())[0]


def distance(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_scan_equals_stream_in_place_with_one_compilation(latents):
    wide = Toy(PACKED, dim=64)
    cache, conditioning = wide.cache(), wide.conditioning()
    inputs = wide.with_text_kv(wide.inputs([0]))
    pointer = cache.v.codes.unsafe_buffer_pointer()
    with Compilations() as compiled:
        for i in range(4):
            chunk, cache = wide.sampler.step(wide.params, cache, conditioning, inputs)
            np.testing.assert_array_equal(chunk, latents[:, 2 * i : 2 * i + 2])
    assert compiled.counts["_step"] == 1
    assert cache.v.codes.dtype == jnp.uint8 and cache.v.codes.unsafe_buffer_pointer() == pointer


def test_packing_changes_the_video_a_little_after_the_first_chunk(latents, plain):
    np.testing.assert_allclose(latents[:, :2], plain[:, :2], atol=1e-5)
    assert 1e-6 < distance(latents[:, 2:], plain[:, 2:]) < 0.05


def test_unrotated_keys_are_packed_as_well(wide, plain):
    policy = dataclasses.replace(PACKED, relative_rope=True)
    relative, _ = wide.scan([wide.inputs([0])] * 4, wide.conditioning(), policy=policy)
    assert 1e-6 < distance(relative, plain) < 0.05


def test_the_pipeline_notes_the_cache_and_refuses_bad_settings_before_compiling(tiny):
    script = ShotScript.of("a cat runs", seconds=1)
    assert not any("NVFP4" in note for note in tiny.stream(script).notes)
    pipe = tiny.with_settings(kv="nvfp4", kv_smoothing="none")
    with pytest.raises(UserError, match="use kv=model"):
        pipe.stream(script)
    engine = copy.copy(pipe.engine)
    engine.cfg = dataclasses.replace(engine.cfg, dim=32)  # heads of 16 channels
    pipe = Pipeline(engine)
    (note,) = (note for note in pipe.stream(script).notes if "NVFP4" in note)
    assert "NVFP4 (none), dequantized layer by layer: 0.00 MB, 3." in note
    with pytest.raises(UserError, match=r"kv_reader=mosaic: .*this is cpu"):
        pipe.with_settings(kv_reader="mosaic").stream(script)
