"""The small world, trained on CPU: VAE, text encoder, then the autoregressive DiT.

    ./launch/small_world.sh    # all stages: `longlive train --config=small_world:STAGE`
    longlive evaluate --config=small_world:evaluate --checkpoint=runs/small_world

Cost: 172 minutes on two EPYC cores with other work (VAE 31, text encoder 1, DiT 125).
Result: VAE 32.4 dB; caption accuracy 93 % at 32 steps and 78 % at 4 (212 held-out shots); cut
timing 100 %; in minute-long videos, last-to-first-quarter caption accuracy 1.03. The shipped DiT
was trained without error recycling (`ar` instead of `recycled`).
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

ARGUMENTS = (
    "sample", "nvfp4", "evaluate", "formats", "few_steps", "vae", "text", "ar", "recycled", "base",
    "ar_from_base", "dmd", "three_step", "two_step", "one_step", "nvfp4_student", "nvfp4_teacher",
    "leak", "standalone",
)  # fmt: skip


def get_config(arg: str = "sample") -> ConfigDict:
    """The config of one command.

    Args:
      arg: `sample` (default) or `nvfp4` (weights and KV cache in NVFP4) to sample from the
        built-in checkpoint; `vae`, `text`, `ar` or `recycled` to train a stage, `base` the
        bidirectional model and `ar_from_base` the AR model that starts from it; `dmd` to distil to
        4 steps, with options of DISTILLED such as `dmd,two_step,nvfp4` (`dmd` may be left out
        with options other than `nvfp4`); `evaluate`, `formats` for
        the checkpoints that launch/formats.sh trains, or `few_steps` for the tables of distilled
        models, whose adapters launch/few_steps.sh trains.
    """
    options = arg.split(",")
    if "dmd" in options or set(options) & (DISTILLED.keys() - {"nvfp4"}):
        return ConfigDict(_dmd(*options))
    uses = {"sample": _sample, "nvfp4": _nvfp4, "evaluate": _evaluate, "formats": _formats}
    uses |= {"few_steps": _few_steps}
    stages = {"vae": _vae, "text": _text, "ar": _ar, "recycled": _recycled}
    stages |= {"base": _base, "ar_from_base": _ar_from_base}
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


def _few_steps() -> dict:
    """Tables of distilled models; `--parts=NAME` selects one of them.

    The adapters and their logs are under config.evaluate.runs.
    """
    packed = dict(quant=dict(policy="nvfp4"))
    rows = [
        *(dict(name=f"AR, {n} steps", steps=n) for n in (32, 8, 4, 2)),
        *(_distilled(f"distilled, {n} steps", f"steps_{n}", n) for n in (4, 3, 2, 1)),
        _distilled("NVFP4 generator, 4 steps", "nvfp4_generator", 4, **packed),
        _distilled("+ real score, 4 steps", "nvfp4_real_score", 4, **packed),
        _distilled("+ fake score, 4 steps", "nvfp4", 4, **packed),
        _distilled("+ KV cache, 4 steps", "nvfp4", 4, **packed, kv="nvfp4"),
        _distilled("+ KV cache, 2 steps", "nvfp4_2", 2, **packed, kv="nvfp4"),
        _distilled("standalone, 4 steps", "standalone", 4),
        _distilled("leaking gradient, 4 steps", "leak", 4),
    ]
    tables = _few_steps_tables([row["name"] for row in rows])
    return dict(
        evaluate=dict(
            batch=16,
            sample=dict(solver="unipc"),
            compared=rows,
            comparison=dict(least_shots=1000, seed=4),
            tables=tables,
            parts=[table["name"] for table in tables],
            runs="runs/few_steps",
        )
    )


def _few_steps_tables(names: list[str]) -> list[dict]:
    """The tables of `few_steps` and their bars, from the names of its cases."""
    ar, four, two = names[0], names[4], names[6]
    accuracy = [_bar(four, ar, 3.0), _bar(two, ar, 8.0)]
    others = [
        _bar(name, ar, kind="no_worse", metric=metric)
        for name in (four, two)
        for metric in ("identity_held", "cut_exact")
    ]
    nvfp4 = [_bar(name, four) for name in names[8:12]] + [_bar(names[12], two)]
    precision = [four, *names[8:12], two, names[12]]
    return [
        _table("few_steps", "AR and distilled", names[:8], accuracy + others),
        _table("precision", "Distilled in bf16 and NVFP4", precision, nvfp4),
        _table("standalone", "Distilled from the AR model or its base", [ar, four, names[13]]),
        _table("leak", "Gradient between chunks, cut off or leaking", [ar, four, names[14]]),
        _table(
            "summary",
            "bf16 and NVFP4 at 4 and 2 steps",
            [ar, four, names[11], two, names[12]],
            accuracy + others + nvfp4[3:],
        ),
    ]


def _distilled(name: str, folder: str, steps: int, **settings: Any) -> dict:
    """A case of `few_steps` with an adapter, and the log of its training."""
    row = dict(name=name, adapter=folder, log=f"{folder}.run", steps=steps, guidance=1.0)
    return row | settings


def _bar(case: str, against: str, points: float = 3.0, **fields: str) -> dict:
    return dict(case=case, against=against, points=points, **fields)


def _table(name: str, title: str, rows: list, bars: Sequence = ()) -> dict:
    """A table whose baseline is its first row."""
    return dict(name=name, title=title, rows=rows, baseline=rows[0], bars=list(bars))


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


DISTILLED: dict[str, dict] = {
    "three_step": dict(rollout=dict(steps=3)),
    "two_step": dict(rollout=dict(steps=2)),
    "one_step": dict(rollout=dict(steps=1)),
    "nvfp4_student": dict(precision=dict(student="nvfp4_frozen")),
    "nvfp4_teacher": dict(precision=dict(student="nvfp4_frozen", teacher="nvfp4_frozen")),
    "nvfp4": dict(precision=dict.fromkeys(("student", "teacher", "critic"), "nvfp4_frozen")),
    "leak": dict(rollout=dict(gradients="reference"), init_adapters=None, loop=dict(steps=1600)),
    # The window is that of the AR model that the adapter is for; the base sees whole clips.
    "standalone": dict(
        checkpoint="runs/few_steps/base",
        as_sampled=False,
        rollout=dict(window=4),
        init_adapters=None,
        loop=dict(steps=1600),
    ),
}
"""Options of `dmd` and what they change; those without `init_adapters` go on from steps_4."""


def _dmd(*options: str) -> dict:
    if unknown := set(options) - {"dmd", *DISTILLED}:
        names = ", ".join(DISTILLED)
        raise ValueError(f"with dmd, choose from {names}, got {', '.join(sorted(unknown))}")
    optim = dict(name="adamw", b1=0.0, b2=0.999, weight_decay=0.01, clip=10.0)
    config = ConfigDict(
        dict(
            stage="small_dmd",
            # Models: student and critic start from the checkpoint, and the teacher is it too.
            checkpoint="small_world",
            teacher=None,
            lora=dict(rank=32),
            init_adapters=None,
            # Precision.
            dtype="bfloat16",
            precision={},
            remat="none",
            unroll=4,
            # Data and losses.
            batch=8,
            shot_chunks=(2, 6),
            rollout=dict(steps=4, shift=5.0, solver="unipc", chunks=6, gradients="detached"),
            scores=dict(
                context="clean", guidance=3.0, shift=5.0, per_chunk=True, shot_rope_offset=8
            ),
            # Optimization.
            generator_every=2,
            optim=optim | dict(lr=3e-4, decay=0.6),
            critic_optim=optim | dict(lr=5e-4, decay=0.4),
            loop=dict(steps=1600, log_every=20, eval_every=400, save_every=200),
            preview=dict(
                prompts=(
                    "a red circle moves right on a white background",
                    "a blue square moves left on a black background",
                ),
            ),
        ),
        convert_dict=True,
    )
    later = [DISTILLED[option] for option in options if option != "dmd"]
    if later:
        config.init_adapters, config.loop.steps = "runs/few_steps/steps_4", 500
    for changes in later:
        _merge(config, changes)
    return config.to_dict()


def _merge(config: ConfigDict, changes: dict) -> None:
    """Sets the nested values of `changes`, also where the config has None or another type."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
            _merge(config[name], value)
        else:
            with config.ignore_type(), config.unlocked():
                config[name] = value


def _base() -> dict:
    """The bidirectional base model, of clips of 7 chunks with one noise level each."""
    recipe = _ar()
    loss = recipe["loss"] | dict(context_noise=0.0, one_level=1.0)
    return recipe | dict(
        stage="base",
        corpus=dict(videos=2400, chunks=24, shot_chunks=(2, 8)),
        windows=dict(batch=16, chunks=7, inside=0.5, shot_rope_offset=8),
        loss=loss,
    )


def _ar_from_base() -> dict:
    """Stage `ar` from the base model in --out, which it replaces there: give it a copy."""
    recipe = _ar()
    return recipe | dict(start="checkpoint", loop=recipe["loop"] | dict(steps=6000))
