"""Names of what a layer's attention saves for its gradient, for rematerialization policies."""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

SAVED = ("attention_out", "attention_lse")
"""With these two saved, a rematerialized layer does not run its attention again."""


def name_saved(
    out: Float[Array, "..."], lse: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Marks output and log-sum-exp in a forward rule, so that `SAVED` selects them."""
    return checkpoint_name(out, SAVED[0]), checkpoint_name(lse, SAVED[1])
