"""Command line of longlive-jax; the only package that parses flags and prints."""
