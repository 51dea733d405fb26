"""The VAE as a stream uses it: latents to frames chunk by chunk, with its state as data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh

from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.vae import VAE, decode_chunk, encode, encode_chunk
from longlive_jax.sampling.sharding import REPLICATED, VIDEOS, over_videos
from longlive_jax.typing import Array, Bool, Float, Params, Shaped


@struct.dataclass
class DecoderState:
    """What the decoder carries from one chunk of a video to the next.

    Attributes:
      tails: last inputs of every causal layer; None before the first chunk. The first chunk decodes
        to fewer frames, so it has a compiled function of its own, which the None selects.
    """

    tails: Any = None


class StreamingVAE:
    """The jitted VAE: pixels to latents, latents to bytes; optionally on a device of its own."""

    def __init__(self, vae: VAE, device: jax.Device | None = None, mesh: Mesh | None = None):
        """Copies the parameters to `device`; None leaves them where they are.

        `mesh` shards the videos that are decoded over its devices.
        """
        self._mesh = mesh
        self.cfg = vae.cfg
        self._device = device
        self._params = self._device_put(params_of(vae))
        self._graphdef = nnx.graphdef(vae)
        self._jitted_decode = jax.jit(
            self._decode_frames, donate_argnums=1, static_argnames="as_float"
        )
        self._jitted_encode_chunk = jax.jit(self._encode_frames, donate_argnums=1)
        self._jitted_encode = jax.jit(self._encode_pixels, static_argnames="chunk_frames")

    def encode(
        self, pixels: Float[np.ndarray, "b f h w 3"], *, chunk_frames: int | None = None
    ) -> Float[Array, "b g h w z"]:
        """Latents of a clip of 1 + 4n frames, on the VAE's device.

        With `chunk_frames`, that many latent frames are encoded per step, in constant memory.
        """
        pixels = self._device_put(pixels)
        return self._jitted_encode(self._params, pixels, chunk_frames=chunk_frames)

    def encode_chunk(
        self, tails: Any, pixels: Float[np.ndarray, "b f h w 3"]
    ) -> tuple[Float[Array, "b g h w z"], Any]:
        """Latents of the next frames of a clip on the VAE's device, and the encoder's tails.

        `tails` is None for the first 1 + 4n frames of a clip, later ones are 4n, and is donated.
        Compiles once for each number of frames.
        """
        return self._jitted_encode_chunk(self._params, tails, self._device_put(pixels))

    def decode(
        self, state: DecoderState, latents: Float[Array, "b f h w z"], *, as_float: bool = False
    ) -> tuple[Shaped[Array, "b f h w 3"], Bool[Array, ""], DecoderState]:
        """Frames of the next chunk, whether they are finite, and the state after it.

        Frames are uint8, or float32 in [-1, 1]. Nothing is waited for. `state` is donated and must
        not be used again; a video begins with `DecoderState()`. n latents give 4n frames, or
        1 + 4 (n - 1) in the first chunk.
        """
        return self._jitted_decode(
            self._params, state, self._device_put(latents), as_float=as_float
        )

    def _device_put[T](self, x: T) -> T:
        return x if self._device is None else jax.device_put(x, self._device)

    def _decode_frames(
        self, params: Params, state: DecoderState, latents: Array, as_float: bool
    ) -> tuple[Array, Array, DecoderState]:
        def decode(params: Params, tails: Any, latents: Array):
            frames, tails = decode_chunk(with_params(self._graphdef, params), latents, tails)
            # Clipping hides values that are not finite, so they are tested before.
            is_finite = jnp.isfinite(latents).all() & jnp.isfinite(frames).all()
            frames = jnp.clip(frames, -1, 1)
            if not as_float:
                frames = jnp.rint((frames + 1) * 127.5).astype(jnp.uint8)
            return frames, is_finite[None], tails

        arguments, specs = (params, state.tails, latents), (REPLICATED, VIDEOS, VIDEOS)
        frames, is_finite, tails = over_videos(self._mesh, decode, arguments, specs, VIDEOS)
        return frames, is_finite.all(), DecoderState(tails)

    def _encode_frames(self, params: Params, tails: Any, pixels: Array) -> tuple[Array, Any]:
        return encode_chunk(with_params(self._graphdef, params), pixels, tails)

    def _encode_pixels(self, params: Params, pixels: Array, chunk_frames: int | None) -> Array:
        vae = with_params(self._graphdef, params)
        if chunk_frames is None:
            return encode_chunk(vae, pixels)[0]
        return encode(vae, pixels, chunk_frames=chunk_frames)
