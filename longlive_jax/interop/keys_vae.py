"""Key tables of the causal VAE: Wan's own naming, and diffusers' (also used by LightVAE)."""

from collections.abc import Iterable, Mapping

from longlive_jax.interop.keytable import KeyRule, KeyTable
from longlive_jax.io.arrays import Shape, TreePath

__all__ = ["DIFFUSERS", "ORIGINAL", "config_of", "original", "original_for"]

_SIDE = "{side:encoder|decoder}"


def _conv(key: str, path: str, transform: str) -> list[KeyRule]:
    return [
        KeyRule(f"{key}.weight", f"{path}.kernel", transform),
        KeyRule(f"{key}.bias", f"{path}.bias"),
    ]


def _resnet(key: str, path: str, names: Mapping[str, str]) -> list[KeyRule]:
    """Rules of a residual block; `names` maps our layer names to those of the file."""
    rules = [
        KeyRule(f"{key}.{names[norm]}.gamma", f"{path}.{norm}.gamma", "gamma3d")
        for norm in ("norm1", "norm2")
    ]
    for conv in ("conv1", "conv2"):
        rules += _conv(f"{key}.{names[conv]}", f"{path}.{conv}", "conv3d")
    return rules + _conv(f"{key}.{names['shortcut']}", f"{path}.shortcut", "pointwise3d")


def _attention(key: str, path: str) -> list[KeyRule]:
    return [
        KeyRule(f"{key}.norm.gamma", f"{path}.norm.gamma", "gamma2d"),
        *_conv(f"{key}.to_qkv", f"{path}.qkv", "pointwise2d"),
        *_conv(f"{key}.proj", f"{path}.proj", "pointwise2d"),
    ]


def _resample(key: str, path: str) -> list[KeyRule]:
    return [
        *_conv(f"{key}.resample.1", f"{path}.conv", "conv2d"),
        *_conv(f"{key}.time_conv", f"{path}.time_conv", "time_conv"),
    ]


def original(encoder_blocks: int = 2, decoder_blocks: int = 3) -> KeyTable:
    """Key table in Wan's naming.

    Wan numbers the residual blocks and the resampler of a stage in one list, so the resampler's
    index is the number of blocks, `encoder_blocks` or `decoder_blocks`.
    """
    names = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "shortcut": "shortcut",
    }
    rules = [
        *_conv(f"{_SIDE}.conv1", "{side}.conv_in", "conv3d"),
        *_conv(f"{_SIDE}.head.2", "{side}.conv_out", "conv3d"),
        KeyRule(f"{_SIDE}.head.0.gamma", "{side}.norm_out.gamma", "gamma3d"),
        *_attention(f"{_SIDE}.middle.1", "{side}.mid.attn"),
        *_resnet(f"{_SIDE}.middle.0", "{side}.mid.res0", names),
        *_resnet(f"{_SIDE}.middle.2", "{side}.mid.res1", names),
        *_conv("conv1", "quant_conv", "pointwise3d"),
        *_conv("conv2", "post_quant_conv", "pointwise3d"),
    ]
    for side, word, ours, blocks in (
        ("encoder", "downsamples", "down", encoder_blocks),
        ("decoder", "upsamples", "up", decoder_blocks),
    ):
        stage, path = f"{side}.{word}.{{s}}.{word}", f"{side}.stages.{{s}}"
        rules += _resnet(f"{stage}.{{r}}", f"{path}.resnets.{{r}}", names)
        rules += _resample(f"{stage}.{blocks}", f"{path}.{ours}")
    return KeyTable("VAE, Wan naming", tuple(rules))


def original_for(keys: Iterable[str]) -> KeyTable:
    """Key table in Wan's naming, with the numbers of blocks read from a file's keys."""
    blocks = {"downsamples": 0, "upsamples": 0}
    for key in keys:
        # encoder.downsamples.{stage}.downsamples.{block}.residual...
        words = key.split(".")
        if len(words) > 5 and words[1] in blocks and words[5] == "residual" and words[4].isdigit():
            blocks[words[1]] = max(blocks[words[1]], int(words[4]) + 1)
    return original(blocks["downsamples"] or 2, blocks["upsamples"] or 3)


def _diffusers() -> KeyTable:
    names = {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "conv_shortcut",
    }
    rules = [
        *_conv(f"{_SIDE}.{{m:conv_in|conv_out}}", "{side}.{m}", "conv3d"),
        KeyRule(f"{_SIDE}.norm_out.gamma", "{side}.norm_out.gamma", "gamma3d"),
        *_attention(f"{_SIDE}.mid_block.attentions.0", "{side}.mid.attn"),
        *_resnet(f"{_SIDE}.mid_block.resnets.{{r:0|1}}", "{side}.mid.res{r}", names),
        *_conv("{m:quant_conv|post_quant_conv}", "{m}", "pointwise3d"),
    ]
    for side, word, sampler, ours in (
        ("encoder", "down_blocks", "downsampler", "down"),
        ("decoder", "up_blocks", "upsampler", "up"),
    ):
        stage, path = f"{side}.{word}.{{s}}", f"{side}.stages.{{s}}"
        rules += _resnet(f"{stage}.resnets.{{r}}", f"{path}.resnets.{{r}}", names)
        rules += _resample(f"{stage}.{sampler}", f"{path}.{ours}")
    # Projection heads from LightVAE's training, which the decoder does not use.
    ignore = ("dynamic_feature_projection_heads.{rest:.*}",)
    return KeyTable("VAE, diffusers naming", tuple(rules), ignore)


ORIGINAL = original()
DIFFUSERS = _diffusers()


def config_of(shapes: Mapping[TreePath, Shape]) -> dict:
    """The fields of `VAEConfig` that follow from the shapes, by path in the parameter tree.

    The latent statistics are not among them. Raises KeyError with the path of an array that is
    needed and missing.
    """
    stages = 1 + max((int(p[2]) for p in shapes if p[:2] == ("encoder", "stages")), default=3)
    down = [_stage(shapes, "encoder", s) for s in range(stages)]
    up = [_stage(shapes, "decoder", s) for s in range(stages)][::-1]
    encoder_dim = shapes["encoder", "conv_in", "bias"][0]
    decoder_dim = up[0][0]
    mult = tuple(width // encoder_dim for width, _ in down)
    decoder_mult = tuple(width // decoder_dim for width, _ in up)
    temporal_down = tuple(
        ("encoder", "stages", str(s), "down", "time_conv", "kernel") in shapes
        for s in range(stages - 1)
    )
    return {
        "encoder_dim": encoder_dim,
        "decoder_dim": decoder_dim,
        "z_dim": shapes["post_quant_conv", "bias"][0],
        "dim_mult": mult,
        "decoder_mult": None if decoder_mult == mult else decoder_mult,
        "res_blocks": down[0][1],
        "decoder_res_blocks": None if up[0][1] == down[0][1] + 1 else up[0][1],
        "temporal_down": temporal_down,
    }


def _stage(shapes: Mapping[TreePath, Shape], side: str, stage: int) -> tuple[int, int]:
    """Width and number of residual blocks of a stage."""
    prefix = (side, "stages", str(stage), "resnets")
    indices = {int(path[4]) for path in shapes if path[:4] == prefix}
    return shapes[(*prefix, "0", "conv1", "bias")][0], 1 + max(indices, default=0)
