"""The small world's SentencePiece model: every word of its captions is one piece."""

import io
import re
from collections.abc import Iterable

import sentencepiece

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.models.umt5.tokenizer import EOS, PAD, Tokenizer, clean
from longlive_jax.small_world.words import all_captions

TEXT_LENGTH = 16
"""Tokens of a prompt: the cut prefix, the longest caption, the end mark, and some to spare."""

UNKNOWN = 2
"""Piece of words outside the world; also what the text encoder sees in place of a hidden word."""

_PUNCTUATION = re.compile(r"([^\w\s]+)(?=\s|$)")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a word's beginning


def words_of(captions: Iterable[str]) -> list[str]:
    """The distinct words of captions in lower case, then their punctuation marks, each sorted."""
    text = (_PUNCTUATION.sub(r" \1", clean(caption).lower()).split() for caption in captions)
    found = {word for words in text for word in words}
    return sorted(found, key=lambda word: (bool(_PUNCTUATION.fullmatch(word)), word))


def train_tokenizer(captions: Iterable[str]) -> bytes:
    """A SentencePiece model whose pieces are the words of `captions`.

    Numbers: padding 0, end mark 1, unknown 2, then `words_of` in order. Case is folded.
    The same words give the same bytes.
    A run of unknown words is one unknown piece, which the text encoder learns to guess from its
    context, so a foreign adjective does not break a prompt.

    Raises:
      ValueError: no captions.
    """
    words = words_of(captions)
    if not words:
        raise ValueError("no captions to train a tokenizer on; give at least one word")
    # Declared pieces are matched before anything is learnt, longest first, so that nothing is left
    # to learn and the vocabulary holds exactly these words, without pieces of words.
    pieces = [word if _PUNCTUATION.fullmatch(word) else _SPACE + word for word in words]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["".join(pieces).replace(_SPACE, " ")]),
        model_writer=out,
        model_type="bpe",
        vocab_size=3 + len(pieces),
        user_defined_symbols=pieces,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNKNOWN,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def world_tokenizer() -> Tokenizer:
    """The tokenizer of the small world's captions and cut prefix; `.model` holds its bytes."""
    return Tokenizer(train_tokenizer([CUT_PREFIX, *all_captions()]))
