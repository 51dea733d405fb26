"""Array-in, array-out operations with one reference each; imports nothing of longlive_jax."""
