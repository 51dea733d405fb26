"""The VAE: whole clips, chunk by chunk, and sub-clips of a longer one."""

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


def whole_and_streamed(golden: Golden) -> Sequence[Case]:
    """Encoding and decoding, at once, in a scan over chunks, and with the tails in our hands."""
    model = load("vae", golden.under("w/"), _statistics(golden))
    _check_strides(model.config, golden.meta["config"])
    pixels, latents = golden.frames("pixels", 1), golden.frames("z_in", 1)

    def run(function, x, **options):
        return jax.jit(lambda params: function(model.around(params), x, **options))(model.params)

    def streamed() -> jnp.ndarray:
        pieces = [part for part in (latents[:, :2], latents[:, 2:]) if part.shape[1]]
        return jnp.concatenate(_streamed(model, decode_chunk, pieces), axis=1)

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
    """Settings that were read off the shapes of weights, against what the file says they are."""
    ours = {
        "dim": config.encoder_dim,
        "dec_dim": config.decoder_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.res_blocks,
        "temperal_downsample": list(config.temporal_down),
    }
    theirs = {name: sizes[name] for name in ours}
    if ours != theirs:
        raise ValueError(f"settings read off the weights are {ours}, the file says {theirs}")


def _streamed(model: Model, function, pieces: Sequence[jnp.ndarray]) -> list[jnp.ndarray]:
    """One call a piece, each given the tails that the one before left."""
    step = jax.jit(lambda params, x, tails: function(model.around(params), x, tails))
    out, tails = [], None
    for piece in pieces:
        result, tails = step(model.params, piece, tails)
        out.append(result)
    return out


def halo(golden: Golden) -> Sequence[Case]:
    """The whole clip, and sub-clips that begin some latents earlier than what is wanted of them."""
    model, ratio = _encoder(golden), 2 ** sum(golden.meta["config"]["temperal_downsample"])
    pixels = golden["pixels_uint8"].astype(np.float32) / np.float32(127.5) - 1
    video = jnp.asarray(np.moveaxis(pixels, 1, -1))
    step = jax.jit(lambda params, x, tails: encode_chunk(model.around(params), x, tails))

    def encoded(frames: jnp.ndarray) -> jnp.ndarray:
        """A latent at a time, so that clips of all lengths share their compiled steps."""
        cuts = [0, *range(1, frames.shape[1] + 1, ratio)]
        latents, tails = [], None
        for i in range(len(cuts) - 1):
            z, tails = step(model.params, frames[:, cuts[i] : cuts[i + 1]], tails)
            latents.append(z)
        return jnp.concatenate(latents, axis=1)

    def whole() -> jnp.ndarray:
        return jax.jit(lambda params: encode(model.around(params), video))(model.params)

    def of_window(halo: int) -> jnp.ndarray:
        first, last, dropped = window(golden.meta, halo, ratio)
        return encoded(video[:, first:last])[:, dropped:]

    z = golden.frames("z_full", 1)
    cases = [
        compared("z_full", CLOSE, whole, z),
        compared("z_full_streamed", CLOSE, lambda: encoded(video), z),
    ]
    for case in golden.meta["cases"]:
        halo, want = case["halo"], golden.frames(f"z_sub/halo{case['halo']}", 1)
        place = [case["raw_start"], case["raw_end"], case["dropped"]]
        cut = partial(window, golden.meta, halo, ratio)
        cases += [
            compared(f"halo{halo}/window", EXACT, cut, place, differing),
            compared(f"halo{halo}", CLOSE, partial(of_window, halo), want),
        ]
    return cases


def window(meta: Mapping[str, Any], halo: int, ratio: int) -> tuple[int, int, int]:
    """(first raw frame, end, latents to drop) to get latents [keep_start, keep_end) of a clip."""
    keep = (meta["keep_start"], meta["keep_end"])
    return dataclasses.astuple(halo_window.window(keep, halo=halo, ratio=ratio))


def _encoder(golden: Golden) -> Model:
    """A VAE of which only the encoder is in the file; the decoder is zeros."""
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
        raise ValueError("the VAE has no model")
    absent = {
        key: value
        for key, value in zeros_for(table, expected).items()
        if key.startswith(("decoder.", "conv2."))
    }
    return assemble(VAE, table, {**absent, **golden.under("w/")}, config)
