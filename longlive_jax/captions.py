"""Text that training captions and sampling scripts have in common."""

CUT_PREFIX = "The scene transitions. "
"""Opens the prompt of the first chunk after a cut, as in the reference's training captions."""
