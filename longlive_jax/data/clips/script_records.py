"""Records of scripts in a store, and the prompt and cut of every chunk that they amount to.

A record's arrays are the fields of `EncodedScript`; `first_frame` is there in stores with first
images only.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.data.clips.encode_spec import Encoders, EncodeSpec
from longlive_jax.data.clips.encoding_plan import EncodingPlan, EncodingProgress
from longlive_jax.data.clips.records import dtype_of, pack_record
from longlive_jax.data.clips.scripts import PromptScript, read_picture
from longlive_jax.data.clips.store import Manifest, Shard, with_shard, write_shard
from longlive_jax.spec import UserError
from longlive_jax.typing import Bool, Float, Int

__all__ = ["EncodedScript", "write_scripts"]


@dataclasses.dataclass(frozen=True)
class EncodedScript:
    """A script of `s` shots, with prompts as rows in the store.

    Attributes:
      prompt: each shot's prompt, int32.
      cut_prompt: each shot's prompt with the cut prefix, int32.
      cut: whether each shot begins with a cut, unless it is the first.
      chunks: chunks of each shot, int32; 0 if the script does not say.
      first_frame: latents of the first frame, or None.
    """

    prompt: Int[np.ndarray, "s"]
    cut_prompt: Int[np.ndarray, "s"]
    cut: Bool[np.ndarray, "s"]
    chunks: Int[np.ndarray, "s"]
    first_frame: Float[np.ndarray, "h w c"] | None = None

    def chunk_prompts(
        self, chunks: int, chunks_per_shot: int = 0
    ) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
        """Row in the store of every chunk's prompt, int32, and which chunks are cuts.

        Without durations in the script, its shots have `chunks_per_shot` chunks, and a script of
        one shot is repeated with a cut after as many; with 0 the shots have equal lengths, except
        that the first ones have the remaining chunks. A script that is too long is cut off, and
        the last shot of one that is too short is extended.
        """
        # 1. (shot, whether it is a cut, chunks) of every stretch.
        shots = list(range(len(self.prompt)))
        cuts, lengths = self.cut.tolist(), self.chunks.tolist()
        if not all(lengths) and chunks_per_shot:
            repeats = -(-chunks // chunks_per_shot) if len(shots) == 1 else 1
            shots, cuts = shots * repeats, [True] * repeats if repeats > 1 else cuts
            lengths = [chunks_per_shot] * len(shots)
        elif not all(lengths):
            count = len(shots)
            lengths = [chunks // count + (i < chunks % count) for i in range(count)]
        # 2. Its chunks.
        rows: list[int] = []
        is_cut: list[bool] = []
        for shot, cut, length in zip(shots, cuts, lengths, strict=True):
            if length and len(rows) < chunks:
                begins = bool(rows) and cut
                first = self.cut_prompt if begins else self.prompt
                rows += [int(first[shot]), *[int(self.prompt[shot])] * (length - 1)]
                is_cut += [begins, *[False] * (length - 1)]
                last = int(self.prompt[shot])
        rows += [last] * (chunks - len(rows))
        is_cut += [False] * (chunks - len(is_cut))
        return np.array(rows[:chunks], np.int32), np.array(is_cut[:chunks], bool)


def write_scripts(
    manifest: Manifest,
    out: Path,
    missing: Mapping[int, range],
    plan: EncodingPlan,
    spec: EncodeSpec,
    encoders: Encoders,
    progress: EncodingProgress,
) -> Manifest:
    """Writes the missing shards of scripts, with their first images if the store has them.

    Raises UserError if no image can be read.
    """
    encode = encoders.load_vae() if manifest.identity["first_images"] else None
    prompt_rows = {prompt: i for i, prompt in enumerate(plan.prompts)}
    for number, indices in missing.items():
        skipped: list[tuple[str, str]] = []

        def records(
            indices: range = indices, skipped: list[tuple[str, str]] = skipped
        ) -> Iterator[bytes]:
            for i in indices:
                script = plan.scripts[i]
                try:
                    yield _record(script, prompt_rows, spec, encode)
                except Unusable as reason:
                    skipped.append((script.name, str(reason)))
                progress("scripts", i + 1, len(plan.scripts))

        file = f"scripts-{number:05d}.array_record"
        written = write_shard(out / file, records())
        shards = with_shard(manifest.scripts, number, Shard(file, written, tuple(skipped)))
        manifest = dataclasses.replace(manifest, scripts=shards)
        manifest.write(out)
    if not any(shard.records for shard in manifest.scripts):
        why = "; ".join(f"{name}: {reason}" for name, reason in manifest.skipped[:3])
        raise UserError(f"none of {len(plan.scripts)} first images can be read ({why})")
    return manifest


def _record(
    script: PromptScript,
    prompt_rows: Mapping[str, int],
    spec: EncodeSpec,
    encode: Callable[[np.ndarray], np.ndarray] | None,
) -> bytes:
    """The record of a script. Raises Unusable if its first image cannot be read.

    `encode` maps frames uint8 [1, h, w, 3] to latents [1, h, w, c]; None without images.
    """
    prefix = spec.join.cut_prefix
    captions = [shot.caption.removeprefix(prefix) for shot in script.shots]
    arrays = {
        "prompt": np.array([prompt_rows[text] for text in captions], np.int32),
        "cut_prompt": np.array([prompt_rows[prefix + text] for text in captions], np.int32),
        "cut": np.array([shot.cut for shot in script.shots], bool),
        "chunks": np.array([shot.chunks or 0 for shot in script.shots], np.int32),
    }
    if encode is not None:
        assert script.image is not None  # scripts without one have a problem
        frame = encode(read_picture(script.image, spec.size)[None])[0]
        arrays["first_frame"] = frame.astype(dtype_of(spec.dtype))
    return pack_record(arrays, {"name": script.name})
