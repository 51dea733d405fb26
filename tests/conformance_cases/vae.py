"""The VAE on full clips, chunk by chunk, and on windows of a longer clip."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import VAE, Golden, Model, assemble, load, zeros_for
from conformance_cases.rows import CLOSE, EXACT, Case, compared, differing
from longlive_jax.interop import keys_vae
from longlive_jax.interop.components import expected_shapes
from longlive_jax.models.vae import VAEConfig, decode, decode_chunk, encode, encode_chunk
from longlive_jax.parallel import halo as halo_window


def full_and_streamed(golden: Golden) -> Sequence[Case]:
    """Encoding and decoding in one call, in a scan over chunks, and with explicit tails."""
    model = load("vae", golden.under("w/"), _statistics(golden))
    _check_strides(model.config, golden.meta["config"])
    pixels, latents = golden.frames("pixels", 1), golden.frames("z_in", 1)

    def run(function, x, **options):
        return jax.jit(lambda params: function(model.around(params), x, **options))(model.params)

    def streamed() -> jnp.ndarray:
        chunks = [chunk for chunk in (latents[:, :2], latents[:, 2:]) if chunk.shape[1]]
        return jnp.concatenate(_streamed(model, decode_chunk, chunks), axis=1)

    z, out = golden.frames("z", 1), golden.frames("pixels_out", 1)
    stream = [golden.frames(key, 1) for key in ("y_stream_0", "y_stream_1") if key in golden]
    return [
        compared("encode", CLOSE, lambda: run(encode, pixels), z),
        compared("encode_chunked", CLOSE, lambda: run(encode, pixels, chunk_frames=1), z),
        compared("decode", CLOSE, lambda: run(decode, latents), out),
        compared("decode_chunked", CLOSE, lambda: run(decode, latents, chunk_frames=1), out),
        compared("decode_streamed", CLOSE, streamed, np.concatenate(stream or [out], axis=1)),
    ]


def _statistics(golden: Golden) -> dict[str, Any]:
    mean, std = (tuple(map(float, golden[f"latent_{name}"])) for name in ("mean", "std"))
    return {"latents_mean": mean, "latents_std": std, "z_dim": golden.meta["config"]["z_dim"]}


def _check_strides(config: VAEConfig, sizes: Mapping[str, Any]) -> None:
    """Raises ValueError if the settings inferred from the weights differ from the file's."""
    ours = {
        "dim": config.encoder_dim,
        "dec_dim": config.decoder_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.res_blocks,
        "temperal_downsample": list(config.temporal_down),
    }
    theirs = {name: sizes[name] for name in ours}
    if ours != theirs:
        raise ValueError(f"settings inferred from the weights are {ours}, the file has {theirs}")


def _streamed(model: Model, function, chunks: Sequence[jnp.ndarray]) -> list[jnp.ndarray]:
    """One call per chunk, each with the tails of the previous call."""
    step = jax.jit(lambda params, x, tails: function(model.around(params), x, tails))
    out, tails = [], None
    for chunk in chunks:
        result, tails = step(model.params, chunk, tails)
        out.append(result)
    return out


def halo(golden: Golden) -> Sequence[Case]:
    """The full clip, and windows with halos of several lengths before the latents to keep."""
    # 1. The encoder, and the clip.
    model, stride = _encoder(golden), 2 ** sum(golden.meta["config"]["temperal_downsample"])
    pixels = golden["pixels_uint8"].astype(np.float32) / np.float32(127.5) - 1
    video = jnp.asarray(np.moveaxis(pixels, 1, -1))
    step = jax.jit(lambda params, x, tails: encode_chunk(model.around(params), x, tails))

    def encoded(frames: jnp.ndarray) -> jnp.ndarray:
        """Encodes one latent at a time, so that clips of all lengths use the same programs."""
        cuts = [0, *range(1, frames.shape[1] + 1, stride)]
        latents, tails = [], None
        for i in range(len(cuts) - 1):
            z, tails = step(model.params, frames[:, cuts[i] : cuts[i + 1]], tails)
            latents.append(z)
        return jnp.concatenate(latents, axis=1)

    def full_clip() -> jnp.ndarray:
        return jax.jit(lambda params: encode(model.around(params), video))(model.params)

    def windowed(halo: int) -> jnp.ndarray:
        first, last, dropped = window(golden.meta, halo, stride)
        return encoded(video[:, first:last])[:, dropped:]

    # 2. The cases.
    z = golden.frames("z_full", 1)
    cases = [
        compared("z_full", CLOSE, full_clip, z),
        compared("z_full_streamed", CLOSE, lambda: encoded(video), z),
    ]
    for case in golden.meta["cases"]:
        halo, want = case["halo"], golden.frames(f"z_sub/halo{case['halo']}", 1)
        bounds = [case["raw_start"], case["raw_end"], case["dropped"]]
        own = partial(window, golden.meta, halo, stride)
        cases += [
            compared(f"halo{halo}/window", EXACT, own, bounds, differing),
            compared(f"halo{halo}", CLOSE, partial(windowed, halo), want),
        ]
    return cases


def window(meta: Mapping[str, Any], halo: int, temporal_stride: int) -> tuple[int, int, int]:
    """(first raw frame, end, latents to drop) for latents [keep_start, keep_end) of a clip."""
    keep = (meta["keep_start"], meta["keep_end"])
    own = halo_window.window(keep, halo=halo, temporal_stride=temporal_stride)
    return dataclasses.astuple(own)


def _encoder(golden: Golden) -> Model:
    """A VAE with the encoder of the file, and zeros for the decoder."""
    sizes, statistics = golden.meta["config"], _statistics(golden)
    config = VAEConfig(
        encoder_dim=sizes["dim"],
        decoder_dim=sizes["dec_dim"],
        z_dim=sizes["z_dim"],
        dim_mult=tuple(sizes["dim_mult"]),
        res_blocks=sizes["num_res_blocks"],
        temporal_down=tuple(sizes["temperal_downsample"]),
        latent_mean=statistics["latents_mean"],
        latent_std=statistics["latents_std"],
    )
    table = keys_vae.original(config.res_blocks, config.decoder_blocks)
    expected = expected_shapes(VAE, config)
    if expected is None:
        raise ValueError("the VAE component has no model")
    decoder = {
        key: value
        for key, value in zeros_for(table, expected).items()
        if key.startswith(("decoder.", "conv2."))
    }
    return assemble(VAE, table, {**decoder, **golden.under("w/")}, config)
