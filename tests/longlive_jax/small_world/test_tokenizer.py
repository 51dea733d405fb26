"""Pieces and ids of the small world's tokenizer."""

import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.models.umt5 import Tokenizer
from longlive_jax.small_world.tokenizer import (
    TEXT_LENGTH,
    UNKNOWN,
    train_tokenizer,
    words_of,
    world_tokenizer,
)
from longlive_jax.small_world.words import VOCABULARY, all_captions


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


def words(pieces):
    """Pieces without SentencePiece's symbol for the start of a word."""
    return [piece.removeprefix("\u2581") for piece in pieces]


def test_every_word_of_the_world_is_one_piece(tokenizer):
    for word in VOCABULARY:
        assert words(tokenizer.pieces(word)) == [word]
    for caption in all_captions():
        assert words(tokenizer.pieces(caption)) == caption.split()


def test_prefix_and_full_stop(tokenizer):
    pieces = words(tokenizer.pieces(CUT_PREFIX + "a red circle."))
    assert pieces == ["the", "scene", "transitions", ".", "a", "red", "circle", "."]


def test_no_caption_has_unknown_words_or_is_too_long(tokenizer):
    prompts = [CUT_PREFIX + caption + "." for caption in all_captions()]
    ids, mask = tokenizer.encode(prompts, TEXT_LENGTH)
    assert not (ids == UNKNOWN).any()
    assert not tokenizer.truncations(prompts, TEXT_LENGTH)
    assert mask.sum(1).max() == 15  # 4 of the prefix, 9 words, full stop, end of sequence


def test_different_captions_have_different_ids(tokenizer):
    ids, _ = tokenizer.encode(all_captions(), TEXT_LENGTH)
    assert len({row.tobytes() for row in ids}) == len(all_captions())


def test_case_does_not_matter(tokenizer):
    assert tokenizer.pieces("A RED Circle") == tokenizer.pieces("a red circle")


def test_words_outside_the_vocabulary_are_unknown_and_do_not_affect_others(tokenizer):
    ids, mask = tokenizer.encode(["a shiny red circle, moves 左 left"], TEXT_LENGTH)
    known, _ = tokenizer.encode(["a red circle moves left"], TEXT_LENGTH)
    known_ids = [i for i in ids[0][mask[0]] if i != UNKNOWN]
    assert known_ids == [i for i in known[0] if i]
    assert mask.sum() == len(known_ids) + 3


def test_the_empty_prompt_is_the_end_of_sequence(tokenizer):
    ids, mask = tokenizer.encode([""], TEXT_LENGTH)
    assert ids[0, 0] == 1 and mask.sum() == 1


def test_the_model_depends_on_the_words_only(tokenizer):
    captions = [CUT_PREFIX, *all_captions()]
    assert train_tokenizer(reversed(captions)) == tokenizer.model


def test_other_captions():
    vocabulary = words_of(["A cube, on top.", "an up-left cone"])
    assert vocabulary == ["a", "an", "cone", "cube", "on", "top", "up-left", ",", "."]
    tokenizer = Tokenizer(train_tokenizer(["A cube, on top.", "an up-left cone"]))
    assert tokenizer.vocab_size == 3 + len(vocabulary)
    assert words(tokenizer.pieces("an up-left cube, on top")) == [
        "an", "up-left", "cube", ",", "on", "top"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no captions"):
        train_tokenizer([])


def test_unknown_words():
    """Each once, in order; known words and their punctuation are none, nor is a known beginning."""
    tokenizer = world_tokenizer()
    assert tokenizer.unknown_words("A dragon flies left, slowly; the dragon stays.") == (
        "dragon",
        "flies",
        "slowly",
    )
    assert tokenizer.unknown_words("The scene transitions. a red circle moves up") == ()
    assert tokenizer.unknown_words("two circles") == ("two",) and tokenizer.unknown_words("") == ()


def test_a_note_names_the_first_unknown_words():
    tokenizer = world_tokenizer()
    many = [f"{letter * 3} circles" for letter in "bcdefghijklm"]
    (note,) = tokenizer.unknown_notes([*many, "a red circle"])
    assert "does not know the words 'bbb', 'ccc', " in note and "'kkk' and 2 more;" in note
    assert tokenizer.unknown_notes(["a red circle"]) == ()
