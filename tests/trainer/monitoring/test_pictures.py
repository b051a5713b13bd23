"""Grids of images: captions stay beside their image, in any script and length."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import font_manager

from shardstep.trainer.monitoring import pictures
from shardstep.trainer.monitoring.pictures import draw_grid, drawable, fonts_for, label_texts, undrawable

NAMES = [
    "cat",
    "W" * 60,
    "Labrador_retriever_of_the_golden_kind",
    "挪威森林猫" * 6,
    "القط الصغير الجميل جدا",
    "$x^2$",
    "a\nb",
    "",
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, which are kept open."""
    figures: list[Any] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, picture: figures.append(figure))
    return figures


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 64])
def test_captions_stay_in_their_cells(count: int, pairs: bool, drawn: list[Any], tmp_path: Path) -> None:
    images = [np.zeros((20 + 3 * (place % 4), 24, 3), np.uint8) for place in range(count)]
    captions = [
        "\n".join(f"{drawable(NAMES[(place + line) % len(NAMES)])} 97.1%" for line in range(1 + place % 3))
        for place in range(count)
    ]
    title = "Above: one.\nBelow: another." if pairs else ""
    draw_grid(images, captions, tmp_path / "a.png", below=images if pairs else (), title=title)
    (figure,) = drawn
    (axis,) = figure.axes
    with pictures._without_font_warnings():
        boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
        pixels = [image.get_window_extent() for image in axis.images]
    assert len(pixels) == count * (1 + pairs)
    everything = [*boxes, *pixels]
    assert min(box.x0 for box in everything) >= -1
    assert max(box.x1 for box in everything) <= figure.bbox.width + 1
    assert min(box.y0 for box in everything) >= -1
    assert max(box.y1 for box in everything) <= figure.bbox.height + 1
    # Beside each other at most a pixel in common, by rounding.
    shrunk = [(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1) for box in everything]
    for place, (left, low, right, high) in enumerate(shrunk):
        for other in shrunk[place + 1 :]:
            assert right <= other[0] or other[2] <= left or high <= other[1] or other[3] <= low
    assert min(text.get_fontsize() for text in axis.texts) >= 5


@pytest.mark.parametrize(
    ("shares", "texts"),
    [
        ({"cat": 1.0}, ["cat"]),
        ({"cat": 0.636, "dog": 0.364}, ["cat 63.6%", "dog 36.4%"]),
        ({"dog": 0.02, "cat": 0.98}, ["dog 2.0%", "cat 98.0%"]),
        ({"cat": 0.9999, "dog": 0.0001}, ["cat"]),
        ({"cat": 1.0, "dog": 1.0}, ["cat", "dog"]),
        ({"a, b": 1.0, "c\nd": 0.5}, ["a, b", "c\\nd 50.0%"]),
        ({}, ["none"]),
    ],
)
def test_the_labels_of_an_image(shares: dict[str, float], texts: list[str]) -> None:
    assert label_texts(shares) == texts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cat", "cat"),
        ("i" * 40, "i" * 40),  # 40 x 28 of a letter's 100 are 18.5 average letters of 60
        ("n" * 40, "n" * 22 + "…"),  # 63 each: 22 are 23.1
        ("W" * 40, "W" * 14 + "…"),  # 99 each: 14 are 23.1
        ("a$b", r"a\$b"),
        ("a\tb", r"a\tb"),
        ("قط", "\u200eقط\u200e"),
    ],
)
def test_names_are_shortened_by_their_width(name: str, text: str) -> None:
    assert drawable(name) == text


def test_the_end_of_a_name_can_be_kept() -> None:
    assert drawable("n" * 40 + ".jpg", keep="end") == "…" + "n" * 19 + ".jpg"


def test_characters_without_a_font_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures._more_fonts.cache_clear()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    try:
        assert fonts_for("猫 cat") == ["DejaVu Sans"]
        assert undrawable(["cat", "猫", "кошка"]) == "猫"
    finally:
        pictures._more_fonts.cache_clear()


def test_fonts_of_this_machine_are_used_for_what_matplotlibs_lacks() -> None:
    text = "猫"
    if undrawable([text]):
        pytest.skip("no font with Chinese characters here (apt-get install fonts-wqy-microhei)")
    own, other = fonts_for(text + " cat")
    assert own == "DejaVu Sans"
    path = font_manager.findfont(other, fallback_to_default=False)
    assert ord(text) in pictures._characters(path)
