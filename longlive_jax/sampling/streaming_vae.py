"""Decoding latents chunk by chunk while the next chunk is being denoised.

JAX dispatches work without waiting for it, so overlap needs no threads: the decode of chunk i and
the denoising of chunk i + 1 are queued, and the host waits only for frames it hands out. At most
`ahead` chunks are under way beyond that one, which bounds memory for a video of any length.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.vae import VAE, decode_chunk, encode, encode_chunk
from longlive_jax.typing import Array, Bool, Float, Params, UInt8

type Decode = Callable[[Array], tuple[Array, Array]]


class Codec:
    """The jitted VAE: pixels to latents, latents to bytes; perhaps on a device of its own."""

    def __init__(self, vae: VAE, device: jax.Device | None = None):
        self.cfg = vae.cfg
        self._device = device
        self._params = params_of(vae) if device is None else jax.device_put(params_of(vae), device)
        self._graphdef = nnx.graphdef(vae)
        self._decode = jax.jit(self._bytes, donate_argnums=2)
        self._encode = jax.jit(self._latents, static_argnames="chunk_frames")

    def encode(
        self, pixels: Float[np.ndarray, "b f h w 3"], *, chunk_frames: int | None = None
    ) -> Float[Array, "b g h w z"]:
        """Latents of a clip of 1 + 4n frames, `chunk` latents at a time; on the default device."""
        latents = self._encode(self._params, self._here(pixels), chunk_frames=chunk_frames)
        return latents if self._device is None else jax.device_put(latents, jax.devices()[0])

    def decoder(self) -> Decode:
        """A decoder of one video: give it the latents in order, chunk by chunk.

        It returns uint8 frames and whether all latents were finite, both perhaps still under way.
        """
        tails: Any = None

        def decode(latents: Array) -> tuple[Array, Array]:
            nonlocal tails
            frames, finite, tails = self._decode(self._params, self._here(latents), tails)
            return frames, finite

        return decode

    def _here(self, x: Any) -> Any:
        return x if self._device is None else jax.device_put(x, self._device)

    def _bytes(
        self, params: Params, latents: Array, tails: Any
    ) -> tuple[UInt8[Array, "b f h w 3"], Bool[Array, ""], Any]:
        frames, tails = decode_chunk(with_params(self._graphdef, params), latents, tails)
        frames = jnp.rint((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8)
        return frames, jnp.isfinite(latents).all(), tails

    def _latents(self, params: Params, pixels: Array, chunk_frames: int | None) -> Array:
        vae = with_params(self._graphdef, params)
        return (
            encode_chunk(vae, pixels)[0]
            if chunk_frames is None
            else encode(vae, pixels, chunk_frames=chunk_frames)
        )


def overlapped(
    latents: Iterable[Float[Array, "b f h w z"]], decode: Decode, *, ahead: int = 1
) -> Iterator[tuple[UInt8[np.ndarray, "b f h w 3"], Float[Array, "b f h w z"]]]:
    """Yields each chunk's frames on the host, and its latents; `ahead` more chunks are under way.

    Raises FloatingPointError for latents that are not finite: such a video has no pixels.
    """
    waiting: deque[tuple[Array, Array, Array]] = deque()
    try:
        for chunk in latents:
            frames, finite = decode(chunk)
            frames.copy_to_host_async()
            waiting.append((frames, finite, chunk))
            if len(waiting) > ahead:
                yield _fetch(*waiting.popleft())
        while waiting:
            yield _fetch(*waiting.popleft())
    finally:
        # Who leaves early may end the process, which must not find its threads at work.
        jax.block_until_ready(list(waiting))


def _fetch(frames: Array, finite: Array, latents: Array) -> tuple[np.ndarray, Array]:
    host = np.asarray(frames)
    if not bool(finite):
        raise FloatingPointError(
            "the sampler has diverged: latents are not finite; try dtype float32, or less guidance"
        )
    return host, latents
