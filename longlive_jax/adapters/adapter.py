"""An adapter: low-rank factors of a DiT's kernels, and what they were made for."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from longlive_jax.diffusion.solvers import SOLVERS, check_levels
from longlive_jax.interop.finite import check_finite
from longlive_jax.interop.lora_file import check_fits
from longlive_jax.io.arrays import Shape, TreePath, flatten
from longlive_jax.spec import UserError, reject_unknown
from longlive_jax.typing import Params

__all__ = ["ROLES", "SETTINGS", "Adapter"]

ROLES = ("adapter", "generator", "critic")
SETTINGS = ("steps", "shift", "solver", "levels", "guidance")
"""Sampling settings that an adapter may have: fields of `SampleSpec`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank branches `scale * a @ b` for the kernels of a DiT.

    Attributes:
      branches: factors in nested dictionaries, at the place of the linear that they adapt:
        `{"blocks": {"ffn": {"up": {"a": [l, i, r], "b": [l, r, o]}}}}`.
      scale: alpha / r.
      settings: sampling settings that it was made for (`SETTINGS`); plugging it in sets them.
      role: "generator" or "critic" of a distillation, or "adapter".
      base: fingerprint of the DiT that it was made on (`weights_fingerprint`), or "".
      provenance: how it was made, plain values.
      name: name for messages.
      is_partial: whether it may be plugged into a model of more layers, which stay as they are.

    Raises UserError for factors that do not fit each other, and for settings that cannot be.
    """

    branches: Params = dataclasses.field(repr=False)
    scale: float = 1.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    role: str = "adapter"
    base: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    name: str = "adapter"
    is_partial: bool = False

    def __post_init__(self) -> None:
        # 1. Settings.
        if self.role not in ROLES:
            raise UserError(f"{self.name}: role must be {', '.join(ROLES)}, got {self.role!r}")
        if not math.isfinite(self.scale):
            raise UserError(f"{self.name}: scale must be a finite number, got {self.scale}")
        object.__setattr__(self, "settings", _checked_settings(self.settings, self.name))
        # 2. Factors.
        factors = self.factors
        if not factors:
            raise UserError(f"{self.name}: adapts nothing; an adapter needs at least one branch")
        for path, value in factors.items():
            if path[-1] not in ("a", "b") or value.ndim != 3:
                raise UserError(
                    f"{self.name}: {'.'.join(path)} must be a factor a [l, i, r] or b [l, r, o], "
                    f"got {tuple(value.shape)}"
                )
        for *parents, _ in factors:
            a, b = (factors.get((*parents, side)) for side in "ab")
            if a is None or b is None or a.shape[::2] != (b.shape[0], b.shape[1]):
                shapes = ", ".join(str(None if x is None else tuple(x.shape)) for x in (a, b))
                raise UserError(
                    f"{self.name}: the factors of {'.'.join(parents)} do not fit: {shapes}"
                )
        if len(ranks := {x.shape[2] for p, x in factors.items() if p[-1] == "a"}) > 1:
            raise UserError(f"{self.name}: all branches need one rank, got {sorted(ranks)}")

    @property
    def factors(self) -> dict[TreePath, Any]:
        """Factors by path, `("blocks", "ffn", "up", "a")`."""
        return flatten(self.branches)

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted linears, such as `blocks.ffn.up`."""
        return tuple(sorted({".".join(path[:-1]) for path in self.factors}))

    @property
    def rank(self) -> int:
        """Rank of all branches."""
        return next(x.shape[2] for path, x in self.factors.items() if path[-1] == "a")

    @property
    def layers(self) -> int:
        """Number of layers of the factors."""
        return max(x.shape[0] for x in self.factors.values())

    @property
    def alpha(self) -> float:
        """Numerator of the scale: `scale * rank`."""
        return self.scale * self.rank

    @property
    def fingerprint(self) -> str:
        """CRC-32 (8 hex digits) of the scale and of all factors."""
        checksum = zlib.crc32(repr((self.scale, self.targets)).encode())
        for _, value in sorted(self.factors.items()):
            array = np.ascontiguousarray(np.asarray(value))
            checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
        return f"{checksum:08x}"

    def check_finite(self) -> None:
        """Raises UserError, naming an array, if it has NaN or infinite values."""
        for path, value in self.factors.items():
            check_finite(np.asarray(value), ".".join(path), self.name)

    def check_fits(self, shapes: Mapping[TreePath, Shape]) -> None:
        """Raises UserError unless it fits a DiT, given the shapes of its parameters by path."""
        factors = {path: tuple(value.shape) for path, value in self.factors.items()}
        check_fits(factors, shapes, self.name, is_partial=self.is_partial)

    def describe(self) -> str:
        """Rank, alpha, role, settings and size in one line."""
        megabytes = sum(x.size * jnp.dtype(x.dtype).itemsize for x in self.factors.values()) / 1e6
        parts = [f"rank {self.rank}, alpha {self.alpha:g}, {len(self.targets)} linears"]
        parts += [f"{self.layers} layers, {megabytes:,.1f} MB"]
        parts += [f"made for {_texts(self.settings)}"] * bool(self.settings)
        return f"{self.name} ({self.role}): {', '.join(parts)}"


def _texts(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {settings[name]}" for name in SETTINGS if name in settings)


def _checked_settings(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings with levels as a tuple; UserError for unknown ones and impossible values."""
    reject_unknown(settings, SETTINGS, f"{name}: settings")
    values = {k: v for k, v in settings.items() if v is not None}
    steps, levels = values.get("steps"), values.get("levels")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise UserError(f"{name}: settings: steps must be a whole number >= 1, got {steps!r}")
    if values.get("solver", "unipc") not in SOLVERS:
        raise UserError(
            f"{name}: settings: solver must be {', '.join(SOLVERS)}, got {values['solver']!r}"
        )
    if levels is not None:
        try:
            values["levels"] = tuple(float(level) for level in levels)
            check_levels(values["levels"], len(values["levels"]) if steps is None else steps)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: settings: {error}") from error
        values.setdefault("steps", len(values["levels"]))
    return values
