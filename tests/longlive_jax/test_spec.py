"""Settings become dataclasses, or an error that names the remedy."""

import dataclasses
from typing import Literal

import pytest
from ml_collections import ConfigDict

from longlive_jax.spec import UserError, build, check_minimums, nearest


@dataclasses.dataclass(frozen=True)
class Inner:
    steps: int = 4
    lr: float = 1e-3
    kind: Literal["ode", "sde"] = "ode"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    part: Inner = Inner()
    other: Inner | None = None
    shape: tuple[int, int] = (1, 2)
    parts: tuple[Inner, ...] = ()
    fast: bool = False

    def __post_init__(self):
        if self.shape[0] < 0:
            raise ValueError(f"shape must be positive, got {self.shape}")


def test_builds_nested_dataclasses_from_a_config_dict():
    config = ConfigDict({"name": "a", "part": {"lr": 1}, "shape": [3, 4], "parts": [{"steps": 1}]})
    assert build(Outer, config) == Outer("a", Inner(lr=1.0), None, (3, 4), (Inner(1),))
    assert isinstance(build(Outer, config).part.lr, float)


def test_missing_fields_of_a_nested_dataclass_are_those_of_its_default():
    @dataclasses.dataclass(frozen=True)
    class Long:
        part: Inner = Inner(steps=50, kind="sde")
        maybe: Inner | None = Inner(steps=60)

    built = build(Long, {"part": {"lr": 2.0}, "maybe": {"lr": 3.0}})
    assert built == Long(Inner(50, 2.0, "sde"), Inner(60, 3.0))


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
        ({"name": "a", "part": 7}, ["config.part", "is a group; set one of steps", "7"]),
        ({"name": "a", "part": {"lr": float("nan")}}, ["config.part.lr", "finite number, got nan"]),
        ({"name": "a", "part": {"lr": 10**400}}, ["config.part.lr", "finite number, got inf"]),
        ({"name": "a", "shape": [1]}, ["config.shape", "expected 2 values, got 1"]),
        ({"name": "a", "shape": 1}, ["config.shape", "expected a list"]),
        ({"name": "a", "parts": [{}, {"x": 1}]}, ["config.parts[1]", "'x'"]),
        ({"name": "a", "shape": [-1, 1]}, ["config: shape must be positive"]),
        ({"name": "a", "other": {"steps": "x"}}, ["config.other.steps", "'x'"]),
    ],
)
def test_errors_name_path_value_and_remedy(values, words):
    with pytest.raises(UserError) as error:
        build(Outer, values)
    for word in words:
        assert word in str(error.value)


def test_none_is_a_word_where_it_is_a_choice():
    """`--config.policy=none` reads as None."""

    @dataclasses.dataclass(frozen=True)
    class Choices:
        policy: str = "none"
        smoothing: Literal["mean", "none"] = "mean"
        name: str = "a"

    assert build(Choices, {"policy": None, "smoothing": None}) == Choices("none", "none")
    with pytest.raises(UserError, match=r"config\.name: expected str, got None"):
        build(Choices, {"name": None})


def test_nearest_lists_all_words_if_none_is_close():
    assert nearest("smple", ["sample", "train"]) == "; did you mean 'sample'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"


def test_check_minimums_names_the_first_field_below_its_minimum():
    check_minimums(Inner(steps=1), steps=1)
    with pytest.raises(ValueError, match=r"^steps must be >= 1, got 0$"):
        check_minimums(Inner(steps=0), steps=1)
