"""The VAE and the text encoder of a checkpoint, and whether a store was made by them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from longlive_jax.data.clips.encoding import Encoders, EncodeSpec
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.checkpoint import TOKENIZER, read_manifest
from longlive_jax.io.models import load_model
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.models.vae import VAE, VAEConfig, encode_chunk, normalize_frames
from longlive_jax.spec import UserError, build
from longlive_jax.typing import Array, Float, UInt8

__all__ = [
    "check_made_by",
    "checkpoint_encoders",
    "encode_video",
    "fingerprint",
    "text_encoder",
]


def checkpoint_encoders(folder: str | os.PathLike, spec: EncodeSpec, *, dtype: Any) -> Encoders:
    """The encoders of a checkpoint directory; nothing is loaded before it is needed.

    `dtype` is what they compute in. Raises UserError if the directory lacks one of them, or its VAE
    does not fit `spec`.
    """
    prints = {name: fingerprint(folder, name) for name in ("vae", "umt5")}
    model = Tokenizer(Path(folder) / TOKENIZER).model
    identity = prints | {
        "tokenizer": hashlib.sha256(model).hexdigest()[:16],
        "computed_in": np.dtype(dtype).name,
    }
    vae = build(VAEConfig, read_manifest(folder)["components"]["vae"], path=f"{folder}: vae")
    if vae.temporal_stride != spec.join.temporal_stride:
        raise UserError(
            f"the VAE makes {vae.temporal_stride} frames one latent, the clips are planned for "
            f"{spec.join.temporal_stride}"
        )
    edge = 2 * vae.spatial_stride  # the DiT takes 2x2 latents for a token
    if any(side <= 0 or side % edge for side in spec.size):
        height, width = spec.size
        raise UserError(
            f"size {height}x{width} (height x width) is not divisible by {edge}; nearest below: "
            f"{max(edge, height // edge * edge)}x{max(edge, width // edge * edge)}"
        )

    def video() -> Callable[[np.ndarray], np.ndarray]:
        model = load_model(folder, "vae", dtype=dtype)
        return lambda frames: encode_video(model, frames, chunk_frames=spec.join.chunk_frames)

    area = spec.size[0] * spec.size[1] // vae.spatial_stride**2
    return Encoders(
        text=lambda: text_encoder(folder, length=spec.text_len, dtype=dtype),
        video=video,
        latent_bytes=4 * area * vae.z_dim,
        identity=identity,
    )


def text_encoder(
    folder: str | os.PathLike, *, length: int, dtype: Any
) -> Callable[[str], Float[np.ndarray, "t e"]]:
    """A function from a prompt to the features of its tokens, `length` rows at most.

    It warns of a prompt that is too long.
    """
    umt5, tokenizer = load_model(folder, "umt5", dtype=dtype), Tokenizer(Path(folder) / TOKENIZER)

    def encode(prompt: str) -> np.ndarray:
        for cut_off in tokenizer.truncations([prompt], length):
            logging.warning("%s", cut_off)
        _, mask = tokenizer.encode([prompt], length)
        return np.asarray(encode_prompts(umt5, tokenizer, [prompt], length=length)[0, : mask.sum()])

    return encode


def encode_video(vae: VAE, video: UInt8[np.ndarray, "r h w 3"], *, chunk_frames: int) -> np.ndarray:
    """Latents float32 [f, h, w, c] of a clip of 1 + 4 (f - 1) frames, `chunk_frames` latents at a
    time.

    Working memory is constant in the clip's length, and so is the number of compilations.
    """
    temporal_stride = vae.cfg.temporal_stride
    first = 1 + temporal_stride * (chunk_frames - 1)
    z, tails = _begin(vae, video[None, :first])
    found = [np.asarray(z[0])]
    for at in range(first, len(video), temporal_stride * chunk_frames):
        z, tails = _go_on(vae, video[None, at : at + temporal_stride * chunk_frames], tails)
        found.append(np.asarray(z[0]))
    return np.concatenate(found)


@jax.jit
def _begin(vae: VAE, frames: UInt8[Array, "1 f h w 3"]):
    return encode_chunk(vae, normalize_frames(frames))


@jax.jit
def _go_on(vae: VAE, frames: UInt8[Array, "1 f h w 3"], tails):
    return encode_chunk(vae, normalize_frames(frames), tails)


def fingerprint(checkpoint: str | os.PathLike, component: str) -> str:
    """Of a component's settings and parameters; equal only if both are. UserError if absent."""
    manifest = read_manifest(checkpoint)
    if component not in manifest["components"]:
        raise UserError(f"{checkpoint}: has no component {component!r}")
    held = [manifest[part][component] for part in ("components", "arrays")]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def check_made_by(clips: EncodedClips, checkpoint: str | os.PathLike) -> None:
    """UserError if the VAE or the text encoder of a checkpoint are not those that made a store."""
    for name in ("vae", "umt5"):
        theirs, ours = clips.manifest.identity[name], fingerprint(checkpoint, name)
        if theirs != ours:
            raise UserError(
                f"{clips.folder}: was encoded by another {name} ({theirs}) than that of "
                f"{checkpoint} ({ours}); encode the dataset with this checkpoint, into "
                "another folder"
            )
