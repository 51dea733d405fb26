"""The built-in small world on two CPU cores: VAE, text encoder, then the autoregressive DiT.

    longlive train --config=configs/small_world.py:vae --workdir=runs/vae --out=runs/small_world
"""

from ml_collections import ConfigDict

ARGUMENTS = ("vae", "text", "ar")


def get_config(arg: str = "vae") -> ConfigDict:
    """One stage of the recipe."""
    return ConfigDict({"vae": _vae, "text": _text, "ar": _ar}[arg or "vae"]())


def _vae() -> dict:
    phases = [dict(steps=1500, batch=48, frames=1), dict(steps=2000, batch=4, frames=17)]
    return dict(
        stage="vae",
        model=dict(
            encoder_dim=12,
            decoder_dim=16,
            z_dim=16,
            res_blocks=1,
            decoder_res_blocks=1,
            decoder_mult=(1, 2, 4, 8),
            latent_mean=(0.0,) * 16,
            latent_std=(1.0,) * 16,
        ),
        phases=phases,
        loop=dict(steps=sum(p["steps"] for p in phases), log_every=20, eval_every=200, save_every=400),
        optim=dict(name="muon", lr=0.02, adam_lr=2e-3, b1=0.9, b2=0.98, weight_decay=0.0, warmup=50, decay=0.6, clip=1.0),
        ema=dict(decay=0.995, start=200),
    )


def _text() -> dict:
    return dict(
        stage="text",
        model=dict(vocab_size=64, dim=64, dim_attn=64, ffn_dim=128, heads=4, layers=2),
        batch=128,
        loop=dict(steps=1500, log_every=50, eval_every=500, save_every=500),
        optim=dict(lr=2e-3, b1=0.9, b2=0.99, weight_decay=0.0, warmup=50, decay=0.5, clip=1.0),
        ema=dict(decay=0.99, start=100),
    )


def _ar() -> dict:
    return dict(
        stage="ar",
        model=dict(
            dim=192,
            ffn_dim=768,
            freq_dim=64,
            text_dim=64,
            text_len=16,
            heads=6,
            layers=6,
            in_channels=16,
            out_channels=16,
            dtype="bfloat16",
        ),
        corpus=dict(videos=800, chunks=24, shot_chunks=(3, 12)),
        episodes=dict(batch=32, targets=7, window=4, global_sinks=1, phase=8, far=320),
        loss=dict(shift=5.0, context_noise=0.1, text_dropout=0.1),
        loop=dict(steps=3000, log_every=20, eval_every=200, save_every=200),
        optim=dict(name="muon", lr=0.02, adam_lr=2e-3, b1=0.9, b2=0.98, weight_decay=0.0, warmup=50, decay=0.6, clip=1.0),
        ema=dict(decay=0.998, start=200),
    )
