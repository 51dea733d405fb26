"""Prompts to token numbers: text cleaning and a SentencePiece model.

Works with the `spiece.model` of google/umt5-xxl and with any SentencePiece model that gives padding
the number 0 and the end mark the number 1, as the T5 family does.
"""

import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece

from longlive_jax.spec import UserError
from longlive_jax.typing import Bool, Int32

PAD, EOS = 0, 1

_WHITESPACE = re.compile(r"\s+")


def clean(text: str) -> str:
    """Repairs broken Unicode, resolves HTML entities (twice), makes whitespace runs one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", text).strip()


@dataclasses.dataclass(frozen=True)
class Truncation:
    """A prompt that does not fit: its place in the list, its tokens, the limit, and what is kept.

    Tokens and limit count the end mark.
    """

    index: int
    tokens: int
    limit: int
    kept: str

    def __str__(self) -> str:
        return (
            f"prompt {self.index + 1} has {self.tokens} tokens, the text encoder reads "
            f"{self.limit}; it is cut off after {self.kept[-40:]!r}"
        )


class Tokenizer:
    """A SentencePiece model; `source` is its file or the bytes of one.

    Raises UserError if the file is missing, is no SentencePiece model, or numbers its special
    tokens differently.
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
        """Number of the piece that stands for whatever the model cannot spell."""
        return self._pieces.unk_id()

    def pieces(self, text: str) -> list[str]:
        """What the cleaned text is cut into, without the end mark."""
        return self._pieces.EncodeAsPieces(clean(text))

    def encode(
        self, prompts: Sequence[str], length: int = 512
    ) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
        """Token numbers padded to `length`, and a mask that is true at tokens.

        Every row ends in the end mark; a prompt too long for the row loses its end (`truncations`
        tells which). The empty prompt is the end mark alone.
        """
        _check(prompts, length)
        ids = np.full((len(prompts), length), PAD, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for i, prompt in enumerate(prompts):
            row = [*self._pieces.EncodeAsIds(clean(prompt))[: length - 1], EOS]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return ids, mask

    def truncations(self, prompts: Sequence[str], length: int = 512) -> list[Truncation]:
        """The prompts that `encode` would cut off at `length` tokens; worth a warning each."""
        _check(prompts, length)
        found = []
        for i, prompt in enumerate(prompts):
            row = self._pieces.EncodeAsIds(clean(prompt))
            if len(row) + 1 > length:
                kept = self._pieces.DecodeIds(row[: length - 1])
                found.append(Truncation(i, len(row) + 1, length, kept))
        return found


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
        raise ValueError(f"length is {length}; it must be at least 1, for the end mark")
