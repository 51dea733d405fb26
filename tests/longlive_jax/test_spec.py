"""Settings become dataclasses or a sentence that says what to change."""

import dataclasses
from typing import Literal

import pytest
from ml_collections import ConfigDict

from longlive_jax.spec import UserError, build, nearest


@dataclasses.dataclass(frozen=True)
class Part:
    steps: int = 4
    lr: float = 1e-3
    kind: Literal["ode", "sde"] = "ode"


@dataclasses.dataclass(frozen=True)
class Whole:
    name: str
    part: Part = Part()
    other: Part | None = None
    shape: tuple[int, int] = (1, 2)
    parts: tuple[Part, ...] = ()
    fast: bool = False

    def __post_init__(self):
        if self.shape[0] < 0:
            raise ValueError(f"shape must be positive, got {self.shape}")


def test_builds_nested_dataclasses_from_a_config_dict():
    config = ConfigDict({"name": "a", "part": {"lr": 1}, "shape": [3, 4], "parts": [{"steps": 1}]})
    assert build(Whole, config) == Whole("a", Part(lr=1.0), None, (3, 4), (Part(1),))
    assert isinstance(build(Whole, config).part.lr, float)


def test_what_is_left_out_of_a_part_is_as_the_whole_has_it():
    @dataclasses.dataclass(frozen=True)
    class Long:
        part: Part = Part(steps=50, kind="sde")
        maybe: Part | None = Part(steps=60)

    built = build(Long, {"part": {"lr": 2.0}, "maybe": {"lr": 3.0}})
    assert built == Long(Part(50, 2.0, "sde"), Part(60, 3.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a", "part": {"step": 1}}, ["config.part", "'step'", "did you mean 'steps'"]),
        ({"nme": "a"}, ["config", "'nme'", "'name'"]),
        ({}, ["missing key 'name'"]),
        ({"name": 3}, ["config.name", "expected str", "3"]),
        ({"name": "a", "fast": 1}, ["config.fast", "expected bool"]),
        ({"name": "a", "part": {"steps": True}}, ["config.part.steps", "expected int"]),
        ({"name": "a", "part": {"steps": 1.5}}, ["config.part.steps", "1.5"]),
        ({"name": "a", "part": {"kind": "pde"}}, ["'pde'", "'ode'", "'sde'"]),
        ({"name": "a", "part": 7}, ["config.part", "Part", "7"]),
        ({"name": "a", "shape": [1]}, ["config.shape", "expected 2 values, got 1"]),
        ({"name": "a", "shape": 1}, ["config.shape", "expected a list"]),
        ({"name": "a", "parts": [{}, {"x": 1}]}, ["config.parts[1]", "'x'"]),
        ({"name": "a", "shape": [-1, 1]}, ["config: shape must be positive"]),
        ({"name": "a", "other": {"steps": "x"}}, ["config.other.steps", "'x'"]),
    ],
)
def test_errors_name_place_value_and_remedy(values, words):
    with pytest.raises(UserError) as caught:
        build(Whole, values)
    for word in words:
        assert word in str(caught.value)


def test_nearest_lists_everything_when_nothing_is_close():
    assert nearest("smple", ["sample", "train"]) == "; did you mean 'sample'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
