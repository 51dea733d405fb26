"""The VAE's encoder: pixels to unnormalised latent moments."""

from itertools import pairwise

import jax
from flax import nnx

from longlive_jax.models.vae.config import VAEConfig
from longlive_jax.models.vae.layers import CausalConv3d, Middle, ResidualBlock, RMSNorm
from longlive_jax.models.vae.resample import Downsample, average_down, patchify
from longlive_jax.typing import Array, Float


class DownStage(nnx.Module):
    """Residual blocks, then 2x downsampling, with a channel-averaging shortcut from the input."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        cfg: VAEConfig,
        *,
        down: bool,
        temporal: bool,
        rngs: nnx.Rngs,
    ):
        self.outputs, self.time, self.space = outputs, 2 if temporal else 1, 2 if down else 1
        widths = [inputs] + [outputs] * cfg.res_blocks
        self.resnets = nnx.List(ResidualBlock(a, b, cfg, rngs=rngs) for a, b in pairwise(widths))
        self.down = Downsample(outputs, cfg, temporal=temporal, rngs=rngs) if down else None

    def __call__(self, x: Float[Array, "b f h w c"], tails):
        shortcut = average_down(x, self.outputs, time=self.time, space=self.space)
        block_tails, down_tail = tails or ((None,) * len(self.resnets), None)
        new_tails = []
        for block, tail in zip(self.resnets, block_tails, strict=True):
            x, tail = block(x, tail)
            new_tails.append(tail)
        if self.down is not None:
            x, down_tail = self.down(x, down_tail)
        return x + shortcut, (tuple(new_tails), down_tail)


class Encoder(nnx.Module):
    """Encodes `[b, f, h, w, 3]` in [-1, 1] to moments `[b, g, h/16, w/16, 2z]`.

    Takes and returns the tails of all its layers as one pytree; they are None at a clip's start.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths, stages = cfg.encoder_widths, len(cfg.dim_mult)
        temporal = (*cfg.temporal_down, False)
        self.conv_in = CausalConv3d(12, widths[0], cfg, rngs=rngs)
        self.stages = nnx.List(
            DownStage(
                widths[s], widths[s + 1], cfg, down=s < stages - 1, temporal=temporal[s], rngs=rngs
            )
            for s in range(stages)
        )
        self.mid = Middle(widths[-1], cfg, rngs=rngs)
        self.norm_out = RMSNorm(widths[-1], cfg)
        self.conv_out = CausalConv3d(widths[-1], 2 * cfg.z_dim, cfg, rngs=rngs)

    def __call__(self, video: Float[Array, "b f h w 3"], tails):
        tail_in, stage_tails, mid_tails, tail_out = tails or (
            (None, (None,) * len(self.stages), None, None)
        )
        x, tail_in = self.conv_in(patchify(video), tail_in)
        new_tails = []
        for stage, tail in zip(self.stages, stage_tails, strict=True):
            x, tail = stage(x, tail)
            new_tails.append(tail)
        x, mid_tails = self.mid(x, mid_tails)
        x, tail_out = self.conv_out(jax.nn.silu(self.norm_out(x)), tail_out)
        return x, (tail_in, tuple(new_tails), mid_tails, tail_out)
