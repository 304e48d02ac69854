"""Texts of users in pictures: no formulas, and in a font that has their characters."""

import io
import logging
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from training.pictures import new_figure, render

DOG = "狗"


def drawn(text):
    figure = new_figure(2, 1)
    figure.text(0.1, 0.4, text)
    return np.asarray(Image.open(io.BytesIO(render(figure))).convert("L")).astype(int)


@pytest.mark.parametrize("name", ["$_$", r"$\frac$", "a$b$c", r"\$"])
def test_dollar_signs_are_drawn_as_they_stand(name):
    assert (drawn(name) < 128).any()
    figure = new_figure(2, 2, layout="constrained")
    figure.subplots().set_xticks([0, 1], [name, "b"])
    assert render(figure)


def test_a_text_between_dollar_signs_is_as_wide_as_with_another_sign():
    def width(text):
        return np.ptp(np.flatnonzero((drawn(text) < 200).any(axis=0)))

    assert abs(width("$dog$") - width("8dog8")) <= 2


@pytest.fixture
def only_dejavu(monkeypatch):
    """Matplotlib's own fonts are the only ones installed."""
    fonts = [f for f in font_manager.fontManager.ttflist if f.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


@pytest.fixture(params=["known", "new"])
def font(tmp_path, only_dejavu, monkeypatch, request):
    """An installed font that has one Chinese character, as a square; Matplotlib may not know it."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(DOG): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "One Square", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(tmp_path / "square.ttf")
    if request.param == "known":
        font_manager.fontManager.addfont(str(tmp_path / "square.ttf"))
    fonts = [str(tmp_path / "square.ttf")] if request.param == "new" else []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)


def test_a_character_is_drawn_with_an_installed_font_that_has_it(font, caplog):
    dark = drawn(DOG) < 128
    assert dark.sum() > 100 and dark[np.ix_(dark.any(1), dark.any(0))].all()  # the square, full
    assert not caplog.text


def test_characters_that_no_font_has_are_said_once(only_dejavu, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("resmlp"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(f"{DOG} and {DOG}")
    assert len(caplog.records) == 1
    assert f"no installed font has {DOG}: drawn as boxes" in caplog.text
