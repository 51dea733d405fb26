"""Per-frame readings of small-world videos: the scene in each frame, measured from its pixels.

The model of a frame is one shape with a centre marker on a plain background. Position, size and
shape come from matched filters with three free colours, so blur, noise or a wrong colour do not
affect the shape reading. Colours are then averaged well inside the fitted regions. Frames are tori,
so a subject at the border is read as well as one in the middle.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from longlive_jax.small_world import drawing
from longlive_jax.small_world.drawing import HEIGHT, WIDTH
from longlive_jax.small_world.words import BACKGROUNDS, COLOURS, MARKERS, SHAPES
from longlive_jax.typing import Float, Int

UNCLEAR = -1
"""Reading of an attribute that matches no known value."""

_CROP = 48  # pixels; contains every template, offsets included
_OFFSETS = np.arange(-2.0, 2.5)  # pixels, in x and y
_RADII = np.arange(11.0, 21.0)  # pixels
_MIN_EXPLAINED = 0.5  # explained share of a frame's variance, below which it has no shape
_MAX_COLOUR_DISTANCE = 0.65  # Euclidean, RGB in [-1, 1], to the nearest known colour
_PLAIN_DISTANCE = 0.25  # largest difference of a channel between a plain background and its median
_PLAIN_SHARE = 0.4  # smallest share of pixels within that distance
_BATCH = 64  # frames read together


@dataclasses.dataclass(frozen=True)
class FrameReadings:
    """Readings of a video, one entry per frame. Pixel values are in [-1, 1].

    Attributes:
      shape: index into SHAPES, or UNCLEAR.
      colour: index into COLOURS, or UNCLEAR.
      marker: index into MARKERS, or UNCLEAR.
      background: index into BACKGROUNDS, or UNCLEAR.
      x: horizontal centre of the subject in pixels.
      y: vertical centre of the subject in pixels.
      radius: radius of the subject in pixels.
      explained: share of the frame's variance that the fitted template explains.
      overlap: intersection over union of the subject's pixels and the fitted outline.
      error: root mean square difference from a clean rendering of the scene that was read.
      sharpness: energy of pixel differences, relative to that rendering.
      change: mean absolute difference from the previous frame (0 for the first frame), between
        means over 4 x 4 pixels, which are robust to noise.
    """

    shape: Int[np.ndarray, " f"]
    colour: Int[np.ndarray, " f"]
    marker: Int[np.ndarray, " f"]
    background: Int[np.ndarray, " f"]
    x: Float[np.ndarray, " f"]
    y: Float[np.ndarray, " f"]
    radius: Float[np.ndarray, " f"]
    explained: Float[np.ndarray, " f"]
    overlap: Float[np.ndarray, " f"]
    error: Float[np.ndarray, " f"]
    sharpness: Float[np.ndarray, " f"]
    change: Float[np.ndarray, " f"]

    def __len__(self) -> int:
        return len(self.shape)


def frame_readings(video: Float[np.ndarray, "f h w 3"]) -> FrameReadings:
    """Reads every frame of a video: floats in [-1, 1], HEIGHT x WIDTH pixels.

    Raises:
      ValueError: if the video has another size, no frames, integer pixels or non-finite pixels.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[1:] != (HEIGHT, WIDTH, 3) or not len(video):
        raise ValueError(
            f"video must have shape [f, {HEIGHT}, {WIDTH}, 3] with f >= 1, got {list(video.shape)}"
        )
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"pixels must be floats in [-1, 1], got {video.dtype}")
    if not np.isfinite(video).all():
        bad = int(np.count_nonzero(~np.isfinite(video)))
        raise ValueError(f"{bad} pixel values are not finite; the generator has diverged")
    video = video.astype(np.float32, copy=False)
    parts = [_read(video[at : at + _BATCH]) for at in range(0, len(video), _BATCH)]
    merged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    coarse = merged.pop("coarse")
    step = np.abs(np.diff(coarse, axis=0, prepend=coarse[:1])).mean((1, 2, 3))
    return FrameReadings(**merged, change=step)


def _read(video: np.ndarray) -> dict[str, np.ndarray]:
    """Fields of `FrameReadings` for a batch of frames, with `coarse` in place of `change`."""
    # 1. Fit shape, size and position to what differs from the background.
    ground = np.median(video[:, ::2, ::2].reshape(len(video), -1, 3), axis=1)
    away = np.abs(video - ground[:, None, None]).max(-1)
    row, column = _locate(away)
    shape, radius, y, x, explained = _fit(video, row, column)
    outline, dot = drawing.coverage(shape, radius, x, y)

    # 2. Average colours inside the fitted regions and match them to the known ones.
    inside = ((outline >= 0.999) & (dot <= 0.001)).astype(np.float32)
    body = _mean_over(video, inside)
    centre = _mean_over(video, (dot >= 0.999).astype(np.float32))
    background, background_distance = _nearest(ground, BACKGROUNDS)
    colour, colour_distance = _nearest(body, COLOURS)
    marker, marker_distance = _nearest(centre, MARKERS)

    # 3. Compare with a clean rendering of that scene.
    clean = drawing.compose(
        outline,
        dot,
        drawing.colour_levels(BACKGROUNDS)[background],
        drawing.colour_levels(COLOURS)[colour],
        drawing.colour_levels(MARKERS)[marker],
    )
    has_shape = explained >= _MIN_EXPLAINED
    is_plain = (away < _PLAIN_DISTANCE).mean((1, 2)) >= _PLAIN_SHARE
    has_colour = has_shape & (colour_distance < _MAX_COLOUR_DISTANCE)
    has_marker = has_shape & (marker_distance < _MAX_COLOUR_DISTANCE)
    has_background = is_plain & (background_distance < _MAX_COLOUR_DISTANCE)
    return {
        "shape": np.where(has_shape, shape, UNCLEAR),
        "colour": np.where(has_colour, colour, UNCLEAR),
        "marker": np.where(has_marker, marker, UNCLEAR),
        "background": np.where(has_background, background, UNCLEAR),
        "x": x % WIDTH,
        "y": y % HEIGHT,
        "radius": radius,
        "explained": explained,
        "overlap": _overlap(video, outline, dot, ground, body),
        "error": np.sqrt(np.square(video - clean).mean((1, 2, 3))),
        "coarse": video.reshape(len(video), HEIGHT // 4, 4, WIDTH // 4, 4, 3).mean((2, 4)),
        "sharpness": _edge_energy(video) / np.maximum(_edge_energy(clean), 1e-6),
    }


def _locate(away: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Approximate centre (row, column) of the subject, from pixel distances to the background."""
    weight = np.clip(away - 0.15, 0, 1)
    blurred = np.fft.irfft2(np.fft.rfft2(weight) * _disc(), s=(HEIGHT, WIDTH))
    best = blurred.reshape(len(away), -1).argmax(1)
    row, column = (best // WIDTH).astype(float), (best % WIDTH).astype(float)
    for _ in range(2):  # the best disc is off-centre for asymmetric shapes; move to the centroid
        dy = _wrapped(np.arange(HEIGHT) - row[:, None], HEIGHT)
        dx = _wrapped(np.arange(WIDTH) - column[:, None], WIDTH)
        near = weight * (dy[:, :, None] ** 2 + dx[:, None, :] ** 2 < (_CROP / 2) ** 2)
        total = np.maximum(near.sum((1, 2)), 1e-6)
        row += (near.sum(2) * dy).sum(1) / total
        column += (near.sum(1) * dx).sum(1) / total
    return row, column


@functools.cache
def _disc() -> np.ndarray:
    """Fourier transform of a disc of about a subject's size, centred on pixel (0, 0)."""
    origin = np.zeros(1)
    outline, _ = drawing.coverage(np.zeros(1, int), np.full(1, 13.0), origin, origin)
    return np.fft.rfft2(outline[0])


def _wrapped(offset: np.ndarray, period: int) -> np.ndarray:
    return (offset + period / 2) % period - period / 2


@functools.cache
def _templates() -> np.ndarray:
    """Matched filters [2, shape * radius * y * x, crop * crop], whitened per template.

    After subtraction of the frame's mean, the two filters of a template span body and marker. The
    sum of their squared responses is the variance that the three best colours explain.
    """
    grid = np.meshgrid(np.arange(len(SHAPES)), _RADII, _OFFSETS, _OFFSETS, indexing="ij")
    shape, radius, dy, dx = (g.reshape(-1) for g in grid)
    outline, dot = drawing.coverage(shape.astype(int), radius, dx + _CROP // 2, dy + _CROP // 2)
    pair = np.stack([outline * (1 - dot), dot]).reshape(2, len(shape), -1)
    mean = pair.mean(-1)
    gram = np.einsum("ikp,jkp->kij", pair, pair) - HEIGHT * WIDTH * np.einsum(
        "ik,jk->kij", mean, mean
    )
    whiten = np.linalg.inv(np.linalg.cholesky(gram))
    crop = pair.reshape(2, len(shape), HEIGHT, WIDTH)[:, :, :_CROP, :_CROP]
    crop = crop.reshape(2, len(shape), -1)
    return np.ascontiguousarray(np.einsum("kij,jkp->ikp", whiten, crop), np.float32)


def _fit(video: np.ndarray, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shape, radius, y, x and explained variance share of each frame's best template."""
    # Crops around the approximate centres, without the frame's mean.
    frames = len(video)
    top, left = np.round(row).astype(int), np.round(column).astype(int)
    span = np.arange(_CROP) - _CROP // 2
    rows = (top[:, None] + span) % HEIGHT
    columns = (left[:, None] + span) % WIDTH
    mean = video.mean((1, 2))
    crop = video[np.arange(frames)[:, None, None], rows[:, :, None], columns[:, None, :]]
    crop = (crop - mean[:, None, None]).reshape(frames, -1, 3).transpose(0, 2, 1)
    # Responses of all templates, and the best one.
    first, second = (crop.reshape(frames * 3, -1) @ part.T for part in _templates())
    power = (first**2 + second**2).reshape(frames, 3, -1).sum(1)
    power = power.reshape(frames, len(SHAPES), len(_RADII), len(_OFFSETS), len(_OFFSETS))
    total = np.square(video - mean[:, None, None]).sum((1, 2, 3))
    best = np.unravel_index(power.reshape(frames, -1).argmax(1), power.shape[1:])
    # Refine radius and position between the grid's points.
    fine = [
        axis[best[k]] + _peak(power, best, k) * (axis[1] - axis[0])
        for k, axis in ((1, _RADII), (2, _OFFSETS), (3, _OFFSETS))
    ]
    explained = power.reshape(frames, -1).max(1) / np.maximum(total, 1e-6)
    return best[0], fine[0], fine[1] + top, fine[2] + left, explained


def _peak(power: np.ndarray, best: tuple[np.ndarray, ...], axis: int) -> np.ndarray:
    """Offset, in grid steps, of the parabola's vertex through the best template's neighbours."""
    size = power.shape[axis + 1]

    def at(step: int) -> np.ndarray:
        index = list(best)
        index[axis] = np.clip(best[axis] + step, 0, size - 1)
        return power[(np.arange(len(power)), *index)]

    before, here, after = at(-1), at(0), at(1)
    bend = np.maximum(2 * here - before - after, 1e-9)
    inner = (best[axis] > 0) & (best[axis] < size - 1)
    return np.where(inner, np.clip((after - before) / (2 * bend), -0.5, 0.5), 0.0)


def _mean_over(video: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean colour [f, 3] of the pixels with a weight [f, h, w] of 1; 0 where there are none."""
    frames = len(video)
    total = weight.reshape(frames, 1, -1) @ video.reshape(frames, -1, 3)
    return total[:, 0] / np.maximum(weight.sum((1, 2)), 1)[:, None]


def _nearest(rgb: np.ndarray, table) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest colour in a table, and the Euclidean distance to it."""
    gap = np.linalg.norm(rgb[:, None] - drawing.colour_levels(table), axis=-1)
    return gap.argmin(1), gap.min(1)


def _overlap(video, outline, dot, ground, body) -> np.ndarray:
    """Intersection over union of subject and outline.

    The subject's pixels are those nearer to the body's colour than to the background's, and the
    marker, which may have the background's colour.
    """
    axis = body - ground
    middle = (axis * (body + ground)).sum(-1) / 2
    along = (video.reshape(len(video), -1, 3) @ axis[:, :, None])[..., 0]
    subject = (along > middle[:, None]).reshape(outline.shape) | (dot > 0)
    fitted = outline > 0.5
    union = (subject | fitted).sum((1, 2))
    return (subject & fitted).sum((1, 2)) / np.maximum(union, 1)


def _edge_energy(video: np.ndarray) -> np.ndarray:
    """Sum of squared differences between neighbouring pixels, per frame."""
    across = np.square(np.diff(video, axis=2)).sum((1, 2, 3))
    return across + np.square(np.diff(video, axis=1)).sum((1, 2, 3))
