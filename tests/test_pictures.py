"""Texts of users in pictures: no formulas, and in a font that has their characters."""

import io
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from training.pictures import new_figure, render

DOG, CIRCLED = "狗", "Ⓐ"  # the latter is in a font that comes with Matplotlib


def drawn(text, **options):
    figure = new_figure(2, 1)
    figure.text(0.1, 0.4, text, **options)
    return np.asarray(Image.open(io.BytesIO(render(figure))).convert("L")).astype(int)


def width(text):
    return np.ptp(np.flatnonzero((drawn(text) < 200).any(axis=0)))


@pytest.mark.parametrize("name", ["$dog$", r"$\frac$", "a$b$c"])
def test_dollar_signs_are_drawn_as_they_stand(name):
    assert abs(width(name) - width(name.replace("$", "8"))) <= 2
    figure = new_figure(2, 2, layout="constrained")
    figure.subplots().set_xticks([0, 1], [name, "b"])
    assert render(figure)


@pytest.fixture
def only_dejavu(monkeypatch):
    """Matplotlib's main fonts are the only ones installed."""
    fonts = [f for f in font_manager.fontManager.ttflist if f.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


@pytest.mark.parametrize("known", [True, False])
def test_a_character_is_drawn_with_an_installed_font_that_has_it(
    only_dejavu, caplog, monkeypatch, known
):
    """Matplotlib may not know it yet."""
    boxes, path = drawn(CIRCLED), f"{matplotlib.get_data_path()}/fonts/ttf/STIXGeneral.ttf"
    caplog.clear()
    if known:
        font_manager.fontManager.addfont(path)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [path] if not known else [])
    found = drawn(CIRCLED)
    assert (found == drawn(CIRCLED, font=Path(path))).all() and (found != boxes).any()
    assert not caplog.text


def test_characters_that_no_font_has_are_said_once(only_dejavu, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(f"{DOG} and {DOG}")
    assert len(caplog.records) == 1
    assert f"no installed font has {DOG}: drawn as boxes" in caplog.text
