"""Captions of the small world and its held-out split."""

import dataclasses
import itertools

import pytest

from longlive_jax import small_world as sw
from longlive_jax.captions import CUT_PREFIX


def test_captions_are_sentences():
    assert (
        sw.caption(sw.Scene("circle", "red", "white", "left"))
        == "a red circle moves left on a white background"
    )
    assert (
        sw.caption(sw.Scene("cross", "orange", "gray", "still"))
        == "an orange cross stays still on a gray background"
    )


def test_parsing_inverts_every_caption():
    scenes = sw.all_scenes()
    assert len(scenes) == len(set(sw.all_captions())) == 720
    for scene in scenes:
        assert sw.parse_caption(sw.caption(scene)) == scene
        assert sw.parse_caption(CUT_PREFIX + sw.caption(scene).capitalize() + ".") == scene


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red blob moves left on a white background", "shape 'blob'.*triangle"),
        ("a teal circle moves left on a white background", "colour 'teal'.*purple"),
        ("a red circle moves left on a red background", "background 'red'.*mint"),
        ("a red circle moves away on a white background", "motion 'away'.*down"),
        ("a red circle runs left on a white background", "word 'runs'.*moves, stays"),
        ("a red circle moves still on a white background", "moves still"),
        ("a red circle stays left on a white background", "stays left"),
        ("a red circle", "has 3 words"),
        ("", "has 0 words"),
    ],
)
def test_other_sentences_are_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        sw.parse_caption(text)


def test_vocabulary_covers_the_captions():
    used = {word for text in sw.all_captions() for word in text.split()}
    assert used == set(sw.VOCABULARY)
    assert len(sw.VOCABULARY) == len(used)


def test_colours_and_backgrounds_cannot_be_confused():
    assert not set(sw.COLOURS) & set(sw.BACKGROUNDS)
    everything = [*sw.COLOURS.values(), *sw.BACKGROUNDS.values()]
    for a, b in itertools.combinations(everything, 2):
        assert sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) >= 75**2, (a, b)


def test_a_tenth_is_held_out_and_training_has_every_pair_of_attributes():
    train, held_out = sw.all_scenes("train"), sw.all_scenes("held_out")
    assert len(held_out) == 72 and not set(train) & set(held_out)
    assert all(sw.held_out(*dataclasses.astuple(scene)) for scene in held_out)
    for a, b in itertools.combinations(range(4), 2):
        pairs = {(dataclasses.astuple(s)[a], dataclasses.astuple(s)[b]) for s in train}
        everything = {
            (dataclasses.astuple(s)[a], dataclasses.astuple(s)[b]) for s in train + held_out
        }
        assert pairs == everything
    for axis in range(4):
        assert {dataclasses.astuple(s)[axis] for s in held_out} == {
            dataclasses.astuple(s)[axis] for s in train
        }


def test_unknown_words_and_splits_are_rejected():
    with pytest.raises(ValueError, match="unknown colour 'teal'"):
        sw.held_out("circle", "teal", "white", "left")
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        sw.Scene("blob", "red", "white", "left")
    with pytest.raises(ValueError, match=r"split must be .*, got 'test'"):
        sw.all_scenes("test")
