"""The answer of a comparison as a page that needs no network, and as Markdown. Text in, text out."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --line: #ddd; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a0a0a0; --line: #3a3a3a; --paper: #16181b; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } .wide svg { max-width: 100%; min-width: 30rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.left td, .left th { text-align: left; white-space: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem 1rem;
      border: 1px solid var(--line); border-radius: 6px; }
.note, figcaption { color: var(--soft); font-size: .9rem; } figure { margin: 1rem 0; }
@media print { body { margin: 0; max-width: none; } figure, table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Answer:
    """What a comparison has found, ready to be shown.

    Attributes:
        title, command: what was compared.
        facts: of budget, data, hardware and versions, by what they are.
        columns, rows: the table.
        search: the table of the search for rates; empty without one.
        words: which differences are real.
        notes: how to read the table, and which runs did not end well.
        plots: file names, with what each shows.
    """

    title: str
    command: str
    facts: dict[str, str]
    columns: list[str]
    rows: list[list[str]]
    search: list[list[str]]
    words: list[str]
    notes: list[str]
    plots: dict[str, str]


def page(answer: Answer, plots: Mapping[str, str]) -> str:
    """One HTML page, everything inside it.

    Args:
        answer: of the comparison.
        plots: SVG by name.
    """
    parts = [
        f"<h1>{_text(answer.title)}</h1>",
        "<h2>Which differences are real</h2>",
        *(f"<p>{_text(sentence)}</p>" for sentence in answer.words),
        "<h2>Results</h2>",
        _table(answer.columns, answer.rows),
        *(f'<p class="note">{_text(note)}</p>' for note in answer.notes),
        *(
            f'<figure><div class="wide">{plots[name]}</div><figcaption>{_text(shows)}</figcaption></figure>'
            for name, shows in answer.plots.items()
        ),
    ]
    if answer.search:
        parts += ["<h2>Sensitivity to the rate</h2>", _table(_SEARCH_COLUMNS, answer.search, "left")]
    parts += [
        "<h2>How it was made</h2>",
        f"<pre>{_text(answer.command)}</pre>",
        _table(["", ""], [[key, value] for key, value in answer.facts.items()], "left"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(answer.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def document(answer: Answer, pictures: Mapping[str, str]) -> str:
    """The same as Markdown, for docs/.

    Args:
        answer: of the comparison.
        pictures: file names by plot, beside the document.
    """
    parts = [
        f"# {answer.title}",
        f"Written by this command, not by hand:\n\n```\n{answer.command}\n```",
        _markdown_table(["", ""], [[key, value] for key, value in answer.facts.items()]),
        "## Which differences are real",
        "\n".join(f"- {sentence}" for sentence in answer.words),
        "## Results",
        _markdown_table(answer.columns, answer.rows),
        "\n".join(f"- {note}" for note in answer.notes),
        *(f"![{shows}]({pictures[name]})" for name, shows in answer.plots.items()),
    ]
    if answer.search:
        parts += ["## Sensitivity to the rate", _markdown_table(_SEARCH_COLUMNS, answer.search)]
    return "\n\n".join(parts) + "\n"


_SEARCH_COLUMNS = ["variant", "rate: training loss", "the worse neighbour's loss"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f'<div class="wide"><table class="{style}">{shown}<tbody>{body}</tbody></table></div>'


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(text: str) -> str:
    return html.escape(text)
