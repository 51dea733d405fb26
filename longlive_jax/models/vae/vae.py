"""The causal 3-D VAE of Wan 2.2, for full clips or chunk by chunk with state held by the caller.

`encode_chunk` and `decode_chunk` take and return `tails`, a pytree with the last input frames of
every layer that looks back in time. Its shapes are fixed, so one compilation serves every chunk
after the first.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.models.vae.config import VAEConfig
from longlive_jax.models.vae.decoder import Decoder
from longlive_jax.models.vae.encoder import Encoder
from longlive_jax.models.vae.layers import Linear
from longlive_jax.typing import Array, Float, UInt8


class VAE(nnx.Module):
    """Parameters of the encoder and the decoder; latents are normalised per channel."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs=rngs)
        self.quant_conv = Linear(2 * cfg.z_dim, 2 * cfg.z_dim, cfg, rngs=rngs)
        self.post_quant_conv = Linear(cfg.z_dim, cfg.z_dim, cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)


def normalize_frames(frames: UInt8[Array, "*b f h w 3"]) -> Float[Array, "*b f h w 3"]:
    """Converts uint8 colours to float32 pixels in [-1, 1], the encoder's input range."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def encode_chunk(vae: VAE, frames: Float[Array, "b f h w 3"], tails=None):
    """Encodes the next raw frames of a clip to normalised latents.

    Args:
      frames: pixels in [-1, 1]. The first chunk (`tails=None`) has 1 + 4n frames, later ones 4n.
      tails: tails returned by the previous call; None at the start of a clip.

    Returns:
      (latents float32 [b, g, h/16, w/16, z], tails); g is n + 1 for the first chunk and n later.

    Raises:
      ValueError: the number of frames, the height or the width does not fit the strides.
    """
    cfg = vae.cfg
    _check_frames(frames.shape, cfg, first=tails is None)
    moments, tails = vae.encoder(frames.astype(cfg.dtype), tails)
    mu = vae.quant_conv(moments)[..., : cfg.z_dim].astype(jnp.float32)
    return (mu - jnp.array(cfg.latent_mean)) / jnp.array(cfg.latent_std), tails


def decode_chunk(vae: VAE, z: Float[Array, "b f h w z"], tails=None):
    """Decodes the next latents of a clip to pixels (float32, not clipped to [-1, 1]).

    n latents give 4n frames, or 1 + 4(n-1) in the first chunk (`tails=None`). Returns the pixels
    and the tails for the next call.
    """
    cfg = vae.cfg
    z = z.astype(jnp.float32) * jnp.array(cfg.latent_std) + jnp.array(cfg.latent_mean)
    frames, tails = vae.decoder(vae.post_quant_conv(z.astype(cfg.dtype)), tails)
    return frames.astype(jnp.float32), tails


def encode(vae: VAE, video: Float[Array, "b f h w 3"], *, chunk_frames: int | None = None):
    """Encodes a full clip of 1 + 4n frames; with `chunk_frames`, that many latents per step.

    Chunked encoding uses working memory that does not grow with the length of the clip.
    """
    if chunk_frames is None:
        return encode_chunk(vae, video)[0]
    size = chunk_frames * vae.cfg.temporal_stride
    return _in_chunks(lambda x, tails: encode_chunk(vae, x, tails), video, 1, size)


def decode(vae: VAE, z: Float[Array, "b f h w z"], *, chunk_frames: int | None = None):
    """Decodes a full clip; with `chunk_frames`, that many latents per step in constant memory."""
    if chunk_frames is None:
        return decode_chunk(vae, z)[0]
    return _in_chunks(lambda x, tails: decode_chunk(vae, x, tails), z, 1, chunk_frames)


def _in_chunks(step, x: Array, num_first: int, size: int) -> Array:
    """Runs `step(frames, tails)` on the first frames, on chunks of `size`, and on the rest."""
    first, tails = step(x[:, :num_first], None)
    body = x[:, num_first:]
    num_chunks = body.shape[1] // size
    outputs = [first]
    if num_chunks:
        stacked = body[:, : num_chunks * size].reshape(x.shape[0], num_chunks, size, *x.shape[2:])
        tails, ys = jax.lax.scan(
            lambda tails, chunk: step(chunk, tails)[::-1], tails, jnp.moveaxis(stacked, 1, 0)
        )
        ys = jnp.moveaxis(ys, 0, 1)
        outputs.append(ys.reshape(x.shape[0], -1, *ys.shape[3:]))
    if body.shape[1] > num_chunks * size:
        outputs.append(step(body[:, num_chunks * size :], tails)[0])
    return jnp.concatenate(outputs, axis=1)


def _check_frames(shape: tuple[int, ...], cfg: VAEConfig, *, first: bool) -> None:
    frames, height, width = shape[1:4]
    stride, space = cfg.temporal_stride, cfg.spatial_stride
    if (frames - first) % stride or frames < 1:
        rule = f"1 + {stride}n" if first else f"{stride}n"
        raise ValueError(f"{frames} frames cannot be encoded here; give {rule} frames")
    if height % space or width % space:
        raise ValueError(
            f"frames of {height}x{width} pixels; both sides must be multiples of {space}"
        )
