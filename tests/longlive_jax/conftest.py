"""A small-world checkpoint with tiny models and random weights."""

import pytest
from flax import nnx

from longlive_jax.io.checkpoint import TOKENIZER, save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.sampling.settings import save_settings
from longlive_jax.small_world.tokenizer import world_tokenizer


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Checkpoint directory; chunks of 4 latent frames at 64x64 pixels, 2 sampling steps."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tokenizer = world_tokenizer()
    vae = VAEConfig(
        encoder_dim=4,
        decoder_dim=4,
        z_dim=4,
        dim_mult=(1, 1, 1, 1),
        res_blocks=1,
        decoder_res_blocks=1,
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    )
    umt5 = UMT5Config(
        vocab_size=tokenizer.vocab_size, dim=8, dim_attn=8, ffn_dim=16, heads=2, layers=1
    )
    dit = DiTConfig(
        dim=24, ffn_dim=32, freq_dim=8, text_dim=8, text_len=16, heads=2, layers=2,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    for name, make, cfg in (("vae", VAE, vae), ("umt5", UMT5, umt5), ("dit", DiT, dit)):
        save_component(folder, name, params_of(make(cfg, rngs=nnx.Rngs(0))), cfg)
    (folder / TOKENIZER).write_bytes(tokenizer.model)
    save_settings(folder, {"size": (64, 64), "chunk_frames": 4, "steps": 2})
    return folder
