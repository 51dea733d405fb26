"""Latents and caches of entire videos against the reference."""

import numpy as np
import pytest

CASES = ["plain", "sink", "multishot", "multishot_2step", "multishot_cfg"]
I2V_CASES = ["i2v", "i2v_cfg", "t2v_clean_recache"]


def distance(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def check(golden, name):
    case = next(case for case in golden.meta["cases"] if case["name"] == name)
    latents, cache = golden.run(case)
    assert distance(latents, np.moveaxis(golden.arrays[f"{name}/latents"], 2, -1)) < 1e-4
    check_cache(golden, case, cache)
    return latents, cache


def check_cache(golden, case, cache):
    """The reference keeps chunks in order of age, and counts in tokens."""
    state, name = case["cache_state"], case["name"]
    order = np.argsort(np.asarray(cache.slot_chunk[0]))
    stored = np.asarray(cache.k)[0, 0, order]
    want = golden.arrays[f"{name}/k_cache_layer0"][0]
    want = want.reshape(-1, stored.shape[1], *want.shape[1:])
    # The reference evicts a chunk when the next one arrives, we when the last one is written.
    common = [i for i in range(len(want)) if min(distance(slot, want[i]) for slot in stored) < 1e-4]
    assert len(common) == len(stored) and len(want) - 1 in common and common == sorted(common)
    tokens = stored.shape[1]
    assert int(cache.num_chunks[0]) * tokens == state["global_end_index"]
    if state["pinned_start"] >= 0:
        sink = list(np.asarray(cache.slot_chunk[0])[order]).index(int(cache.sink_start[0]))
        assert common[sink] * tokens == state["pinned_start"]
        assert int(cache.sink_length[0]) * tokens == state["pinned_len"]


@pytest.mark.parametrize("name", CASES)
def test_multishot_equals_the_reference(multishot, name):
    check(multishot, name)


@pytest.mark.parametrize("name", I2V_CASES)
def test_image_to_video_equals_the_reference(i2v, name):
    latents, _ = check(i2v, name)
    if "i2v" in name:
        first = np.moveaxis(i2v.arrays["initial_latent"][0, 0], 0, -1)
        np.testing.assert_array_equal(latents[0, 0], first)
