"""What the small world can show and say: attributes, captions, the held-out combinations.

A caption names four attributes: shape, colour, background and motion. `caption` and
`parse_caption` are inverse to each other, so whatever is written can be checked in pixels.
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
MARKS = MappingProxyType({"white": (255, 255, 255), "black": (0, 0, 0), "cyan": (0, 220, 230)})
MOTIONS = MappingProxyType(
    {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
"""Direction as (x, y) in image coordinates: y grows downwards."""

_FILLERS = ("a", "an", "moves", "stays", "on", "background")
VOCABULARY = tuple(dict.fromkeys((*_FILLERS, *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS)))


@dataclasses.dataclass(frozen=True)
class Scene:
    """The four attributes that a caption names; each is a key of the tables above."""

    shape: str
    colour: str
    background: str
    motion: str

    def __post_init__(self) -> None:
        for kind, known in _KNOWN.items():
            _check(getattr(self, kind), kind, known)


_KNOWN = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "motion": MOTIONS}


def _check(word: str, kind: str, known) -> str:
    if word not in known:
        raise ValueError(f"unknown {kind} {word!r} in the small world; known: {', '.join(known)}")
    return word


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(scene) -> str:
    """The sentence for anything with the attributes of a `Scene`, such as a `Shot`."""
    verb = "stays still" if scene.motion == "still" else f"moves {scene.motion}"
    return (
        f"{_article(scene.colour)} {scene.shape} {verb} on {_article(scene.background)} background"
    )


def parse_caption(text: str) -> Scene:
    """Read a caption back; case, a final full stop and the cut prefix do not matter.

    Raises ValueError that names the first word which does not fit, and what may stand there.
    """
    plain = text.strip()
    if plain.lower().startswith(CUT_PREFIX.strip().lower()):
        plain = plain[len(CUT_PREFIX.strip()) :]
    words = re.findall(r"\S+", plain.lower().strip().removesuffix("."))
    if len(words) != 9:
        raise ValueError(
            f"{text!r} has {len(words)} words, a small-world caption has 9, such as "
            f"{'a red circle moves left on a white background'!r}"
        )
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
        raise ValueError(f"{verb + ' ' + motion!r}: a subject 'stays still' or 'moves' somewhere")
    return Scene(
        _check(shape, "shape", SHAPES),
        _check(colour, "colour", COLOURS),
        _check(background, "background", BACKGROUNDS),
        motion,
    )


def held_out(shape: str, colour: str, background: str, motion: str) -> bool:
    """True for the 72 of 720 combinations that training never shows.

    A fixed linear rule: every shape-and-colour pair keeps 3 of its 30 combinations back, and
    every pair of attribute values still occurs in training.
    """
    index = [
        tuple(_KNOWN[kind]).index(_check(word, kind, _KNOWN[kind]))
        for kind, word in zip(_KNOWN, (shape, colour, background, motion), strict=True)
    ]
    return (7 * index[0] + 5 * index[1] + 3 * index[2] + 2 * index[3]) % 10 == 0


def all_scenes(split: str | None = None) -> tuple[Scene, ...]:
    """Every combination, or only those of split "train" or "held_out", in a fixed order."""
    check_split(split)
    scenes = (Scene(*words) for words in itertools.product(*_KNOWN.values()))
    return tuple(s for s in scenes if split is None or in_split(s, split))


def all_captions(split: str | None = None) -> tuple[str, ...]:
    """The captions of `all_scenes(split)`, in the same order."""
    return tuple(caption(scene) for scene in all_scenes(split))


def check_split(split: str | None) -> None:
    """Raise ValueError unless split is None, "train" or "held_out"."""
    if split not in (None, "train", "held_out"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'held_out' (None: both)")


def in_split(scene, split: str | None) -> bool:
    """Whether a scene (or shot) may be shown in this split; None allows every one."""
    if split is None:
        return True
    held = held_out(scene.shape, scene.colour, scene.background, scene.motion)
    return held == (split == "held_out")
