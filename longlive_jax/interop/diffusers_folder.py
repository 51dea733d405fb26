"""The files beside the weights that make an exported folder a diffusers pipeline.

model_index.json                       class of every component of `WanPipeline`
scheduler/scheduler_config.json        UniPC on flow levels
tokenizer/spiece.model, tokenizer_config.json, special_tokens_map.json
transformer/, vae/, text_encoder/      config.json
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longlive_jax.spec import UserError

__all__ = ["CONFIGS", "TOKENIZER_FILE", "write_pipeline_files"]

TOKENIZER_FILE = "tokenizer/spiece.model"
VERSION = "0.35.0"
"""Version of diffusers whose layout the files have: the first with `expand_timesteps`."""
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": VERSION,
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
NEEDED = {"transformer": "dit", "vae": "vae", "text_encoder": "umt5"}
"""Components of the pipeline, and ours."""


def write_pipeline_files(
    out: Path, names: list[str], *, shift: float, text_len: int, has_tokenizer: bool
) -> None:
    """Writes the index, the scheduler and the tokenizer's settings of a complete checkpoint.

    Args:
      out: folder of the export.
      names: exported components; without all three models, there is no pipeline and no index.
      shift: shift of the noise levels.
      text_len: tokens per prompt.
      has_tokenizer: whether the folder has a SentencePiece model.
    """
    if has_tokenizer:
        _write(out / "tokenizer" / "tokenizer_config.json", _tokenizer(text_len))
        _write(out / "tokenizer" / "special_tokens_map.json", SPECIAL_TOKENS)
    if not has_tokenizer or not set(NEEDED.values()) <= set(names):
        return
    _write(out / "scheduler" / "scheduler_config.json", _scheduler(shift))
    _write(out / "model_index.json", MODEL_INDEX)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _scheduler(shift: float) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": VERSION,
        # UniPC of order 2 on flow levels, and what the class requires besides.
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "disable_corrector": [],
        "dynamic_thresholding_ratio": 0.995,
        "final_sigmas_type": "zero",
        "flow_shift": shift,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_p": None,
        "solver_type": "bh2",
        "steps_offset": 0,
        "thresholding": False,
        "time_shift_type": "exponential",
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
        "use_exponential_sigmas": False,
        "use_flow_sigmas": True,
        "use_karras_sigmas": False,
    }


SPECIAL_TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _tokenizer(text_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "T5Tokenizer",
        **SPECIAL_TOKENS,
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "extra_ids": 0,
        "model_max_length": text_len,
        "sp_model_kwargs": {},
    }


def _dit(config: Mapping[str, Any]) -> dict[str, Any]:
    same = ("ffn_dim", "freq_dim", "text_dim", "in_channels", "out_channels", "eps")
    return {
        "_class_name": "WanTransformer3DModel",
        **{name: config[name] for name in same},
        "attention_head_dim": config["dim"] // config["heads"],
        "num_attention_heads": config["heads"],
        "num_layers": config["layers"],
        # Diffusers' class has no such field; only `longlive convert` reads it.
        **({} if config["text_len"] == 512 else {"text_len": config["text_len"]}),
        "patch_size": [1, 2, 2],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


def _vae(config: Mapping[str, Any]) -> dict[str, Any]:
    blocks, decoder = config["res_blocks"], config.get("decoder_res_blocks")
    if config.get("decoder_mult") is not None or decoder not in (None, blocks + 1):
        raise UserError(
            "VAE: diffusers cannot describe a decoder that does not mirror the encoder; export it "
            "with --naming=original"
        )
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config["encoder_dim"],
        "decoder_base_dim": config["decoder_dim"],
        "dim_mult": config["dim_mult"],
        "in_channels": 12,
        "out_channels": 12,
        "is_residual": True,
        "latents_mean": config["latent_mean"],
        "latents_std": config["latent_std"],
        "num_res_blocks": blocks,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "temperal_downsample": config["temporal_down"],
        "z_dim": config["z_dim"],
    }


def _umt5(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config["vocab_size"],
        "d_model": config["dim"],
        "d_kv": config["dim_attn"] // config["heads"],
        "d_ff": config["ffn_dim"],
        "num_heads": config["heads"],
        "num_layers": config["layers"],
        "relative_attention_num_buckets": config["buckets"],
        "relative_attention_max_distance": config["max_distance"],
        "layer_norm_epsilon": config["eps"],
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


CONFIGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "dit": _dit,
    "vae": _vae,
    "umt5": _umt5,
}
"""config.json of a component, from its settings in our manifest."""
