"""Array-in, array-out operations, each with a reference implementation.

Nothing here imports longlive_jax.
"""
