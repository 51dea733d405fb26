"""The text encoder."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden, load
from conformance_cases.rows import CLOSE, EXACT, Case, compared


def umt5_encoder(golden: Golden) -> Sequence[Case]:
    """The features of the encoder; at padding they must be exactly zero."""
    sizes = golden.meta["config"]
    hints = {"d_model": sizes["dim"], "d_ff": sizes["dim_ffn"]}
    hints |= {"num_heads": sizes["num_heads"], "num_layers": sizes["num_layers"]}
    model = load("umt5", golden.under("w/"), hints)
    mask = golden["mask"] > 0

    @jax.jit
    def encode(params, ids, mask):
        return model.around(params)(ids, mask)

    def features():
        return np.asarray(encode(model.params, jnp.asarray(golden["ids"]), jnp.asarray(mask)))

    return [
        compared("y", CLOSE, features, golden["y"]),
        Case("padding", EXACT, lambda: float(np.abs(features()[~mask]).max(initial=0.0))),
    ]
