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


def bare(pieces):
    return [piece.removeprefix("\u2581") for piece in pieces]


def test_every_word_of_the_world_is_one_piece(tokenizer):
    for word in VOCABULARY:
        assert bare(tokenizer.pieces(word)) == [word]
    for caption in all_captions():
        assert bare(tokenizer.pieces(caption)) == caption.split()


def test_prefix_and_full_stop(tokenizer):
    pieces = bare(tokenizer.pieces(CUT_PREFIX + "a red circle."))
    assert pieces == ["the", "scene", "transitions", ".", "a", "red", "circle", "."]


def test_nothing_in_the_world_is_unknown_or_too_long(tokenizer):
    prompts = [CUT_PREFIX + caption + "." for caption in all_captions()]
    ids, mask = tokenizer.encode(prompts, TEXT_LENGTH)
    assert not (ids == UNKNOWN).any()
    assert not tokenizer.truncations(prompts, TEXT_LENGTH)
    assert mask.sum(1).max() == 15  # 4 of the prefix, 9 words, full stop, end mark


def test_different_captions_have_different_numbers(tokenizer):
    ids, _ = tokenizer.encode(all_captions(), TEXT_LENGTH)
    assert len({row.tobytes() for row in ids}) == len(all_captions())


def test_case_does_not_matter(tokenizer):
    assert tokenizer.pieces("A RED Circle") == tokenizer.pieces("a red circle")


def test_foreign_words_are_unknown_and_leave_the_others_alone(tokenizer):
    ids, mask = tokenizer.encode(["a shiny red circle, moves 左 left"], TEXT_LENGTH)
    known, _ = tokenizer.encode(["a red circle moves left"], TEXT_LENGTH)
    kept = [i for i in ids[0][mask[0]] if i != UNKNOWN]
    assert kept == [i for i in known[0] if i]
    assert mask.sum() == len(kept) + 3


def test_the_empty_prompt_is_the_end_mark(tokenizer):
    ids, mask = tokenizer.encode([""], TEXT_LENGTH)
    assert ids[0, 0] == 1 and mask.sum() == 1


def test_same_words_same_bytes(tokenizer):
    captions = [CUT_PREFIX, *all_captions()]
    assert train_tokenizer(reversed(captions)) == tokenizer.model


def test_other_worlds():
    words = words_of(["A cube, on top.", "an up-left cone"])
    assert words == ["a", "an", "cone", "cube", "on", "top", "up-left", ",", "."]
    tokenizer = Tokenizer(train_tokenizer(["A cube, on top.", "an up-left cone"]))
    assert tokenizer.vocab_size == 3 + len(words)
    assert bare(tokenizer.pieces("an up-left cube, on top")) == [
        "an", "up-left", "cube", ",", "on", "top"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no captions"):
        train_tokenizer([])
