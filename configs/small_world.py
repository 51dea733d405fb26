"""The small world, trained on CPU: VAE, text encoder, then the autoregressive DiT.

    ./launch/small_world.sh    # all stages: `longlive train --config=small_world:STAGE`
    longlive evaluate --config=small_world:evaluate --checkpoint=runs/small_world

Cost: 172 minutes on two EPYC cores with other work (VAE 31, text encoder 1, DiT 125).
Result: VAE 32.4 dB; caption accuracy 93 % at 32 steps and 78 % at 4 (212 held-out shots); cut
timing 100 %; in minute-long videos, last-to-first-quarter caption accuracy 1.03. The shipped DiT
was trained without error recycling (`ar` instead of `recycled`).
"""

from ml_collections import ConfigDict

ARGUMENTS = ("sample", "nvfp4", "evaluate", "formats", "vae", "text", "ar", "recycled")


def get_config(arg: str = "sample") -> ConfigDict:
    """The config of one command.

    Args:
      arg: `sample` (default) or `nvfp4` (weights and KV cache in NVFP4) to sample from the
        built-in checkpoint; `vae`, `text`, `ar` or `recycled` to train a stage; `evaluate`, or
        `formats` for the checkpoints that launch/formats.sh trains.
    """
    uses = {"sample": _sample, "nvfp4": _nvfp4, "evaluate": _evaluate, "formats": _formats}
    stages = {"vae": _vae, "text": _text, "ar": _ar, "recycled": _recycled}
    if "," in arg:
        raise ValueError(f"choose one of {', '.join(ARGUMENTS)}, got {arg!r}")
    return ConfigDict((uses | stages)[arg or "sample"]())


def _sample() -> dict:
    return dict(checkpoint="small_world", sample={})


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
        dict(name=f"{name}, {cache} cache", kv=kv, **settings)
        for name, settings in weights.items()
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
        # Model.
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
        # Images first, then clips.
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
        # Model and sampler.
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
        # Data and loss.
        corpus=dict(videos=2400, chunks=24, shot_chunks=(2, 8)),
        windows=dict(batch=8, targets=7, window=4, global_sinks=1, shot_rope_offset=8, far=320),
        loss=dict(shift=5.0, weighting="uniform", context_noise=0.1, text_dropout=0.1),
        # Optimization.
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
