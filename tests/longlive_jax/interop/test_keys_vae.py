"""Key tables of the VAE at depths other than the published one."""

import numpy as np
import pytest

from longlive_jax.interop import keys_vae
from longlive_jax.interop.components import COMPONENTS, expected_shapes
from longlive_jax.models.vae import VAEConfig

VAE = COMPONENTS["vae"]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_depth_is_derived_from_the_keys(blocks):
    """A stage's resampler is numbered after its blocks, so a wrong depth would miss keys."""
    config = VAEConfig(
        encoder_dim=4, decoder_dim=4, z_dim=2, dim_mult=(1, 2), res_blocks=blocks,
        temporal_down=(True,), latent_mean=(0.0,) * 2, latent_std=(1.0,) * 2,
    )  # fmt: skip
    expected = expected_shapes(VAE, config)
    leaves = keys_vae.original(blocks, blocks + 1).backward(expected)
    shapes = {
        key: leaf.to_tensor(np.zeros(leaf.shape)).shape for leaf in leaves for key in leaf.keys
    }
    table = keys_vae.original_for(shapes)
    assert {leaf.path for leaf in table.forward(shapes, expected=expected)} == set(expected)
    settings = VAE.settings(expected, {})
    assert settings.res_blocks == blocks and settings.decoder_blocks == blocks + 1
