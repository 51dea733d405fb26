"""The checkpoint that a stage trains further, whose other parts complete the export."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlive_jax.data.clips.clip_plan import FPS
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.builtin import find_checkpoint
from longlive_jax.io.checkpoint import TOKENIZER, CheckpointWriter, read_manifest, save_component
from longlive_jax.io.completeness import check_arrays, require_components
from longlive_jax.io.parts import add_parts, parts_to_add
from longlive_jax.parallel.hosts import is_first_process
from longlive_jax.sampling.settings import MANIFEST_KEY, spec_for
from longlive_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
    """A complete checkpoint directory to start from.

    Attributes:
      folder: the directory.
      component: the component that is trained.
      parts: its other parts that the exported checkpoint lacks.
    """

    folder: Path
    component: str
    parts: tuple[str, ...]

    @classmethod
    def open(
        cls, name: str, out: Path, component: str = "dit", *, complete: bool = True
    ) -> "BaseCheckpoint":
        """The checkpoint `name` for a run that trains `component` and exports to `out`.

        Without `complete`, `out` gets none of its parts (an adapter is used with the checkpoint).

        Raises UserError if a part is missing or damaged, if its parts do not fit together, or if
        `out` has other versions of them.
        """
        folder = find_checkpoint(name)
        require_components(folder)
        parts = parts_to_add(folder, out, without=component) if complete else ()
        if is_first_process():
            check_arrays(folder, *(part for part in parts if part != TOKENIZER))
        return cls(folder, component, parts)

    def sample_settings(
        self, clips: EncodedClips, *, window: int | None, global_sinks: int, **settings: Any
    ) -> dict[str, Any]:
        """Fields of `SampleSpec` that suit a model trained on `clips` from this checkpoint.

        Args:
          clips: clips of the training.
          window: chunks that a chunk attended to; None for its full past, which is sampled with
            this checkpoint's window.
          global_sinks: first chunks that all later chunks attended to.
          **settings: other fields of `SampleSpec` that the training determines.
        """
        own, identity = spec_for(self.folder), clips.manifest.identity
        least = 1 + max(1, global_sinks + 1)
        return {
            "size": list(identity["size"]),
            "fps": float(FPS),
            "chunk_frames": identity["join"]["chunk_frames"],
            "cut_prefix": identity["join"]["cut_prefix"],
            "window": max(own.window, least) if window is None else window,
            "global_sinks": global_sinks,
            "negative_prompt": own.negative_prompt,
            **settings,
        }

    def export(
        self,
        directory: Path,
        params: Params,
        config: Any,
        *,
        provenance: Mapping[str, Any],
        sampling: Mapping[str, Any],
    ) -> tuple[str, ...]:
        """Writes the trained component, sampling settings and the other parts; returns notes."""
        continues = read_manifest(self.folder)["provenance"].get(self.component, {})
        with CheckpointWriter(directory, overwrite=True) as writer:
            added = add_parts(writer, self.folder, self.parts)
            writer.manifest[MANIFEST_KEY] = dict(sampling)
            writer.commit()
        save_component(
            directory,
            self.component,
            params,
            config,
            provenance={**provenance, "continues": continues},
            overwrite=True,
        )
        return (f"from {self.folder}: {added}",) if self.parts else ()
