"""Captions are shown in a font that has their characters, or with escapes."""

import pytest

from longlive_jax.io import fonts
from longlive_jax.io.fonts import caption_font, wrap

CHINESE = "\u7ea2\u8272\u7684\u5706"


@pytest.mark.parametrize(
    "text",
    ["a red circle", "caf\u00e9 \u00dcn\u00ef", "\u0394\u03c9", "\u041a\u0440", "\u062f\u0627"],
)
def test_latin_greek_cyrillic_and_arabic_are_always_readable(text, monkeypatch):
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: ())
    _, escaped, missing = caption_font(text, 15)
    assert escaped == text and not missing


def test_what_no_font_has_is_escaped(monkeypatch):
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: ())
    fonts._best_font.cache_clear()
    _, escaped, missing = caption_font("a \u7ea2 \U0001f3ac", 15)
    assert escaped == r"a \u7ea2 \U0001f3ac" and set(missing) == {"\u7ea2", "\U0001f3ac"}


def test_an_installed_font_with_the_characters_is_preferred(monkeypatch):
    default = fonts._default_font()
    other = default.replace("DejaVuSans.ttf", "STIXGeneral.ttf")
    characters = {default: frozenset("ab"), other: frozenset("ab" + CHINESE)}
    monkeypatch.setattr(fonts, "_characters", characters.__getitem__)
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: (other,))
    fonts._best_font.cache_clear()
    font, escaped, missing = caption_font("ab " + CHINESE, 15)
    assert font.path == other and escaped.endswith(CHINESE) and not missing
    fonts._best_font.cache_clear()


@pytest.mark.parametrize("text", ["a long caption of words " * 9, CHINESE * 40, "x" * 300, "a"])
def test_lines_fit_and_lose_nothing(text):
    font, _, _ = caption_font("a", 15)
    lines = wrap(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert wrap("two words", font, 200) == ["two words"]
