"""Hyper-parameters and latent statistics of the causal 3-D VAE of Wan 2.2."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

# fmt: off
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Widths and strides; the defaults are Wan2.2-TI2V-5B's VAE (704,688,668 parameters).

    A clip `[b, 1 + 4(f-1), 16h, 16w, 3]` is encoded to latents `[b, f, h, w, z_dim]`: a 2x2
    patchify and three spatial downsamplings by 2, two of which also halve the frame rate.

    Attributes:
      encoder_dim: base channel width of the encoder.
      decoder_dim: base channel width of the decoder.
      z_dim: number of latent channels.
      dim_mult: multipliers of the base width, one per stage, finest stage first.
      res_blocks: residual blocks per encoder stage.
      decoder_res_blocks: residual blocks per decoder stage; None means `res_blocks` + 1, as in Wan.
      decoder_mult: width multipliers of the decoder, finest stage first; None means `dim_mult`, as
        in Wan.
      temporal_down: whether each stage but the last also halves the frame rate.
      latent_mean: mean of each latent channel, subtracted when encoding.
      latent_std: standard deviation of each latent channel, divided by when encoding.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    encoder_dim: int = 160
    decoder_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    decoder_res_blocks: int | None = None
    decoder_mult: tuple[int, ...] | None = None
    temporal_down: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN22_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN22_LATENT_STD
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if len(self.temporal_down) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_down has {len(self.temporal_down)} entries for {len(self.dim_mult)} "
                "stages; give one for every stage but the last"
            )
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(
                f"latent_mean and latent_std have {len(self.latent_mean)} and "
                f"{len(self.latent_std)} entries for z_dim {self.z_dim}; give one of each per "
                "latent channel"
            )

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channel widths: the input of the first encoder stage, then the output of every stage."""
        return tuple(self.encoder_dim * m for m in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channel widths: the input of the first decoder stage, then the output of every stage."""
        mult = self.dim_mult if self.decoder_mult is None else self.decoder_mult
        return tuple(self.decoder_dim * m for m in (mult[-1], *mult[::-1]))

    @property
    def decoder_blocks(self) -> int:
        """Residual blocks per decoder stage."""
        return self.res_blocks + 1 if self.decoder_res_blocks is None else self.decoder_res_blocks

    @property
    def temporal_stride(self) -> int:
        """Raw frames per latent after the first one."""
        return 2 ** sum(self.temporal_down)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent along height and width (patchify included)."""
        return 2 ** len(self.dim_mult)

    def num_raw_frames(self, latents: int) -> int:
        """Number of raw frames in a clip of `latents` latents; the first latent is one frame."""
        return 1 + self.temporal_stride * (latents - 1)
