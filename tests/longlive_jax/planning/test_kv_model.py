"""The KV cache's work against a chunk's, for GB200 and a window of four chunks."""

import json

import pytest

from longlive_jax.bench.kernels_page import TABLE
from longlive_jax.planning.chips import get_chip
from longlive_jax.planning.kv_model import chunk_seconds, kv_seconds

SHARES = {row["kernel"]: row["model_share"] for row in json.loads(TABLE.read_text())}
REQUIRED = 0.55
"""Share that Blackwell's forward attention must reach; the cache takes more of a faster one."""


def cache_share(attention_share: float) -> float:
    chip = get_chip("gb200")
    cache = sum(kv_seconds(chip, slots=3, quantize_share=SHARES["nvfp4_quantize"]).values())
    return cache / chunk_seconds(chip, slots=3, attention_share=attention_share)


def test_the_cache_takes_at_most_two_percent_beside_the_attention_required():
    assert cache_share(REQUIRED) <= 0.02


def test_the_page_says_what_the_cache_takes_beside_the_attention_compiled(docs_kernels):
    share = 100 * cache_share(SHARES["attention_forward_blackwell"])
    assert f"take {share:.1f} % of a chunk" in docs_kernels


@pytest.fixture
def docs_kernels() -> str:
    from longlive_jax.bench.kernels_page import PAGE

    return " ".join(PAGE.read_text().split())
