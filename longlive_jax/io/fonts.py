"""Fonts for captions in any script: one that has the characters, or escapes in their place."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

__all__ = ["caption_font", "wrap"]

TOKENS = re.compile(r"\s+|[\u1100-\u11ff\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef]|\S")
"""Places where a line may break: at spaces, and beside characters of scripts without spaces."""


def caption_font(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str, str]:
    """A font for a caption.

    DejaVu Sans, which comes with matplotlib, has Latin, Greek, Cyrillic, Arabic and more. For other
    scripts the installed fonts are searched.

    Args:
      text: the caption.
      size: height of the font in pixels.

    Returns:
      The font, the text with every character that the font lacks written as `\\u4e2d`, and those
      characters, which are empty if the text is readable.
    """
    wanted = frozenset(c for c in text if not c.isspace())
    best = _best_font(wanted)
    missing = wanted - _characters(best)
    escaped = "".join(_escape(c) if c in missing else c for c in text)
    return ImageFont.truetype(best, size), escaped, "".join(sorted(missing))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The lines of a text of at most `width` pixels; words that are longer are broken."""
    lines = [""]
    for word in re.findall(r"\s+|\S+", text):
        if font.getlength(lines[-1] + word.rstrip()) <= width:
            lines[-1] += word if lines[-1] or not word.isspace() else ""
        elif font.getlength(word) <= width and not _breaks_anywhere(word):
            lines.append(word.lstrip())
        else:
            for token in TOKENS.findall(word):
                if font.getlength(lines[-1] + token) > width and lines[-1]:
                    lines.append("")
                lines[-1] += token
    return [line.rstrip() for line in lines if line.strip()] or [""]


def _breaks_anywhere(word: str) -> bool:
    """Whether a word is of a script without spaces between words."""
    return any(len(token) == 1 and ord(token) >= 0x1100 for token in TOKENS.findall(word))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@functools.lru_cache(maxsize=256)
def _best_font(wanted: frozenset[str]) -> str:
    """The font with the most of the characters: the default one, unless another has more."""
    best = _default_font()
    missing = len(wanted - _characters(best))
    for path in _installed_fonts() if missing else ():
        lacks = len(wanted - _characters(path))
        if lacks < missing:
            best, missing = path, lacks
        if not missing:
            break
    return best


def _default_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _installed_fonts() -> tuple[str, ...]:
    """Scalable fonts of the system, upright regular ones first."""
    from matplotlib.font_manager import findSystemFonts

    def is_styled(path: str) -> tuple[bool, str]:
        styles = ("bold", "italic", "oblique", "mono", "light", "thin", "black")
        return any(style in Path(path).stem.lower() for style in styles), path

    return tuple(sorted(_scalable(findSystemFonts()), key=is_styled))


def _scalable(paths: list[str]) -> Iterator[str]:
    """The fonts that Pillow draws at any size, which excludes bitmaps such as colour emoji."""
    for path in paths:
        try:
            ImageFont.truetype(path, 15)
        except OSError:
            continue
        yield path


@functools.lru_cache(maxsize=256)
def _characters(path: str) -> frozenset[str]:
    """The characters that a font has glyphs for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(path).get_charmap()))
