"""Data sets: what training and evaluation read."""
