"""The VAE's decoder: latents to pixels."""

from itertools import pairwise

import jax
from flax import nnx

from longlive_jax.models.vae.config import VAEConfig
from longlive_jax.models.vae.layers import CausalConv3d, Middle, ResidualBlock, RMSNorm
from longlive_jax.models.vae.resample import Upsample, duplicate_up, unpatchify
from longlive_jax.typing import Array, Float


class UpStage(nnx.Module):
    """Residual blocks, then 2x upsampling with a channel-duplicating shortcut from the input."""

    def __init__(
        self, inputs: int, outputs: int, cfg: VAEConfig, *, up: bool, temporal: bool, rngs: nnx.Rngs
    ):
        self.outputs, self.time = outputs, 2 if temporal else 1
        widths = [inputs] + [outputs] * cfg.decoder_blocks
        self.resnets = nnx.List(ResidualBlock(a, b, cfg, rngs=rngs) for a, b in pairwise(widths))
        self.up = Upsample(outputs, cfg, temporal=temporal, rngs=rngs) if up else None

    def __call__(self, x: Float[Array, "b f h w c"], tails):
        first, stage_input = tails is None, x
        block_tails, up_tail = tails or ((None,) * len(self.resnets), None)
        new_tails = []
        for block, tail in zip(self.resnets, block_tails, strict=True):
            x, tail = block(x, tail)
            new_tails.append(tail)
        if self.up is not None:
            x, up_tail = self.up(x, up_tail)
            x = x + duplicate_up(stage_input, self.outputs, time=self.time, space=2, first=first)
        return x, (tuple(new_tails), up_tail)


class Decoder(nnx.Module):
    """Decodes `[b, f, h, w, z]` to pixels `[b, g, 16h, 16w, 3]`, not clipped.

    Takes and returns the tails of all its layers as one pytree; they are None at a clip's start.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths, stages = cfg.decoder_widths, len(cfg.dim_mult)
        temporal = (*cfg.temporal_down[::-1], False)
        self.conv_in = CausalConv3d(cfg.z_dim, widths[0], cfg, rngs=rngs)
        self.mid = Middle(widths[0], cfg, rngs=rngs)
        self.stages = nnx.List(
            UpStage(
                widths[s], widths[s + 1], cfg, up=s < stages - 1, temporal=temporal[s], rngs=rngs
            )
            for s in range(stages)
        )
        self.norm_out = RMSNorm(widths[-1], cfg)
        self.conv_out = CausalConv3d(widths[-1], 12, cfg, rngs=rngs, scale=0.3)

    def __call__(self, z: Float[Array, "b f h w z"], tails):
        tail_in, mid_tails, stage_tails, tail_out = tails or (
            (None, None, (None,) * len(self.stages), None)
        )
        x, tail_in = self.conv_in(z, tail_in)
        x, mid_tails = self.mid(x, mid_tails)
        new_tails = []
        for stage, tail in zip(self.stages, stage_tails, strict=True):
            x, tail = stage(x, tail)
            new_tails.append(tail)
        x, tail_out = self.conv_out(jax.nn.silu(self.norm_out(x)), tail_out)
        return unpatchify(x), (tail_in, mid_tails, tuple(new_tails), tail_out)
