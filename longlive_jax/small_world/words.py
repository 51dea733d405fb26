"""Attributes and captions of the small world, and its train / held-out split.

A caption names four attributes: shape, colour, background and motion. `caption` and
`parse_caption` are inverses of each other, so every caption can be checked against pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from types import MappingProxyType

from longlive_jax.captions import CUT_PREFIX

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = MappingProxyType(
    {
        "red": (215, 30, 45),
        "orange": (245, 130, 25),
        "yellow": (245, 225, 50),
        "green": (35, 155, 60),
        "blue": (45, 85, 235),
        "purple": (150, 50, 190),
    }
)
BACKGROUNDS = MappingProxyType(
    {
        "white": (240, 240, 240),
        "black": (16, 16, 16),
        "gray": (128, 128, 128),
        "navy": (20, 30, 110),
        "pink": (250, 175, 200),
        "mint": (165, 235, 205),
    }
)
MARKERS = MappingProxyType({"white": (255, 255, 255), "black": (0, 0, 0), "cyan": (0, 220, 230)})
MOTIONS = MappingProxyType(
    {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
"""Direction as (x, y) in image coordinates: y grows downwards."""

_FILLERS = ("a", "an", "moves", "stays", "on", "background")
VOCABULARY = tuple(dict.fromkeys((*_FILLERS, *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS)))


@dataclasses.dataclass(frozen=True)
class Scene:
    """The four attributes that a caption names.

    Attributes:
      shape: element of SHAPES.
      colour: key of COLOURS.
      background: key of BACKGROUNDS.
      motion: key of MOTIONS.

    Raises:
      ValueError: if an attribute is unknown.
    """

    shape: str
    colour: str
    background: str
    motion: str

    def __post_init__(self) -> None:
        for kind, choices in _CHOICES.items():
            _check(getattr(self, kind), kind, choices)


_CHOICES = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "motion": MOTIONS}


def _check(word: str, kind: str, choices) -> str:
    """The word itself; ValueError unless it is one of the choices."""
    if word not in choices:
        raise ValueError(
            f"unknown {kind} {word!r} in a small-world caption; use one of {', '.join(choices)}"
        )
    return word


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(scene) -> str:
    """The caption of a `Scene`, or of anything with its attributes, such as a `ShotSpec`."""
    verb = "stays still" if scene.motion == "still" else f"moves {scene.motion}"
    return (
        f"{_article(scene.colour)} {scene.shape} {verb} on {_article(scene.background)} background"
    )


def parse_caption(text: str) -> Scene:
    """Parses a caption; case, a final full stop and the cut prefix are ignored.

    Raises:
      ValueError: if the text is not a caption; the message names the first word that does not
        fit and the words allowed in its place.
    """
    # 1. Strip the cut prefix and the full stop.
    plain = text.strip()
    if plain.lower().startswith(CUT_PREFIX.strip().lower()):
        plain = plain[len(CUT_PREFIX.strip()) :]
    words = re.findall(r"\S+", plain.lower().strip().removesuffix("."))
    if len(words) != 9:
        raise ValueError(
            f"{text!r} has {len(words)} words; a small-world caption has 9, such as "
            f"{'a red circle moves left on a white background'!r}"
        )
    # 2. Check the fixed words, then the attributes.
    article, colour, shape, verb, motion, on, article2, background, last = words
    for word, allowed in (
        (article, ("a", "an")),
        (verb, ("moves", "stays")),
        (on, ("on",)),
        (article2, ("a", "an")),
        (last, ("background",)),
    ):
        _check(word, "word", allowed)
    _check(motion, "motion", MOTIONS)
    if (verb == "stays") != (motion == "still"):
        raise ValueError(
            f"{verb + ' ' + motion!r} is not a motion; use 'stays still' or 'moves' and a direction"
        )
    return Scene(
        _check(shape, "shape", SHAPES),
        _check(colour, "colour", COLOURS),
        _check(background, "background", BACKGROUNDS),
        motion,
    )


def held_out(shape: str, colour: str, background: str, motion: str) -> bool:
    """Whether a combination is one of the 72 of 720 that are excluded from training.

    The rule is linear and fixed. It excludes 3 of the 30 combinations of every shape-colour pair,
    and every pair of attribute values still occurs in training.

    Raises:
      ValueError: if an attribute is unknown.
    """
    index = [
        tuple(_CHOICES[kind]).index(_check(word, kind, _CHOICES[kind]))
        for kind, word in zip(_CHOICES, (shape, colour, background, motion), strict=True)
    ]
    return (7 * index[0] + 5 * index[1] + 3 * index[2] + 2 * index[3]) % 10 == 0


def all_scenes(split: str | None = None) -> tuple[Scene, ...]:
    """All combinations of a split ("train" or "held_out"; None for both), in a fixed order."""
    check_split(split)
    scenes = (Scene(*words) for words in itertools.product(*_CHOICES.values()))
    return tuple(s for s in scenes if split is None or in_split(s, split))


def all_captions(split: str | None = None) -> tuple[str, ...]:
    """The captions of `all_scenes(split)`, in the same order."""
    return tuple(caption(scene) for scene in all_scenes(split))


def check_split(split: str | None) -> None:
    """Raises ValueError unless split is None, "train" or "held_out"."""
    if split not in (None, "train", "held_out"):
        raise ValueError(f"split must be 'train', 'held_out' or None (both), got {split!r}")


def in_split(scene, split: str | None) -> bool:
    """Whether a scene or shot belongs to a split; everything belongs to None."""
    if split is None:
        return True
    is_held_out = held_out(scene.shape, scene.colour, scene.background, scene.motion)
    return is_held_out == (split == "held_out")
