"""Key tables: one list of rules turns a PyTorch state dict into a parameter tree and back.

A rule pairs a *key template* with a *path template*. Both are literal text with fields in braces:
``blocks.{layer}.self_attn.{m:q|k|v|o}.weight`` <-> ``blocks.self_attn.{m}.kernel``. A field without
a pattern matches a whole number. The field ``layer`` is special: it never appears in the path, the
tensors of all layers are stacked along a new leading axis instead. The third part of a rule names
an invertible change of axes (``TRANSFORMS``), so that a table reads both ways:

    leaves = table.forward({"blocks.0.self_attn.q.weight": (64, 64), ...}, expected=shapes)
    pieces = table.backward({("blocks", "self_attn", "q", "kernel"): (2, 64, 64), ...})

Both collect every missing, extra, duplicate and misshapen key and raise once (``KeyReport``).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from longlive_jax.io.arrays import Path, Shape
from longlive_jax.spec import UserError

_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")
_LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axes and its inverse; both return views where numpy can."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    rank: int | None = None  # of the PyTorch tensor; None: any


def _permute(*axes: int) -> Transform:
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(back), len(axes))


def _squeezed(*unit_axes: int, transpose: bool = False) -> Transform:
    """Drop axes of length one (they must be one), then swap the two that remain if asked."""

    def forward(x: np.ndarray) -> np.ndarray:
        x = np.squeeze(x, axis=unit_axes)
        return x.T if transpose else x

    def inverse(x: np.ndarray) -> np.ndarray:
        return np.expand_dims(x.T if transpose else x, unit_axes)

    rank = len(unit_axes) + (2 if transpose else 1)
    return Transform(forward, inverse, rank)


def _patch_in(x: np.ndarray) -> np.ndarray:
    """Conv3d weight [e, c, 1, 2, 2] -> [(ph pw c), e]."""
    e, c, frames, rows, columns = x.shape
    if (frames, rows, columns) != (1, 2, 2):
        raise ValueError(f"patch size {(frames, rows, columns)}; only (1, 2, 2) is supported")
    return x.transpose(2, 3, 4, 1, 0).reshape(4 * c, e)


def _patch_out(x: np.ndarray) -> np.ndarray:
    """The inverse of `_patch_in`."""
    return x.reshape(1, 2, 2, x.shape[0] // 4, x.shape[1]).transpose(4, 3, 0, 1, 2)


def _time_in(x: np.ndarray) -> np.ndarray:
    """Conv3d weight [o, i, t, 1, 1] -> [t, i, o]."""
    return np.squeeze(x, axis=(3, 4)).transpose(2, 1, 0)


def _time_out(x: np.ndarray) -> np.ndarray:
    """The inverse of `_time_in`."""
    return x.transpose(2, 1, 0)[..., None, None]


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    "linear": _permute(1, 0),  # [out, in] -> [in, out]
    "conv2d": _permute(2, 3, 1, 0),  # OIHW -> HWIO
    "conv3d": _permute(2, 3, 4, 1, 0),  # OIDHW -> DHWIO
    "pointwise2d": _squeezed(2, 3, transpose=True),  # [out, in, 1, 1] -> [in, out]
    "pointwise3d": _squeezed(2, 3, 4, transpose=True),  # [out, in, 1, 1, 1] -> [in, out]
    "time_conv": Transform(_time_in, _time_out, 5),  # [out, in, t, 1, 1] -> [t, in, out]
    "patch_embedding": Transform(_patch_in, _patch_out, 5),
    "gamma2d": _squeezed(1, 2),  # [c, 1, 1] -> [c]
    "gamma3d": _squeezed(1, 2, 3),  # [c, 1, 1, 1] -> [c]
    # [1, n, e] -> [n, e]
    "drop_first": Transform(lambda x: np.squeeze(x, axis=0), lambda x: x[None], 3),
}


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """One line of a table: a key template, a path template, and the name of a transform.

    `optional`: another form of a weight that some files have; it is never missed.
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
        """Whether the leaf has a leading layer axis."""
        return "{layer}" in self.key

    @functools.cached_property
    def key_regex(self) -> re.Pattern[str]:
        """Matches the keys of this rule; named groups are the fields."""
        return re.compile(_regex(self.key, {}))

    @functools.cached_property
    def path_regex(self) -> re.Pattern[str]:
        """Matches the dotted paths of this rule; field patterns come from the key template."""
        return re.compile(_regex(self.path, dict(_FIELD.findall(self.key))))

    def path_of(self, fields: Mapping[str, str]) -> Path:
        """The tree path for field values."""
        return tuple(_fill(self.path, fields).split("."))

    def key_of(self, fields: Mapping[str, str]) -> str:
        """The state-dict key for field values (with `layer` among them if stacked)."""
        return _fill(self.key, fields)


def _regex(template: str, patterns: Mapping[str, str]) -> str:
    out, at = [], 0
    for field in _FIELD.finditer(template):
        name, pattern = field[1], field[2] or patterns.get(field[1]) or r"\d+"
        out += [re.escape(template[at : field.start()]), f"(?P<{name}>{pattern})"]
        at = field.end()
    return "".join([*out, re.escape(template[at:])]) + r"\Z"


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: fields[field[1]], template)


@dataclasses.dataclass
class KeyReport:
    """Everything wrong with a set of keys, raised once."""

    missing: list[str] = dataclasses.field(default_factory=list)
    extra: list[str] = dataclasses.field(default_factory=list)
    duplicate: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: KeyReport) -> None:
        """Takes over what another report found."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).extend(getattr(other, field.name))

    def check(self, what: str, *, limit: int = 8) -> None:
        """Raise UserError naming counts and the first `limit` of each kind, if there are any."""
        kinds = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not any(kinds.values()):
            return
        parts = []
        for kind, found in kinds.items():
            if found:
                more = f", and {len(found) - limit} more" if len(found) > limit else ""
                parts.append(f"{len(found)} {kind}: {', '.join(found[:limit])}{more}")
        raise UserError(f"{what} does not fit: " + "; ".join(parts))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter array and the state-dict tensors it is made of."""

    path: Path
    rule: KeyRule
    keys: tuple[str, ...]  # one per layer if stacked, else one
    shape: Shape  # with the layer axis if stacked

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor of the state dict in the axis order of this leaf (without layer axis)."""
        return TRANSFORMS[self.rule.transform].forward(tensor)

    def extract(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `place`."""
        return TRANSFORMS[self.rule.transform].inverse(value)


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a table made of a set of keys, sound or not.

    Attributes:
      leaves: the sound ones.
      shapes: of all leaves, as if gaps between layers were filled.
      paths: of all leaves that have at least one key.
    """

    leaves: list[Leaf]
    shapes: dict[Path, Shape]
    paths: set[Path]
    report: KeyReport


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """Rules of one component in one naming; `ignore`: templates of keys that carry no weight."""

    name: str
    rules: Sequence[KeyRule]
    ignore: Sequence[str] = ()

    def match(self, key: str) -> tuple[KeyRule, dict[str, str]] | None:
        """The first rule that the key fits, with its field values."""
        for rule in self.rules:
            if found := rule.key_regex.match(key):
                return rule, found.groupdict()
        return None

    def score(self, keys: Iterable[str]) -> int:
        """How many of the keys this table knows; used to tell what a file holds."""
        return sum(self.match(key) is not None for key in keys)

    def ignores(self, key: str) -> bool:
        """Whether the key is known and carries no weight."""
        return any(re.match(_regex(template, {}), key) for template in self.ignore)

    def forward(
        self, shapes: Mapping[str, Shape], *, expected: Mapping[Path, Shape] | None = None
    ) -> list[Leaf]:
        """Leaves for a state dict given by its shapes, in order of appearance.

        With `expected` (path -> shape of the model's parameters) every leaf must be there in that
        shape and no other. Raises UserError with the whole `KeyReport`.
        """
        found = self.collect(shapes)
        if expected is not None:
            self.compare(found, expected)
        found.report.check(self.name)
        return found.leaves

    def collect(self, shapes: Mapping[str, Shape]) -> Collected:
        """What `forward` finds before it judges: the report is not raised."""
        report = KeyReport()
        found: dict[Path, tuple[KeyRule, dict[int, str]]] = {}
        for key in shapes:
            if self.ignores(key):
                continue
            matched = self.match(key)
            if matched is None:
                report.extra.append(key)
                continue
            rule, fields = matched
            layers = found.setdefault(rule.path_of(fields), (rule, {}))[1]
            layer = int(fields.get(_LAYER, 0))
            if layer in layers:
                report.duplicate.append(f"{key} (same leaf as {layers[layer]})")
            else:
                layers[layer] = key
        depth = max((1 + max(m) for r, m in found.values() if r.stacked), default=0)
        made, provisional = [], {}
        for path, (rule, members) in found.items():
            leaf, shape = self._leaf(path, rule, members, depth, shapes, report)
            made += [leaf] if leaf is not None else []
            if shape is not None:
                provisional[path] = shape
        return Collected(made, provisional, set(found), report)

    def _leaf(self, path, rule, members, depth, shapes, report) -> tuple[Leaf | None, Shape | None]:
        """The leaf if it is sound, and its shape as far as it can be told."""
        # a layer number far beyond the number of tensors is damage, not a model
        limit = min(depth, 4 * len(members) + 64) if rule.stacked else 0
        gaps = [i for i in range(limit) if i not in members]
        report.missing += [self._key_at(rule, path, i) for i in gaps]
        keys = tuple(members[i] for i in sorted(members))
        placed = {}
        for key in keys:
            try:
                placed[key] = transformed_shape(rule.transform, shapes[key])
            except ValueError as error:
                report.misshapen.append(f"{key} {tuple(shapes[key])} ({error})")
        if not placed:
            return None, None
        first = next(iter(placed.values()))
        odd = [key for key in placed if placed[key] != first]
        report.misshapen += [f"{key} {placed[key]} instead of {first}" for key in odd]
        shape = (limit, *first) if rule.stacked else first
        sound = len(placed) == len(keys) and not odd and not gaps and limit in (0, depth)
        return (Leaf(path, rule, keys, shape) if sound else None), shape

    def _key_at(self, rule: KeyRule, path: Path, layer: int) -> str:
        found = rule.path_regex.match(".".join(path))
        fields = found.groupdict() if found else {}
        return rule.key_of(fields | {_LAYER: str(layer)})

    def compare(self, found: Collected, expected: Mapping[Path, Shape]) -> None:
        """Adds to the report what the model's parameters lack or do not know."""
        report = found.report
        for leaf in found.leaves:
            want = expected.get(leaf.path)
            if want is None:
                report.extra += leaf.keys
            elif tuple(want) != leaf.shape:
                report.misshapen.append(f"{leaf.keys[0]} {leaf.shape} instead of {tuple(want)}")
        for path, shape in expected.items():
            if path not in found.paths:
                report.missing += self._keys_or_path(path, shape)

    def unmatched(self, found: Collected) -> list[str]:
        """Key templates of the rules that none of the keys fit, optional ones apart."""
        used = [".".join(path) for path in found.paths]
        rules = (rule for rule in self.rules if not rule.optional)
        return [r.key for r in rules if not any(r.path_regex.match(path) for path in used)]

    def _keys_or_path(self, path: Path, shape: Shape) -> list[str]:
        try:
            return list(self._outgoing(path, shape).keys)
        except KeyError:
            return ["/".join(path)]

    def _outgoing(self, path: Path, shape: Shape) -> Leaf:
        for rule in self.rules:
            if found := rule.path_regex.match(".".join(path)):
                layers = range(shape[0]) if rule.stacked else [0]
                keys = (rule.key_of(found.groupdict() | {_LAYER: str(i)}) for i in layers)
                return Leaf(path, rule, tuple(keys), tuple(shape))
        raise KeyError(path)

    def backward(self, shapes: Mapping[Path, Shape]) -> list[Leaf]:
        """Leaves for a parameter tree given by its shapes; `Leaf.extract` makes the tensors.

        Raises UserError naming every path no rule knows and every key written twice.
        """
        report, leaves = KeyReport(), []
        seen: set[str] = set()
        for path, shape in shapes.items():
            try:
                leaf = self._outgoing(path, shape)
            except KeyError:
                report.extra.append("/".join(path))
                continue
            report.duplicate += [key for key in leaf.keys if key in seen]
            seen.update(leaf.keys)
            leaves.append(leaf)
        report.check(self.name)
        return leaves


def transformed_shape(transform: str, shape: Shape) -> Shape:
    """The shape after a named transform, without touching data; ValueError if it cannot apply."""
    change = TRANSFORMS[transform]
    if change.rank is not None and len(shape) != change.rank:
        raise ValueError(f"needs {change.rank} axes, has {len(shape)}")
    if transform == "patch_embedding":
        if tuple(shape[2:]) != (1, 2, 2):
            raise ValueError(f"patch size {shape[2:]}; only (1, 2, 2) is supported")
        return (4 * shape[1], shape[0])
    return change.forward(np.broadcast_to(np.zeros((), np.uint8), shape)).shape
