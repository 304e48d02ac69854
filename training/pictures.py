"""Pictures: Matplotlib figures whose texts are drawn as they stand, in a font that has them."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import suppress

from cli.errors import UserError

_log = logging.getLogger("resmlp")


def new_figure(width: float, height: float, **options):
    """A Matplotlib figure (inches) outside of pyplot; UserError if Matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need `pip install matplotlib`") from None
    return Figure(figsize=(width, height), **options)


def new_grid(count: int, columns: int, width: float, height: float, **options):
    """A figure of at least ``count`` cells (inches), and their axes, without lines."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows, **options)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.axis("off")
    return figure, cells


def render(figure, format: str = "png") -> bytes:
    """The file of a figure. A dollar sign in a text is one, not the beginning of a formula.

    Characters that Matplotlib's own font lacks are drawn with installed fonts, or logged once.
    """
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.get_xticklabels(), axes.get_yticklabels()  # now their texts are there
    texts = figure.findobj(Text)
    families, unknown = _fonts_for({char for text in texts for char in text.get_text()})
    for text in texts:
        text.set_parse_math(False)
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])
    if unknown:
        shown = "".join(sorted(unknown))[:20]
        _log.warning(f"no installed font has {shown}: drawn as boxes (fonts-noto-cjk has many)")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said above
        figure.savefig(buffer, format=format, dpi=110)
    return buffer.getvalue()


def _fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """Families that have what Matplotlib's own font lacks, and the characters that none has."""
    from matplotlib import font_manager

    def covered(path: str) -> set[str]:
        try:
            charmap = font_manager.get_font(path).get_charmap()
        except Exception:  # a font that Matplotlib cannot load: coloured pictures, say
            return set()
        return {char for char in missing if ord(char) in charmap}

    missing = {char for char in characters if char.isprintable()}
    missing -= covered(font_manager.findfont(font_manager.FontProperties()))
    families: list[str] = []
    if not missing:
        return families, missing
    manager, known = font_manager.fontManager, {}
    for path in {*font_manager.findSystemFonts()} - {font.fname for font in manager.ttflist}:
        with suppress(Exception):  # it has come since Matplotlib's list of fonts was made
            manager.addfont(path)
    for font in manager.ttflist:
        if "resort" not in font.name.lower():  # these have a box for everything
            known[font.name] = known.get(font.name) or covered(font.fname)
    while missing & set().union(*known.values()):
        best = max(known, key=lambda name: len(known[name] & missing))
        families.append(best)
        missing -= known[best]
    return families, missing
