"""The frozen models of a distillation: student, critic and teacher, and what they share."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from longlive_jax.parallel import rules
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.dmd.roles import CRITIC_BACKBONE, STUDENT_BACKBONE, TEACHER
from longlive_jax.training.stages.backbones import FrozenForm, read_backbone
from longlive_jax.training.state import abstract_state
from longlive_jax.typing import Params
from pallas_kernels.dispatch import Implementation, Unsupported

__all__ = ["Backbone", "FrozenRoles", "RolePrecision"]

Policy = Literal["none", "fp8", "nvfp4_frozen"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolePrecision:
    """Policies that pack the frozen matrices of each role; "none" keeps them in the run's dtype.

    Attributes:
      student: the student's.
      teacher: the teacher's, which needs no gradient.
      critic: the critic's.
      implementation: implementation of quantize and matmul.
    """

    student: Policy = "none"
    teacher: Policy = "none"
    critic: Policy = "none"
    implementation: Implementation = "auto"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen model: where it is read, and in which form it is kept.

    Attributes:
      folder: checkpoint directory.
      form: the form.
    """

    folder: Path
    form: FrozenForm


@dataclasses.dataclass(frozen=True)
class FrozenRoles:
    """The frozen models by their names in the losses.

    Attributes:
      backbones: the models; the critic's is absent where it is the student's.
      share: whether models with the same weights and precision are one copy.
    """

    backbones: Mapping[str, Backbone]
    share: bool

    @classmethod
    def of(
        cls, student: Path, teacher: Path, precision: RolePrecision, *, dtype: str, share: bool
    ) -> "FrozenRoles":
        """Student and critic from one checkpoint, the teacher from its own.

        Args:
          student: checkpoint directory of student and critic.
          teacher: that of the teacher.
          precision: how each role is packed.
          dtype: dtype of matrices that are not packed.
          share: whether models with the same weights and precision are one copy.
        """
        settings: dict[str, Any] = {"dtype": dtype, "implementation": precision.implementation}
        backbones = {
            STUDENT_BACKBONE: Backbone(
                student, FrozenForm(policy=precision.student, gradient=True, **settings)
            ),
            CRITIC_BACKBONE: Backbone(
                student, FrozenForm(policy=precision.critic, gradient=True, **settings)
            ),
            TEACHER: Backbone(teacher, FrozenForm(policy=precision.teacher, **settings)),
        }
        if share and precision.student == precision.critic:
            del backbones[CRITIC_BACKBONE]
        return cls(backbones, share)

    def original(self, name: str) -> str:
        """The first model whose arrays serve for this one too; it may be this one."""
        own = self.backbones[name]
        for other, backbone in self.backbones.items():
            same = backbone.folder.resolve() == own.folder.resolve()
            if self.share and same and backbone.form.policy == own.form.policy:
                return other
        return name

    def read(self, model: Params, mesh: Mesh) -> dict[str, Params]:
        """Parameters on the mesh, by name; `model` has the shapes of a model's parameters.

        Raises UserError, before anything is read, for a policy that does not fit model or mesh.
        """
        self.abstract(model, mesh)
        frozen: dict[str, Params] = {}
        for name, backbone in self.backbones.items():
            original = self.original(name)
            if original == name:
                frozen[name] = read_backbone(backbone.folder, model, backbone.form, mesh)
            else:
                frozen[name] = frozen[original]
        return frozen

    def abstract(self, model: Params, mesh: Mesh) -> dict[str, Params]:
        """Shapes and shardings of `read`; nothing is read. It raises like `read`."""
        frozen = {}
        for name, backbone in self.backbones.items():
            try:
                shapes, specs = backbone.form.abstract(model, mesh)
            except (ValueError, Unsupported) as error:
                raise UserError(f"config.precision, {name}: {error}") from error
            frozen[name] = abstract_state(shapes, rules.shardings(mesh, specs))
        return frozen

    def describe(self, model: Params) -> tuple[str, ...]:
        """One line for each model: where it is read, and its precision."""
        lines = []
        for name, backbone in self.backbones.items():
            original = self.original(name)
            form = backbone.form.quantization.describe(model)
            form = form if original == name else f"the arrays of {original}"
            lines.append(f"{name}: {backbone.folder}, {form}")
        return tuple(lines)
