"""HTML elements from Python values, everything escaped, and a page of them that is complete in one file."""

import base64
from html import escape
from importlib import resources

import numpy as np

from shardstep.configs.text import printable
from shardstep.datasets.decode import encode_png

# The browser fetches nothing and runs nothing, whatever a class or a run is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None
"""Html, other text to be escaped, or nothing."""


def tag(name: str, *children: Child, **attributes: str | float | None) -> Html:
    """Make an element, of HTML or SVG.

    Args:
        children: in their order; None is left out.
        attributes: class_ is class, data_x is data-x; None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "br", "meta"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Join elements and text."""
    return Html(
        "".join(child if isinstance(child, Html) else _escaped(child) for child in children if child is not None)
    )


def table(head: list[Child], rows: list[list[Child]]) -> Html:
    """Make a table that scrolls where it is too wide; the first column has the names of the rows."""
    written_head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))) if head else None
    written_rows = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows
    )
    return tag("div", tag("table", written_head, tag("tbody", *written_rows)), class_="wide", tabindex="0")


def picture(pixels: np.ndarray, description: str, class_: str | None = None) -> Html:
    """Make an image that is part of the page, from uint8 pixels (height, width, 1 or 3)."""
    data = base64.b64encode(encode_png(pixels)).decode()
    height, width = pixels.shape[:2]
    return tag("img", src=f"data:image/png;base64,{data}", alt=description, width=width, height=height, class_=class_)


def page(title: str, *body: Child) -> str:
    """Make a complete document."""
    style = resources.files("shardstep.trainer.analysis.pages").joinpath("style.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *body)), lang='en')}\n"


def _escaped(text: str) -> str:
    return escape(printable(text, keep="\n"))


def _text(value: str | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
