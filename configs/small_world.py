"""The built-in small world on two CPU cores: VAE, text encoder, then the autoregressive DiT.

One stage of the recipe after the other, into the same checkpoint:

    longlive train --config=configs/small_world.py:vae --workdir=runs/vae --out=runs/small_world
    longlive train --config=configs/small_world.py:text --workdir=runs/text --out=runs/small_world
    longlive train --config=configs/small_world.py:recycled \\
        --workdir=runs/recycled --out=runs/small_world
    longlive evaluate --config=configs/small_world.py:evaluate --checkpoint=runs/small_world

or all of it by launch/small_world.sh. `ar` is `recycled` without error recycling. With
`--config.quant.policy=nvfp4_train` the linears of the blocks are trained in NVFP4, forward and
backward (paper, section 2.2).

Cost on two EPYC cores without AMX, jax 0.11.2: all by the one command, beside other work, 172
minutes with installation and evaluation, of which vae 31, text 1, recycled 125 (2026-11-26); with
less beside it vae 25 (2026-11-25) and recycled 109, of which 8.5 are encoding: two and a half
hours, added up.

Result of that run: every bar. VAE 32.4 dB; 93 % of 212 held-out shots are all right at 32 steps
(shape 94, colour 99, background 100, motion 99, cuts 100), 78 % at 4; minute-long videos last/first
quarter 1.03. The same recycled on the shipped VAE and text encoder: 91 % (shape 91.5), 78 %, 0.97.
A run of 12000 updates had shape 88, for which 90 is asked, and 87 % all right.

The shipped DiT was trained longer and without recycling, in two runs of `ar`: 12000 updates, then
8000 more with

    --config.start=checkpoint --config.loop.steps=8000 --config.loop.seed=1 --config.optim.lr=0.01

on the corpus of the first. The first was not quite what this file makes: its first 3000 updates saw
3000 videos of a harder world, with subjects of any size at any place, at a constant rate; then the
generator got its grid and three sizes, and the corpus was made anew; at step 6500 the end was moved
from 11000 to 12000; and its noise levels had shift 3. Shift 5 spends more of the work on levels
above 0.8, where a shot's subject is decided: given true videos noised to 0.8, the model of the
first run made no mistake of shape (25 first chunks of shots). See the README's table.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("sample", "nvfp4", "evaluate", "formats", "vae", "text", "ar", "recycled")


def get_config(arg: str = "sample") -> ConfigDict:
    """Sampling from the built-in checkpoint (`nvfp4`: packed as it is loaded, and so is its cache),
    or one stage of the recipe (`recycled`: `ar` with error recycling), or what is measured
    (`formats`: after launch/formats.sh has trained what it compares)."""
    parts = {"sample": _sample, "nvfp4": _nvfp4, "evaluate": _evaluate, "formats": _formats}
    dit = {"ar": _ar, "recycled": _recycled}
    stages = {"vae": _vae, "text": _text} | dit
    return ConfigDict((parts | stages)[arg or "sample"]())


def _sample() -> dict:
    return dict(checkpoint="longlive_jax/assets/small_world", sample={})


def _nvfp4() -> dict:
    return _sample() | dict(sample=dict(quant=dict(policy="nvfp4"), kv="nvfp4"))


def _evaluate() -> dict:
    return dict(evaluate=dict(batch=8, sample=dict(steps=32), fewer_steps=(4, 2)))


def _formats() -> dict:
    weights: dict[str, dict] = {
        "not packed": dict(checkpoint="runs/formats/bf16"),
        "packed afterwards": dict(checkpoint="runs/formats/bf16", quant=dict(policy="nvfp4")),
        "trained in NVFP4": dict(checkpoint="runs/formats/nvfp4", quant=dict(policy="nvfp4")),
    }
    rows = [
        dict(name=f"{name}, {cache} cache", kv=kv, **chosen)
        for name, chosen in weights.items()
        for cache, kv in (("plain", "model"), ("NVFP4", "nvfp4"))
    ]
    few = dict(steps=4, solver="unipc")
    return dict(evaluate=dict(batch=16, sample=few, compared=rows))


def _vae() -> dict:
    phases = [
        dict(steps=1500, batch=48, frames=1),
        dict(steps=100, batch=4, frames=17),
        dict(steps=1300, batch=8, frames=9),
        dict(steps=300, batch=4, frames=21),
    ]
    return dict(
        stage="vae",
        save_dtype="float16",
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
        loop=dict(
            steps=sum(p["steps"] for p in phases), log_every=20, eval_every=200, save_every=400
        ),
        optim=dict(
            name="muon",
            lr=0.02,
            adam_lr=2e-3,
            b1=0.9,
            b2=0.98,
            weight_decay=0.0,
            warmup=50,
            decay=0.6,
            clip=1.0,
        ),
        ema=dict(decay=0.995, start=200),
    )


def _text() -> dict:
    return dict(
        stage="text",
        save_dtype="float16",
        model=dict(vocab_size=64, dim=64, dim_attn=64, ffn_dim=128, heads=4, layers=2),
        batch=128,
        loop=dict(steps=1500, log_every=50, eval_every=500, save_every=500),
        optim=dict(lr=2e-3, b1=0.9, b2=0.99, weight_decay=0.0, warmup=50, decay=0.5, clip=1.0),
        ema=dict(decay=0.99, start=100),
    )


def _ar() -> dict:
    return dict(
        stage="ar",
        save_dtype="float16",
        dtype="bfloat16",
        quant=dict(policy="none"),
        unroll=4,
        gate=0.5,
        sampling=dict(solver="sde"),
        model=dict(
            dim=256,
            ffn_dim=576,
            freq_dim=64,
            text_dim=64,
            text_len=16,
            heads=4,
            layers=4,
            in_channels=16,
            out_channels=16,
        ),
        corpus=dict(videos=2400, chunks=24, shot_chunks=(2, 8)),
        windows=dict(batch=8, targets=7, window=4, global_sinks=1, shot_rope_offset=8, far=320),
        loss=dict(shift=5.0, weighting="uniform", context_noise=0.1, text_dropout=0.1),
        loop=dict(steps=15000, log_every=50, eval_every=2500, save_every=500),
        optim=dict(
            name="muon",
            lr=0.02,
            adam_lr=2e-3,
            b1=0.9,
            b2=0.98,
            weight_decay=0.0,
            warmup=50,
            decay=1.0,
            clip=1.0,
        ),
        ema=dict(decay=0.99, start=200),
    )


def _recycled() -> dict:
    recipe = _ar()
    buffer = dict(by="chunk", rows=recipe["corpus"]["chunks"], slots=16)
    return recipe | dict(recycling=dict(buffer=buffer, start=5000))
