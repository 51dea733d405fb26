"""Pixels of the small world: one shape with a centre mark on a plain ground, wrapped around."""

from __future__ import annotations

import numpy as np

from longlive_jax.small_world.words import SHAPES
from longlive_jax.typing import Float, Int

HEIGHT, WIDTH = 64, 64
SPEED = 1.5
"""Pixels per frame of everything that moves."""
FPS = 24
RADII = (13.0, 15.5, 18.0)
"""Radii that a subject can have, in pixels."""
MARK_RADIUS = 0.34
"""Radius of the centre mark in units of the subject's radius."""
RAMP = 3.0
"""Width in pixels of the soft edge: what lets a small VAE reach 32 dB without looking blurred."""

_BLOCK = 16  # frames drawn at once: their temporaries stay in a core's cache


def levels(table) -> Float[np.ndarray, "n 3"]:
    """The colours of a table (name -> 8-bit RGB) as float32 in [-1, 1], in its order."""
    return np.asarray(list(table.values()), np.float32) / np.float32(127.5) - 1


def distance(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of SHAPES[shape] centred at 0; negative inside.

    x [..., w], y [..., h, 1] and radius broadcast. Outside corners the distance is that of the
    nearest edge's line, which keeps corners sharp.
    """
    name = SHAPES[shape]
    if name == "circle":
        return np.sqrt(x * x + y * y) - radius
    ax = np.abs(x)
    if name == "triangle":  # equilateral, point up, centroid at 0, inradius 0.575 radius
        slope = np.float32(np.sqrt(3) / 2)
        return np.maximum(slope * ax - np.float32(0.5) * y, y) - np.float32(0.575) * radius
    ay = np.abs(y)
    if name == "square":
        return np.maximum(ax, ay) - np.float32(0.86) * radius
    wide, narrow = radius, np.float32(0.38) * radius
    return np.minimum(np.maximum(ax - wide, ay - narrow), np.maximum(ax - narrow, ay - wide))


def coverage(
    shape: Int[np.ndarray, " n"],
    radius: Float[np.ndarray, " n"],
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    *,
    ramp: float = RAMP,
) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n h w"]]:
    """How much of each pixel the subject covers, and how much its mark; float32 in [0, 1].

    x, y: centres in pixels, any real number; the frame wraps around.
    """
    n = len(shape)
    outline = np.empty((n, HEIGHT, WIDTH), np.float32)
    mark = np.empty_like(outline)
    dx = _wrapped(np.arange(WIDTH) - x[:, None], WIDTH)[:, None, :]
    dy = _wrapped(np.arange(HEIGHT) - y[:, None], HEIGHT)[:, :, None]
    radius = np.asarray(radius, np.float32)[:, None, None]
    for kind in range(len(SHAPES)):
        rows = np.flatnonzero(shape == kind)
        for at in range(0, len(rows), _BLOCK):
            pick = rows[at : at + _BLOCK]
            a, b, r = dx[pick], dy[pick], radius[pick]
            edge = distance(kind, a, b, r)
            outline[pick] = _soft(edge, ramp)
            mark[pick] = _soft(np.sqrt(a * a + b * b) - np.float32(MARK_RADIUS) * r, ramp)
    return outline, mark


def compose(
    outline: Float[np.ndarray, "n h w"],
    mark: Float[np.ndarray, "n h w"],
    background: Float[np.ndarray, "n 3"],
    colour: Float[np.ndarray, "n 3"],
    mark_colour: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, "n h w 3"]:
    """Lay subject over ground and mark over subject; float32 in [-1, 1]."""
    out = np.empty((*outline.shape, 3), np.float32)
    for at in range(0, len(out), _BLOCK):
        part = slice(at, at + _BLOCK)
        cover, top = outline[part], mark[part]
        for channel in range(3):
            ground, body, dot = (
                c[part, channel, None, None] for c in (background, colour, mark_colour)
            )
            plane = ground + (body - ground) * cover
            plane += (dot - plane) * top
            out[part, ..., channel] = plane
    return out


def _wrapped(offset: np.ndarray, period: int) -> np.ndarray:
    """Offsets folded into [-period / 2, period / 2): the nearest copy on the torus."""
    half = period / 2
    return ((offset + half) % period - half).astype(np.float32)


def _soft(edge: np.ndarray, ramp: float) -> np.ndarray:
    return np.clip(np.float32(0.5) - edge * np.float32(1 / ramp), 0, 1)
