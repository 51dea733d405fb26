"""Small JSON files that lie next to weights."""

import json
from pathlib import Path
from typing import Any

from longlive_jax.spec import UserError

__all__ = ["read_json_object"]


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a UTF-8 file, with or without a byte-order mark; None without the file.

    Raises UserError if the file is damaged or has something else than an object.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again or remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
