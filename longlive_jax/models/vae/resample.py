"""Resampling: patchify, the two parameter-free shortcuts, and learned down- and upsampling."""

import einops
import jax.numpy as jnp
from flax import nnx

from longlive_jax.models.vae.config import VAEConfig
from longlive_jax.models.vae.layers import Conv2d, Tail, prepend_tail
from longlive_jax.typing import Array, Float


def patchify(x: Float[Array, "b f h w c"]) -> Float[Array, "b f h2 w2 4c"]:
    """Moves 2x2 pixels to channels; the column offset is the slower axis, as in Wan 2.2."""
    return einops.rearrange(x, "b f (h y) (w x) c -> b f h w (c x y)", y=2, x=2)


def unpatchify(x: Float[Array, "b f h w 4c"]) -> Float[Array, "b f h2 w2 c"]:
    """The inverse of `patchify`."""
    return einops.rearrange(x, "b f h w (c x y) -> b f (h y) (w x) c", y=2, x=2)


def average_down(x: Float[Array, "b f h w c"], outputs: int, *, time: int, space: int) -> Array:
    """Shortcut of a down stage: space and time to channels, then means of adjacent channels.

    If the number of frames is not a multiple of `time` (the first frame of a clip), zero frames are
    prepended.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = einops.rearrange(x, "b (f t) (h y) (w x) c -> b f h w (c t y x)", t=time, y=space, x=space)
    return jnp.mean(x.reshape(*x.shape[:-1], outputs, -1), axis=-1)


def duplicate_up(
    x: Float[Array, "b f h w c"], outputs: int, *, time: int, space: int, first: bool
) -> Array:
    """Shortcut of an up stage: channels are repeated, then moved to space and time.

    At the start of a clip (`first`) the leading `time - 1` frames are dropped, because its first
    latent is a single frame.
    """
    factor = time * space * space
    x = jnp.repeat(x, outputs * factor // x.shape[-1], axis=-1)
    x = einops.rearrange(x, "b f h w (c t y x) -> b (f t) (h y) (w x) c", t=time, y=space, x=space)
    return x[:, time - 1 :] if first else x


class TimeConv(nnx.Module):
    """Temporal convolution over three frames, as one matmul over their stacked channels."""

    def __init__(self, inputs: int, outputs: int, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        noise = (
            rngs.params.normal((3, inputs, outputs), cfg.param_dtype) * 0.1 / (3 * inputs) ** 0.5
        )
        copies = jnp.tile(jnp.eye(inputs, dtype=cfg.param_dtype), (1, outputs // inputs))
        self.kernel = nnx.Param(noise.at[2].add(copies))  # initialised to repeat the current frame
        self.bias = nnx.Param(jnp.zeros(outputs, cfg.param_dtype))

    def __call__(self, x: Float[Array, "b f h w i"], *, stride: int) -> Float[Array, "b g h w o"]:
        last = x.shape[1] - 2
        taps = jnp.concatenate([x[:, i : i + last : stride] for i in range(3)], axis=-1)
        kernel = self.kernel[...].astype(self.dtype).reshape(taps.shape[-1], -1)
        return taps @ kernel + self.bias[...].astype(self.dtype)


class Downsample(nnx.Module):
    """Halves height and width, and time if `temporal`; a clip's first frame is kept separate."""

    def __init__(self, width: int, cfg: VAEConfig, *, temporal: bool, rngs: nnx.Rngs):
        self.conv = Conv2d(width, cfg, stride=2, rngs=rngs)
        self.time_conv = TimeConv(width, width, cfg, rngs=rngs) if temporal else None

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        x = self.conv(x)
        if self.time_conv is None:
            return x, None
        padded = x if tail is None else prepend_tail(tail, x)
        if tail is None and x.shape[1] == 1:
            return x, x
        y = self.time_conv(padded, stride=2)
        return (jnp.concatenate([x[:, :1], y], axis=1) if tail is None else y), padded[:, -1:]


class Upsample(nnx.Module):
    """Doubles height and width, and time if `temporal`; a clip's first latent stays one frame.

    The temporal convolution of the second latent does not use that first frame as context either
    (as in Wan 2.2).
    """

    def __init__(self, width: int, cfg: VAEConfig, *, temporal: bool, rngs: nnx.Rngs):
        self.conv = Conv2d(width, cfg, rngs=rngs)
        self.time_conv = TimeConv(width, 2 * width, cfg, rngs=rngs) if temporal else None

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        if self.time_conv is not None:
            x, tail = _double_time(self.time_conv, x, tail)
        x = einops.repeat(x, "b f h w c -> b f (h y) (w x) c", y=2, x=2)
        return self.conv(x), tail


def _double_time(conv: TimeConv, x: Array, tail: Tail) -> tuple[Array, Array]:
    first, rest = (x[:, :0], x) if tail is not None else (x[:, :1], x[:, 1:])
    """Twice as many frames, but for the first latent of a clip; and the next tail."""
    context = jnp.zeros_like(jnp.repeat(x[:, :1], 2, axis=1)) if tail is None else tail
    padded = prepend_tail(context, rest)
    if rest.shape[1]:
        y = conv(padded, stride=1)
        rest = einops.rearrange(y, "b f h w (two c) -> b (f two) h w c", two=2)
    return jnp.concatenate([first, rest], axis=1), padded[:, -2:]
