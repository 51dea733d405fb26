"""SentencePiece model of the small world, with one piece per word of its captions."""

import io
import re
from collections.abc import Iterable

import sentencepiece

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.models.umt5.tokenizer import EOS, PAD, Tokenizer, clean
from longlive_jax.small_world.words import all_captions

TEXT_LENGTH = 16
"""Tokens per prompt: enough for cut prefix, longest caption, full stop and end of sequence."""

UNKNOWN = 2
"""Id of words outside the vocabulary; also replaces masked words in text-encoder training."""

_PUNCTUATION = re.compile(r"([^\w\s]+)(?=\s|$)")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's symbol for the start of a word


def words_of(captions: Iterable[str]) -> list[str]:
    """The distinct lower-case words of captions, sorted, then their punctuation marks, sorted."""
    text = (_PUNCTUATION.sub(r" \1", clean(caption).lower()).split() for caption in captions)
    distinct = {word for words in text for word in words}
    return sorted(distinct, key=lambda word: (bool(_PUNCTUATION.fullmatch(word)), word))


def train_tokenizer(captions: Iterable[str]) -> bytes:
    """Trains a SentencePiece model whose pieces are the words of `captions`.

    Ids: 0 padding, 1 end of sequence, 2 unknown, then `words_of(captions)` in order. Case is
    folded, and the same words give the same bytes. Consecutive unknown words become one unknown
    piece. The text encoder learns to infer it from its context, so an adjective outside the
    vocabulary does not break a prompt.

    Returns:
      The serialized model.

    Raises:
      ValueError: if there are no captions.
    """
    words = words_of(captions)
    if not words:
        raise ValueError("no captions to train a tokenizer on; give at least one word")
    # User-defined symbols are matched first, longest first. Nothing is left to learn, so the
    # vocabulary consists of exactly these words, without subwords.
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
    """The tokenizer of the small world's captions and cut prefix; `.model` is its serialization."""
    return Tokenizer(train_tokenizer([CUT_PREFIX, *all_captions()]))
