"""Rasterization of the small world: a shape with a centre marker on a plain background.

Frames are tori: a shape that leaves at one border enters at the opposite one.
"""

from __future__ import annotations

import numpy as np

from longlive_jax.small_world.words import SHAPES
from longlive_jax.typing import Float, Int

HEIGHT, WIDTH = 64, 64
SPEED = 1.5
"""Speed of moving subjects in pixels per frame."""
FPS = 24
RADII = (13.0, 15.5, 18.0)
"""Possible radii of a subject, in pixels."""
MARKER_RADIUS = 0.34
"""Radius of the centre marker in units of the subject's radius."""
RAMP = 3.0
"""Width of the soft edge in pixels: wide enough for a small VAE to reach 32 dB, without blur."""

_BLOCK = 16  # frames drawn together, so that temporaries fit into a core's cache


def colour_levels(table) -> Float[np.ndarray, "n 3"]:
    """The colours of a table (name -> 8-bit RGB) in its order, float32 in [-1, 1]."""
    return np.asarray(list(table.values()), np.float32) / np.float32(127.5) - 1


def distance(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape centred at 0; negative inside.

    Outside of corners it is the distance to the line through the nearest edge, which keeps corners
    sharp.

    Args:
      shape: index into SHAPES.
      x: horizontal coordinates [..., 1, w] in pixels.
      y: vertical coordinates [..., h, 1] in pixels.
      radius: radius in pixels; broadcasts with x and y.
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
    """Coverage of each pixel by the subject and by its marker, float32 in [0, 1].

    Args:
      shape: index into SHAPES per frame.
      radius: radius in pixels per frame.
      x: horizontal centre in pixels per frame; any real number, as frames wrap around.
      y: vertical centre in pixels per frame; any real number.
      ramp: width of the soft edge in pixels.
    """
    n = len(shape)
    outline = np.empty((n, HEIGHT, WIDTH), np.float32)
    marker = np.empty_like(outline)
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
            marker[pick] = _soft(np.sqrt(a * a + b * b) - np.float32(MARKER_RADIUS) * r, ramp)
    return outline, marker


def compose(
    outline: Float[np.ndarray, "n h w"],
    marker: Float[np.ndarray, "n h w"],
    background: Float[np.ndarray, "n 3"],
    colour: Float[np.ndarray, "n 3"],
    marker_colour: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, "n h w 3"]:
    """Blends subject over background and marker over subject; float32 in [-1, 1]."""
    out = np.empty((*outline.shape, 3), np.float32)
    for at in range(0, len(out), _BLOCK):
        part = slice(at, at + _BLOCK)
        cover, top = outline[part], marker[part]
        for channel in range(3):
            ground, body, dot = (
                c[part, channel, None, None] for c in (background, colour, marker_colour)
            )
            plane = ground + (body - ground) * cover
            plane += (dot - plane) * top
            out[part, ..., channel] = plane
    return out


def _wrapped(offset: np.ndarray, period: int) -> np.ndarray:
    """Offsets wrapped into [-period / 2, period / 2): those to the nearest copy on the torus."""
    half = period / 2
    return ((offset + half) % period - half).astype(np.float32)


def _soft(edge: np.ndarray, ramp: float) -> np.ndarray:
    """Coverage in [0, 1] for signed distances to an edge that is `ramp` pixels wide."""
    return np.clip(np.float32(0.5) - edge * np.float32(1 / ramp), 0, 1)
