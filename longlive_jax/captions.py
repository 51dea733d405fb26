"""Text shared by training captions and sampling scripts."""

CUT_PREFIX = "The scene transitions. "
"""Prefix of the prompt of the first chunk after a cut, as in the reference's training captions."""
