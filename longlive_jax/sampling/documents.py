"""Reads text, JSON and YAML files that other people wrote, with errors that name the place.

Stricter than the libraries: a key may occur once, and size, depth and aliases are limited, so that
no file of a few hundred bytes occupies the machine.
"""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from longlive_jax.spec import UserError

MAX_BYTES = 4_000_000
"""Size limit of a file; a script of a thousand shots has about 100 kB."""
MAX_DEPTH = 20
"""Limit of nested lists and mappings; a script has three levels."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises UserError if the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes; must be <= {MAX_BYTES}, split it")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def read_document(path: Path) -> Any:
    """The content of a `.json` or YAML file.

    Raises UserError, with line and column where they are known, for an unreadable file, bad syntax,
    a key that occurs twice, values that do not fit their tags, and too many levels.
    """
    text, kind = read_text(path), path.suffix[1:].lower()
    try:
        return _parse_json(text) if kind == "json" else yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        reason = ", ".join(filter(None, (error.context, error.problem)))
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path}: {place}not valid {kind}: {_one_line(reason)}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {place}: not valid json: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path}: {_TOO_DEEP}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid {kind}: {_one_line(error)}") from error


_TOO_DEEP = f"more than {MAX_DEPTH} levels of lists and mappings; remove some brackets"


def _one_line(reason: object, length: int = 200) -> str:
    return " ".join(str(reason).split())[:length]


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_json_object)


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} occurs twice; remove one")
        values[key] = value
    return values


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that limits depth and aliases and refuses repeated keys."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes one node. Raises MarkedYAMLError for deep nesting and nested aliases."""
        event: Any = self.peek_event()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(_TOO_DEEP, event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and not _is_flat(node):
            raise _error(f"alias *{event.anchor} of nested values; write them out", event)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Builds one value. Raises MarkedYAMLError for text that does not fit its tag."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            text = str(node.value)[:40]
            raise _error(f"{text!r} is not a value of type {kind}", node) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Builds a mapping. Raises MarkedYAMLError for a key that occurs twice."""
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in keys:
                raise _error(f"key {key.value!r} occurs twice; remove one", key)
            if name is not None:
                keys.add(name)
        return super().construct_mapping(node, deep)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """An error at a node or an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _is_flat(node: yaml.Node | None) -> bool:
    """Whether a node is a scalar or holds only scalars that are no aliases of collections."""
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    else:
        return True
    return all(isinstance(child, yaml.ScalarNode) for child in children)
