"""The VAE and text encoder of a checkpoint, and the check that a store was encoded by them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from longlive_jax.data.clips.encode_spec import Encoders, EncodeSpec
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.checkpoint import TOKENIZER, read_manifest
from longlive_jax.io.completeness import require_components
from longlive_jax.io.models import load_model
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.models.vae import VAE, VAEConfig, encode_chunk, normalize_frames
from longlive_jax.spec import UserError, build
from longlive_jax.typing import Array, Float, UInt8

__all__ = [
    "check_encoded_by",
    "checkpoint_encoders",
    "encode_video",
    "fingerprint",
    "text_encoder",
]


def checkpoint_encoders(folder: str | os.PathLike, spec: EncodeSpec, *, dtype: Any) -> Encoders:
    """The encoders of a checkpoint directory; weights are loaded on first use.

    `dtype` is the compute dtype. Raises UserError if the directory lacks one of them, or if its VAE
    does not match `spec`.
    """
    # 1. Identify the models.
    require_components(folder, "vae", "umt5", TOKENIZER)
    fingerprints = {name: fingerprint(folder, name) for name in ("vae", "umt5")}
    model = Tokenizer(Path(folder) / TOKENIZER).model
    identity = fingerprints | {
        "tokenizer": hashlib.sha256(model).hexdigest()[:16],
        "computed_in": np.dtype(dtype).name,
    }
    # 2. Check the settings against the VAE.
    vae = build(VAEConfig, read_manifest(folder)["components"]["vae"], path=f"{folder}: vae")
    if vae.temporal_stride != spec.join.temporal_stride:
        raise UserError(
            f"{folder}: temporal_stride of the VAE must be {spec.join.temporal_stride}, as in the "
            f"joining rules, got {vae.temporal_stride}"
        )
    multiple = 2 * vae.spatial_stride  # the DiT's patches are 2x2 latents
    if any(side <= 0 or side % multiple for side in spec.size):
        height, width = spec.size
        below = [max(multiple, side // multiple * multiple) for side in spec.size]
        raise UserError(
            f"size must be divisible by {multiple}, got {height}x{width} (height x width); "
            f"nearest below: {below[0]}x{below[1]}"
        )

    # 3. Defer loading.
    def load_vae() -> Callable[[np.ndarray], np.ndarray]:
        model = load_model(folder, "vae", dtype=dtype)
        return lambda frames: encode_video(model, frames, chunk_frames=spec.join.chunk_frames)

    area = spec.size[0] * spec.size[1] // vae.spatial_stride**2
    return Encoders(
        load_text_encoder=lambda: text_encoder(folder, length=spec.text_len, dtype=dtype),
        load_vae=load_vae,
        latent_bytes=4 * area * vae.z_dim,
        identity=identity,
    )


def text_encoder(
    folder: str | os.PathLike, *, length: int, dtype: Any
) -> Callable[[str], Float[np.ndarray, "t e"]]:
    """Returns a function from a prompt to its text features, one row per token.

    Prompts of more than `length` tokens are truncated, with a warning.
    """
    umt5, tokenizer = load_model(folder, "umt5", dtype=dtype), Tokenizer(Path(folder) / TOKENIZER)

    def encode(prompt: str) -> np.ndarray:
        for warning in tokenizer.truncations([prompt], length):
            logging.warning("%s", warning)
        _, mask = tokenizer.encode([prompt], length)
        return np.asarray(encode_prompts(umt5, tokenizer, [prompt], length=length)[0, : mask.sum()])

    return encode


def encode_video(vae: VAE, video: UInt8[np.ndarray, "r h w 3"], *, chunk_frames: int) -> np.ndarray:
    """Encodes a clip of r = 1 + 4 (f - 1) frames to latents float32 [f, h, w, c].

    `chunk_frames` latents are encoded at a time, so neither the working memory nor the number of
    compilations depends on the clip's length.
    """
    temporal_stride = vae.cfg.temporal_stride
    first = 1 + temporal_stride * (chunk_frames - 1)
    z, tails = _encode_first(vae, video[None, :first])
    chunks = [np.asarray(z[0])]
    for at in range(first, len(video), temporal_stride * chunk_frames):
        z, tails = _encode_next(vae, video[None, at : at + temporal_stride * chunk_frames], tails)
        chunks.append(np.asarray(z[0]))
    return np.concatenate(chunks)


@jax.jit
def _encode_first(vae: VAE, frames: UInt8[Array, "1 f h w 3"]):
    return encode_chunk(vae, normalize_frames(frames))


@jax.jit
def _encode_next(vae: VAE, frames: UInt8[Array, "1 f h w 3"], tails):
    return encode_chunk(vae, normalize_frames(frames), tails)


def fingerprint(checkpoint: str | os.PathLike, component: str) -> str:
    """Hash of a component's settings and parameters, 16 hexadecimal digits.

    Raises UserError if the checkpoint does not have the component.
    """
    manifest = read_manifest(checkpoint)
    if component not in manifest["components"]:
        raise UserError(f"{checkpoint}: has no component {component!r}")
    content = [manifest[section][component] for section in ("components", "arrays")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check_encoded_by(clips: EncodedClips, checkpoint: str | os.PathLike) -> None:
    """Raises UserError if a store was encoded by models other than those of a checkpoint."""
    for name in ("vae", "umt5"):
        stored, own = clips.manifest.identity[name], fingerprint(checkpoint, name)
        if stored != own:
            raise UserError(
                f"{clips.folder}: was encoded by another {name} ({stored}) than that of "
                f"{checkpoint} ({own}); encode the dataset with this checkpoint into another folder"
            )
