"""Read the scene off each frame of a small-world video, from its pixels alone.

Every frame is explained as one shape with a centre mark on a plain ground. Position, size and
shape come from matched filters whose three colours are free, so that blur, noise or a wrong colour
do not decide what shape it is; colours are then averaged well inside the fitted regions. The
frame is a torus, so a subject on the border is as easy as one in the middle.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from longlive_jax.small_world import drawing
from longlive_jax.small_world.drawing import HEIGHT, WIDTH
from longlive_jax.small_world.words import BACKGROUNDS, COLOURS, MARKS, SHAPES
from longlive_jax.typing import Float, Int

UNCLEAR = -1
"""The reading of an attribute that no known value explains."""

_CROP = 48  # pixels: every template fits in it, offsets included
_OFFSETS = np.arange(-2.0, 2.5)
_RADII = np.arange(11.0, 21.0)
_LEAST_EXPLAINED = 0.5  # share of a frame's variance, below which there is no shape
_FARTHEST = 0.65  # Euclidean distance of an RGB in [-1, 1] to the nearest known colour
_PLAIN = (0.25, 0.4)  # a ground is plain if this share of pixels is within this of its median
_BATCH = 64  # frames


@dataclasses.dataclass(frozen=True)
class FrameReadings:
    """One entry per frame.

    shape, colour, mark, background: index into SHAPES, COLOURS, MARKS, BACKGROUNDS, or UNCLEAR.
    x, y, radius: of the subject, in pixels. explained: share of variance the fit explains.
    overlap: intersection over union of the subject's pixels with the fitted outline.
    error: root mean square difference to the clean drawing of the scene that was read, in units
    of pixel values in [-1, 1]. sharpness: energy of pixel differences relative to that drawing's.
    change: mean absolute difference of 4 x 4 pixel means, which noise hardly moves, to the frame
    before (0 for the first).
    """

    shape: Int[np.ndarray, " f"]
    colour: Int[np.ndarray, " f"]
    mark: Int[np.ndarray, " f"]
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


def read_frames(video: Float[np.ndarray, "f h w 3"]) -> FrameReadings:
    """Read every frame of a float video in [-1, 1], HEIGHT x WIDTH pixels.

    Raises ValueError for another size, for no frames and for pixels that are not finite.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[1:] != (HEIGHT, WIDTH, 3) or not len(video):
        raise ValueError(
            f"the judge reads [f, {HEIGHT}, {WIDTH}, 3] with at least one frame, "
            f"not {list(video.shape)}"
        )
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"pixels are {video.dtype}; give floats in [-1, 1]")
    if not np.isfinite(video).all():
        bad = int(np.count_nonzero(~np.isfinite(video)))
        raise ValueError(f"{bad} pixel values are not finite: the video is broken, not just wrong")
    video = video.astype(np.float32, copy=False)
    parts = [_read(video[at : at + _BATCH]) for at in range(0, len(video), _BATCH)]
    merged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    coarse = merged.pop("coarse")
    step = np.abs(np.diff(coarse, axis=0, prepend=coarse[:1])).mean((1, 2, 3))
    return FrameReadings(**merged, change=step)


def _read(video: np.ndarray) -> dict[str, np.ndarray]:
    ground = np.median(video[:, ::2, ::2].reshape(len(video), -1, 3), axis=1)
    away = np.abs(video - ground[:, None, None]).max(-1)
    row, column = _locate(away)
    shape, radius, y, x, explained = _fit(video, row, column)
    outline, dot = drawing.coverage(shape, radius, x, y)
    inside = ((outline >= 0.999) & (dot <= 0.001)).astype(np.float32)
    body = _mean_over(video, inside)
    centre = _mean_over(video, (dot >= 0.999).astype(np.float32))

    background, ground_off = _nearest(ground, BACKGROUNDS)
    colour, colour_off = _nearest(body, COLOURS)
    mark, mark_off = _nearest(centre, MARKS)
    clean = drawing.compose(
        outline,
        dot,
        drawing.levels(BACKGROUNDS)[background],
        drawing.levels(COLOURS)[colour],
        drawing.levels(MARKS)[mark],
    )
    seen = explained >= _LEAST_EXPLAINED
    plain = (away < _PLAIN[0]).mean((1, 2)) >= _PLAIN[1]
    return {
        "shape": np.where(seen, shape, UNCLEAR),
        "colour": np.where(seen & (colour_off < _FARTHEST), colour, UNCLEAR),
        "mark": np.where(seen & (mark_off < _FARTHEST), mark, UNCLEAR),
        "background": np.where(plain & (ground_off < _FARTHEST), background, UNCLEAR),
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
    """Rough centre (row, column) of the subject, from each pixel's distance to the ground."""
    weight = np.clip(away - 0.15, 0, 1)
    blurred = np.fft.irfft2(np.fft.rfft2(weight) * _disc(), s=(HEIGHT, WIDTH))
    best = blurred.reshape(len(away), -1).argmax(1)
    row, column = (best // WIDTH).astype(float), (best % WIDTH).astype(float)
    for _ in range(2):  # the brightest disc is off for lopsided shapes; move to the centroid
        dy = _nearby(np.arange(HEIGHT) - row[:, None], HEIGHT)
        dx = _nearby(np.arange(WIDTH) - column[:, None], WIDTH)
        near = weight * (dy[:, :, None] ** 2 + dx[:, None, :] ** 2 < (_CROP / 2) ** 2)
        total = np.maximum(near.sum((1, 2)), 1e-6)
        row += (near.sum(2) * dy).sum(1) / total
        column += (near.sum(1) * dx).sum(1) / total
    return row, column


@functools.cache
def _disc() -> np.ndarray:
    """Fourier transform of a disc about the size of a subject, centred on pixel (0, 0)."""
    one = np.zeros(1)
    outline, _ = drawing.coverage(np.zeros(1, int), np.full(1, 13.0), one, one)
    return np.fft.rfft2(outline[0])


def _nearby(offset: np.ndarray, period: int) -> np.ndarray:
    return (offset + period / 2) % period - period / 2


@functools.cache
def _templates() -> np.ndarray:
    """Matched filters [2, shape * radius * y * x, crop * crop], whitened per template.

    The two filters of a template span body and mark once the frame's mean is taken off, so the
    sum of their squared responses is the variance that the best three colours explain.
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
    """Shape, radius, y, x and explained share of the best template of each frame."""
    frames = len(video)
    top, left = np.round(row).astype(int), np.round(column).astype(int)
    span = np.arange(_CROP) - _CROP // 2
    rows = (top[:, None] + span) % HEIGHT
    columns = (left[:, None] + span) % WIDTH
    mean = video.mean((1, 2))
    crop = video[np.arange(frames)[:, None, None], rows[:, :, None], columns[:, None, :]]
    crop = (crop - mean[:, None, None]).reshape(frames, -1, 3).transpose(0, 2, 1)
    first, second = (crop.reshape(frames * 3, -1) @ part.T for part in _templates())
    power = (first**2 + second**2).reshape(frames, 3, -1).sum(1)
    power = power.reshape(frames, len(SHAPES), len(_RADII), len(_OFFSETS), len(_OFFSETS))
    total = np.square(video - mean[:, None, None]).sum((1, 2, 3))
    best = np.unravel_index(power.reshape(frames, -1).argmax(1), power.shape[1:])
    fine = [
        axis[best[k]] + _peak(power, best, k) * (axis[1] - axis[0])
        for k, axis in ((1, _RADII), (2, _OFFSETS), (3, _OFFSETS))
    ]
    explained = power.reshape(frames, -1).max(1) / np.maximum(total, 1e-6)
    return best[0], fine[0], fine[1] + top, fine[2] + left, explained


def _peak(power: np.ndarray, best: tuple[np.ndarray, ...], axis: int) -> np.ndarray:
    """Vertex, in grid steps, of the parabola through the best template and its neighbours."""
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
    frames = len(video)
    total = weight.reshape(frames, 1, -1) @ video.reshape(frames, -1, 3)
    return total[:, 0] / np.maximum(weight.sum((1, 2)), 1)[:, None]


def _nearest(rgb: np.ndarray, table) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest colour of a table, and the Euclidean distance to it."""
    gap = np.linalg.norm(rgb[:, None] - drawing.levels(table), axis=-1)
    return gap.argmin(1), gap.min(1)


def _overlap(video, outline, dot, ground, body) -> np.ndarray:
    """Intersection over union; the mark may look like the ground, so it counts as found."""
    axis = body - ground  # nearer to the body than to the ground: past the middle of this axis
    middle = (axis * (body + ground)).sum(-1) / 2
    along = (video.reshape(len(video), -1, 3) @ axis[:, :, None])[..., 0]
    found = (along > middle[:, None]).reshape(outline.shape) | (dot > 0)
    drawn = outline > 0.5
    union = (found | drawn).sum((1, 2))
    return (found & drawn).sum((1, 2)) / np.maximum(union, 1)


def _edge_energy(video: np.ndarray) -> np.ndarray:
    across = np.square(np.diff(video, axis=2)).sum((1, 2, 3))
    return across + np.square(np.diff(video, axis=1)).sum((1, 2, 3))
