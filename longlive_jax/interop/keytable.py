"""Key tables: lists of rules that map a PyTorch state dict to a parameter tree and back.

A rule pairs a *key template* with a *path template*. Both are literal text with fields in braces:
``blocks.{layer}.self_attn.{m:q|k|v|o}.weight`` <-> ``blocks.self_attn.{m}.kernel``. A field without
a pattern matches an integer. The field ``layer`` is special: it never appears in the path; the
tensors of all layers are stacked along a new leading axis instead. The third field of a rule names
an invertible change of axes (``TRANSFORMS``), so a table works in both directions:

    leaves = table.forward({"blocks.0.self_attn.q.weight": (64, 64), ...}, expected=shapes)
    leaves = table.backward({("blocks", "self_attn", "q", "kernel"): (2, 64, 64), ...})

Both collect all missing, extra, duplicate and misshapen keys and raise one error (``KeyReport``).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from longlive_jax.interop.transforms import TRANSFORMS, transformed_shape
from longlive_jax.io.arrays import Shape, TreePath
from longlive_jax.spec import UserError

__all__ = [
    "TRANSFORMS",
    "KeyReport",
    "KeyRule",
    "KeyTable",
    "Leaf",
    "TableMatch",
]

_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")
_LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """One row of a key table.

    Attributes:
      key: template of the state-dict keys.
      path: template of the dotted parameter path.
      transform: change of axes, a name in `TRANSFORMS`.
      optional: whether a file may lack these keys, such as an alternative form of a weight.

    Raises ValueError for an unknown transform, and if the fields of the two templates differ.
    """

    key: str
    path: str
    transform: str = "identity"
    optional: bool = False

    def __post_init__(self):
        if self.transform not in TRANSFORMS:
            raise ValueError(
                f"unknown transform {self.transform!r}; choose from {sorted(TRANSFORMS)}"
            )
        in_key = {name for name, _ in _FIELD.findall(self.key)}
        in_path = {name for name, _ in _FIELD.findall(self.path)}
        if in_key - {_LAYER} != in_path:
            raise ValueError(f"fields differ between {self.key!r} and {self.path!r}")

    @property
    def stacked(self) -> bool:
        """Whether the tensors of all layers are stacked along a leading axis."""
        return "{layer}" in self.key

    @functools.cached_property
    def key_regex(self) -> re.Pattern[str]:
        """Pattern of this rule's keys; its named groups are the fields."""
        return re.compile(_regex(self.key, {}))

    @functools.cached_property
    def path_regex(self) -> re.Pattern[str]:
        """Pattern of this rule's dotted paths, with the field patterns of the key template."""
        return re.compile(_regex(self.path, dict(_FIELD.findall(self.key))))

    def path_of(self, fields: Mapping[str, str]) -> TreePath:
        """The parameter path for the given field values."""
        return tuple(_fill(self.path, fields).split("."))

    def key_of(self, fields: Mapping[str, str]) -> str:
        """The state-dict key for the given field values, including `layer` if stacked."""
        return _fill(self.key, fields)


def _regex(template: str, patterns: Mapping[str, str]) -> str:
    pieces, end = [], 0
    for field in _FIELD.finditer(template):
        name, pattern = field[1], field[2] or patterns.get(field[1]) or r"\d+"
        pieces += [re.escape(template[end : field.start()]), f"(?P<{name}>{pattern})"]
        end = field.end()
    return "".join([*pieces, re.escape(template[end:])]) + r"\Z"


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: fields[field[1]], template)


@dataclasses.dataclass
class KeyReport:
    """All problems with the keys of a state dict, raised as one error.

    Attributes:
      missing: keys that the model needs and the state dict lacks.
      extra: keys that no rule matches.
      duplicate: keys of a parameter that another key already gives.
      misshapen: keys of tensors that have the wrong shape.
    """

    missing: list[str] = dataclasses.field(default_factory=list)
    extra: list[str] = dataclasses.field(default_factory=list)
    duplicate: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: KeyReport) -> None:
        """Appends the problems of another report."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).extend(getattr(other, field.name))

    def check(self, what: str, *, limit: int = 8) -> None:
        """Raises UserError if there are problems: their number and the first `limit` by kind."""
        kinds = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not any(kinds.values()):
            return
        texts = []
        for kind, keys in kinds.items():
            if keys:
                more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
                texts.append(f"{len(keys)} {kind}: {', '.join(keys[:limit])}{more}")
        raise UserError(f"{what}: keys do not match: " + "; ".join(texts))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter array and the state-dict tensors it consists of.

    Attributes:
      path: path of the parameter.
      rule: rule that matched.
      keys: state-dict keys: one per layer if stacked, else a single one.
      shape: shape of the parameter, including the layer axis if stacked.
    """

    path: TreePath
    rule: KeyRule
    keys: tuple[str, ...]
    shape: Shape

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """A state-dict tensor in the axis order of the parameter, without the layer axis."""
        return TRANSFORMS[self.rule.transform].forward(tensor)

    def to_tensor(self, value: np.ndarray) -> np.ndarray:
        """The state-dict tensor of a parameter (or one of its layers): inverse of `to_param`."""
        return TRANSFORMS[self.rule.transform].inverse(value)


@dataclasses.dataclass(frozen=True)
class TableMatch:
    """The result of matching the keys of a state dict with a table, valid or not.

    Attributes:
      leaves: leaves that are complete and consistent.
      shapes: shapes of all leaves by path, counting missing layers as present.
      paths: paths of all leaves that have at least one key.
      report: problems, not raised yet.
    """

    leaves: list[Leaf]
    shapes: dict[TreePath, Shape]
    paths: set[TreePath]
    report: KeyReport


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """The rules of one component in one naming.

    Attributes:
      name: name for messages and provenance.
      rules: rows of the table; the first one that matches a key applies.
      ignore: templates of known keys that are not parameters of the model.
    """

    name: str
    rules: Sequence[KeyRule]
    ignore: Sequence[str] = ()

    def match(self, key: str) -> tuple[KeyRule, dict[str, str]] | None:
        """The first rule that matches the key, with its field values, or None."""
        for rule in self.rules:
            if matched := rule.key_regex.match(key):
                return rule, matched.groupdict()
        return None

    def score(self, keys: Iterable[str]) -> int:
        """The number of keys that a rule matches, used to identify a file's component."""
        return sum(self.match(key) is not None for key in keys)

    def ignores(self, key: str) -> bool:
        """Whether the key is known and not a parameter of the model."""
        return any(re.match(_regex(template, {}), key) for template in self.ignore)

    def forward(
        self, shapes: Mapping[str, Shape], *, expected: Mapping[TreePath, Shape] | None = None
    ) -> list[Leaf]:
        """Leaves for a state dict, given its shapes by key, in the order of the keys.

        With `expected`, the model's parameter shapes by path, the leaves must be exactly these.
        Raises UserError with the full `KeyReport`.
        """
        match = self.match_keys(shapes)
        if expected is not None:
            self.compare(match, expected)
        match.report.check(self.name)
        return match.leaves

    def match_keys(self, shapes: Mapping[str, Shape]) -> TableMatch:
        """Matches the keys of a state dict, given its shapes; problems are reported, not raised."""
        # 1. Group the keys by path and layer.
        report = KeyReport()
        groups: dict[TreePath, tuple[KeyRule, dict[int, str]]] = {}
        for key in shapes:
            if self.ignores(key):
                continue
            matched = self.match(key)
            if matched is None:
                report.extra.append(key)
                continue
            rule, fields = matched
            layers = groups.setdefault(rule.path_of(fields), (rule, {}))[1]
            layer = int(fields.get(_LAYER, 0))
            if layer in layers:
                report.duplicate.append(f"{key} (same leaf as {layers[layer]})")
            else:
                layers[layer] = key
        # 2. Make the leaves; all stacked leaves must have the same number of layers.
        depth = max((1 + max(keys) for rule, keys in groups.values() if rule.stacked), default=0)
        leaves, leaf_shapes = [], {}
        for path, (rule, layer_keys) in groups.items():
            leaf, shape = self._leaf(path, rule, layer_keys, depth, shapes, report)
            leaves += [leaf] if leaf is not None else []
            if shape is not None:
                leaf_shapes[path] = shape
        return TableMatch(leaves, leaf_shapes, set(groups), report)

    def _leaf(
        self,
        path: TreePath,
        rule: KeyRule,
        layer_keys: Mapping[int, str],
        depth: int,
        shapes: Mapping[str, Shape],
        report: KeyReport,
    ) -> tuple[Leaf | None, Shape | None]:
        """The leaf if it is valid, and its shape if any of its tensors has one."""
        # 1. Missing layers. A layer number far beyond the number of tensors is damage.
        layers = min(depth, 4 * len(layer_keys) + 64) if rule.stacked else 0
        gaps = [i for i in range(layers) if i not in layer_keys]
        report.missing += [self._key_at(rule, path, i) for i in gaps]
        # 2. Shapes, which must be the same in every layer.
        keys = tuple(layer_keys[i] for i in sorted(layer_keys))
        param_shapes = {}
        for key in keys:
            try:
                param_shapes[key] = transformed_shape(rule.transform, shapes[key])
            except ValueError as error:
                report.misshapen.append(f"{key} {tuple(shapes[key])} ({error})")
        if not param_shapes:
            return None, None
        first = next(iter(param_shapes.values()))
        odd = [key for key in param_shapes if param_shapes[key] != first]
        report.misshapen += [f"{key} {param_shapes[key]} instead of {first}" for key in odd]
        # 3. The leaf.
        shape = (layers, *first) if rule.stacked else first
        valid = len(param_shapes) == len(keys) and not odd and not gaps and layers in (0, depth)
        return (Leaf(path, rule, keys, shape) if valid else None), shape

    def _key_at(self, rule: KeyRule, path: TreePath, layer: int) -> str:
        matched = rule.path_regex.match(".".join(path))
        fields = matched.groupdict() if matched else {}
        return rule.key_of(fields | {_LAYER: str(layer)})

    def compare(self, match: TableMatch, expected: Mapping[TreePath, Shape]) -> None:
        """Adds to the report where the leaves differ from the model's parameters."""
        report = match.report
        for leaf in match.leaves:
            want = expected.get(leaf.path)
            if want is None:
                report.extra += leaf.keys
            elif tuple(want) != leaf.shape:
                report.misshapen.append(f"{leaf.keys[0]} {leaf.shape} instead of {tuple(want)}")
        for path, shape in expected.items():
            if path not in match.paths:
                report.missing += self._keys_or_path(path, shape)

    def unmatched(self, match: TableMatch) -> list[str]:
        """Key templates of the rules, except optional ones, that no key matched."""
        paths = [".".join(path) for path in match.paths]
        rules = (rule for rule in self.rules if not rule.optional)
        return [r.key for r in rules if not any(r.path_regex.match(path) for path in paths)]

    def _keys_or_path(self, path: TreePath, shape: Shape) -> list[str]:
        try:
            return list(self._leaf_of_param(path, shape).keys)
        except KeyError:
            return ["/".join(path)]

    def _leaf_of_param(self, path: TreePath, shape: Shape) -> Leaf:
        """The leaf of a parameter by its path; KeyError if no rule matches it."""
        for rule in self.rules:
            if matched := rule.path_regex.match(".".join(path)):
                layers = range(shape[0]) if rule.stacked else [0]
                keys = (rule.key_of(matched.groupdict() | {_LAYER: str(i)}) for i in layers)
                return Leaf(path, rule, tuple(keys), tuple(shape))
        raise KeyError(path)

    def backward(self, shapes: Mapping[TreePath, Shape]) -> list[Leaf]:
        """Leaves for a parameter tree, given its shapes by path; `Leaf.to_tensor` converts values.

        Raises UserError naming every path that no rule matches and every key that occurs twice.
        """
        report, leaves = KeyReport(), []
        keys: set[str] = set()
        for path, shape in shapes.items():
            try:
                leaf = self._leaf_of_param(path, shape)
            except KeyError:
                report.extra.append("/".join(path))
                continue
            report.duplicate += [key for key in leaf.keys if key in keys]
            keys.update(leaf.keys)
            leaves.append(leaf)
        report.check(self.name)
        return leaves
