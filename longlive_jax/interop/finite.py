"""Refuses weights that are not finite, which would turn every video into noise or black."""

import jax.numpy as jnp
import numpy as np

from longlive_jax.spec import UserError

__all__ = ["check_finite"]

BLOCK = 1 << 22
"""Values that are tested at once, so that the test needs little memory."""


def check_finite(value: np.ndarray, name: str, where: str) -> np.ndarray:
    """`value` itself. Raises UserError, naming the array, if it has NaN or infinite values.

    Args:
      value: array of any dtype.
      name: its name, for the message.
      where: its file or folder.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    flat = value.reshape(-1)
    blocks = (flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK))
    bad = sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)
    if bad:
        raise UserError(
            f"{where}: {name} has {bad:,} of {flat.size:,} values that are NaN or infinite; copy "
            "or download the file again, or use an earlier checkpoint of the run"
        )
    return value
