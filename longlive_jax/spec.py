"""Builds frozen dataclasses from loose settings, with errors that name the remedy.

Everything below the command line takes dataclasses only. `build` accepts any nested mapping (such
as a ConfigDict), so defaults live in one place, the dataclass, and a misspelt key is an error.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in the user's input; shown as one line, exit code 2."""


class Failure(RuntimeError):
    """A run that cannot continue, for a reason its user can act on; one line, exit code `code`."""

    code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of known words if none is close."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.55)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def reject_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises UserError for the first of `keys` that is not in `known`."""
    names = list(known)
    for key in keys:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, names)}")


def check_minimums(settings: Any, **minimums: int) -> None:
    """Raises ValueError for the first attribute of `settings` that is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(settings, name)
        if value < minimum:
            raise ValueError(f"{name} must be >= {minimum}, got {value}")


def with_renamed(values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """`values` with the keys of earlier versions replaced by their present names."""
    return {renamed.get(key, key): value for key, value in values.items()}


def build[T](cls: type[T], values: Any, *, path: str = "config", default: T | None = None) -> T:
    """Builds the (frozen) dataclass `cls` from a mapping, recursively.

    Missing fields are taken from `default`, else from the dataclass default, recursively. Lists
    become tuples, and ints become floats, where the annotation says so. Raises UserError with the
    dotted path for an unknown key, a missing key, a value of the wrong type, and a ValueError from
    `__post_init__`.

    Args:
      cls: the dataclass.
      values: a mapping from field names to values; mappings for fields that are dataclasses.
      path: dotted path of `values`, for error messages.
      default: an instance of `cls` with the values of missing fields.
    """
    # 1. Check the keys.
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"build needs a dataclass, got {cls}")
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        names = ", ".join(f.name for f in dataclasses.fields(cls) if f.init)
        raise UserError(f"{path}: is a group; set one of {names}, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    reject_unknown(values, fields, path)
    # 2. Convert the values; the others have defaults.
    hints = typing.get_type_hints(cls)
    defaults = {
        k: _default(f) if default is None else getattr(default, k) for k, f in fields.items()
    }
    chosen = {k: _convert(hints[k], v, f"{path}.{k}", defaults[k]) for k, v in values.items()}
    for name, value in defaults.items():
        if value is dataclasses.MISSING and name not in chosen:
            raise UserError(f"{path}: missing key {name!r}")
    # 3. Build the dataclass.
    try:
        return typing.cast(T, cls(**defaults | chosen))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def check_types(settings: Any) -> None:
    """UserError for the first field of a dataclass whose value does not fit its annotation.

    Values are converted as by `build`, in place, also in frozen classes.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        object.__setattr__(settings, name, _convert(hint, getattr(settings, name), name))


def _default(field: dataclasses.Field) -> Any:
    """A field's default value, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _convert(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """Converts `value` to the annotation `hint`; other kinds of annotations accept any value.

    Fields that a mapping lacks are taken from `default`, if that is an instance of `hint`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    # Composite annotations.
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, path, default)
    if value is None and "none" in (*args, default) and (origin is typing.Literal or hint is str):
        return "none"  # the command line reads this word as None
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return origin(_convert_items(origin, args, value, path))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        known = default if isinstance(default, hint) else None
        return build(hint, value, path=path, default=known)
    # Scalars, those of NumPy included.
    if hint in (int, float, bool) and hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, path)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"{path}: expected {hint.__name__}, got {value!r}")
    if origin is tuple or hint is tuple:
        raise UserError(f"{path}: expected a list, got {value!r}")
    return value


def _finite(value: float, path: str) -> float:
    """`value` as a float; UserError unless it is finite."""
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{path}: expected a finite number, got {number}")
    return number


def _convert_items(origin: Any, args: tuple, values: Any, path: str) -> list:
    """Converts the items of a list or tuple."""
    if not args:
        return list(values)
    if origin is list or args[-1] is Ellipsis:
        hints = [args[0]] * len(values)
    elif len(args) != len(values):
        raise UserError(f"{path}: expected {len(args)} values, got {len(values)}: {values!r}")
    else:
        hints = list(args)
    return [
        _convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, values, strict=True))
    ]


def _convert_union(args: tuple, value: Any, path: str, default: Any) -> Any:
    """Converts to the first alternative that accepts `value`; raises the error of the first one."""
    if value is None and type(None) in args:
        return None
    errors = []
    for option in args:
        if option is type(None):
            continue
        try:
            return _convert(option, value, path, default)
        except UserError as error:
            errors.append(error)
    raise errors[0]
