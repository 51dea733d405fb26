"""Writes a checkpoint with a VAE and a text encoder of random weights, and nothing else."""

import jax
import numpy as np
from flax import nnx

from longlive_jax.io.checkpoint import TOKENIZER, save_component
from longlive_jax.models.params import abstract
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.sampling.settings import save_settings
from longlive_jax.small_world.tokenizer import world_tokenizer

TEXT_DIM, Z_DIM = 8, 4


def write_encoders(folder):
    """Writes encoders for 64x32 pixels and chunks of two latents."""
    tokenizer = world_tokenizer()
    vae = VAEConfig(
        encoder_dim=4, decoder_dim=4, z_dim=Z_DIM, dim_mult=(1, 1, 1, 1), res_blocks=1,
        decoder_res_blocks=1, latent_mean=(0.0,) * Z_DIM, latent_std=(1.0,) * Z_DIM,
    )  # fmt: skip
    umt5 = UMT5Config(
        tokenizer.vocab_size, dim=TEXT_DIM, dim_attn=TEXT_DIM, ffn_dim=16, heads=2, layers=1
    )
    for name, make, cfg in (("vae", VAE, vae), ("umt5", UMT5, umt5)):
        save_component(
            folder, name, random_params(lambda make=make, cfg=cfg: make(cfg, rngs=nnx.Rngs(0))), cfg
        )
    (folder / TOKENIZER).write_bytes(tokenizer.model)
    save_settings(folder, {"size": (64, 32), "chunk_frames": 2, "steps": 2})
    return folder


def random_params(make):
    """Random parameters of a module, without compiling the module's own initialisers."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        inputs = np.prod(leaf.shape[:-1], initial=1)
        return (rng.standard_normal(leaf.shape) * inputs**-0.5).astype(np.float32)

    return jax.tree.map(draw, abstract(make)[1])
