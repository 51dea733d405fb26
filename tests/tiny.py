"""Tiny models of a complete pipeline with random weights, and a checkpoint of them."""

import dataclasses
import io
from pathlib import Path

import jax
import sentencepiece
from flax import nnx

from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.umt5 import UMT5, Tokenizer, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.sampling.settings import save_settings


def activate_outputs(params):
    """Changes a new DiT's parameters so that its output depends on every layer and on the prompt.

    After initialisation the output is zero, the gates are nearly closed, and the prompt has little
    effect. Modifies and returns `params`.
    """
    head = params["head"]["linear"]
    noise = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    head["kernel"] = noise * head["kernel"].shape[0] ** -0.5
    params["blocks"]["modulation"] *= 6
    for layer in params["text_embedding"].values():
        layer["kernel"] *= 25
    return params


def tiny_parts():
    """(dit, vae, umt5, tokenizer) with random weights, for 64x32 pixels and 2 latents per chunk."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a cat runs", "a dog sleeps", "The scene transitions."] * 20),
        model_writer=out, model_type="unigram", byte_fallback=True, hard_vocab_limit=False,
        vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(out.getvalue())
    umt5 = UMT5Config(tokenizer.vocab_size, dim=12, dim_attn=12, ffn_dim=16, heads=2, layers=1)
    vae = VAEConfig(
        encoder_dim=4, decoder_dim=4, z_dim=4, res_blocks=1,
        latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
    )  # fmt: skip
    dit = DiTConfig(
        dim=24, ffn_dim=32, freq_dim=8, text_dim=12, text_len=48, heads=2, layers=2,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    rngs = nnx.Rngs(0)
    model = DiT(dit, rngs=rngs)
    model = with_params(model, activate_outputs(params_of(model)))
    return model, VAE(vae, rngs=rngs), UMT5(umt5, rngs=rngs), tokenizer


TINY = {"size": (64, 32), "chunk_frames": 2, "steps": 2}


def write_tiny(folder: Path) -> Path:
    """Writes the models, tokenizer and settings to a new checkpoint directory."""
    dit, vae, umt5, tokenizer = tiny_parts()
    for name, model in {"dit": dit, "vae": vae, "umt5": umt5}.items():
        settings = {
            k: v for k, v in dataclasses.asdict(model.cfg).items() if not k.endswith("dtype")
        }
        save_component(folder, name, params_of(model), settings)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    save_settings(folder, TINY)
    return folder
