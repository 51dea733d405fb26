"""Encodes prompts to text features, and caches their keys and values."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from longlive_jax.models.umt5 import UMT5
from longlive_jax.models.umt5.prompts import encode_prompts
from longlive_jax.models.umt5.tokenizer import Tokenizer
from longlive_jax.models.wan import TextKV
from longlive_jax.typing import Array, Float

CACHED_PROMPTS = 24
"""Number of prompts whose keys and values stay on the device."""


class PromptEncoder:
    """Encodes prompts to text features of a fixed number of tokens."""

    def __init__(self, umt5: UMT5, tokenizer: Tokenizer, length: int):
        self._umt5, self._tokenizer, self._length = umt5, tokenizer, length

    def __call__(self, prompt: str) -> Float[Array, "1 t e"]:
        """Features of one prompt, zero beyond its tokens."""
        return encode_prompts(self._umt5, self._tokenizer, [prompt], length=self._length)

    def truncations(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """A note for each prompt that has more tokens than the text encoder reads."""
        return tuple(map(str, self._tokenizer.truncations(prompts, self._length)))

    def unknown_words(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """A note with all words of the prompts that are unknown; none if all are known."""
        return self._tokenizer.unknown_notes(prompts)


class PromptCache:
    """Keys and values of prompts, computed by `compute` when missing; thread-safe.

    At `capacity`, the least recently used prompt is evicted.
    """

    def __init__(self, compute: Callable[[str], TextKV], capacity: int = CACHED_PROMPTS):
        self._compute, self._capacity = compute, capacity
        self._entries: OrderedDict[str, TextKV] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, prompt: str) -> TextKV:
        with self._lock:
            if prompt not in self._entries:
                self._entries[prompt] = self._compute(prompt)
            self._entries.move_to_end(prompt)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
            return self._entries[prompt]
