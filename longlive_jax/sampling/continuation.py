"""Videos that are continued: their frames or latents, cut into the chunks that enter the cache.

A cut between two shots of the past lies between two chunks, as in a generated video. Each shot
therefore keeps the frames of whole chunks up to its end, and what is left of its beginning, less
than a chunk, is not used.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from longlive_jax.io.pictures import to_pixels
from longlive_jax.models.vae.config import VAEConfig
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.timeline import ChunkPrompt
from longlive_jax.spec import UserError
from longlive_jax.typing import Array, Float, Shaped

TOLERANCE = 1e-3
"""How far float pixels may lie outside [-1, 1]."""


@dataclasses.dataclass(frozen=True, eq=False)
class PastVideo:
    """A video to be continued.

    Attributes:
      pieces: frames `[b, f, h, w, 3]` or latents `[b, n, h, w, c]` of each chunk, on the host.
      is_encoded: whether the pieces are latents.
      cuts: whether each chunk begins a shot other than the first.
      prompts: prompt of each shot; None stands for the first prompt of each script.
      notes: remarks for the user.
    """

    pieces: tuple[Shaped[np.ndarray, "b f h w c"], ...]
    is_encoded: bool
    cuts: tuple[bool, ...]
    prompts: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @property
    def num_shots(self) -> int:
        """Number of shots."""
        return 1 + sum(self.cuts)

    def latents(self, engine: Engine) -> Iterator[Float[Array, "b n h w c"]]:
        """Latents of each chunk on the DiT's device; frames are encoded a few at a time."""
        if not self.is_encoded:
            yield from self._encode(engine)
            return
        for piece in self.pieces:
            yield engine.device_put(jnp.asarray(piece, jnp.float32))

    def _encode(self, engine: Engine) -> Iterator[Float[Array, "b n h w c"]]:
        """Encodes the first frame, then the frames of a chunk of latents at a time, and the rest.

        That is how the VAE encodes a clip in chunks, so both give the same latents, bit for bit. It
        compiles three times, whatever the length of the video.
        """
        stride, size = engine.vae.cfg.temporal_stride, engine.spec.chunk_frames
        chunks = len(self.pieces)
        blocks = [1, *[stride * size] * (chunks - 1), stride * (size - 1)]

        def encoded() -> Iterator[Array]:
            tails = None
            for frames in _regroup(self.pieces, filter(None, blocks), np.concatenate):
                is_bytes = frames.dtype == np.uint8
                pixels = to_pixels(frames) if is_bytes else frames.astype(np.float32)
                latents, tails = engine.encode_chunk(tails, pixels)
                yield latents

        yield from _regroup(encoded(), [size] * chunks, jnp.concatenate)

    def chunk_prompts(
        self, first_prompts: Sequence[str], prefix: str
    ) -> Iterator[list[ChunkPrompt]]:
        """Prompt, cut and shot of each chunk, for each video of the batch."""
        shot = 0
        for cut in self.cuts:
            shot += cut
            texts = first_prompts
            if self.prompts is not None:
                texts = [self.prompts[shot]] * len(first_prompts)
            texts = [prefix * cut + text.removeprefix(prefix) for text in texts]
            yield [ChunkPrompt(text, cut, shot) for text in texts]


def make_past_video(
    engine: Engine,
    batch: int,
    size: tuple[int, int],
    *,
    video: Any = None,
    latents: Any = None,
    cuts: Sequence[int] = (),
    prompts: Sequence[str] | None = None,
) -> PastVideo | None:
    """The video to be continued by `batch` scripts of `size`; None if there is none.

    Args:
      engine, batch, size: the model, number of videos, their height and width.
      video: frames, `[f, h, w, 3]` or `[b, f, h, w, 3]`, uint8 or in [-1, 1].
      latents: latents in place of frames, `[f, h, w, c]` or `[b, f, h, w, c]`.
      cuts: index of the first (decoded) frame of every shot but the first.
      prompts: prompt of each shot.

    Raises UserError for a video, cuts or prompts that do not fit, before anything is computed.
    """
    # 1. Frames or latents, and the chunks of every shot.
    if video is None and latents is None:
        if cuts != () or prompts is not None:
            raise UserError("video_cuts and video_prompts describe a video; give video, too")
        return None
    if video is not None and latents is not None:
        raise UserError("give either video or video_latents, not both")
    cfg, frames = engine.vae.cfg, engine.spec.chunk_frames
    if video is not None:
        array = _checked_video(video, batch, size)
        bounds = _shot_bounds(cuts, array.shape[1])
        ranges, notes = _frame_ranges(bounds, cfg.temporal_stride, frames)
    else:
        array = _checked_latents(latents, batch, size, cfg, frames)
        bounds = _shot_bounds(cuts, cfg.num_raw_frames(array.shape[1]))
        ranges, notes = _latent_ranges(bounds, cfg.temporal_stride, frames), ()
    # 2. One chunk after the other.
    return PastVideo(
        pieces=tuple(array[:, a:b] for shot in ranges for a, b in shot),
        is_encoded=video is None,
        cuts=tuple(i > 0 and j == 0 for i, shot in enumerate(ranges) for j in range(len(shot))),
        prompts=_checked_prompts(prompts, len(ranges)),
        notes=notes,
    )


def _regroup(
    pieces: Iterable[Any], sizes: Iterable[int], concatenate: Callable[..., Any]
) -> Iterator[Any]:
    """Yields the same frames (axis 1) in pieces of other sizes."""
    source = iter(pieces)
    buffer: list[Any] = []
    for size in sizes:
        while sum(piece.shape[1] for piece in buffer) < size:
            buffer.append(next(source))
        joined = buffer[0] if len(buffer) == 1 else concatenate(buffer, axis=1)
        yield joined[:, :size]
        buffer = [joined[:, size:]] if joined.shape[1] > size else []


def _checked_prompts(prompts: Any, shots: int) -> tuple[str, ...] | None:
    """Prompts of the shots. Raises UserError unless there is one for each."""
    if prompts is None:
        return None
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not is_list or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise UserError(f"video_prompts must be a list of strings, got {prompts!r:.80}")
    if len(prompts) != shots:
        raise UserError(
            f"video_prompts has {len(prompts)} prompts for {shots} shots; give one per shot"
        )
    return tuple(prompts)


def _array(name: str, value: Any, axes: str) -> np.ndarray:
    """A batch of videos on the host. Raises TypeError or UserError for anything else."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be an array {axes}, got {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    return array[None] if array.ndim == 4 else array


def _checked_video(video: Any, batch: int, size: tuple[int, int]) -> np.ndarray:
    array = _array("video", video, "[f, h, w, 3]")
    if array.ndim != 5 or array.shape[0] != batch or array.shape[2:] != (*size, 3):
        raise UserError(
            f"the video to continue has shape {array.shape}; expected [{batch}, frames, "
            f"{size[0]}, {size[1]}, 3]"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"the video to continue has dtype {array.dtype}; give uint8 or float32")
    if array.size and not np.abs(array).max() <= 1 + TOLERANCE:
        raise UserError(
            f"the video to continue has values from {array.min():g} to {array.max():g}; float "
            "frames must be in [-1, 1], others uint8"
        )
    return array


def _checked_latents(
    latents: Any, batch: int, size: tuple[int, int], cfg: VAEConfig, chunk_frames: int
) -> np.ndarray:
    array = _array("video_latents", latents, "[f, h, w, c]")
    shape = (*(edge // cfg.spatial_stride for edge in size), cfg.z_dim)
    if array.ndim != 5 or array.shape[0] != batch or array.shape[2:] != shape:
        raise UserError(
            f"video_latents has shape {array.shape}; expected [{batch}, frames, "
            f"{', '.join(map(str, shape))}]"
        )
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise UserError(f"video_latents must be finite floats, got {array.dtype}")
    if array.shape[1] % chunk_frames or not array.shape[1]:
        raise UserError(
            f"video_latents has {array.shape[1]} frames; must be a multiple of {chunk_frames}, the "
            "latent frames of a chunk"
        )
    return array


def _shot_bounds(cuts: Any, frames: int) -> list[tuple[int, int]]:
    """First frame and end of every shot. Raises UserError for cuts outside the video."""
    is_list = isinstance(cuts, Sequence | np.ndarray) and not isinstance(cuts, str)
    if not is_list or any(
        isinstance(cut, bool) or not isinstance(cut, int | np.integer) for cut in cuts
    ):
        raise UserError(f"video_cuts must be a list of frame indices, got {cuts!r:.80}")
    bounds = [0, *map(int, cuts), frames]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        raise UserError(
            f"video_cuts must be ascending and in [1, {frames - 1}], got "
            f"{', '.join(map(str, cuts))}"
        )
    return list(itertools.pairwise(bounds))


def _frame_ranges(
    bounds: Sequence[tuple[int, int]], stride: int, chunk_frames: int
) -> tuple[list[list[tuple[int, int]]], tuple[str, ...]]:
    """(first frame, end) of the chunks of every shot, and notes on frames that are left out."""
    ranges, notes = [], []
    for i, (begin, end) in enumerate(bounds):
        # The first chunk of a video lacks `stride - 1` frames.
        missing = stride - 1 if i == 0 else 0
        count = (end - begin + missing) // (stride * chunk_frames)
        shot = f"shot {i + 1} of " if len(bounds) > 1 else ""
        if count < 1:
            least = stride * chunk_frames - missing
            raise UserError(
                f"{shot}the video to continue must have >= {least} frames, got {end - begin}"
            )
        ends = [end - stride * chunk_frames * k for k in reversed(range(count))]
        first = ends[0] - stride * chunk_frames + missing
        ranges.append(list(itertools.pairwise([first, *ends])))
        if first > begin:
            left, of_shot = first - begin, f" of shot {i + 1}" if len(bounds) > 1 else ""
            frames, verb = ("frame", "is") if left == 1 else (f"{left} frames", "are")
            notes.append(f"the first {frames}{of_shot} {verb} left out: less than one chunk")
    return ranges, tuple(notes)


def _latent_ranges(
    bounds: Sequence[tuple[int, int]], stride: int, chunk_frames: int
) -> list[list[tuple[int, int]]]:
    """(first latent, end) of the chunks of every shot; UserError for cuts within a chunk."""
    ends = []
    for _, end in bounds:
        latents, rest = divmod(end + stride - 1, stride)
        if rest or latents % chunk_frames:
            raise UserError(
                f"video_cuts: frame {end} lies within a chunk; the chunks of latents begin at "
                f"{stride * chunk_frames}k - {stride - 1}"
            )
        ends.append(latents)
    return [
        [(a, a + chunk_frames) for a in range(begin, end, chunk_frames)]
        for begin, end in itertools.pairwise([0, *ends])
    ]
