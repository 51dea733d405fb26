"""Prompts to token ids: text cleaning and a SentencePiece model.

Works with the `spiece.model` of google/umt5-xxl, and with any SentencePiece model in which padding
has id 0 and the end mark id 1, as in the T5 family.
"""

import dataclasses
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece

from longlive_jax.spec import UserError
from longlive_jax.typing import Bool, Int32

PAD, EOS = 0, 1
MOST_NAMED = 10
"""Number of unknown words that a note names."""

_WHITESPACE = re.compile(r"\s+")
_SPACE = "▁"  # SentencePiece's mark of a word's beginning
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def clean(text: str) -> str:
    """Repairs broken Unicode, unescapes HTML entities twice, and collapses whitespace."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", text).strip()


@dataclasses.dataclass(frozen=True)
class Truncation:
    """A prompt that is too long and is truncated.

    Attributes:
      index: position in the list of prompts, from 0.
      tokens: number of tokens, including the end mark.
      limit: maximum number of tokens, including the end mark.
      retained: text that remains after truncation.
    """

    index: int
    tokens: int
    limit: int
    retained: str

    def __str__(self) -> str:
        return (
            f"prompt {self.index + 1} has {self.tokens} tokens, the text encoder reads "
            f"{self.limit}; it is truncated after {self.retained[-40:]!r}"
        )


class Tokenizer:
    """A tokenizer from a SentencePiece model; `source` is a path or the content of a model file.

    Raises UserError if the file is missing, is not a SentencePiece model, or has other ids for
    padding and the end mark.
    """

    def __init__(self, source: str | Path | bytes):
        name = "tokenizer" if isinstance(source, bytes) else f"tokenizer {source}"
        self.model = source if isinstance(source, bytes) else _read(Path(source))
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(self.model)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{name} is not a SentencePiece model; use the spiece.model of google/umt5-xxl, or "
                "the tokenizer.model of a converted checkpoint"
            ) from error
        first = [self._pieces.IdToPiece(i) for i in range(min(2, self.vocab_size))]
        if first != ["<pad>", "</s>"]:
            raise UserError(
                f"{name} begins with the pieces {first}; UMT5 needs ['<pad>', '</s>'], as in the "
                "spiece.model of google/umt5-xxl"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces; a text encoder needs at least as many embeddings."""
        return self._pieces.GetPieceSize()

    @property
    def unknown(self) -> int:
        """Id of the piece for unknown characters."""
        return self._pieces.unk_id()

    def pieces(self, text: str) -> list[str]:
        """The pieces of the cleaned text, without the end mark."""
        return self._pieces.EncodeAsPieces(clean(text))

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """The words of `text` of which no part is in the vocabulary, once each, in order.

        All of them look the same to the text encoder. Tokenizers with bytes for unknown characters,
        such as UMT5's, know every word.
        """
        words = dict.fromkeys(_WORD.findall(clean(text)))
        return tuple(word for word in words if self._is_unknown(word))

    def unknown_notes(self, texts: Iterable[str]) -> tuple[str, ...]:
        """A note with all words of `texts` that are unknown; none if all are known."""
        words = list(dict.fromkeys(word for text in texts for word in self.unknown_words(text)))
        if not words:
            return ()
        named = ", ".join(map(repr, words[:MOST_NAMED]))
        more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
        plural = "s" * (len(words) > 1)
        return (
            f"the text encoder does not know the word{plural} {named}{more}; all unknown words "
            "look the same to it",
        )

    def _is_unknown(self, word: str) -> bool:
        pieces = self._pieces.EncodeAsPieces(word)
        ids = [self._pieces.PieceToId(piece) for piece in pieces if piece != _SPACE]
        return bool(ids) and all(number == self.unknown for number in ids)

    def encode(
        self, prompts: Sequence[str], length: int = 512
    ) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
        """Token ids padded to `length`, and a mask that is true at tokens.

        Every row ends with the end mark. Prompts that are too long are truncated; `truncations`
        lists them. An empty prompt is only the end mark. Raises ValueError if `prompts` is a single
        string or `length` is below 1.
        """
        _check(prompts, length)
        ids = np.full((len(prompts), length), PAD, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for i, prompt in enumerate(prompts):
            row = [*self._pieces.EncodeAsIds(clean(prompt))[: length - 1], EOS]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return ids, mask

    def truncations(self, prompts: Sequence[str], length: int = 512) -> list[Truncation]:
        """The prompts that `encode` would truncate to `length` tokens, for warnings."""
        _check(prompts, length)
        truncations = []
        for i, prompt in enumerate(prompts):
            row = self._pieces.EncodeAsIds(clean(prompt))
            if len(row) + 1 > length:
                retained = self._pieces.DecodeIds(row[: length - 1])
                truncations.append(Truncation(i, len(row) + 1, length, retained))
        return truncations


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read tokenizer {path} ({error.strerror}); it should be a SentencePiece model, "
            "for Wan 2.2 the spiece.model of google/umt5-xxl"
        ) from error


def _check(prompts: Sequence[str], length: int) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts[:40]!r}; give a list of strings")
    if length < 1:
        raise ValueError(f"length must be >= 1 to fit the end mark, got {length}")
