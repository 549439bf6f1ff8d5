"""Figures are small enough for a page, and the first one is the README's."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGEST = 200 * 1024  # Bytes.


def test_no_figure_is_larger_than_a_page_bears():
    figures = [
        path
        for room in ("benchmarks", "docs", "examples")
        for path in (ROOT / room).rglob("*.png")
        if "_build" not in path.parts
    ]
    assert len(figures) >= 10
    assert not [path.name for path in figures if path.stat().st_size > LARGEST]


def test_the_first_figure_is_that_of_the_rescue():
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text()
        first = text.index("examples/rescue.png")
        assert ".png" not in text[:first]
