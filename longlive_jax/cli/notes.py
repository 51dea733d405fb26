"""Notes for the user on standard error."""

import sys
from collections.abc import Iterable


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note on a line of its own."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
